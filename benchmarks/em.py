"""EM on the full training sets: number of filters, seconds, and how well the filters fit unseen patches.

    python -m benchmarks.em            needs the prepared data (make data); DATA_DIR names another folder

Where RBF_JAX_REFERENCE names a folder with the authors' released filters (``rbf_filters_{mnist,cifar10}.npz``),
they are measured beside ours.
"""

from rbf_jax import process

if __name__ == "__main__":
    process.ensure()

import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import write
from rbf_jax import RBFFilters, data, em, extract_patches, match_scores, rbf

RULES = {"mnist": em.MNIST, "cifar10": em.CIFAR10}
# A zero-variance filter scores what the floor says, not what the data says: one floor for all, high enough to be mild.
FLOORS = {"mnist": 1e-6, "cifar10": 1e-4}


class Quality(NamedTuple):
    """How well filters fit patches.

    Attributes:
        score: mean best score.
        score_not_black: the same over patches that are not exactly black.
        squared_distance: mean ``|z - mu|^2`` to the best-scoring filter.
    """

    score: float
    score_not_black: float
    squared_distance: float


def quality(filters: RBFFilters, patches: np.ndarray, floor: float) -> Quality:
    """Measures filters on patches ``(P, D)``."""
    scores, distances = [], []
    for part in np.array_split(patches, max(1, len(patches) // 10_000)):
        score = match_scores(filters, jnp.asarray(part), variance_floor=floor)
        scores.append(np.asarray(score.max(-1)))
        best = np.asarray(filters.flat_means)[np.asarray(score.argmax(-1))]
        distances.append(np.sum((part - best) ** 2, -1))
    best_scores, lengths = np.concatenate(scores), np.concatenate(distances)
    black = (patches == 0).all(-1)
    return Quality(float(best_scores.mean()), float(best_scores[~black].mean()), float(lengths.mean()))


def random_patches(images: np.ndarray, count: int = 100_000, seed: int = 0) -> np.ndarray:
    """Patches drawn at random from uint8 images, float32 ``(count, D)``."""
    rng = np.random.default_rng(seed)
    per_image = int(np.ceil(count / len(images)))
    parts = []
    for batch in np.array_split(images, 20):
        patches = np.asarray(extract_patches(jnp.asarray(data.as_float(batch))))
        rows = rng.integers(patches.shape[1], size=(len(batch), per_image))
        parts.append(np.take_along_axis(patches, rows[..., None], 1).reshape(-1, patches.shape[-1]))
    return np.concatenate(parts)[:count]


def main() -> None:
    """Measures and writes ``results/benchmarks/em.json``."""
    figures: dict[str, object] = {}
    reference = os.environ.get("RBF_JAX_REFERENCE")
    for name, rules in RULES.items():
        try:
            training = data.load(name, "train", os.environ.get("DATA_DIR") or None)
        except (FileNotFoundError, ValueError) as error:
            print(f"em: {error}", file=sys.stderr)
            sys.exit(2)
        images = jnp.asarray(data.as_float(training.images))
        began = time.perf_counter()
        filters, _ = em.fit(images, config=rules)
        jax.block_until_ready(filters)
        seconds = time.perf_counter() - began
        patches = random_patches(data.load(name, "test", os.environ.get("DATA_DIR") or None).images)
        ours = quality(filters, patches, FLOORS[name])._asdict()
        figures[name] = {"filters": len(filters.variances), "seconds": round(seconds, 1), "ours": ours}
        if reference:
            released = rbf.load(Path(reference) / f"rbf_filters_{name}.npz")
            figures[name] |= {"released": quality(released, patches, FLOORS[name])._asdict()}  # type: ignore[operator]
    write("em", figures)


if __name__ == "__main__":
    main()
