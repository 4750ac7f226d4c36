"""Publishing what a run found."""

import json

import numpy as np
import pytest
from test_results import outcomes

from experiments import jobs
from experiments.configs import cifar10, mnist
from experiments.rundir import Run
from rbf_jax.evaluate import save_outcomes


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A finished run of one model with one cell."""
    monkeypatch.setattr(jobs, "ROOT", tmp_path)
    config = mnist.get_config("cpu")
    run = Run(tmp_path / "run", config)
    save_outcomes(
        run.directory / "ledger" / "cnn-clean-static.npz", outcomes("clean", [[1, 0]], model="cnn", form="static")
    )
    (run.directory / "models").mkdir()
    np.savez(run.directory / "models" / "cnn.npz", x=np.ones(2))
    recipe = {"history": {"loss": [1], "accuracy": [0.5], "validation": [0.75]}, "seconds an epoch": 2.5}
    (run.directory / "models" / "cnn.json").write_text(json.dumps(recipe))
    job = {"commit": "a", "device": "cpu", "cores": 2, "jax": "0", "filters": 23, "config": config.to_dict()}
    (run.directory / "job.json").write_text(json.dumps(job))
    return run


def test_publish_copies_and_makes_the_tables(run, tmp_path):
    results = tmp_path / "results" / "mnist"
    # What a run before published: a cell that this one does not have, and a model of its own.
    save_outcomes(results / "ledger" / "old.npz", outcomes("FGSM", [[1]], model="cnn"))
    (results / "models").mkdir()
    (results / "models" / "rcnn.json").write_text((run.directory / "models" / "cnn.json").read_text())
    jobs.publish(run, ("cnn",), [run.directory / "ledger" / "cnn-clean-static.npz", run.directory / "job.json"])
    found = {str(path.relative_to(results)) for path in results.rglob("*") if path.is_file()}
    kept = {"models/cnn.npz", "models/cnn.json", "models/rcnn.json", "ledger/cnn-clean-static.npz"}
    assert found == kept | {"job.json", "results.json", "README.md"}
    assert json.loads((results / "results.json").read_text())["rows"][0]["accuracy"] == 50.0


def test_a_model_alone_leaves_the_ledger(run, tmp_path):
    results = tmp_path / "results" / "mnist"
    save_outcomes(results / "ledger" / "old.npz", outcomes("FGSM", [[1]], model="cnn"))
    jobs.publish(run, ("cnn",), [])
    assert (results / "ledger" / "old.npz").exists()
    assert (results / "models" / "cnn.npz").exists()
    assert not (results / "README.md").exists()  # there is no job yet


def test_other_weights_stay_behind(run, tmp_path):
    jobs.publish(Run(run.directory, cifar10.get_config("cpu")), ("cnn",), [])
    assert [path.name for path in (tmp_path / "results" / "cifar10" / "models").iterdir()] == ["cnn.json"]
