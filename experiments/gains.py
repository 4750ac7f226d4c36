"""What one model keeps more than another in the worst case: what a front end, or its noise, adds."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from experiments.catalogue import GRADIENT_FREE, KINDS
from experiments.results import in_percent, met_by_all, survivors
from rbf_jax import evaluate
from rbf_jax.evaluate import Outcomes


class Gain(NamedTuple):
    """Accuracy of one model minus that of another, in points of percent.

    Attributes:
        points: the difference.
        low: lower end of its paired 95 % interval.
        high: upper end.
        images: on how many.
        attacks: how many met both, or average over the noise of one.
    """

    points: float
    low: float
    high: float
    images: int
    attacks: int


def gain(
    ledger: Iterable[Outcomes], one: tuple[str, str], other: tuple[str, str], norm: str, epsilon: float
) -> Gain | None:
    """How much more of one model than of the other is left in the worst case, on the images that met all attacks.

    The attacks are those that both met: one that met only the first would make the other look better. Those that need a
    front end's noise have no counterpart, and count; where a noisy prediction met none, the gain is not known. Where
    fewer attacks leave nothing of more images of both, no further attack could, and these images count. Else it is not
    known either where no attack that does without gradients met both: it may be of hidden ones.

    Args:
        ledger: outcomes of the cells.
        one: model and form.
        other: the same.
        norm: of the budget.
        epsilon: likewise.

    Returns:
        The gain; None where it is not known, or no image met all attacks.
    """
    budget = (norm, epsilon)
    groups: list[list[Outcomes]] = [[], []]
    for outcomes in ledger:
        facts = outcomes.facts
        for group, model in zip(groups, (one, other), strict=True):
            known = ((facts["model"], facts["scored_on"]), (facts["norm"], facts["epsilon"])) == (model, budget)
            if known and facts["role"] != "cell":
                group.append(outcomes)
    averaged = [any(KINDS[outcomes.facts["attack"]].noisy for outcomes in group) for group in groups]
    if any(form != "static" and not known for (_, form), known in zip((one, other), averaged, strict=True)):
        return None
    found = [_pair(groups, size) for size in sorted({len(o.rows) for group in groups for o in group})]
    if not found or found[0] is None:
        return None
    nothing = [pair for pair in found if pair and not pair.one.any() and not pair.other.any()]
    if not nothing and not GRADIENT_FREE & found[0].kinds:
        return None
    pair = nothing[-1] if nothing else found[0]
    differences = [*map(float, pair.one - pair.other)]
    low, high = evaluate.paired_interval(differences)
    points = math.fsum(differences) / len(differences)
    return Gain(in_percent(points), in_percent(low), in_percent(high), len(differences), pair.attacks)


class _Pair(NamedTuple):
    """The shares of redraws that the images of two models survive, and which and how many attacks they met."""

    one: np.ndarray
    other: np.ndarray
    kinds: set[str]
    attacks: int


def _pair(groups: list[list[Outcomes]], size: int) -> _Pair | None:
    """Two models under those attacks that met so many images at least, and met both models or know noise."""
    large = [[outcomes for outcomes in group if len(outcomes.rows) >= size] for group in groups]
    common = set.intersection(*({outcomes.facts["title"] for outcomes in group} for group in large))
    part = [[o for o in group if o.facts["title"] in common or KINDS[o.facts["attack"]].noisy] for group in large]
    examples = met_by_all(part[0] + part[1]) if common else np.array([])
    if not len(examples):
        return None
    one, other = (survivors(group, examples).mean(0) for group in part)
    kinds = {outcomes.facts["attack"] for outcomes in part[0] if outcomes.facts["title"] in common}
    return _Pair(one, other, kinds, len({outcomes.facts["title"] for group in part for outcomes in group}))
