"""Files are replaced whole or not at all."""

import os
from pathlib import Path

import pytest

from rbf_jax.files import replacing


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
