"""Timing several versions fairly: in turn within one process, so that a drift of the machine meets them all alike."""

import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.provenance import ROOT, provenance
from rbf_jax.files import replacing

RESULTS = ROOT / "results" / "benchmarks"


def interleaved(functions: dict[str, Callable[[], Any]], repeats: int = 7) -> dict[str, float]:
    """Median seconds of each function, called in turn; the first call of each (compilation) is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            began = time.perf_counter()
            jax.block_until_ready(function())
            if repeat:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


class Turns(NamedTuple):
    """What several libraries took.

    Attributes:
        seconds: of each turn, by library.
        rates: of the matmul, GFLOP/s, in each round.
        returned: what each library's last call returned, where that is a number.
    """

    seconds: dict[str, list[float]]
    rates: list[float]
    returned: dict[str, float]


def _work(pipe: Any, make: Callable[..., Callable[[], object]], arguments: tuple[Any, ...], settle: bool) -> None:
    call = make(*arguments)
    call()
    while pipe.recv():
        if settle:
            call()  # not counted: after the others' turn the caches, and the pages of the allocator, are cold
        began = time.perf_counter()
        returned = call()
        took = time.perf_counter() - began
        pipe.send((took, returned if isinstance(returned, float) else None))


def taking_turns(
    make: Callable[..., Callable[[], object]], names: Sequence[str], *arguments: Any, rounds: int, settle: bool = True
) -> Turns:
    """Times several libraries, each in a process of its own, so that no library's threads disturb the other's.

    Args:
        make: (name, *arguments) -> what is timed, made in the process; a function of a module.
        names: of the libraries.
        arguments: further ones.
        rounds: turns of each that are counted.
        settle: whether a turn begins with a call that is not counted, and one more turn comes first; calls of many
            seconds need neither.
    """
    context = multiprocessing.get_context("spawn")
    pipes, workers = {}, []
    for name in names:
        pipes[name], theirs = context.Pipe()
        workers.append(context.Process(target=_work, args=(theirs, make, (name, *arguments), settle)))
        workers[-1].start()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    rates, returned = [], {}
    for _ in range(rounds + settle):
        for name, pipe in pipes.items():
            pipe.send(True)
            took, returned[name] = pipe.recv()
            seconds[name].append(took)
        rates.append(matmul_rate())
    for pipe, worker in zip(pipes.values(), workers, strict=True):
        pipe.send(False)
        worker.join()
    return Turns({name: values[settle:] for name, values in seconds.items()}, rates[settle:], returned)


def matmul_rate(size: int = 2048) -> float:
    """The practical ceiling: GFLOP/s of a float32 matmul, the best of several."""
    a = jnp.ones((size, size))
    multiply = jax.jit(lambda a: jnp.matmul(a, a, precision=jax.lax.Precision.HIGHEST))
    jax.block_until_ready(multiply(a))
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        jax.block_until_ready(multiply(a))
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best / 1e9


def write(name: str, figures: dict[str, Any]) -> None:
    """Writes figures with machine and commit to ``results/benchmarks/NAME.json`` and prints them."""
    record = provenance() | {"matmul GFLOP/s": round(matmul_rate())} | figures
    text = json.dumps(record, indent=1)
    with replacing(RESULTS / f"{name}.json") as temporary:
        temporary.write_text(text + "\n")
    print(f"{name}: {text}")
