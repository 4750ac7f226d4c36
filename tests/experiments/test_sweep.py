"""The sweep: its points, what it does again and what not, and its table."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import sweep
from experiments.configs import quickstart

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ["--config=experiments/configs/quickstart.py:smoke"]


def test_all_combinations():
    found = sweep.points(quickstart.get_config("smoke"), ["beta2=0,1.75", "attack.settings.pgd.steps=3", "seed=0,1"])
    assert [tuple(point.values()) for point in found] == [
        ("0", "3", "0"),
        ("0", "3", "1"),
        ("1.75", "3", "0"),
        ("1.75", "3", "1"),
    ]
    assert sweep.points(quickstart.get_config("smoke"), []) == [{}]


@pytest.mark.parametrize(
    ("axis", "message"),
    [
        ("beta3=1", "one of .*beta2.*, got 'beta3'"),
        ("seed.x=1", "got 'seed.x'"),
        ("beta2=", "NAME=VALUE,VALUE"),
        ("beta2", "NAME="),
    ],
)
def test_bad_grids_are_refused(axis, message):
    with pytest.raises(ValueError, match=message):
        sweep.points(quickstart.get_config("smoke"), [axis])


def test_a_point_is_finished_for_its_own_values_alone(tmp_path, monkeypatch):
    ended, monkeypatch_run = [1, 0], []

    def run(command, check):
        monkeypatch_run.append(command)
        return subprocess.CompletedProcess(command, ended.pop(0))

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(sweep.jobs, "DATA_DIR", type("Flag", (), {"value": "/data"}))
    monkeypatch.setattr(sweep.jobs, "FILTERS", type("Flag", (), {"value": None}))
    point, folder = {"beta2": "1.0", "seed": "1"}, tmp_path / "beta2=1.0_seed=1"
    assert sweep.folder_of(tmp_path, point) == folder
    assert not sweep.run_point(folder, point, CONFIG)
    assert not sweep.is_finished(folder, point, CONFIG)
    assert sweep.run_point(folder, point, CONFIG)
    assert sweep.is_finished(folder, point, CONFIG)
    assert not sweep.is_finished(folder, point, [*CONFIG, "--config.em.steps=3"])
    assert monkeypatch_run[0][3:] == [
        *CONFIG,
        f"--workdir={folder}",
        "--config.beta2=1.0",
        "--config.seed=1",
        "--data_dir=/data",
    ]


def row(model, form, attack, norm, epsilon, accuracy):
    found = {"model": model, "source": model, "scored_on": form, "attack": attack, "norm": norm, "epsilon": epsilon}
    return found | {"N": 100, "accuracy": accuracy, "wilson95": [accuracy - 1, accuracy + 1]}


def test_the_summary_has_a_line_for_each_point():
    first = [row("cnn", "static", "clean", "", 0.0, 99.0), row("cnn", "static", "pgd", "linf", 0.3, 2.0)]
    headings, lines = sweep.summary([({"seed": "0"}, first), ({"seed": "1"}, first[:1])])
    assert headings == ["seed", "CNN: clean", "CNN: worst in linf 0.3"]
    assert [line["seed"] for line in lines] == ["0", "1"]
    assert lines[0]["CNN: clean"].startswith("99.0")
    assert lines[0]["CNN: worst in linf 0.3"].startswith("2.0")
    assert lines[1]["CNN: worst in linf 0.3"] == ""


@pytest.mark.full
def test_interrupted_it_does_no_finished_work_again(tmp_path):
    """Two points of the pipeline: stopped after the first, then to the end, then nothing left to do."""
    command = [sys.executable, "-m", "experiments.sweep", *CONFIG, "--grid=beta2=0,1.75", f"--workdir={tmp_path}"]

    def run(*flags):
        return subprocess.run([*command, *flags], cwd=ROOT, check=True, capture_output=True, text=True).stdout

    assert "to run: 1" in run("--only=1")
    before = (tmp_path / "beta2=1.75" / "log.jsonl").read_text()
    assert "to run: 1" in run()
    assert "to run: 0" in run()
    assert (tmp_path / "beta2=1.75" / "log.jsonl").read_text() == before
    summary = (tmp_path / "summary.md").read_text()
    assert "2 of 2 points" in summary
    results = [
        json.loads((tmp_path / f"beta2={value}" / "results.json").read_text())["rows"] for value in ("0", "1.75")
    ]
    clean = [next(r for r in rows if (r["model"], r["attack"]) == ("cnn", "clean"))["accuracy"] for rows in results]
    assert clean[0] == clean[1]
