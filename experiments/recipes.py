"""The models of the tables: what stands before the network, what it is trained on, and by which optimizer."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial
from scipy.cluster.vq import kmeans2, vq

from experiments.rundir import Config
from rbf_jax import PRESETS, Beta1, reconstruct
from rbf_jax.checks import check_choice
from rbf_jax.patches import extract_patches
from rbf_jax.rbf import RBFFilters
from rbf_jax.types import Array


class Recipe(NamedTuple):
    """How a model is made, where it differs from the plain network trained on clean images.

    Attributes:
        title: in tables.
        front: what stands before the network: ``"rbf"``, ``"threshold"``, ``"mean"``, or nothing.
        filters: of the front end: ``"own"`` (of the EM), ``"kmeans"`` or ``"released"`` (the authors').
        preset: of beta1, "" for the configuration's.
        noise: whether noisy images join the batches, as for the paper's rCNN+.
        gaussian: standard deviation of noise on every image (Cohen et al. 2019), 0 for none.
        adversarial: whether it is trained on attacked images (Madry et al. 2018), through its front end.
        smoothing: of the labels, as the released code has it; 0 for hard labels.
        seed: added to the configuration's.
    """

    title: str
    front: str = ""
    filters: str = "own"
    preset: str = ""
    noise: bool = False
    gaussian: float = 0.0
    adversarial: bool = False
    smoothing: float = 0.1
    seed: int = 0

    @property
    def defended(self) -> bool:
        """Whether the RBF front end, which can draw noise, stands before the network."""
        return self.front == "rbf"

    @property
    def own_filters(self) -> bool:
        """Whether it stands behind the filters that the EM learned."""
        return self.defended and self.filters == "own"

    @property
    def scored_on(self) -> tuple[str, ...]:
        """The forms in which it is scored; the last one predicts."""
        return ("static", "predict") if self.defended else ("static",)

    @property
    def gradient_form(self) -> str:
        """The form without noise that has a gradient; before a front end without one ``bpda`` takes the identity's."""
        return "bpda" if self.front == "threshold" else "static"

    def beta1(self, preset: str) -> Beta1:
        """The sharpness of its filters, where ``preset`` is the configuration's reading of it."""
        return PRESETS[self.preset or preset]


RECIPES = {
    "cnn": Recipe("CNN"),
    "rcnn": Recipe("rCNN", "rbf"),
    "cnn_plus": Recipe("CNN+", noise=True),
    "rcnn_plus": Recipe("rCNN+", "rbf", noise=True),
    "madry": Recipe("Madry", adversarial=True),
    "rcnn_at": Recipe("rCNN-AT", "rbf", adversarial=True),
    # Cohen's baselines for the certificates.
    "gaussian_02": Recipe("CNN, Gaussian 0.2", gaussian=0.2),
    "gaussian_03": Recipe("CNN, Gaussian 0.3", gaussian=0.3),
    # Controls: other things that could stand there.
    "threshold": Recipe("threshold at 0.5", "threshold"),
    "mean": Recipe("3x3 mean", "mean"),
    "kmeans": Recipe("k-means codebook", "rbf", "kmeans"),
    # Whether it is the labels that hide the gradients.
    "cnn_hard": Recipe("CNN, hard labels", smoothing=0.0),
    "rcnn_hard": Recipe("rCNN, hard labels", "rbf", smoothing=0.0),
    # What the paper leaves open, and what the seed does.
    "rcnn_v2": Recipe("rCNN, preset v2", "rbf", preset="v2"),
    "rcnn_paper": Recipe("rCNN, preset paper", "rbf", preset="paper"),
    "rcnn_released": Recipe("rCNN, released filters", "rbf", "released"),
    "rcnn_seed1": Recipe("rCNN, seed 1", "rbf", seed=1),
    "rcnn_seed2": Recipe("rCNN, seed 2", "rbf", seed=2),
    "rcnn_seed3": Recipe("rCNN, seed 3", "rbf", seed=3),
    "cnn_plus_seed1": Recipe("CNN+, seed 1", noise=True, seed=1),
    "cnn_plus_seed2": Recipe("CNN+, seed 2", noise=True, seed=2),
    "cnn_plus_seed3": Recipe("CNN+, seed 3", noise=True, seed=3),
    # Far beyond what the accuracy needs: whether it becomes robust then, as the released code's authors say.
    "rcnn_long": Recipe("rCNN, long", "rbf"),
}


def _threshold(images: Array) -> Array:
    return (images > 0.5).astype(jnp.float32)


def _mean(images: Array) -> Array:
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    height, width = images.shape[1:3]
    shifted = [padded[:, row : row + height, col : col + width] for row in range(3) for col in range(3)]
    return jnp.stack(shifted).mean(0)


PLAIN_FRONTS: dict[str, Callable[[Array], Array]] = {"threshold": _threshold, "mean": _mean}


def front_end(recipe: Recipe, preset: str, filters: RBFFilters | None, *, testing: bool) -> Partial | None:
    """What stands before the network, without noise: images -> images, None for nothing.

    Args:
        recipe: of the model.
        preset: the configuration's.
        filters: those that the recipe names; None where it needs none.
        testing: sharpness of the test, or else of the training.
    """
    if recipe.defended:
        beta1 = recipe.beta1(preset)
        return Partial(reconstruct, filters, beta1=jnp.float32(beta1.test if testing else beta1.train))
    return Partial(PLAIN_FRONTS[recipe.front]) if recipe.front else None


def kmeans_filters(images: Array, count: int, seed: int, patches: int = 200_000) -> RBFFilters:
    """A codebook by k-means instead of the EM, as filters: centres and mean squared distances to them (Eq. 3).

    Args:
        images: float32 ``(N, H, W, C)`` in [0, 1].
        count: K.
        seed: of the patches that are drawn and of the first centres (k-means++).
        patches: how many are drawn from the first 1,000 images.
    """
    rng = np.random.default_rng(seed)
    found = np.asarray(jax.jit(extract_patches)(images[:1000]))
    found = found.reshape(-1, found.shape[-1])
    taken = rng.choice(found, min(patches, len(found)), replace=False).astype(np.float64)
    centres, _ = kmeans2(taken, count, minit="++", rng=rng)
    nearest, distances = vq(taken, centres)
    totals = np.bincount(nearest, minlength=count)
    variances = np.bincount(nearest, np.square(distances), count) / np.maximum(totals, 1)
    means = centres.reshape(count, 3, 3, -1)
    return RBFFilters(jnp.asarray(means, jnp.float32), jnp.asarray(variances, jnp.float32))


def optimizer(config: Config, batches: int, epochs: int) -> optax.GradientTransformation:
    """The optimizer that ``config.train`` names, with its schedule over so many epochs of so many batches."""
    recipe, decay = config.train, config.train.get("weight_decay", 0.0)
    check_choice(recipe.schedule, "config.train.schedule", ("cosine", "halving"))
    check_choice(recipe.optimizer, "config.train.optimizer", ("adam", "sgd"))
    if recipe.schedule == "cosine":
        steps = epochs * batches
        rate = optax.warmup_cosine_decay_schedule(0, recipe.learning_rate, int(recipe.warm_up * steps), steps)
    else:
        rate = optax.exponential_decay(recipe.learning_rate, recipe.halve_every * batches, 0.5, staircase=True)
    if recipe.optimizer == "adam":
        if decay:
            raise ValueError(f"config.train.weight_decay must be 0 with adam, got {decay}")
        return optax.adam(rate)
    # Neither biases nor batch norm decay.
    kernels = functools.partial(jax.tree.map, lambda parameter: parameter.ndim > 1)
    return optax.chain(optax.add_decayed_weights(decay, mask=kernels), optax.sgd(rate, 0.9, nesterov=True))
