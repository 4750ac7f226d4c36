"""Attacks that know the defence: other forms of the model to attack, and attacks that go by way of other models."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from rbf_jax.attacks.driver import Composed, Iterative, is_misled
from rbf_jax.attacks.gradients import RESULT, fold_in, logits_at
from rbf_jax.checks import check_key, check_single_key, split_keys
from rbf_jax.types import Array, AttackResult, Key, LogitsFn, as_partial, one_for_each


def _straight_through(front: LogitsFn, logits_fn: LogitsFn, key: Key, images: Array) -> Array:
    front_key, model_key = split_keys(key)
    return logits_fn(model_key, images + jax.lax.stop_gradient(front(front_key, images) - images))


def straight_through(front: LogitsFn, logits_fn: LogitsFn) -> Partial:
    """The model ``f(g(x))`` with the front end g taken for the identity in the backward pass (identity BPDA).

    For front ends without a useful gradient (quantisers, saturated or sampled ones). Forward it is the true model.

    Args:
        front: (key, images) -> images ``(B, H, W, C)``.
        logits_fn: the classifier of what comes out.

    Returns:
        A LogitsFn.

    Reference: Athalye et al., ICML 2018.
    """
    return Partial(_straight_through, as_partial(front), as_partial(logits_fn))


def _known_noise(logits_fn: LogitsFn, noise_key: Key, key: Key, images: Array) -> Array:
    del key
    # A key for each image: of a single one a model may make a noise for each place in the batch.
    return logits_fn(jnp.broadcast_to(noise_key, images.shape[:1]), images)


def known_noise(logits_fn: LogitsFn, key: Key) -> Partial:
    """The randomised model under one known draw of its noise: deterministic, whatever key it is given.

    The threat model of an attacker who knows the defence's random state: attack this model, and score on it.

    Args:
        logits_fn: a randomised model.
        key: of the draw; a single one, shared by all images.

    Returns:
        A LogitsFn.

    Raises:
        ValueError: not a single key.
    """
    check_single_key(key)
    return Partial(_known_noise, as_partial(logits_fn), key)


def _transfer(
    attack: Iterative | Composed, models, keys, logits_fn, images, labels, *, targets, **options
) -> AttackResult:
    (source,) = models
    check_key(keys)
    crafted = attack(keys, source, images, labels, targets=targets, **options)
    keys = one_for_each(keys, len(images))
    logits = logits_at(logits_fn, fold_in(keys, RESULT), crafted.images)
    return crafted._replace(success=is_misled(logits, labels, targets), forwards=crafted.forwards + 1)


def transfer(attack: Iterative | Composed, source: LogitsFn) -> Composed:
    """Crafts on one model and looks once at another: the attack's images as the source left them.

    Also for attacking one form of a defence and scoring on another. The passes counted are those of both models.

    Args:
        attack: which crafts.
        source: the model it attacks.

    Returns:
        The attack; ``success`` is that on the model it is called with.
    """
    return Composed(attack.norm, partial(_transfer, attack), (as_partial(source),))


def _annealed(attack, warm_up, models, keys, logits_fn, images, labels, *, start, **options) -> AttackResult:
    check_key(keys)
    keys = one_for_each(keys, len(images))
    spent = jnp.zeros((2, len(images)), jnp.int32)
    for number, model in enumerate(models):
        result = warm_up(fold_in(keys, number), model, images, labels, start=start, **options)
        start, spent = result.images, spent + jnp.stack([result.forwards, result.backwards])
    result = attack(fold_in(keys, len(models)), logits_fn, images, labels, start=start, **options)
    return result._replace(forwards=spent[0] + result.forwards, backwards=spent[1] + result.backwards)


def annealed(
    attack: Iterative | Composed, surrogates: Sequence[LogitsFn], *, warm_up: Iterative | Composed | None = None
) -> Composed:
    """Attacks smoother surrogates first, each from where the last one ended, and the model itself at the end.

    For a front end whose softmax is too sharp to give a gradient: surrogates of the same defence with a smaller beta1,
    raised step by step to the real one.

    Args:
        attack: one that takes a start.
        surrogates: models in the order in which they are attacked, at least one.
        warm_up: the attack on the surrogates; None for the same. For a randomised model, one of many draws, that
            starts where an attack without noise ended.

    Returns:
        The attack.

    Raises:
        ValueError: no surrogate.
    """
    if not surrogates:
        raise ValueError("surrogates must be at least one model, got none")
    return Composed(attack.norm, partial(_annealed, attack, warm_up or attack), tuple(map(as_partial, surrogates)))
