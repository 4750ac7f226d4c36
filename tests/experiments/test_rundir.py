"""The run directory and its configuration."""

import json

import pytest
from ml_collections import ConfigDict

from experiments.rundir import open_run


def config(**changes):
    return ConfigDict({"seed": 0, "train": {"epochs": 3, "step": None}, "budgets": (("linf", 0.3),)} | changes)


def test_it_opens_again_with_the_same_configuration(tmp_path):
    run = open_run(tmp_path / "run", config())
    run.log({"stage": "a"})
    open_run(tmp_path / "run", config()).log({"stage": "b"})
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines] == ["a", "b"]
    assert all("time" in line for line in lines)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"seed": 1}, r"config\.seed = 0, not 1"),
        ({"train": {"epochs": 4, "step": None}}, r"config\.train\.epochs = 3, not 4"),
        ({"budgets": (("l2", 0.3),)}, r"config\.budgets"),
        ({"more": 1}, r"config\.more = None, not 1"),
    ],
)
def test_another_configuration_is_refused(tmp_path, change, name):
    open_run(tmp_path, config())
    with pytest.raises(ValueError, match=name) as error:
        open_run(tmp_path, config(**change))
    assert str(tmp_path) in str(error.value)
    assert "WORKDIR" in str(error.value)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"attack": {"steps": 3}}, {"attack": {"steps": 4}}),
        ({"models": ("cnn",)}, {"models": ("cnn", "rcnn")}),
        ({"epochs": {"rcnn": 3}}, {"epochs": {}}),
        ({}, {"attack": {}, "certify": {"runs": ()}, "studies": {"few": 3}}),
    ],
)
def test_what_is_evaluated_which_models_and_how_long_may_change(tmp_path, before, after):
    open_run(tmp_path, config(**before))
    run = open_run(tmp_path, config(**after))
    assert run.config.to_dict() == config(**after).to_dict()
    assert open_run(tmp_path, config(**before)).directory == tmp_path


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path):
    run = open_run(tmp_path, config())
    run.log({"stage": "a"})
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"stage": "b", "sec')
    run.log({"stage": "c"})
    assert [record["stage"] for record in run.records()] == ["a", "c"]


def test_a_damaged_configuration_is_refused(tmp_path):
    open_run(tmp_path, config())
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        open_run(tmp_path, config())


def test_what_came_before_a_training_is_of_the_log_or_else_of_the_finished_models(tmp_path):
    run = open_run(tmp_path, config())
    assert run.overheads() == {}
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "a.json").write_text(json.dumps({"overheads": {"filters": 3.0, "bank a": 5.0}}))
    (tmp_path / "models" / "b.json").write_text("{}")  # of before they were kept
    assert run.overheads() == {"filters": 3.0, "bank a": 5.0}
    run.log({"stage": "filters", "kind": "kmeans", "seconds": 1.0})
    run.log({"stage": "filters", "kind": "own", "seconds": 4.0})
    run.log({"stage": "bank", "model": "b", "seconds": 6.0})
    assert run.overheads() == {"filters": 4.0, "bank a": 5.0, "bank b": 6.0}
