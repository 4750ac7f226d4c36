"""The published robust network: read rightly, and ranked as its leaderboard ranks attacks."""

import gzip
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from experiments import robust_net
from rbf_jax import attacks, evaluate

WEIGHTS, RAW = os.environ.get("RBF_JAX_ROBUST_NET"), os.environ.get("RBF_JAX_RAW")
there = pytest.mark.skipif(not (WEIGHTS and RAW), reason="RBF_JAX_ROBUST_NET and RBF_JAX_RAW name no files")
KEY = jax.random.key(0)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "weights.npz"
    arrays: dict[str, Any] = {"trades_mnist/feature_extractor.conv1.weight": np.zeros((32, 1, 3, 3))}
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match="must hold trades_mnist/ with"):
        robust_net.load(path)
    with pytest.raises(FileNotFoundError):
        robust_net.load(tmp_path / "none.npz")


def digits(count):
    folder = Path(str(RAW)) / "mnist"
    images, labels = (
        np.frombuffer(gzip.decompress((folder / f"t10k-{name}.gz").read_bytes()), np.uint8)[offset:]
        for name, offset in (("images-idx3-ubyte", 16), ("labels-idx1-ubyte", 8))
    )
    return (images.reshape(-1, 28, 28, 1)[:count] / 255).astype(np.float32), labels[:count].astype(np.int32)


@there
def test_clean_accuracy_is_the_published_one():
    """99.48 % of all 10,000: every layer, the order of the flattened features and the missing padding are right."""
    images, labels = digits(10_000)
    logits = evaluate.predict(KEY, robust_net.load(Path(str(WEIGHTS))), images, batch_size=500)
    assert np.sum(logits.argmax(-1) == labels) == 9948


@there
@pytest.mark.full
def test_stronger_attacks_leave_less():
    """Of the first 500: one step, PGD-40, and the suite, which stays far above what a broken attack would leave."""
    images, labels = digits(500)
    logits_fn = robust_net.load(Path(str(WEIGHTS)))

    def leaves(**suite):
        return evaluate.run_suite(KEY, suite, logits_fn, images, labels, batch_size=128).robust.mean()

    stages = robust_net.stages()
    left = {
        "FGSM": leaves(fgsm=attacks.fgsm(attacks.Linf, epsilon=0.3)),
        "PGD-40": leaves(pgd=stages["PGD-40"].attack),
        "APGD": leaves(ce=stages["APGD-CE"].attack, t=stages["APGD-T"].attack),
    }
    assert left["FGSM"] >= left["PGD-40"] >= left["APGD"] + 0.01
    assert 0.90 <= left["APGD"] <= 0.96
