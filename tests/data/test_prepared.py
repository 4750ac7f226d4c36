"""Reading prepared data: what it gives, and what it refuses."""

import ast
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

import rbf_jax.data
from rbf_jax.data import as_float, is_prepared, load, prepare, prepared
from rbf_jax.data.official import OFFICIAL


@pytest.fixture
def data_dir(name, raw_dir, tmp_path) -> Path:
    prepare(name, raw_dir, tmp_path / "data")
    return tmp_path / "data"


def folder_of(name, data_dir) -> Path:
    (folder,) = (data_dir / name).iterdir()
    return folder


def record_file(name, data_dir, split) -> Path:
    (path,) = folder_of(name, data_dir).glob(f"{name}-{split}.array_record*")
    return path


def assert_refused(name, data_dir, match):
    """Asserts that reading and preparing both refuse, with the reason, the folder and the command."""
    for refused in (lambda: load(name, "test", data_dir), lambda: prepare(name, data_dir, data_dir)):
        with pytest.raises(ValueError, match=match) as caught:
            refused()
        assert f"{data_dir}/{name}/" in str(caught.value)
        assert f"`make data DATA_DIR={data_dir} RAW=<folder with the official files>`" in str(caught.value)


def test_shapes_and_types(name, data_dir):
    images, labels = load(name, "train", data_dir)
    assert images.shape == (20, *OFFICIAL[name].shape)
    assert (images.dtype, labels.dtype, labels.shape) == (np.uint8, np.int32, (20,))
    assert images.flags.c_contiguous
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize("batch", [1, 7, 20, 1000])
@pytest.mark.parametrize("name", ["mnist"])
def test_the_batch_of_reading_changes_nothing(name, data_dir, arrays, monkeypatch, batch):
    monkeypatch.setattr(prepared, "_BATCH", batch)
    np.testing.assert_array_equal(load(name, "train", data_dir).images, arrays["train"].images)


@pytest.mark.parametrize("name", ["mnist"])
def test_slices(name, data_dir, arrays):
    for split, rows in (("train[:5]", slice(5)), ("train[-3:]", slice(-3, None)), ("train[25%:50%]", slice(5, 10))):
        found = load(name, split, data_dir)
        np.testing.assert_array_equal(found.images, arrays["train"].images[rows])
        np.testing.assert_array_equal(found.labels, arrays["train"].labels[rows])


@pytest.mark.parametrize("name", ["mnist"])
def test_unknown_names_are_refused(name, data_dir):
    with pytest.raises(ValueError, match="unknown data set 'mnits'; known: mnist, cifar10"):
        load("mnits", "train", data_dir)
    with pytest.raises(ValueError, match="Unknown split 'validation'"):
        load(name, "validation", data_dir)


def test_unprepared_data_are_refused_with_the_command(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"{name} is not prepared.*`make data DATA_DIR={tmp_path}`.*RAW="):
        load(name, "test", tmp_path)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", ["mnist"])
def test_missing_and_cut_record_files_are_refused(name, data_dir, split):
    path = record_file(name, data_dir, split)
    os.truncate(path, path.stat().st_size - 10)
    assert_refused(name, data_dir, rf"is damaged in {split}")
    path.unlink()
    assert_refused(name, data_dir, rf"is incomplete: {path} is missing")


@pytest.mark.parametrize("name", ["mnist"])
def test_damaged_records_are_refused(name, data_dir):
    path = record_file(name, data_dir, "test")
    content = bytearray(path.read_bytes())
    content[1000] ^= 255
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"is damaged in test"):
        load(name, "test", data_dir)


@pytest.mark.parametrize("name", ["mnist"])
def test_half_prepared_data_are_refused(name, data_dir):
    info = folder_of(name, data_dir) / "dataset_info.json"
    content = info.read_text()
    info.write_text(content[:100])
    assert_refused(name, data_dir, "has a damaged dataset_info.json")
    info.unlink()
    assert_refused(name, data_dir, "is incomplete: it has no dataset_info.json")


@pytest.mark.parametrize("name", ["mnist"])
def test_tfrecord_is_refused(name, data_dir):
    info = folder_of(name, data_dir) / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    assert_refused(name, data_dir, "is in the format tfrecord, which only TensorFlow reads")


def test_other_examples_are_refused(name, data_dir, monkeypatch):
    tiny = OFFICIAL[name]
    monkeypatch.setitem(OFFICIAL, name, tiny._replace(first_test_labels=(0, 1, 2, 3, 4, 5, 6, 7)))
    assert_refused(name, data_dir, "is not in the official order")
    monkeypatch.setitem(OFFICIAL, name, tiny._replace(sizes={"train": 60_000, "test": 10_000}))
    assert_refused(name, data_dir, r"has \{'train': 20, 'test': 12\} examples, not")


@pytest.mark.parametrize("name", ["mnist"])
def test_a_moved_data_dir_is_read(name, data_dir, arrays, tmp_path):
    shutil.move(data_dir, tmp_path / "moved")
    assert is_prepared(name, tmp_path / "moved")
    np.testing.assert_array_equal(load(name, "test", tmp_path / "moved").images, arrays["test"].images)


def test_the_home_folder_is_the_one_that_is_meant(name, raw_dir, arrays, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(raw_dir)
    assert prepare(name, raw_dir, "~/my data")
    assert (tmp_path / "my data" / name).is_dir()
    assert not (raw_dir / "~").exists()
    assert is_prepared(name, "~/my data")
    np.testing.assert_array_equal(load(name, "test", "~/my data").images, arrays["test"].images)
    with pytest.raises(FileNotFoundError, match="`make data DATA_DIR='~/no data'`"):
        load(name, "test", "~/no data")


def test_as_float():
    levels = np.arange(256, dtype=np.uint8).reshape(2, 8, 8, 2)
    scaled = as_float(levels)
    assert (scaled.dtype, scaled.shape) == (np.float32, levels.shape)
    assert (scaled.min(), scaled.max()) == (0, 1)
    np.testing.assert_array_equal(scaled, levels.astype(np.float32) / np.float32(255))
    np.testing.assert_array_equal(np.rint(scaled * 255).astype(np.uint8), levels)
    with pytest.raises(ValueError, match="not float32"):
        as_float(scaled)


def test_importing_the_package_is_light():
    allowed = {"numpy", "rbf_jax", *sys.stdlib_module_names}
    for path in Path(rbf_jax.data.__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text()).body:  # what is outside functions
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert {name.split(".")[0] for name in names} <= allowed, path
            own = ("rbf_jax.data", "rbf_jax.files")  # the latter imports NumPy alone, too
            assert all(not name.startswith("rbf_jax.") or name.startswith(own) for name in names), path
