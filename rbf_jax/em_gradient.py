"""RBF filters by gradient: a fixed number of them, trained by Adam; the authors' own successor to EM."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from rbf_jax.checks import check_count, check_images, check_key, check_positive
from rbf_jax.patches import extract_patches
from rbf_jax.rbf import RBFFilters, match_scores
from rbf_jax.types import Array, Key


def fit_gradient(
    key: Key,
    images: Array,
    filters: int,
    *,
    size: tuple[int, int] = (3, 3),
    steps: int = 2000,
    batch_size: int = 50,
    learning_rate: float = 1e-2,
    variance_floor: float = 1e-6,
    progress: bool = True,
) -> tuple[RBFFilters, Array]:
    """Learns a fixed number of filters by gradient: Adam on ``-mean_z max_j s(z, g_j)`` over means and log-variances.

    The authors' own successor to EM (the second version of their code). The means start at random patches, no two
    alike, and are kept in [0, 1]. The objective is unbounded where patches are exactly alike (their filter's variance
    goes to 0), so the variance stays above ``variance_floor``.

    Args:
        key: draws the first patches and the batches.
        images: float32 ``(N, H, W, C)`` in [0, 1].
        filters: their number K.
        size: height and width of a filter, pixels.
        steps: of Adam.
        batch_size: images in a step.
        learning_rate: of Adam, decayed to 0 by a cosine.
        variance_floor: lowest variance.
        progress: show a progress bar.

    Returns:
        The filters, and the mean best score of each step, ``(steps,)``.

    Raises:
        ValueError: images or numbers out of range, or more filters than different patches.
    """
    check_key(key)
    check_images(images)
    for value, name in ((filters, "filters"), (steps, "steps"), (batch_size, "batch_size")):
        check_count(value, name)
    check_positive(learning_rate, "learning_rate")
    check_positive(variance_floor, "variance_floor")
    shape = (filters, *size, images.shape[-1])

    start_key, choice_key, batch_key = jax.random.split(key, 3)
    some = images[jax.random.choice(start_key, images.shape[0], (min(500, images.shape[0]),), replace=False)]
    patches = extract_patches(some, size).reshape(-1, math.prod(shape[1:]))
    # Equal filters would share every gradient, and stay equal: most patches of MNIST are black.
    distinct = np.unique(np.asarray(patches), axis=0)
    if filters > len(distinct):
        raise ValueError(f"filters must be at most the {len(distinct)} different patches of the images, got {filters}")
    means = jax.random.choice(choice_key, jnp.asarray(distinct), (filters,), replace=False).reshape(shape)
    spread = jnp.maximum(jnp.var(patches, 0).sum(), variance_floor)
    params = (means, jnp.full((filters,), jnp.log(spread)))
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))

    def as_filters(params: tuple[Array, Array]) -> RBFFilters:
        return RBFFilters(params[0], jnp.maximum(jnp.exp(params[1]), variance_floor))

    def loss(params: tuple[Array, Array], batch: Array) -> Array:
        # At the floor itself a maximum has no slope, and a filter that came there would never leave.
        filters = RBFFilters(params[0], jnp.exp(params[1]))
        scores = match_scores(filters, extract_patches(batch, size), variance_floor=variance_floor / 2)
        return -scores.max(-1).mean()

    @jax.jit
    def step(params, opt_state, images, key):
        batch = images[jax.random.randint(key, (batch_size,), 0, images.shape[0])]
        value, gradient = jax.value_and_grad(loss)(params, batch)
        updates, opt_state = optimizer.update(gradient, opt_state)
        means, log_variances = jax.tree.map(jnp.add, params, updates)
        return (jnp.clip(means, 0, 1), jnp.maximum(log_variances, jnp.log(variance_floor))), opt_state, -value

    images, opt_state, scores = jnp.asarray(images), optimizer.init(params), []
    for batch in tqdm(jax.random.split(batch_key, steps), desc="Adam", unit="step", disable=not progress):
        params, opt_state, score = step(params, opt_state, images, batch)
        scores.append(score)
    return as_filters(params), jnp.stack(scores)
