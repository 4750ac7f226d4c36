"""Suites of attacks: the worst of several, example by example, also over several norms."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from rbf_jax import parallel
from rbf_jax.attacks import Composed, Iterative
from rbf_jax.attacks.checks import differ
from rbf_jax.checks import check_images, check_labels, check_single_key
from rbf_jax.evaluate.batched import check_attack, indices, predict, run_attack, survival
from rbf_jax.evaluate.ledger import Parts
from rbf_jax.files import as_path
from rbf_jax.types import Array, Attack, Key, LogitsFn, as_it_is


class SuiteResult(NamedTuple):
    """How N examples fared under a suite of A attacks; NumPy arrays.

    Attributes:
        names: of the attacks; the first, ``"clean"``, is none.
        norms: their norms' names, ``""`` for clean and for functions of one's own.
        survived: ``(A, N)``, the share of the selection redraws on which the example stayed right under the attack;
            NaN where the attack was left out, as the example was broken before.
        attack: int ``(N,)``, the worst attack of each example: an index into the names, 0 where it was wrong from the
            start (``survived[0]`` is 0), where no attack broke a deterministic model, or where all raised a noisy
            one's share.
        restart: int ``(N,)``, which restart of it, or run towards one target, found the image.
        distance: ``(N,)``, of that image, in the attack's norm.
        images: ``(N, H, W, C)``, that image. Where no attack broke a deterministic model, image, restart and distance
            are those of the first attack, for looking on (a noisy form of the model may err there).
        robust: bool ``(R, N)``, whether that image is classified rightly, on fresh redraws; R = 1 without noise.
        forwards: int ``(A, N)``, forward passes spent by each attack.
        backwards: int ``(A, N)``, backward passes.
    """

    names: tuple[str, ...]
    norms: tuple[str, ...]
    survived: np.ndarray
    attack: np.ndarray
    restart: np.ndarray
    distance: np.ndarray
    images: np.ndarray
    robust: np.ndarray
    forwards: np.ndarray
    backwards: np.ndarray


def run_suite(
    key: Key,
    suite: Mapping[str, Attack],
    logits_fn: LogitsFn,
    images: Array,
    labels: Array,
    *,
    judge: LogitsFn | None = None,
    redraws: tuple[int, int] = (10, 5),
    union: bool = True,
    rows: Array | None = None,
    batch_size: int | None = None,
    directory: str | Path | None = None,
    progress: bool = False,
) -> SuiteResult:
    """Runs attacks one after the other, and says for each example which of them is the worst.

    A deterministic model is its own judge: an example is broken as soon as one attack succeeds. A randomised one is
    judged by its prediction under fresh noise, never by what an attack saw: an attack's image is scored on selection
    redraws, the worst attack is the one with the smallest share of right predictions, the first of equals (none where
    all raised it), and its image is scored once more on redraws that nothing was selected on. Logits with a NaN are
    never right to the judge, and mislead nobody to an attack: where a model overflows, nothing is searched.

    Args:
        key: example i takes keys that depend on ``rows[i]`` alone, not on the batch.
        suite: attacks by name, of one norm or of several; their own epsilons.
        logits_fn: the model that is attacked, see `run_attack`. An attack on another form of it is
            ``attacks.transfer(attack, form)``.
        images: float32 ``(N, H, W, C)`` in [0, 1].
        labels: int32 or int64 ``(N,)``.
        judge: the prediction of a randomised model (a defence's ``predict``); None for a deterministic model.
        redraws: of the judge, for selection and for the final score.
        union: only the worst case is wanted: attacks go on with the examples that are not broken yet (right on at least
            one selection redraw), and a deterministic model's examples leave an attack as soon as it succeeds.
        rows: the examples' indices in their data set, ``(N,)``; None for 0 to N - 1.
        batch_size: images at a time; None for what fits, see `fitting_batch`.
        directory: where finished batches are kept, so that a run that was stopped goes on; None for nowhere.
        progress: whether to show bars.

    Returns:
        The result; ``result.robust.mean()`` is the robust accuracy.

    Raises:
        ValueError: an argument out of range, an empty suite, an attack called ``clean``, a randomised model without a
            judge, or a directory of another run.
    """
    check_single_key(key)
    check_images(images)
    check_labels(labels, len(images))
    if not isinstance(suite, Mapping):
        raise ValueError(f"suite must be a dictionary of attacks by name, got {type(suite).__name__}")
    if not suite or "clean" in suite:
        raise ValueError(f"suite must hold at least one attack, none called 'clean', got {list(suite)}")
    logits_fn = as_it_is(logits_fn)
    images, labels = np.array(images), np.asarray(labels, np.int32)
    total, names = len(images), ("clean", *suite)
    rows = indices(rows, total)
    norm_names = {name: _norm_name(name, attack) for name, attack in suite.items()}
    size = fitting_batch(logits_fn, images) if batch_size is None else batch_size
    random, judge = judge is not None, logits_fn if judge is None else as_it_is(judge)
    selection, scoring = redraws if random else (1, 1)
    attack_key, select_key, score_key = jax.random.split(key, 3)

    def kept(*names: str) -> Parts | None:
        facts = {"attack": names[0], "union": union}
        return None if directory is None else Parts(as_path(directory).joinpath(*names), facts)

    def score(key: Key, moved: Array, live: np.ndarray, count: int, parts: Parts | None = None) -> np.ndarray:
        return survival(key, judge, moved, labels[live], redraws=count, rows=rows[live], batch_size=size, parts=parts)

    everything = np.arange(total)
    survived = np.full((len(names), total), np.nan)
    survived[0] = score(select_key, images, everything, selection, kept("clean", "scores")).mean(0)
    if not random and differ(*(predict(jax.random.key(seed), logits_fn, images[:32]) for seed in (0, 1))):
        raise ValueError("logits_fn gives other logits under another key: name the judge of its noise, judge=")
    worst, restart, moved = np.zeros(total, int), np.zeros(total, int), images.copy()
    distance, passes = np.zeros(total), np.zeros((2, len(names), total), int)
    least = survived[0].copy()
    for number, (name, attack) in enumerate(suite.items(), 1):
        live = np.flatnonzero(least > 0) if union else everything
        if not len(live):
            break
        found = run_attack(
            jax.random.fold_in(attack_key, number),
            attack,
            logits_fn,
            images[live],
            labels[live],
            rows=rows[live],
            leave=union and not random,
            batch_size=size,
            parts=kept(name),
            progress=name if progress else None,
        )
        select = jax.random.fold_in(select_key, number)
        share = score(select, found.images, live, selection, kept(name, "scores")).mean(0)
        survived[number, live] = share
        passes[:, number, live] = found.forwards, found.backwards
        # Right on all selection redraws is not right on all: of equals an attack's image is worse than the clean one.
        lower = (share < least[live]) | ((share == least[live]) & (worst[live] == 0) & (share > 0))
        at = live[lower]
        least[at], worst[at], moved[at] = share[lower], number, found.images[lower]
        restart[at], distance[at] = found.restart[lower], found.distance[lower]
    if not random:
        worst[least > 0] = 0
    robust = score(score_key, moved, everything, scoring)
    return SuiteResult(names, ("", *norm_names.values()), survived, worst, restart, distance, moved, robust, *passes)


def _norm_name(name: str, attack: Attack) -> str:
    """Of the attack's norm; empty for a function of one's own, which names none."""
    check_attack(attack, f"suite[{name!r}]")
    return attack.norm.name if isinstance(attack, Iterative | Composed) else ""


MEMORY = 2**31
"""Bytes that the activations of a batch may take where the device does not say what it has."""

LARGEST_BATCH = 1024


def fitting_batch(logits_fn: LogitsFn, images: Array) -> int:
    """The largest power of two whose activations, forward and backward, fill at most half of the device's memory.

    Asks the compiler for what a batch of eight takes; of a model without a gradient, forward alone.

    Args:
        logits_fn: the model.
        images: ``(N, H, W, C)``; only their shape counts.

    Returns:
        1 to 1024.
    """
    logits_fn, shape = as_it_is(logits_fn), (8, *images.shape[1:])

    def forward(logits_fn: LogitsFn, key: Key, images: Array) -> Array:
        return jax.nn.log_softmax(logits_fn(key, images))[:, 0].sum()

    keys = jax.random.split(jax.random.key(0), shape[0])
    shapes = jax.eval_shape(lambda *arguments: arguments, logits_fn, keys)
    with jax.set_mesh(parallel.mesh(jax.local_devices()[:1])):  # a device's own share
        given = (*shapes, jax.ShapeDtypeStruct(shape, np.float32))
        try:
            lowered = jax.jit(jax.grad(forward, argnums=2)).lower(*given)
        except ValueError:  # callbacks and while loops have no gradient; gradient-free attacks want none
            lowered = jax.jit(forward).lower(*given)
        program = lowered.compile()
    analysis = program.memory_analysis()
    taken = analysis.temp_size_in_bytes / shape[0] if analysis else 1
    stats = jax.local_devices()[0].memory_stats() or {}
    fitting = int(stats.get("bytes_limit", 2 * MEMORY) / 2 / max(taken, 1))
    return max(1, min(LARGEST_BATCH, 1 << (fitting.bit_length() - 1))) if fitting else 1
