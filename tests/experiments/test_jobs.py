"""Publishing what a run found, and giving back what it compiled."""

import json

import jax
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
    clean = outcomes("clean", [[1, 0]], model="cnn", scored_on="static")
    save_outcomes(run.directory / "ledger" / "cnn-clean-static.npz", clean)
    (run.directory / "models").mkdir()
    np.savez(run.directory / "models" / "cnn.npz", x=np.ones(2))
    recipe = {"history": {"loss": [1], "accuracy": [0.5], "validation": [0.75]}, "seconds an epoch": 2.5}
    origin = {"commit": "a", "device": "cpu", "cores": 2, "jax": "0", "config": config.to_dict()}
    (run.directory / "models" / "cnn.json").write_text(json.dumps(origin | recipe))
    (run.directory / "job.json").write_text(json.dumps(origin | {"filters": 23, "seconds": {}}))
    return run


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_publish_copies_and_makes_the_tables(run, tmp_path):
    results = tmp_path / "results" / "mnist-cpu"
    # What runs before published: cells of this model that this run does not have, cells of others, and their models.
    for name in ("cnn-fgsm-linf-0.3-static", "cnn-from-rcnn-fgsm-linf-0.3-static", "cnn_plus-fgsm-linf-0.3-static"):
        model = name.split("-")[0]
        save_outcomes(results / "ledger" / f"{name}.npz", outcomes("fgsm", [[1]], model=model, scored_on="static"))
    (results / "models").mkdir()
    (results / "models" / "rcnn.json").write_text((run.directory / "models" / "cnn.json").read_text())
    jobs.publish(run, ("cnn",), [run.directory / "ledger" / "cnn-clean-static.npz", run.directory / "job.json"])
    kept = {"ledger/cnn_plus-fgsm-linf-0.3-static.npz", "models/rcnn.json"}
    copied = {"models/cnn.npz", "models/cnn.json", "ledger/cnn-clean-static.npz", "job.json"}
    assert files(results) - {"VERDICT.md"} == kept | copied | {"results.json", "README.md"}
    rows = json.loads((results / "results.json").read_text())["rows"]
    assert [(row["model"], row["attack"], row["accuracy"]) for row in rows] == [
        ("cnn", "clean", 50.0),
        ("cnn_plus", "fgsm", 100.0),
    ]


def test_what_is_not_there_is_named_not_where_it_was_to_go(run):
    with pytest.raises(FileNotFoundError, match=f"{run.directory}/ledger/absent.npz"):
        jobs.publish(run, ("cnn",), [run.directory / "ledger" / "absent.npz", run.directory / "job.json"])


def test_a_model_alone_leaves_the_ledger(run, tmp_path):
    results = tmp_path / "results" / "mnist-cpu"
    save_outcomes(results / "ledger" / "cnn-fgsm-linf-0.3-static.npz", outcomes("fgsm", [[1]], model="cnn"))
    jobs.publish(run, ("cnn",), [])
    assert (results / "ledger" / "cnn-fgsm-linf-0.3-static.npz").exists()
    assert (results / "models" / "cnn.npz").exists()
    assert not (results / "README.md").exists()  # there is no job yet


def test_a_model_alone_does_not_take_the_place_of_one_that_was_measured(run, tmp_path):
    """Its accuracies would stand beside another training."""
    results = tmp_path / "results" / "mnist-cpu"
    jobs.publish(run, ("cnn",), [run.directory / "ledger" / "cnn-clean-static.npz", run.directory / "job.json"])
    jobs.publish(run, ("cnn",), [])
    before = {name: (results / name).read_bytes() for name in files(results)}
    record = run.directory / "models" / "cnn.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"sha256": "of other weights"}))
    with pytest.raises(ValueError, match=r"other weights of cnn \(cnn-clean-static.npz\): publish the whole run"):
        jobs.publish(run, ("cnn",), [])
    assert {name: (results / name).read_bytes() for name in files(results)} == before
    jobs.publish(run, ("cnn",), [run.directory / "ledger" / "cnn-clean-static.npz", run.directory / "job.json"])


def test_studies_of_a_run_before_do_not_stay(run, tmp_path):
    """They may be of other weights."""
    old = tmp_path / "results" / "mnist-cpu" / "studies" / "level.json"
    old.parent.mkdir(parents=True)
    old.write_text("{}")
    jobs.publish(run, ("cnn",), [])
    assert old.exists()
    jobs.publish(run, ("cnn",), [run.directory / "ledger" / "cnn-clean-static.npz", run.directory / "job.json"])
    assert not old.exists()


def test_other_weights_stay_behind(run, tmp_path):
    jobs.publish(Run(run.directory, cifar10.get_config("gpu")), ("cnn",), [])
    assert [path.name for path in (tmp_path / "results" / "cifar10" / "models").iterdir()] == ["cnn.json"]


def test_programs_are_given_back():
    def alive():
        return len(jax.devices()[0].client.live_executables())

    function = jax.jit(lambda x: x + x)
    jax.clear_caches()
    first, counts = alive(), []
    for number in jobs.giving_back(range(7), 3):
        counts.append(alive() - first)
        function(np.zeros(number, np.float32))
    assert counts == [0, 1, 2, 0, 1, 2, 0]
