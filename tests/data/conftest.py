"""Tiny stand-ins for the official files: same formats, few images, hashes of their own in a patched table."""

import gzip
import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest

from rbf_jax.data import Split
from rbf_jax.data.official import OFFICIAL

TINY_SIZES = {"train": 20, "test": 12}


def raw_files(name: str, arrays: dict[str, Split]) -> dict[str, bytes]:
    """Returns the raw files, uncompressed, that hold `arrays` in the official format."""
    files = {}
    for split, (images, labels) in arrays.items():
        names = OFFICIAL[name].files[split]
        bytes_of_labels = labels.astype(np.uint8)
        if name == "mnist":
            files[names[0]] = struct.pack(">4I", 2051, len(images), 28, 28) + images.tobytes()
            files[names[1]] = struct.pack(">2I", 2049, len(labels)) + bytes_of_labels.tobytes()
            continue
        for file, rows in zip(names, np.array_split(np.arange(len(images)), len(names)), strict=True):
            records = [bytes([bytes_of_labels[i]]) + images[i].transpose(2, 0, 1).tobytes() for i in rows]
            files[file] = b"".join(records)
    return files


@pytest.fixture(params=["mnist", "cifar10"])
def name(request) -> str:
    return request.param


@pytest.fixture
def arrays(name) -> dict[str, Split]:
    rng = np.random.default_rng(7)
    shape = OFFICIAL[name].shape
    return {
        split: Split(rng.integers(0, 256, (n, *shape), np.uint8), rng.integers(0, 10, n, np.int32))
        for split, n in TINY_SIZES.items()
    }


@pytest.fixture
def files(name, arrays, monkeypatch) -> dict[str, bytes]:
    """The raw files of `arrays`; while the test runs they are the official ones."""
    content = raw_files(name, arrays)
    tiny = OFFICIAL[name]._replace(
        sizes=TINY_SIZES,
        sha256={file: hashlib.sha256(data).hexdigest() for file, data in content.items()},
        first_test_labels=tuple(arrays["test"].labels[:8].tolist()),
    )
    monkeypatch.setitem(OFFICIAL, name, tiny)
    return content


@pytest.fixture
def raw_dir(files, tmp_path) -> Path:
    """A folder with the raw files, MNIST's gzipped, directly in it."""
    folder = tmp_path / "raw"
    folder.mkdir()
    for file, data in files.items():
        if file.endswith(".bin"):
            (folder / file).write_bytes(data)
        else:
            (folder / f"{file}.gz").write_bytes(gzip.compress(data))
    return folder
