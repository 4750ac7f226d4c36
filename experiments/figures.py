"""The figures of a report."""

from typing import Any

import jax
import numpy as np

from experiments import evaluation
from experiments.catalogue import Cell, cells
from experiments.learn import Examples
from experiments.recipes import RECIPES
from experiments.rundir import Config, Run
from rbf_jax import PRESETS, plots, reconstruct, saliency
from rbf_jax.rbf import RBFFilters
from rbf_jax.types import LogitsFn

SHOWN = slice(0, 8)


def sections(run: Run, test: Examples, filters: RBFFilters, forms: dict[str, dict[str, LogitsFn]]) -> list[Any]:
    """Heading, text, figure and description of each; those of attacked images need a defended model under PGD."""
    config, count = run.config, len(filters.variances)
    rebuilt = jax.jit(lambda images: reconstruct(filters, images, PRESETS[config.preset].test))
    gradients = jax.jit(saliency.loss_gradients)
    clean, labels = test.images[SHOWN], test.labels[SHOWN]
    maps = {
        name: np.asarray(gradients(jax.random.key(0), model["static"], clean, labels)) for name, model in forms.items()
    }
    found: list[Any] = [
        (
            "The filters (Fig. 2)",
            f"The EM found {count} filters, templates of 3x3 patches. Every image is rebuilt from them.",
            plots.filters(filters),
            f"{count} filter means",
        ),
        (
            "Loss gradients (Fig. 5)",
            "Gradient of each image's loss with respect to its pixels, for each model without noise.",
            plots.saliency(clean, maps),
            "loss gradients of the models",
        ),
    ]
    for cell in cells(config):
        if RECIPES[cell.model].defended and cell.attack == "pgd":
            rows = evaluation.drawn(config, cell.examples)
            attacked = evaluation.craft(run, test, cell, forms)
            return found + _attacked(config, cell, test.images[rows], np.asarray(attacked), rebuilt)
    return found


def _attacked(config: Config, cell: Cell, clean: np.ndarray, attacked: np.ndarray, rebuilt: Any) -> list[Any]:
    before, after = distances(config, clean, attacked, rebuilt)
    return [
        (
            "Originals and reconstructions",
            f"Clean test images and images attacked on {cell.model} ({cell.title}, {cell.norm}), each above its "
            "static reconstruction.",
            plots.image_rows(
                {
                    "clean": clean[SHOWN],
                    "rebuilt": np.asarray(rebuilt(clean[SHOWN])),
                    "attacked": attacked[SHOWN],
                    "attacked, rebuilt": np.asarray(rebuilt(attacked[SHOWN])),
                }
            ),
            "rows of clean, rebuilt, attacked and rebuilt attacked images",
        ),
        (
            "What reconstruction does to distances (Fig. 3)",
            "Each point is an attacked image: its distance from the original, and the distance between the two "
            "reconstructions. Below the diagonal the front end brings them closer, above it drives them apart. "
            "Claim 1 of the paper says that it brings them closer.",
            plots.reconstruction_distances(before, after),
            "distances before and after reconstruction in three norms",
        ),
    ]


def distances(
    config: Config, clean: np.ndarray, attacked: np.ndarray, rebuilt: Any
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Fig. 3: by norm ``(N,)``, of attacked images from their originals, and the same of their reconstructions.

    The perturbations are scaled down at random, so that all sizes up to the budget occur.
    """
    share = np.random.default_rng(config.seed).uniform(size=(len(clean), 1, 1, 1)).astype(np.float32)
    moved = clean + share * (attacked - clean)

    def measured(a: np.ndarray, b: np.ndarray) -> dict[str, np.ndarray]:
        deltas = (np.asarray(b) - np.asarray(a)).reshape(len(a), -1)
        return {
            name: np.linalg.norm(deltas, order, axis=-1) for name, order in (("linf", np.inf), ("l2", 2), ("l1", 1))
        }

    return measured(clean, moved), measured(rebuilt(clean), rebuilt(moved))
