"""Run directories and data in an object store: gs:// paths, over a store in memory."""

from collections import deque

import fsspec
import jax
import ml_collections
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from helpers import random_filters

from experiments import rundir
from rbf_jax import data, evaluate, files, rbf, train
from rbf_jax.data import prepared
from rbf_jax.evaluate import Outcomes, Parts

FOLDER = "gs://bucket/runs/one"


class Store(MemoryFileSystem):
    protocol = ("gs", "gcs")
    store = {}  # noqa: RUF012  (the memory file system keeps it on the class)
    pseudo_dirs = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + path.removeprefix("gs://").strip("/")


@pytest.fixture(autouse=True)
def store():
    fsspec.register_implementation("gcs", Store, clobber=True)
    Store.store.clear()


def test_paths_of_this_machine_are_ordinary_ones(tmp_path):
    assert files.as_path(str(tmp_path)) == tmp_path
    assert not str(files.as_path("~/x")).startswith("~")
    assert str(files.as_path(FOLDER) / "a.npz") == f"{FOLDER}/a.npz"


def test_a_file_appears_when_it_is_whole():
    path = files.as_path(FOLDER) / "deep" / "a.txt"
    with files.replacing(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"

    def fail():
        with files.replacing(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "whole"


def test_a_store_that_cannot_be_written_is_known_before_the_work(monkeypatch):
    path = files.as_path("gs://bucket/checked/a.npz")
    files.check_writable(path)
    assert not path.exists()
    assert list(path.parent.iterdir()) == []

    def refuse(*_, **__):
        raise RuntimeError("no such bucket")  # a client's own class

    monkeypatch.setattr(Store, "_open", refuse)
    with pytest.raises(OSError, match=r"cannot write gs://bucket/checked/\.a\.npz\.tmp \(RuntimeError: no such bucket"):
        files.check_writable(path)


def test_a_run_directory():
    config = ml_collections.ConfigDict({"models": ("cnn",), "seed": 0})
    run = rundir.open_run(files.as_path(FOLDER), config)
    for number in range(3):
        run.log({"number": number})
    assert [record["number"] for record in rundir.open_run(files.as_path(FOLDER), config).records()] == [0, 1, 2]
    config.seed = 1
    with pytest.raises(ValueError, match=r"gs://bucket/runs/one/config\.json has config\.seed = 0, not 1"):
        rundir.open_run(files.as_path(FOLDER), config)


def test_filters_weights_and_ledgers(rng):
    folder = files.as_path(FOLDER)
    filters = random_filters(rng, 4)
    rbf.save(folder / "filters.npz", filters)
    np.testing.assert_array_equal(rbf.load(folder / "filters.npz").means, filters.means)
    train.save_weights(folder / "models" / "a.npz", {"params": {"w": np.ones(3, np.float32)}}, {"seed": 1})
    assert train.load_weights(folder / "models" / "a.npz")[1] == {"seed": 1}
    outcomes = Outcomes(np.arange(5), np.ones((1, 5), bool), rng.uniform(size=(2, 5)) < 0.5, {"model": "a"})
    evaluate.save_outcomes(folder / "ledger" / "a.npz", outcomes)
    (path,) = folder.glob("ledger/[!.]*.npz")
    np.testing.assert_array_equal(evaluate.load_outcomes(path).scoring, outcomes.scoring)


# No list: a model is also what the globals that it reads hold, and one that changes would be another model.
TRACES = deque()


def traced(key, images):
    TRACES.append(len(images))
    return images.reshape(len(images), -1)


def test_finished_batches_are_not_computed_again():
    TRACES.clear()

    def run():
        images, labels = np.zeros((6, 2, 2, 1), np.float32), np.zeros(6, np.int32)
        parts = Parts(files.as_path(FOLDER) / "parts", {"attack": "none"})
        model = jax.tree_util.Partial(traced)
        survived = evaluate.survival(jax.random.key(0), model, images, labels, redraws=1, batch_size=2, parts=parts)
        assert survived.all()
        assert parts.seconds() > 0

    run()
    before = TRACES.count(2)  # a single image is only asked for its classes
    files.as_path(f"{FOLDER}/parts/000002.npz").unlink()
    run()
    assert TRACES.count(2) == before > 0
    assert len(list(files.as_path(f"{FOLDER}/parts").glob("*.npz"))) == 3


def test_data_are_copied_once(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    remote = files.as_path("gs://bucket/data")
    for name in ("info.json", "train.array_record"):
        path = remote / "mnist" / "3.0.1" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    local = prepared._copied("mnist", remote)
    assert sorted(path.name for path in local.glob("mnist/3.0.1/*")) == ["info.json", "train.array_record"]
    (remote / "mnist" / "3.0.1" / "info.json").write_text("changed")
    assert (prepared._copied("mnist", remote) / "mnist" / "3.0.1" / "info.json").read_text() == "info.json"


def test_an_object_store_is_no_place_to_prepare_data_in(tmp_path, monkeypatch):
    """The message is a way that works: prepare here, then copy."""
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(
        FileNotFoundError, match=r"not prepared under gs://bucket/none: run `make data`.* then copy .*/<name> to gs"
    ):
        data.load("mnist", "test", "gs://bucket/none")
    with pytest.raises(
        ValueError, match="data_dir must be a folder of this machine, got gs://bucket/none: run `make data`"
    ):
        data.prepare("mnist", tmp_path, "gs://bucket/none")
    assert list(tmp_path.iterdir()) == []
