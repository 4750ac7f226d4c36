"""Checkpoints and weights: round trips, damage, foreign files, a full disk."""

import contextlib
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rbf_jax import models, train
from rbf_jax.train import checkpoint

SETTINGS = {"epochs": 3, "key": [0, 1]}
ROOT = Path(__file__).resolve().parents[2]
# orbax leaves its inner tasks unfinished where a file cannot be read.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def tree(value=1.0):
    return {
        "weights": (jnp.full((30, 40), float(value)), jnp.arange(5, dtype=jnp.float32)),
        "none": None,
        "step": jnp.int32(value),
    }


def same(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and np.array_equal(x, y, equal_nan=True)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def test_the_last_one_is_restored_and_two_stay(tmp_path):
    assert checkpoint.restore(tmp_path / "none", tree(), SETTINGS) is None
    (tmp_path / "empty").mkdir()
    assert checkpoint.restore(tmp_path / "empty", tree(), SETTINGS) is None
    for step in (1, 2, 30):
        checkpoint.save(tmp_path / "runs", step, tree(step), SETTINGS)
    assert same(checkpoint.restore(tmp_path / "runs", tree(), SETTINGS), tree(30))
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["2", "30"]


def test_nan_and_infinity_come_back(tmp_path):
    odd = {"x": jnp.array([jnp.nan, jnp.inf, -0.0])}
    checkpoint.save(tmp_path, 1, odd, {})
    assert same(checkpoint.restore(tmp_path, odd, {}), odd)


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size > 100)


@pytest.fixture
def saved(tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path / "run", step, tree(step), SETTINGS)
    return tmp_path / "run"


@pytest.mark.parametrize("damage", ["truncated", "changed", "removed"])
def test_damage_is_never_taken_for_a_checkpoint(saved, damage):
    messages = []
    for path in files(saved / "2"):
        whole = path.read_bytes()
        middle = len(whole) // 2
        changed = {"truncated": whole[:middle], "changed": whole[:middle] + b"\xff\x00" + whole[middle + 2 :]}
        path.unlink() if damage == "removed" else path.write_bytes(changed[damage])
        messages.append(refusal(saved))
        path.write_bytes(whole)
    refused = [message for message in messages if message]
    assert len(refused) >= 3
    assert all(str(saved / "2") in message and "Remove" in message for message in refused)
    assert refusal(saved) is None


def refusal(folder):
    """Why the folder's last checkpoint is refused; None where it is read, and then it is the right one."""
    try:
        read = checkpoint.restore(folder, tree(), SETTINGS)
    except ValueError as error:
        return str(error)
    # A file that orbax does not need may be damaged.
    assert same(read, tree(2))
    return None


def test_after_removing_the_damaged_one_the_one_before_it_is_restored(saved):
    shutil.rmtree(saved / "2")
    assert same(checkpoint.restore(saved, tree(), SETTINGS), tree(1))


@pytest.mark.parametrize(
    "template",
    [
        tree() | {"step": jnp.zeros(2, jnp.int32)},
        tree() | {"more": jnp.zeros(2)},
        {"weights": tree()["weights"]},
        tree() | {"weights": (jnp.zeros((30, 41)), jnp.zeros(5))},
    ],
)
def test_another_structure_is_refused(saved, template):
    with pytest.raises(ValueError, match="Remove"):
        checkpoint.restore(saved, template, SETTINGS)


def test_other_settings_are_named(saved):
    with pytest.raises(ValueError, match=r"its epochs is 3, not 4"):
        checkpoint.restore(saved, tree(), SETTINGS | {"epochs": 4})


def test_a_foreign_folder_and_a_file_are_refused(tmp_path):
    (tmp_path / "foreign" / "7").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"foreign/7 is damaged or foreign"):
        checkpoint.restore(tmp_path / "foreign", tree(), SETTINGS)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="it is a file"):
        checkpoint.restore(tmp_path / "file", tree(), SETTINGS)


def test_a_full_disk_is_reported_and_loses_nothing(saved):
    # Files end at 100 kB here, as on a disk with so much room.
    code = f"""
import resource, signal
from jax import random
from rbf_jax.train import checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    checkpoint.save({str(saved)!r}, 3, {{"x": random.normal(random.key(0), (400, 400))}}, {{}})
except OSError as error:
    print("refused", error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert f"refused cannot write checkpoint {saved / '3'}" in result.stdout
    assert same(checkpoint.restore(saved, tree(), SETTINGS), tree(2))


def test_that_another_process_is_gone_is_not_taken_for_a_full_disk(saved, monkeypatch):
    gone = jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: Barrier timed out")

    @contextlib.contextmanager
    def waiting(directory):
        try:
            raise gone
        except jax.errors.JaxRuntimeError as error:
            raise ValueError("finalizing failed") from error
        yield

    monkeypatch.setattr(checkpoint, "_checkpointer", waiting)
    with pytest.raises(jax.errors.JaxRuntimeError, match="DEADLINE_EXCEEDED") as raised:
        checkpoint.save(saved, 3, tree(3), SETTINGS)
    assert raised.value is gone


def test_weights_come_back_as_float16(tmp_path, rng):
    classifier = models.from_linen(models.CNN())
    variables = classifier.init(jax.random.key(0), (28, 28, 1))
    read = train.save_weights(tmp_path / "w.npz", variables, {"epochs": 3})
    again, recipe = train.load_weights(tmp_path / "w.npz")
    assert recipe == {"epochs": 3}
    assert same(read, again)
    expected = jax.tree.map(lambda x: np.float32(np.float16(x)), variables)
    assert same(read, expected)
    images = jnp.asarray(rng.uniform(size=(2, 28, 28, 1)), jnp.float32)
    assert np.allclose(classifier.apply(read, images)[0], classifier.apply(variables, images)[0], atol=0.02)
    assert (tmp_path / "w.npz").stat().st_size < 1.6e6


def test_weights_are_written_under_any_name(tmp_path):
    for value in (1.0, 2.0):
        train.save_weights(tmp_path / "rcnn", {"params": {"a": jnp.full(2, value)}}, {})
        np.testing.assert_array_equal(train.load_weights(tmp_path / "rcnn")[0]["params"]["a"], np.full(2, value))
    assert [path.name for path in tmp_path.iterdir()] == ["rcnn"]


def test_weights_beyond_float16_are_refused(tmp_path):
    with pytest.raises(ValueError, match="params/big is not"):
        train.save_weights(tmp_path / "w.npz", {"params": {"big": jnp.array([1e5])}}, {})
    assert not (tmp_path / "w.npz").exists()


def test_weights_of_nnx_modules_are_refused(tmp_path):
    classifier = models.from_nnx(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"variables must be nested dictionaries, as those of models\.from_linen, got"):
        train.save_weights(tmp_path / "w.npz", classifier.init(jax.random.key(0), (2,)), {})
    assert not (tmp_path / "w.npz").exists()


def test_no_weights(tmp_path):
    with pytest.raises(FileNotFoundError):
        train.load_weights(tmp_path / "none.npz")
    np.savez(tmp_path / "other.npz", x=np.ones(2))
    with pytest.raises(ValueError, match=r"other\.npz is not a file of weights"):
        train.load_weights(tmp_path / "other.npz")
    np.savez(tmp_path / "recipe.npz", recipe=np.array("none"))
    with pytest.raises(ValueError, match=r"recipe\.npz is not a file of weights: its recipe is no JSON"):
        train.load_weights(tmp_path / "recipe.npz")
    (tmp_path / "text.npz").write_text("not a zip")
    with pytest.raises(ValueError, match=r"text\.npz is not a file of weights, or damaged"):
        train.load_weights(tmp_path / "text.npz")
