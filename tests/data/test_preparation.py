"""Raw official files -> tensorflow-datasets: exact, in order, and only from the right bytes."""

import gzip
import hashlib
import io
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from rbf_jax.data import Split, is_prepared, load, preparation, prepare
from rbf_jax.data.official import OFFICIAL


def assert_holds(name, arrays, data_dir):
    for split, expected in arrays.items():
        found = load(name, split, data_dir)
        np.testing.assert_array_equal(found.images, expected.images)
        np.testing.assert_array_equal(found.labels, expected.labels)


def tar_gz(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for file in sorted(files, reverse=True):  # not in the official order, as in the real archive
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{file}")
            member.size = len(files[file])
            tar.addfile(member, io.BytesIO(files[file]))
    return buffer.getvalue()


def test_round_trip_is_exact_and_in_order(name, arrays, raw_dir, tmp_path):
    data_dir = tmp_path / "data"
    assert not is_prepared(name, data_dir)
    assert prepare(name, raw_dir, data_dir)
    assert is_prepared(name, data_dir)
    assert_holds(name, arrays, data_dir)


def test_prepared_data_are_left_alone(name, raw_dir, tmp_path):
    prepare(name, raw_dir, tmp_path / "data")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "data" / name).rglob("*")}
    assert not prepare(name, tmp_path / "no such folder", tmp_path / "data")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "data" / name).rglob("*")} == before


def test_nothing_is_printed_about_a_download(name, raw_dir, tmp_path, capsys):
    prepare(name, raw_dir, tmp_path / "data")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("place", ["", "{name}", "cifar-10-batches-bin", "{name}/cifar-10-batches-bin"])
def test_raw_files_are_found(name, arrays, files, tmp_path, place):
    folder = tmp_path / "raw" / place.format(name=name)
    folder.mkdir(parents=True)
    for file, data in files.items():
        (folder / file).write_bytes(data)
    read = preparation._read_raw(name, tmp_path / "raw", None)
    for split, expected in arrays.items():
        np.testing.assert_array_equal(read[split].images, expected.images)
        np.testing.assert_array_equal(read[split].labels, expected.labels)


@pytest.mark.parametrize("name", ["cifar10"])
@pytest.mark.parametrize("place", ["", "cifar10"])
def test_the_archive_is_read(name, arrays, files, tmp_path, place):
    folder = tmp_path / "raw" / place
    folder.mkdir(parents=True)
    (folder / "cifar-10-binary.tar.gz").write_bytes(tar_gz(files))
    read = preparation._read_raw(name, tmp_path / "raw", None)
    np.testing.assert_array_equal(read["train"].images, arrays["train"].images)
    np.testing.assert_array_equal(read["test"].labels, arrays["test"].labels)


@pytest.mark.parametrize("name", ["cifar10"])
def test_a_bad_archive_is_refused(name, files, tmp_path):
    archive = tmp_path / "cifar-10-binary.tar.gz"
    whole = tar_gz(files)
    archive.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=rf"{archive} is not a whole tar.gz file.*make data .*RAW="):
        prepare(name, tmp_path, tmp_path / "data")
    archive.write_bytes(tar_gz({file: files[file] for file in files if file != "data_batch_3.bin"}))
    with pytest.raises(ValueError, match=r"has no data_batch_3.bin: it is not the official archive"):
        prepare(name, tmp_path, tmp_path / "data")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("harm", ["changed", "truncated"])
def test_wrong_bytes_are_refused(name, files, raw_dir, tmp_path, harm):
    file = next(iter(files))
    wrong = files[file][:-1] if harm == "truncated" else files[file][:-1] + bytes([files[file][-1] ^ 1])
    path = next(raw_dir.glob(f"{file}*"))
    path.write_bytes(gzip.compress(wrong) if path.suffix == ".gz" else wrong)
    with pytest.raises(ValueError, match="is not the official") as caught:
        prepare(name, raw_dir, tmp_path / "data")
    message = str(caught.value)
    hashes = [hashlib.sha256(data).hexdigest() for data in (wrong, files[file])]
    for part in (
        str(path),
        f"{len(wrong)} uncompressed bytes",
        *hashes,
        f"make data DATA_DIR={tmp_path / 'data'} RAW=",
    ):
        assert part in message
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("name", ["mnist"])
def test_a_cut_gzip_is_refused(name, raw_dir, tmp_path):
    path = raw_dir / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=rf"{path} is not a whole gzip file"):
        prepare(name, raw_dir, tmp_path / "data")


def test_missing_files_are_named(name, files, raw_dir, tmp_path):
    file = list(files)[-1]
    next(raw_dir.glob(f"{file}*")).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{raw_dir} has no {file} \({name}\).*make data .*RAW="):
        prepare(name, raw_dir, tmp_path / "data")


def test_a_killed_preparation_leaves_nothing_that_looks_prepared(name, arrays, raw_dir, tmp_path):
    data_dir = tmp_path / "data"
    script = """
import os, signal, sys
import numpy as np
from rbf_jax.data import Split, preparation
from rbf_jax.data.official import OFFICIAL

name, data_dir = sys.argv[1:]

def images():
    for i in range(20):
        if i == 10:
            os.kill(os.getpid(), signal.SIGKILL)
        yield np.zeros(OFFICIAL[name].shape, np.uint8)

preparation._read_raw = lambda *_: {"train": Split(images(), range(20))}
preparation.prepare(name, "unused", data_dir)
"""
    killed = subprocess.run([sys.executable, "-c", script, name, str(data_dir)], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [path.name.split(".")[0] for path in (data_dir / name).iterdir()] == ["incomplete"]
    assert not is_prepared(name, data_dir)
    assert prepare(name, raw_dir, data_dir)
    assert_holds(name, arrays, data_dir)


def test_a_race_is_won_by_the_first(name, arrays, raw_dir, tmp_path, monkeypatch):
    data_dir = tmp_path / "data"

    class Slow(list):
        def __iter__(self):
            monkeypatch.undo()  # the patched reading, and the patched table with it
            monkeypatch.setitem(OFFICIAL, name, tiny)
            assert prepare(name, raw_dir, data_dir)  # another process, while this one writes
            return super().__iter__()

    tiny = OFFICIAL[name]
    slow = {split: Split(data.images, data.labels) for split, data in arrays.items()}
    slow["train"] = Split(Slow(arrays["train"].images), arrays["train"].labels)  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr(preparation, "_read_raw", lambda *_: slow)
    assert not prepare(name, raw_dir, data_dir)
    assert_holds(name, arrays, data_dir)
    assert len(list((data_dir / name).iterdir())) == 1


@pytest.mark.full
@pytest.mark.skipif("RBF_JAX_RAW" not in os.environ, reason="RBF_JAX_RAW names no folder with the official raw files")
@pytest.mark.parametrize(
    ("name", "first"), [("mnist", [7, 2, 1, 0, 4, 1, 4, 9]), ("cifar10", [3, 8, 8, 0, 6, 6, 1, 6])]
)
def test_the_official_files(name, first, tmp_path):
    raw = preparation._read_raw(name, Path(os.environ["RBF_JAX_RAW"]), None)
    assert prepare(name, os.environ["RBF_JAX_RAW"], tmp_path)
    assert load(name, "test[:8]", tmp_path).labels.tolist() == first
    assert_holds(name, raw, tmp_path)
