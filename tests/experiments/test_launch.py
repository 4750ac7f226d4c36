"""The launch scripts: what they would do, by commands that only write down how they were called."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from experiments import reproduce  # noqa: F401  (defines the flags)

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "experiments" / "launch"


@pytest.fixture
def bin_folder(tmp_path):
    """gcloud, srun, scontrol that note their arguments; srun ends with SRUN_CODE."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("gcloud", "srun", "scontrol"):
        script = folder / name
        code = "exit ${SRUN_CODE:-0}" if name == "srun" else ""
        script.write_text(
            "#!/usr/bin/env bash\n"
            f"""printf '%q ' {name} "${{@//$'\\n'/ }}" >> {tmp_path}/called\n"""
            f"echo >> {tmp_path}/called\n{code}\n"
        )
        script.chmod(0o755)
    return folder


def run(script, bin_folder, *arguments, **variables):
    environment = {"PATH": f"{bin_folder}:{os.environ['PATH']}", "HOME": "/home/user"} | variables
    return subprocess.run(
        [LAUNCH / script, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def called(tmp_path):
    return [shlex.split(line) for line in (tmp_path / "called").read_text().splitlines()]


def check_command(words):
    """The configuration exists, and the flags are those of the program."""
    at = words.index("experiments.reproduce")
    assert words[at - 2 : at] == [".venv/bin/python", "-m"]
    from absl import flags

    for word in words[at + 1 :]:
        name, _, value = word.removeprefix("--").partition("=")
        assert name in flags.FLAGS
        if name == "config":
            file, _, profile = value.partition(":")
            assert (ROOT / file).exists()
            assert profile in ("smoke", "cpu", "gpu", "paper")


@pytest.mark.parametrize("script", ["tpu.sh", "slurm.sh"])
def test_they_are_valid_bash(script):
    subprocess.run(["bash", "-n", LAUNCH / script], check=True)


def test_a_tpu_slice(tmp_path, bin_folder):
    done = run("tpu.sh", bin_folder, "cifar10", "paper", BUCKET="gs://b", ZONE="z")
    assert done.returncode == 0, done.stderr
    steps = [words[4] for words in called(tmp_path) if words[:4] == ["gcloud", "compute", "tpus", "tpu-vm"]]
    assert steps == ["describe", "delete", "create", "scp", "ssh", "ssh"]
    last = called(tmp_path)[-1]
    assert "--worker=all" in last
    command = next(word for word in last if word.startswith("--command=")).removeprefix("--command=cd rbf_jax && ")
    check_command(shlex.split(command))
    assert "--workdir=gs://b/runs/cifar10-paper" in command
    assert "--distributed" in command


def test_a_dry_run_does_nothing(tmp_path, bin_folder):
    done = run("tpu.sh", bin_folder, BUCKET="gs://b", ZONE="z", DRY_RUN="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("+ gcloud") == 5
    assert not (tmp_path / "called").exists()


def test_a_tpu_slice_needs_a_bucket(bin_folder):
    done = run("tpu.sh", bin_folder, ZONE="z")
    assert done.returncode != 0
    assert "must name a bucket" in done.stderr


@pytest.mark.parametrize(("code", "again"), [("0", False), ("143", True), ("2", False)])
def test_slurm_queues_again_what_was_stopped(tmp_path, bin_folder, code, again):
    done = run("slurm.sh", bin_folder, SRUN_CODE=code, SLURM_JOB_ID="7", DATA_DIR="/data")
    assert done.returncode == int(code)
    first, *rest = called(tmp_path)
    check_command(first)
    assert first[-1] == "--data_dir=/data"
    assert rest == ([["scontrol", "requeue", "7"]] if again else [])


def test_a_spot_machine():
    task = yaml.safe_load((LAUNCH / "spot.yaml").read_text())
    assert task["resources"]["use_spot"] is True
    for part in ("setup", "run"):
        subprocess.run(["bash", "-n"], input=task[part], text=True, check=True)
    variables = {**task["envs"], "BUCKET": "gs://b"}
    echoed = subprocess.run(
        ["bash", "-c", "echo " + task["run"]], env=variables, capture_output=True, text=True, check=True
    )
    check_command(shlex.split(echoed.stdout))
