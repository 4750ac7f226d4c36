"""The defence as a model: RBF front end, then a classifier (Eq. 5 of the paper)."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from rbf_jax.checks import check_choice, check_count, check_logits, split_keys
from rbf_jax.rbf import CONSTANTS, RBFFilters, check_filters
from rbf_jax.reconstruction import NOISES, SCALES, bpda, check_beta1, check_beta2, reconstruct, sample_reconstruction
from rbf_jax.types import Array, LogitsFn, as_partial, one_for_each


class Defense(NamedTuple):
    """The four forms of a defended model, each a LogitsFn that may cross a ``jit`` boundary.

    Attributes:
        static: no noise, z_j = mu_j; the front end ignores the key. What the paper's static attacks attack.
        draw: one noisy draw, with its exact gradient through the true clip (exact EoT averages this).
        bpda: one noisy draw forward, the static reconstruction backward (the paper's adaptive attack).
        predict: the prediction, log of the mean softmax over the draws (Eq. 5).
    """

    static: LogitsFn
    draw: LogitsFn
    bpda: LogitsFn
    predict: LogitsFn


class _Settings(NamedTuple):
    noise: str
    scale: str
    constant: str
    draws: int


def _static(settings, filters, logits_fn, beta1, beta2, key, images):
    del beta2
    return logits_fn(key, reconstruct(filters, images, beta1, constant=settings.constant))


def _sample(settings, filters, beta1, beta2, key, images, draws=None):
    noise, scale, constant, _ = settings
    return sample_reconstruction(
        key, filters, images, beta1, beta2, noise=noise, scale=scale, draws=draws, constant=constant
    )


def _draw(settings, filters, logits_fn, beta1, beta2, key, images):
    noise_key, model_key = split_keys(key)
    return logits_fn(model_key, _sample(settings, filters, beta1, beta2, noise_key, images))


def _bpda(settings, filters, logits_fn, beta1, beta2, key, images):
    noise_key, model_key = split_keys(key)
    static = reconstruct(filters, images, beta1, constant=settings.constant)
    sampled = _sample(settings, filters, beta1, beta2, noise_key, jax.lax.stop_gradient(images))
    return logits_fn(model_key, bpda(static, sampled))


def _predict(settings, filters, logits_fn, beta1, beta2, key, images):
    noise_key, model_key = split_keys(key)
    sampled = _sample(settings, filters, beta1, beta2, noise_key, images, draws=settings.draws)
    model_keys = one_for_each(model_key, images.shape[0])
    keys = jax.vmap(lambda key: jax.random.split(key, settings.draws))(model_keys)
    logits = logits_fn(keys.swapaxes(0, 1).reshape(-1), sampled.reshape(-1, *images.shape[1:]))
    check_logits(logits, settings.draws * images.shape[0])
    # In half precision many means would tie.
    log_softmax = jax.nn.log_softmax(logits.astype(jnp.float32)).reshape(settings.draws, images.shape[0], -1)
    return jax.nn.logsumexp(log_softmax, axis=0) - math.log(settings.draws)


@functools.cache
def _bind(form: Callable[..., Array], settings: _Settings) -> Callable[..., Array]:
    # The same settings give the same function object, so that `defend` called anew (other weights) compiles nothing.
    def bound(filters, logits_fn, beta1, beta2, key, images):
        return form(settings, filters, logits_fn, beta1, beta2, key, images)

    return bound


def defend(
    filters: RBFFilters,
    logits_fn: LogitsFn,
    *,
    beta1: Array | float,
    beta2: Array | float,
    draws: int = 10,
    noise: str = "per_run",
    scale: str = "variance",
    constant: str = "none",
) -> Defense:
    """Puts the RBF front end before a classifier.

    Args:
        filters: the K filters.
        logits_fn: the classifier of rebuilt images. For results under ``jit`` without recompilation a
            ``jax.tree_util.Partial``, as `models.logits_fn` makes.
        beta1: sharpness of the weights, in (0, 100], natural base.
        beta2: noise level, at least 0.
        draws: m, noisy draws that one prediction averages.
        noise: ``"per_run"`` or ``"per_patch"``, see `reconstruction.sample_reconstruction`.
        scale: ``"variance"``, ``"sigma"`` or ``"sqrt_sigma"``, see `reconstruction.sample_std`.
        constant: see `rbf.match_scores`.

    Returns:
        The four forms. ``predict`` hands the classifier ``draws * B`` images at once.

    Raises:
        ValueError: an argument out of range.

    Reference: Section III c, Eq. 5.
    """
    check_filters(filters)
    check_beta1(beta1)
    check_beta2(beta2)
    check_count(draws, "draws")
    check_choice(noise, "noise", NOISES)
    check_choice(scale, "scale", SCALES)
    check_choice(constant, "constant", CONSTANTS)
    settings = _Settings(noise, scale, constant, draws)
    arguments = (filters, as_partial(logits_fn), jnp.float32(beta1), jnp.float32(beta2))
    return Defense(*(Partial(_bind(form, settings), *arguments) for form in (_static, _draw, _bpda, _predict)))
