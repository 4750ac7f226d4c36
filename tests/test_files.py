"""Files are replaced whole or not at all."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from rbf_jax.files import as_path, check_writable, read_npz, replacing


@pytest.fixture
def path(tmp_path) -> Path:
    path = tmp_path / "result.json"
    path.write_text("old")
    return path


@pytest.mark.parametrize("kind", [str, Path])
def test_the_new_content_appears_at_the_end(path, kind):
    with replacing(kind(path)) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert (temporary.parent, temporary.suffix) == (path.parent, ".json")
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def test_folders_are_made(tmp_path):
    path = tmp_path / "a" / "b" / "result.json"
    with replacing(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_and_nothing_else(path, error):
    def interrupted():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise error("in the middle")

    with pytest.raises(error, match="in the middle"):
        interrupted()
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_an_error_where_nothing_was_leaves_nothing(tmp_path):
    def interrupted():
        with replacing(tmp_path / "result.json") as temporary:
            temporary.write_text("half")
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_a_rename_that_fails_leaves_no_temporary_file(tmp_path):
    (tmp_path / "result.json").mkdir()  # a folder cannot be replaced by a file
    with pytest.raises(OSError, match="result"), replacing(tmp_path / "result.json") as temporary:
        temporary.write_text("new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600), (0o002, 0o664)])
def test_the_mode_is_that_of_an_ordinary_file(path, mask, mode):
    before = os.umask(mask)
    try:
        with replacing(path) as temporary:
            temporary.write_text("new")
        assert os.umask(mask) == mask  # it was looked at, not changed
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == mode


def test_two_writers_do_not_mix(path):
    with replacing(path) as one, replacing(path) as other:
        assert one != other
        one.write_text("the first to start")
        other.write_text("the first to end")
    assert path.read_text() == "the first to start"
    assert list(path.parent.iterdir()) == [path]


def test_a_full_disk_names_the_file(path):
    def full():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match=r"cannot write .*No space left on device.*What was there before stays") as error:
        full()
    assert error.value.errno == errno.ENOSPC
    assert str(path) in str(error.value)
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_the_content_is_on_the_disk_before_the_name(path, monkeypatch):
    """Else a power cut could leave an empty file under it."""
    synced, original = [], os.fsync

    def fsync(handle):
        synced.append((Path(f"/proc/self/fd/{handle}").resolve().read_text(), path.read_text()))
        original(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    with replacing(path) as temporary:
        temporary.write_text("new")
    assert synced == [("new", "old")]


def test_a_folder_is_no_file_to_write(tmp_path):
    with pytest.raises(IsADirectoryError, match=f"cannot write {tmp_path} .*: name a file"):
        check_writable(tmp_path)
    check_writable(tmp_path / "deep" / "a.npz")
    assert [entry.name for entry in tmp_path.rglob("*")] == ["deep"]


def test_an_address_that_lost_a_slash_is_refused():
    """As a pathlib.Path it would be a folder ``gs:`` of this machine."""
    with pytest.raises(ValueError, match="must be a string, gs://"):
        as_path(Path("gs://bucket/run"))
    assert as_path("a:/b") == Path("a:/b")


def test_read_npz_does_not_call_a_file_damaged_that_cannot_be_read_now(tmp_path, monkeypatch):
    np.savez(tmp_path / "x.npz", a=np.ones(2))
    for error in (PermissionError, ConnectionError, TimeoutError):

        def refuse(*_, error=error, **__):
            raise error("not now")

        monkeypatch.setattr(np, "load", refuse)
        with pytest.raises(error, match="not now"):
            read_npz(tmp_path / "x.npz", "a ledger", "Remove it")


def test_read_npz_reads_all_arrays(tmp_path):
    arrays = {"a": np.arange(6.0).reshape(2, 3), "text": np.array("{}"), "none": np.zeros((0, 4), bool)}
    np.savez_compressed(tmp_path / "x.npz", **arrays)
    found = read_npz(tmp_path / "x.npz", "a file", "Do this")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize("compressed", [False, True])
def test_read_npz_refuses_damage_with_the_name_and_a_way_out(tmp_path, rng, compressed):
    path = tmp_path / "x.npz"
    (np.savez_compressed if compressed else np.savez)(path, a=rng.normal(size=50), b=np.arange(5))
    whole, refused = path.read_bytes(), 0
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged if rng.uniform() < 0.9 else damaged[: rng.integers(len(whole))])
        try:
            read_npz(path, "a ledger", "Remove it")
        except ValueError as error:
            message = str(error)
            assert message.startswith(f"{path} is not a ledger, or damaged: ")
            assert message.endswith("Remove it")
            refused += 1
    assert refused > 200
    with pytest.raises(FileNotFoundError):
        read_npz(tmp_path / "none.npz", "a ledger", "Remove it")
