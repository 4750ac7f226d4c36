"""Pages of what many attacks leave of one model, from their ledgers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import results
from experiments.catalogue import ball
from experiments.provenance import joined
from experiments.recipes import RECIPES
from experiments.report import format_table
from rbf_jax import evaluate
from rbf_jax.evaluate import Outcomes
from rbf_jax.files import read_json

SPENT = ("forward passes an image", "backward passes an image", "seconds an image")


def _left(right: np.ndarray) -> str:
    """Accuracy in percent, with its interval, of bool ``(redraws, N)``."""
    found = results.measured(right)
    low, high = found["wilson95"]
    return f"{found['accuracy']:.2f} ({low:.2f}-{high:.2f})"


def _origin(ledgers: Sequence[Outcomes]) -> str:
    def all_of(fact: str) -> str | None:
        return joined(ledger.facts[fact] for ledger in ledgers)

    return f"Commit {all_of('commit')}, {all_of('device')}, {all_of('cores')} core(s), jax {all_of('jax')}."


def union(ledgers: Sequence[Outcomes]) -> np.ndarray:
    """Which examples survive the worst of the attacks, bool ``(redraws, N)``; see `evaluate.worst_case`."""
    ledgers = sorted(ledgers, key=lambda ledger: (ledger.facts["attack"] != "clean", ledger.facts["attack"]))
    return evaluate.worst_case(np.stack([o.selection for o in ledgers]), np.stack([o.scoring for o in ledgers]))


def arena(settings: dict[str, Any], ledgers: Sequence[Outcomes]) -> str:
    """Every attack on one defended model, by threat model, the strongest first."""
    fingerprints = " or ".join(sorted({ledger.facts["weights"][:8] for ledger in ledgers}))
    title = f"{RECIPES[settings['model']].title}, {settings['set']}, {ball(settings['norm'], settings['epsilon'])}"
    parts = [
        f"# Every attack on one model: {title}",
        f"Percent of {settings['N']} images that are classified rightly under each attack, with the 95 % Wilson "
        f"interval, by the mean of {settings['draws']} draws at beta2 = {settings['beta2']:g}. With secret noise an "
        "image is scored on fresh redraws, and 'the worst of all' takes for each image the attack that was worst on "
        "other redraws. With known noise attacker and score have one draw in common. The two are never mixed. Passes "
        "are those of the attacked form; one of the prediction counts once, not once for each draw. Attacks of least "
        "distance (DeepFool, FAB-T, CW-linf, RayS) stop at the boundary of the model without noise, from where noise "
        "brings most images back: what they leave is no sign of robustness.",
        f"{_origin(ledgers)} What was scored has the fingerprint {fingerprints} ('weights' in a `results.json`).",
    ]
    for suite in dict.fromkeys(ledger.facts["suite"] for ledger in sorted(ledgers, key=lambda o: -len(o.selection))):
        found = [ledger for ledger in ledgers if ledger.facts["suite"] == suite]
        found.sort(key=lambda ledger: float(ledger.scoring.mean()))
        lines = [{"attack": "the worst of all", "left": _left(union(found))}]
        for ledger in found:
            spent = {what: f"{ledger.facts[what]:g}" for what in SPENT if what in ledger.facts}
            lines.append({"attack": ledger.facts["attack"], "left": _left(ledger.scoring)} | spent)
        headings = ("attack", "left", *SPENT)
        parts += [
            f"## {suite.capitalize()}",
            format_table(headings, [dict.fromkeys(headings, "–") | line for line in lines]),
        ]
    return "\n\n".join(parts) + "\n"


def robust_net(settings: dict[str, Any], ledgers: Sequence[Outcomes]) -> str:
    """What the suite leaves of a published robust network, attack by attack in their order."""
    left, lines = None, []
    for ledger in sorted(ledgers, key=lambda ledger: ledger.facts["seed"]):
        facts, robust = ledger.facts, ledger.scoring
        left = robust if left is None else left & robust
        lines.append(
            {
                "attack": facts["stage"],
                "images met": str(facts["attacked"]),
                "left by it alone": _left(robust) if facts["alone"] else "–",
                "left by all so far": _left(left),
                "forward passes": str(facts["forward passes"]),
                "backward passes": str(facts["backward passes"]),
                "seconds": str(facts["seconds"]),
            }
        )
    others = [{"attack": name, "left": f"{value:.2f}"} for name, value in settings["others"].items()]
    return (
        "\n\n".join(
            [
                "# The attacks on a published robust network",
                f"TRADES on MNIST, linf {settings['epsilon']:g}: percent of {ledgers[0].scoring.shape[1]} test images "
                "that are left, with the 95 % Wilson interval. Slow attacks met the images that stood closest to being "
                "broken by those before; the others count as robust, so that every figure is an upper bound.",
                _origin(ledgers),
                format_table(list(lines[0]), lines),
                "## What others left, of all 10,000 (the network's leaderboard, and AutoAttack's)",
                format_table(("attack", "left"), others),
            ]
        )
        + "\n"
    )


KINDS = {"arena": arena, "robust_net": robust_net}


def page(folder: Path) -> str:
    """The page of a folder with ``settings.json`` and ``ledger/``."""
    settings = read_json(folder / "settings.json", "Publish it again")
    ledgers = [evaluate.load_outcomes(path) for path in sorted(folder.glob("ledger/[!.]*.npz"))]
    return KINDS[settings["kind"]](settings, ledgers)
