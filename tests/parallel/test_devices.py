"""The same results on several simulated devices as on one, and no batch whole on any of them."""

import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

# By one worker: each would compute the module's fixtures for itself.
pytestmark = pytest.mark.xdist_group("devices")

CHILD = Path(__file__).with_name("child.py")
BATCH_OF_IMAGES = 16 * 16 * 16


def run(folder, devices):
    result = folder / f"{devices}.npz"
    command = [sys.executable, str(CHILD), str(devices), str(result)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    with np.load(result) as stored:
        return dict(stored)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("devices")


@pytest.fixture(scope="module")
def alone(folder):
    return run(folder, 1)


@pytest.fixture(scope="module", params=[4, pytest.param(8, marks=pytest.mark.full)])
def devices(request):
    return request.param


@pytest.fixture(scope="module")
def split(folder, devices):
    return run(folder, devices)


def assert_equal(split, alone, kind, **tolerance):
    names = [name for name in alone if name.startswith(f"{kind}/")]
    assert names
    for name in names:
        if alone[name].dtype == np.float32:
            np.testing.assert_allclose(split[name], alone[name], err_msg=name, **tolerance)
        else:
            np.testing.assert_array_equal(split[name], alone[name], err_msg=name)


def test_a_device_is_handed_its_part(split, devices):
    assert split["part/0"].shape == (16 // devices, 16, 16, 1)


def test_what_an_augmentation_holds_is_on_every_device(split, alone, devices):
    held = [int(value) for name, value in split.items() if name.startswith("everywhere/")]
    assert len(held) > 4
    assert set(held) == {devices}
    assert {int(value) for name, value in alone.items() if name.startswith("everywhere/")} == {1}


def test_em_learns_the_same(split, alone):
    assert len(alone["em/1"]) > 3
    assert_equal(split, alone, "em", rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["training", "adversarial training"])
def test_training_is_the_same(split, alone, kind):
    """Batch statistics are the whole batch's; dropout, augmentation and the attack draw the same."""
    assert_equal(split, alone, kind, rtol=1e-4, atol=1e-5)


def test_predictions_are_the_same(split, alone):
    assert_equal(split, alone, "logits", rtol=1e-5, atol=1e-5)
    assert_equal(split, alone, "survival")
    assert_equal(split, alone, "few")
    assert_equal(split, alone, "kept")
    np.testing.assert_array_equal(alone["kept/0"], alone["survival/0"])


@pytest.mark.parametrize("kind", ["suite", "noisy suite"])
def test_attacks_have_the_same_outcomes(split, alone, kind):
    robust = [value for name, value in alone.items() if name.startswith(f"{kind}/") and value.dtype == bool]
    assert 0 < robust[-1].mean() < 1
    assert_equal(split, alone, kind, atol=1e-5)


def test_certificates_are_the_same(split, alone):
    assert_equal(split, alone, "certificate")


def collectives(folder, devices):
    """Programs, and what is exchanged in them: operation, and elements of each array that comes out."""
    for path in folder.glob(f"{devices}.npz.hlo/*.cpu_after_optimizations.txt"):
        for shapes, operation in re.findall(
            r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute)(?:-start)?\(", path.read_text()
        ):
            sizes = [math.prod(map(int, filter(None, shape.split(",")))) for shape in re.findall(r"\[(.*?)\]", shapes)]
            yield path.name.split(".")[1], operation, sizes


def test_no_batch_is_gathered(split, folder, devices):
    """Sums and labels cross devices. Images do where noisy ones join a batch, and no device gets more than its part."""
    found = list(collectives(folder, devices))
    assert {"jit_advance", "jit__step", "jit__count"} <= {program for program, *_ in found}
    for program, operation, sizes in found:
        assert program in ("jit_advance", "jit__step", "jit__count", "jit__lambda")
        limit = 2 * BATCH_OF_IMAGES // devices if operation == "all-to-all" else BATCH_OF_IMAGES // 4
        assert sum(sizes) <= limit, (program, operation, sizes)
