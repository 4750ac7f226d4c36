"""Files that are never half-written, and damaged ones that are refused with a way out."""

import contextlib
import errno
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether it lies in an object store."""
    return "://" in os.fspath(path)


def as_path(path: str | os.PathLike[str]) -> Path:
    """A path on this machine, with ``~``, or one in an object store: ``gs://``, ``s3://``, ``az://``.

    These need the store's client: ``pip install rbf_jax[cloud]`` brings that of gs.

    Raises:
        ValueError: a store's address that was a `pathlib.Path`, which makes one slash of two.
    """
    if not is_remote(path):
        if re.match(r"[a-z0-9]{2,}:/[^/]", os.fspath(path)):
            raise ValueError(f"an address in an object store must be a string, gs://..., got {path!r}")
        return Path(path).expanduser()
    from etils import epath

    remote: Any = epath.Path(path)  # has the methods of a Path
    return remote


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a temporary name beside ``path`` to write to; renames it to ``path`` at the end, removes it on an error.

    A killed process may leave a temporary file; its name begins with a dot. An object store shows a file when it is
    whole: there the temporary one lies on this machine.

    Raises:
        OSError: the file cannot be written: no room, no right; what was there before stays.
    """
    path = as_path(path)
    if is_remote(path):
        with tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder) / path.name
            yield temporary
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(temporary.read_bytes())
            except Exception as error:  # of any class: each store's client has its own
                raise OSError(f"cannot write {path} ({type(error).__name__}: {error})") from error
        return
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=f".tmp{path.suffix}")
        os.close(handle)
        temporary = Path(name)
        yield temporary
        # Renamed before its content is on the disk, a power cut would leave an empty file under the name.
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        # mkstemp makes files that only their owner may read; give the mode that an ordinary open() would have.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(path)
    except OSError as error:
        if error.errno is None:  # not the system's
            raise
        reason = f"cannot write {path} ({error.strerror}): make room there or name another folder"
        raise OSError(error.errno, f"{reason}. What was there before stays") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def copy_file(source: Path, target: str | os.PathLike[str]) -> None:
    """Copies a file, whole or not at all; one that is missing is named itself, not where it was to go."""
    content = source.read_bytes()
    with replacing(target) as temporary:
        temporary.write_bytes(content)


class _EnoughError(Exception):
    """Ends an attempt that is not to be completed."""


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raises OSError where the file could not be written now: before the work, not after it. Makes its folder.

    In an object store, where writing is the only way to find out, it leaves an empty file beside it for a moment.
    """
    path = as_path(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, f"cannot write {path} (it is a folder): name a file")
    if is_remote(path):
        probe = path.parent / f".{path.name}.tmp"
        with replacing(probe) as temporary:
            temporary.touch()
        probe.unlink()
        return
    with contextlib.suppress(_EnoughError), replacing(path):
        raise _EnoughError


def append_line(path: str | os.PathLike[str], line: str) -> None:
    """Adds a line to a text file, which is made where it is missing; ends first a line that was cut short.

    Raises:
        OSError: the file cannot be written.
    """
    path = as_path(path)
    if is_remote(path):  # whose files cannot grow
        before = path.read_text() if path.exists() else ""
        with replacing(path) as temporary:
            temporary.write_text(before + line + "\n")
        return
    try:
        with path.open("ab+") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - 1, 0))
            begin = b"" if file.read() in (b"", b"\n") else b"\n"
            file.write(begin + line.encode() + b"\n")
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path} ({error.strerror}): make room there") from error


def read_json(path: str | os.PathLike[str], way_out: str) -> Any:
    """Reads a JSON file.

    Args:
        path: the file.
        way_out: what to do where it is damaged; ends the message.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged.
    """
    try:
        return json.loads(as_path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}). {way_out}") from error


def check_facts(described: str, found: Mapping[str, Any], wanted: Mapping[str, Any], way_out: str) -> None:
    """Raises ValueError where what a file says of itself is not what is asked for.

    Args:
        described: the file and what it then is, as the message says it: "run/a.npz is of another evaluation".
        found: what the file says.
        wanted: what it must say; it may say more.
        way_out: what to do about it; ends the message.
    """
    for name, value in wanted.items():
        if found.get(name) != value:
            raise ValueError(f"{described}: its {name} is {found.get(name)!r}, not {value!r}. {way_out}")


def write_npz(path: str | os.PathLike[str], arrays: Mapping[str, Any], *, compressed: bool = False) -> None:
    """Writes arrays as ``.npz``, whole or not at all, under any name: to one that ends otherwise NumPy adds ``.npz``.

    Raises:
        OSError: the file cannot be written; what was there before stays.
    """
    with replacing(path) as temporary, temporary.open("wb") as file:
        (np.savez_compressed if compressed else np.savez)(file, **arrays)


def read_npz(path: str | os.PathLike[str], kind: str, way_out: str) -> dict[str, np.ndarray]:
    """Reads all arrays of an ``.npz`` file.

    Args:
        path: the file.
        kind: what the file should be, as the message says it: "a filter file".
        way_out: what to do where it is damaged; ends the message.

    Raises:
        FileNotFoundError: no such file.
        PermissionError, ConnectionError, TimeoutError: it cannot be read now.
        ValueError: the file is damaged or something else.
    """
    try:
        # Opened here: NumPy leaves a file that it cannot read open.
        with as_path(path).open("rb") as file, np.load(file, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (FileNotFoundError, PermissionError, ConnectionError, TimeoutError):
        raise
    except Exception as error:  # zipfile, zlib, tokenize and NumPy itself: damaged bytes raise a dozen classes
        raise ValueError(f"{path} is not {kind}, or damaged: {error}. {way_out}") from error
