"""The pipeline's entry point: what it writes, and how it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import tables
from experiments.configs import cifar10, mnist, quickstart
from experiments.pipeline import Row
from experiments.reproduce import table

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    "--config.train_examples=256",
    "--config.test_examples=20",
    "--config.em.steps=6",
    "--config.em.growth_steps=6",
    "--config.train.epochs=1",
    "--config.pgd.steps=1",
    "--config.pgd.examples=10",
    "--config.eot.examples=10",
    "--config.eot.steps=1",
    "--config.eot.draws=1",
    "--config.draws=2",
    "--config.batch_size=10",
]


def reproduce(config: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "experiments.reproduce", f"--config=experiments/configs/{config}", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=dict(os.environ))


@pytest.mark.full  # half a minute of compilation; CI runs the quickstart itself
def test_writes_results_and_report(tmp_path):
    result = reproduce("quickstart.py:smoke", f"--workdir={tmp_path}", *TINY)
    assert result.returncode == 0, result.stderr
    first = result.stdout.splitlines()[0]
    assert "256 training" in first
    assert "minutes" in first
    record = json.loads((tmp_path / "results.json").read_text())
    # Clean on three forms; FGSM and PGD on the CNN (one form) and the rCNN (two), and EoT, in two norms.
    assert len(record["rows"]) == 3 + 2 * (2 * 3 + 1)
    assert {row["total"] for row in record["rows"]} == {20, 10}
    assert all(0 <= row["wilson95"][0] <= row["correct"] / row["total"] <= row["wilson95"][1] for row in record["rows"])
    report = (tmp_path / "report.html").read_text()
    assert report.count("<img") == 4
    assert str(tmp_path / "report.html") in result.stdout
    assert "BPDA+EoT, l2 2" in result.stdout
    assert "BPDA+EoT, l2 2" in tables.accuracy_table(record)


def test_missing_data_says_what_to_run(tmp_path):
    result = reproduce("mnist.py:smoke", f"--data_dir={tmp_path}", f"--workdir={tmp_path}/run")
    assert result.returncode == 2
    assert "make data" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("module", [quickstart, mnist, cifar10])
def test_an_unknown_profile_is_named(module):
    with pytest.raises(ValueError, match="PROFILE must be one of cpu, smoke, got 'big'"):
        module.get_config("big")


def test_table_has_a_row_for_each_attack():
    rows = [
        Row("CNN", "clean", "", 0.0, 990, 1000, 1.0),
        Row("rCNN", "clean", "", 0.0, 95, 100, 1.0),
        Row("CNN", "FGSM", "linf", 0.3, 1, 100, 1.0),
        Row("rCNN", "FGSM", "linf", 0.3, 50, 100, 1.0),
    ]
    clean_1000, clean_100, fgsm = table(rows)
    assert (clean_1000["N"], clean_1000["CNN"], clean_1000["rCNN"]) == ("1000", "99.0 (98-99)", "")
    assert clean_100["rCNN"] == "95.0 (89-98)"
    assert (fgsm["attack"], fgsm["CNN"], fgsm["rCNN"]) == ("FGSM, linf 0.3", "1.0 (0-5)", "50.0 (40-60)")


def test_benchmark_table_holds_every_figure(tmp_path):
    origin = {"commit": "abc", "device": "cpu", "cores": 2, "jax": "0"}
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "kernel.json").write_text(json.dumps(origin | {"forward": {"ratio": 3.25}}))
    tables.main(tmp_path)
    text = (tmp_path / "benchmarks" / "table.md").read_text()
    assert "forward: ratio" in text
    assert "3.25" in text
    assert "Commit abc" in text
