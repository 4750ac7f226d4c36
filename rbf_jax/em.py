"""Non-parametric EM: learns RBF filters from patches and finds their number itself (Eq. 3 of the paper).

Hard clustering. A patch goes to the filter that scores it highest, or to one pooled "new" cluster when even the best
score lies below ``log(alpha) + offset``; the pooled cluster becomes a filter when it holds enough patches. ``alpha``
falls while many patches are new and rises again when few are, less so the more filters there are, and from 1.8 K0 of
them on no longer. The paper names no thresholds or schedule: these are the rules of the released CIFAR-10 code.

``init -> (e_step -> m_step)* -> filters``: pure functions over filters padded to a power of two, which `fit` drives.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from rbf_jax import parallel
from rbf_jax.checks import check_images, check_key
from rbf_jax.em_gradient import fit_gradient as fit_gradient
from rbf_jax.em_rules import CIFAR10 as CIFAR10
from rbf_jax.em_rules import MNIST as MNIST
from rbf_jax.em_rules import EMConfig as EMConfig
from rbf_jax.em_rules import check_em_config
from rbf_jax.patches import extract_patches, patch_grid
from rbf_jax.rbf import RBFFilters, peak_scores, squared_distances, tile_images
from rbf_jax.types import Array, Key


class EMState(NamedTuple):
    """What is carried from step to step.

    Attributes:
        filters: padded to a power of two; entries from ``num_filters`` on mean nothing.
        num_filters: int32, how many there are.
        alpha: float32, sets the score below which a patch is new.
        step: int32, M-steps done.
    """

    filters: RBFFilters
    num_filters: Array
    alpha: Array
    step: Array


class EMStatistics(NamedTuple):
    """Sums over the patches assigned to each padded filter, and last to the pooled new cluster (reference point 0.5).

    Attributes:
        counts: float32 ``(K + 1,)``, patches.
        offsets: float32 ``(K + 1, D)``, sum of ``z - mu``. Sums about the present mean: ``E[z^2] - mu^2`` cancels in
            float32.
        squares: float32 ``(K + 1,)``, sum of ``|z - mu|^2``.
        score: float32, sum of the best scores of patches that are not new.
    """

    counts: Array
    offsets: Array
    squares: Array
    score: Array


class EMStep(NamedTuple):
    """What an M-step reports; scalars, or in a history one entry for each step.

    Attributes:
        num_filters: int32, filters after the step.
        alpha: float32, alpha after the step.
        new_share: float32, share of the patches that were new.
        score: float32, mean best score of the patches that were not.
    """

    num_filters: Array
    alpha: Array
    new_share: Array
    score: Array


class EMInfo(NamedTuple):
    """What `fit` reports.

    Attributes:
        history: of all M-steps of this call.
        state: the state after the last one; give it to `fit` to go on from there.
    """

    history: EMStep
    state: EMState


def init(channels: int, *, config: EMConfig = MNIST, key: Key | None = None) -> EMState:
    """The first state: no filter at all (the released code), or with a key one drawn at random (the paper's text).

    Args:
        channels: of the images.
        config: the rules.
        key: None, or a key for one filter with mean and variance uniform in [0, 1].

    Returns:
        A state with room for 8 filters.

    Raises:
        ValueError: a key that is none, or of the old kind.
    """
    means = jnp.zeros((8, *config.size, channels), jnp.float32)
    variances = jnp.ones(8, jnp.float32)
    count = 0
    if key is not None:
        check_key(key)
        mean_key, variance_key = jax.random.split(key)
        means = means.at[0].set(jax.random.uniform(mean_key, means.shape[1:]))
        variances = variances.at[0].set(jax.random.uniform(variance_key))
        count = 1
    return EMState(RBFFilters(means, variances), jnp.int32(count), jnp.float32(1.0), jnp.int32(0))


def _order_preserving_int(bits: Array) -> Array:
    """Bits of float32 -> int32 with the floats' order: the magnitude bits of negative ones flip. Its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def best_filters(state: EMState, patches: Array, *, variance_floor: float) -> tuple[Array, Array]:
    """Index and score of the best filter of each patch.

    The index replaces the lowest bits of the score, so that one integer maximum finds both: an arg-max over the last
    axis does not vectorise on CPU and takes several times as long as everything else in the E-step.

    Args:
        state: the filters so far.
        patches: float32 ``(P, D)`` in [0, 1].
        variance_floor: lowest variance used.

    Returns:
        int32 and float32 ``(P,)``. Scores are compared, and returned, to ``K * 2**-23`` of themselves; without any
        filter the score is no number.
    """
    size = state.filters.variances.shape[0]
    index = jnp.arange(size, dtype=jnp.int32)
    peaks = peak_scores(state.filters, variance_floor=variance_floor)
    # `match_scores`, with -inf for the padding.
    peaks = jnp.where(index < state.num_filters, peaks, -jnp.inf)
    scale = 0.5 / jnp.maximum(state.filters.variances, variance_floor)
    scores = peaks - squared_distances(state.filters, patches) * scale
    ordered = _order_preserving_int(jax.lax.bitcast_convert_type(scores, jnp.int32))
    best = ((ordered & ~(size - 1)) | index).max(-1)
    score = jax.lax.bitcast_convert_type(_order_preserving_int(best & ~(size - 1)), jnp.float32)
    return best & (size - 1), score


def e_step(state: EMState, images: Array, *, config: EMConfig = MNIST, counted: Array | None = None) -> EMStatistics:
    """Assigns every patch of the images to its best filter, or to the pooled new cluster; sums what `m_step` needs.

    Args:
        state: the filters so far.
        images: float32 ``(B, H, W, C)`` in [0, 1].
        config: the rules.
        counted: bool ``(B,)``, the images that have a part in the sums; None for all.

    Returns:
        The sums. Those of several sets of images add up (`jax.tree.map(jnp.add, ...)`).
    """
    size, channels = state.filters.means.shape[0], images.shape[-1]
    grey = jnp.full((1, math.prod(config.size) * channels), 0.5, jnp.float32)
    means = jnp.concatenate([state.filters.flat_means, grey])
    # alpha at or below 0 means that nothing is new (the log would be NaN).
    grows = (state.step < config.growth_steps) & (state.alpha > 0)
    threshold = jnp.log(jnp.maximum(state.alpha, 1e-30)) + config.offset

    def add_tile(total: EMStatistics, xs: tuple[Array, Array | None]) -> tuple[EMStatistics, None]:
        tile, counted = xs
        patches = extract_patches(tile, config.size).reshape(-1, means.shape[1])
        index, score = best_filters(state, patches, variance_floor=config.variance_floor)
        # Without any filter the score is no number, hence not (score >= threshold).
        new = grows & ~(score >= threshold)
        index = jnp.where(new, size, index)
        offsets = patches - means[index]
        if counted is not None:
            counted = jnp.repeat(counted, patches.shape[0] // tile.shape[0])
            score = jnp.where(counted, score, 0.0)
            index = jnp.where(counted, index, size + 1)  # beyond the segments: left out
        columns = [offsets, jnp.sum(offsets**2, -1, keepdims=True), jnp.ones_like(offsets[:, :1])]
        sums = jax.ops.segment_sum(jnp.concatenate(columns, -1), index, size + 1)
        part = EMStatistics(sums[:, -1], sums[:, :-2], sums[:, -2], jnp.sum(jnp.where(new, 0.0, score)))
        return jax.tree.map(jnp.add, total, part), None

    most = tile_images(images.shape, config.size, size)
    tile = max(number for number in range(1, most + 1) if images.shape[0] % number == 0)
    zero = EMStatistics(*(jnp.zeros(shape, jnp.float32) for shape in (size + 1, means.shape, size + 1, ())))
    tiles = jax.tree.map(lambda array: array.reshape(-1, tile, *array.shape[1:]), (images, counted))
    return jax.lax.scan(add_tile, zero, tiles)[0]


def m_step(state: EMState, statistics: EMStatistics, *, config: EMConfig = MNIST) -> tuple[EMState, EMStep]:
    """New means and variances (Eq. 3), filters deleted and added, alpha moved.

    ``mu' = mu + sum(z - mu) / n`` and ``v' = sum|z - mu|^2 / n - |mu' - mu|^2``. A filter with at most one patch goes;
    the pooled cluster becomes a filter when it holds more than ``new_share`` of all patches; then
    ``alpha += 0.6913 / ((1 + exp(K / K0)) (1 + exp(f / 0.001))) - 0.05`` with f the share of new patches.

    Args:
        state: with room for at least one more filter.
        statistics: the sums of `e_step`.
        config: the rules.

    Returns:
        The next state and what happened.
    """
    size = state.filters.variances.shape[0]
    counts, offsets, squares, score = statistics
    shift = offsets / jnp.maximum(counts, 1)[:, None]
    reference = jnp.concatenate([state.filters.flat_means, jnp.full_like(shift[:1], 0.5)])
    # A mean of values in [0, 1] leaves it by rounding alone.
    means = jnp.clip(reference + shift, 0, 1)
    variances = jnp.maximum(squares / jnp.maximum(counts, 1) - jnp.sum(shift**2, -1), 0)

    new_share = counts[-1] / jnp.maximum(counts.sum(), 1)
    kept = (jnp.arange(size + 1) < state.num_filters) & (counts > 1)
    kept = kept.at[-1].set(new_share > config.new_share)
    order = jnp.argsort(~kept, stable=True)[:size]
    count = kept.sum(dtype=jnp.int32)

    growth = 0.6913 / (
        (1 + jnp.exp(count.astype(jnp.float32) / config.expected_filters)) * (1 + jnp.exp(new_share / 0.001))
    )
    alpha = state.alpha + growth - 0.05
    filters = RBFFilters(means[order].reshape(state.filters.means.shape), variances[order])
    report = EMStep(count, alpha, new_share, score / jnp.maximum(counts[:-1].sum(), 1))
    return EMState(filters, count, alpha, state.step + 1), report


@functools.partial(jax.jit, static_argnames="config")
def _step(state: EMState, images: Array, config: EMConfig, counted: Array | None = None) -> tuple[EMState, EMStep]:
    def on_device(images: Array, counted: Array | None) -> EMStatistics:
        return jax.tree.map(lambda sums: sums[None], e_step(state, images, config=config, counted=counted))

    parts = parallel.per_device(on_device)(images, counted)
    return m_step(state, jax.tree.map(lambda sums: sums.sum(0), parts), config=config)


def _with_room(state: EMState) -> EMState:
    """Doubles the padding when one more filter would not fit."""
    size = state.filters.variances.shape[0]
    if int(state.num_filters) < size:
        return state
    means, variances = state.filters
    padded = RBFFilters(
        jnp.concatenate([means, jnp.zeros_like(means)]), jnp.concatenate([variances, jnp.ones_like(variances)])
    )
    return state._replace(filters=padded)


def fit(
    images: Array,
    *,
    config: EMConfig = MNIST,
    key: Key | None = None,
    state: EMState | None = None,
    progress: bool = True,
) -> tuple[RBFFilters, EMInfo]:
    """Learns filters from images by the non-parametric EM.

    Deterministic: the released rules draw nothing at random. Compiled once for each power of two that the number
    of filters passes. Interrupted runs go on exactly: ``fit(images, config=config._replace(steps=100))`` and then
    ``fit(images, config=config, state=info.state)`` give what one run gives.

    Args:
        images: float32 ``(N, H, W, C)`` in [0, 1].
        config: the rules, `MNIST` or `CIFAR10` or your own.
        key: optional, for the paper's randomly drawn first filter.
        state: where to go on from; None starts anew.
        progress: show a progress bar.

    Returns:
        The filters, and the history of the run.

    Raises:
        ValueError: images or rules out of range, both key and state given, a state of other filters or of another room,
            or rules under which no filter begins.

    Reference: Section III a, Eq. 3.
    """
    check_images(images)
    check_em_config(config)
    if key is not None and state is not None:
        raise ValueError("key draws a first filter for a new run: it cannot be given together with state")
    patch_grid(images.shape, config.size)
    current = init(images.shape[-1], config=config, key=key) if state is None else state
    wanted = (*config.size, images.shape[-1])
    if current.filters.means.shape[1:] != wanted:
        raise ValueError(f"state must have filters of {wanted}, got {current.filters.means.shape[1:]}")
    room = len(current.filters.variances)
    if room & (room - 1):  # masks of indices take it for one
        raise ValueError(f"state must have room for a power of two of filters, got {room}: pad it with unused ones")
    first = int(current.step)
    if first >= config.steps:
        raise ValueError(f"steps must be above the {first} M-steps that the state has behind it, got {config.steps}")
    history, images = [], np.asarray(images)
    # Images that fill up the devices' parts are not counted.
    filled = parallel.filled(config.images_per_step)
    counted = None
    if filled > config.images_per_step:
        counted = parallel.take(np.arange(filled) < config.images_per_step, np.arange(filled))
    with tqdm(total=config.steps, initial=first, desc="EM", unit="step", disable=not progress) as bar:
        for step in range(first, config.steps):
            current = _with_room(current)
            rows = (step * config.images_per_step + np.arange(filled)) % images.shape[0]
            current, report = _step(current, parallel.take(images, rows), config, counted)
            history.append(report)
            bar.set_postfix(filters=int(report.num_filters), refresh=False)
            bar.update()
    count = int(current.num_filters)
    if count == 0:
        raise ValueError(
            f"EM ended without any filter: growth_steps = {config.growth_steps} and new_share = {config.new_share} let "
            "none begin"
        )
    filters = RBFFilters(current.filters.means[:count], current.filters.variances[:count])
    return filters, EMInfo(jax.tree.map(lambda *entries: jnp.stack(entries), *history), current)
