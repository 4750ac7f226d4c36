"""Signals that wait for a checkpoint."""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from rbf_jax import parallel


@contextlib.contextmanager
def delayed_signals(wanted: bool) -> Iterator[Callable[[], bool]]:
    """Holds SIGTERM and SIGINT back; yields a function that says whether one came; delivers it at the end.

    What one of several processes gets takes effect in all.
    """
    came: list[int] = []
    # Only the main thread may change handlers; elsewhere signals do what they did.
    if not wanted or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    # What is ignored stays so (SIGINT of a command in a script's background); a handler in C (None) cannot be put back.
    before = {number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, lambda number, frame: came.append(number))

    def interrupted() -> bool:
        number = parallel.largest(came[0] if came else 0)
        if number and not came:
            came.append(number)
        return number > 0

    try:
        yield interrupted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(signal.Signals(came[0]))
            sys.exit(128 + came[0])  # a handler that only took note of it must not take this for a finished training
