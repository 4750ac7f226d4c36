"""Several processes over the loopback: together, one killed and all started again, and one that is missing."""

import json
import os
import signal
import socket
import subprocess
import time

import numpy as np
import pytest
from helpers import ROOT, experiment

from rbf_jax import process


def start(folder, *flags):
    environment = {**os.environ, **process.settings(os.environ), "RBF_JAX_SETTINGS": "1"}
    return subprocess.Popen(
        experiment("reproduce", "quickstart.py:smoke", f"--workdir={folder}", *flags),
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_address():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def start_two(folder):
    flags = ("--distributed", f"--coordinator={free_address()}", "--processes=2")
    return [start(folder, *flags, f"--process={i}") for i in range(2)]


@pytest.mark.parametrize("number", [0, 1])
def test_a_missing_process_is_said(tmp_path, number):
    address = free_address()
    flags = (f"--coordinator={address}", "--processes=2", f"--process={number}", "--join_seconds=1")
    with start(tmp_path, "--distributed", *flags) as alone:
        _, said = alone.communicate(timeout=120)
    assert alone.returncode == 2
    assert f"not all 2 processes have met at {address} within 1 s: start every one" in said


def test_where_to_meet_must_be_said(tmp_path):
    with start(tmp_path, "--distributed", "--join_seconds=1") as alone:
        _, said = alone.communicate(timeout=120)
    assert alone.returncode == 2
    assert "--coordinator=HOST:PORT --processes=N --process=I" in said


def started_training(folder):
    """Two processes, in their first epoch."""
    pair = start_two(folder)
    while not list((folder / "checkpoints").glob("cnn/*")):
        assert all(process.poll() is None for process in pair)
        time.sleep(0.2)
    return pair


@pytest.mark.full
def test_told_to_end_one_makes_both_write_a_checkpoint(tmp_path):
    """As a batch system tells a single process of a job that its time is up."""
    pair = started_training(tmp_path)
    pair[1].send_signal(signal.SIGTERM)
    for told in pair:
        told.communicate(timeout=120)
    assert {told.returncode for told in pair} == {-signal.SIGTERM}
    (steps,) = [sorted(int(path.name) for path in (tmp_path / "checkpoints" / "cnn").glob("[0-9]*"))]
    assert steps
    # No half-written one is left.
    assert [path.name for path in (tmp_path / "checkpoints" / "cnn").iterdir()] == [str(step) for step in steps]


@pytest.mark.full
def test_killed_and_started_again_they_end_as_one_does(tmp_path):
    """Training, attacks and checkpoints of two processes, one of which is killed in the first epoch."""
    together, alone = tmp_path / "together", tmp_path / "alone"
    pair = started_training(together)
    pair[1].kill()
    for left in pair:
        left.communicate(timeout=300)
    assert pair[0].returncode not in (0, None)

    for again in start_two(together):
        _, said = again.communicate(timeout=600)
        assert again.returncode == 0, said[-2000:]
    with start(alone) as single:
        _, said = single.communicate(timeout=600)
    assert single.returncode == 0, said[-2000:]

    for name in ("cnn", "rcnn"):
        with np.load(together / f"models/{name}.npz") as found, np.load(alone / f"models/{name}.npz") as expected:
            for layer in set(expected.files) - {"recipe"}:
                np.testing.assert_allclose(found[layer], expected[layer], atol=2e-3, err_msg=layer)
    found, expected = (json.loads((folder / "results.json").read_text())["rows"] for folder in (together, alone))
    assert len(found) == len(expected)
    # One image of 20 is 5 points.
    assert max(abs(a["accuracy"] - b["accuracy"]) for a, b in zip(found, expected, strict=True)) <= 5
