"""What is published: rows and tables, made from the ledger alone."""

import collections
import functools
import itertools
import json
from collections.abc import Iterable
from typing import Any

import numpy as np

from experiments.catalogue import KINDS, ball
from experiments.provenance import ROOT, joined
from experiments.recipes import RECIPES
from rbf_jax import evaluate
from rbf_jax.evaluate import Outcomes

PAPER = json.loads((ROOT / "experiments" / "paper_results.json").read_text())
BETA2 = PAPER["settings"]["beta2_test"]
WORST, UNION = "worst of these", "worst over norms"
SCORED = "scoring seconds"
PERCENT_DIGITS = 4
"""Of percentages that are stored: far below the one digit of the tables, which would else round what was rounded."""


def paper_number(
    data_set: str, model: str, form: str, attack: str, norm: str, epsilon: float, beta2: float = BETA2
) -> float | None:
    """The paper's accuracy in percent for a cell; None where it has none.

    Args:
        data_set: ``"mnist"`` or ``"cifar10"``; others are not in the paper.
        model: name of the model.
        form: that scores; the paper's rCNN and rCNN+ are noisy predictions, but for Table VII's other levels of noise.
        attack: a name of `catalogue.KINDS`, behind ``"transfer_"`` where it is transferred.
        norm: name of the norm, empty for clean.
        epsilon: radius of the ball.
        beta2: the level of noise of the form ``"predict"``.
    """
    if data_set not in PAPER["settings"]["linf_eps"]:
        return None
    defended = model in ("rcnn", "rcnn_plus")
    if norm and epsilon != PAPER["settings"][f"{norm}_eps"][data_set]:
        beyond = PAPER["table4_linf_bounds"]["rows"].get(f"{data_set}/{epsilon:g}")
        # There Madry's met PGD alone; which attack the others' numbers are of is not said.
        return beyond[0] if beyond and (model, attack, norm) == ("madry", "pgd", "linf") else None
    if not defended and form != "static":
        return None
    if defended and (level := _level(form, beta2)) != BETA2:
        rows = PAPER["table7_beta2_tradeoff"][data_set]
        key = f"{norm}/{attack}" if norm else attack
        known = model == "rcnn_plus" and key in rows and level in rows["beta2"]
        return rows[key][rows["beta2"].index(level)] if known else None
    compared = strongest(data_set, model)
    if compared and not defended and norm == "linf":
        return compared[0] if attack == compared[1] else None
    if norm in ("", "linf"):
        columns, row = PAPER["table1_linf"]["columns"], PAPER["table1_linf"]["rows"].get(attack)
        return row[columns.index(f"{data_set}/{model}")] if defended and row is not None else None
    columns = PAPER["table5_l1_l2"][f"columns_{norm}"]
    row = PAPER["table5_l1_l2"][norm].get(f"{data_set}/{model}")
    return row[columns.index(attack)] if row is not None and attack in columns else None


def strongest(data_set: str, model: str) -> tuple[float, str] | None:
    """What the strongest attack leaves of a model in the paper's Table III, and its name; None where it has none."""
    found = PAPER["table3_linf_comparison"][data_set].get({"cnn": "baseline"}.get(model, model))
    return found and (float(found[0]), found[1])


def _level(form: str, beta2: float) -> float:
    """The level of noise of a defended model's form."""
    return 0.0 if form == "static" else float(form.partition("@")[2] or beta2)


def make_rows(
    data_set: str, ledger: Iterable[Outcomes], unions: Iterable[dict[str, float]] = (), beta2: float = BETA2
) -> list[dict[str, Any]]:
    """One record for each cell, then each model's worst cases: over the attacks of one norm, and over norms.

    Args:
        data_set: for the paper's numbers.
        ledger: outcomes of the cells.
        unions: budgets by norm, over which together a worst case is taken.
        beta2: the level of noise of the form ``"predict"``.
    """
    ledger = list(ledger)
    check_one_weight(f"the ledger of {data_set} holds", (outcomes.facts for outcomes in ledger))
    # What a cell's scoring took in one form: with the redraws that only its worst cases need.
    took = collections.Counter[tuple[Any, ...]]()
    for outcomes in ledger:
        took[_scored(outcomes.facts)] += outcomes.facts.get(SCORED, 0.0)
    rows = [
        _row(data_set, beta2, o.facts | {SCORED: round(took[_scored(o.facts)], 1)}, o.scoring)
        for o in ledger
        if o.facts["role"] != "union"
    ]
    groups: dict[tuple[str, str], dict[tuple[str, float], list[Outcomes]]] = {}
    for outcomes in ledger:
        facts = outcomes.facts
        if facts["role"] != "cell":
            of_model = groups.setdefault((facts["model"], facts["scored_on"]), {})
            of_model.setdefault((facts["norm"], facts["epsilon"]), []).append(outcomes)
    for budgets in groups.values():
        for (norm, epsilon), group in budgets.items():
            rows += _worst(
                data_set, beta2, [group], {"attack": WORST, "title": WORST, "norm": norm, "epsilon": epsilon}
            )
        for union in unions:
            if all(budget in budgets for budget in union.items()):
                title = union_title(union)
                parts = [budgets[budget] for budget in union.items()]
                rows += _worst(data_set, beta2, parts, {"attack": UNION, "title": title, "norm": "", "epsilon": 0.0})
    return rows


def _scored(facts: dict[str, Any]) -> tuple[Any, ...]:
    """The cell and the form."""
    return tuple(facts.get(key) for key in ("model", "source", "attack", "norm", "epsilon", "crafted_on", "scored_on"))


def union_title(budgets: dict[str, float]) -> str:
    """What the worst case over budgets by norm is called."""
    return f"{UNION}: " + ", ".join(itertools.starmap(ball, budgets.items()))


def check_one_weight(where: str, facts: Iterable[dict[str, Any]], form: str = "scored_on") -> None:
    """Raises ValueError where one form of a model comes with several weights; ``form`` is the name of its fact."""
    weights = {(of["model"], of[form], of["weights"]) for of in facts}
    if len(weights) > len({key[:2] for key in weights}):
        raise ValueError(f"{where} several weights of one model: remove the older ones")


def measured(right: np.ndarray) -> dict[str, Any]:
    """Accuracy in percent of bool ``(redraws, N)``, with its interval."""
    total, accuracy = right.shape[-1], float(right.mean(-1).mean())
    ends = evaluate.wilson_interval(accuracy * total, total)
    return {"N": total, "accuracy": in_percent(accuracy), "wilson95": [*map(in_percent, ends)]}


def in_percent(share: float) -> float:
    """A share in percent, to `PERCENT_DIGITS`."""
    return round(100 * share, PERCENT_DIGITS)


def _worst(data_set: str, beta2: float, groups: list[list[Outcomes]], facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The worst cases over the attacks that so many examples met, for every number of examples of one of them.

    Each of the groups has a part in all, with an attack on the model itself. A deterministic model's one outcome also
    selects.
    """
    found, group = [], [outcomes for group in groups for outcomes in group]
    own = [[len(o.rows) for o in group if o.facts["source"] == o.facts["model"]] for group in groups]
    most = min((max(sizes, default=0) for sizes in own), default=0)
    for size in sorted({len(o.rows) for o in group if 0 < len(o.rows) <= most}, reverse=True):
        part = [outcomes for outcomes in group if len(outcomes.rows) >= size]
        common = met_by_all(part)
        if len(part) < 2 or not len(common):
            continue
        survived = survivors(part, common)
        shared = ("commit", "device", "cores", "jax", "profile", "seed", "weights", "model", "scored_on")
        of_group = {key: part[-1].facts[key] for key in shared if key in part[-1].facts}
        attacks = sorted({_titled(outcomes.facts, by_ball=not facts["norm"]) for outcomes in part})
        more = {"source": of_group["model"], "attacks": attacks}
        more |= {fact: joined(o.facts[fact] for o in part) for fact in ("commit", "device", "jax")}
        found.append(_row(data_set, beta2, of_group | facts | more, survived))
    return found


def _titled(facts: dict[str, Any], *, by_ball: bool) -> str:
    """The attack, where it is told apart by its ball."""
    return f"{ball(facts['norm'], facts['epsilon'])}: {facts['title']}" if by_ball else facts["title"]


def met_by_all(group: Iterable[Outcomes]) -> np.ndarray:
    """Indices of the examples that all attacks met."""
    return functools.reduce(np.intersect1d, (outcomes.rows for outcomes in group))


def survivors(group: list[Outcomes], examples: np.ndarray) -> np.ndarray:
    """Who of these examples survives the worst of the attacks, bool ``(R, N)``."""
    seen = [np.searchsorted(outcomes.rows, examples) for outcomes in group]
    scoring = np.stack([o.scoring[:, at] for o, at in zip(group, seen, strict=True)])
    selection = np.stack([o.selection[:, at] for o, at in zip(group, seen, strict=True)])
    return evaluate.worst_case(selection, scoring)


def _row(data_set: str, beta2: float, facts: dict[str, Any], survived: np.ndarray) -> dict[str, Any]:
    by_redraw = survived.mean(1)
    keys = ("model", "source", "scored_on", "attack", "title", "norm", "epsilon")
    attack = facts["attack"] if facts["source"] == facts["model"] else f"transfer_{facts['attack']}"
    cell = (facts["model"], facts["scored_on"], attack, facts["norm"], facts["epsilon"])
    paper = paper_number(data_set, *cell, beta2)
    return {
        **{key: facts[key] for key in keys},
        **measured(survived),
        "redraws": len(by_redraw),
        "deviation over redraws": in_percent(float(by_redraw.std())),
        "paper": paper,
        "difference": None if paper is None else round(100 * float(by_redraw.mean()) - paper, 1),
        **{key: value for key, value in facts.items() if key not in (*keys, "redraws")},
    }


def column_title(model: str, form: str) -> str:
    """What a model's form is called in tables."""
    title, recipe = RECIPES[model].title, RECIPES[model]
    if not recipe.defended:
        return title
    return f"{title}, no noise" if form == "static" else title + form.removeprefix("predict").replace("@", ", beta2 ")


def table(rows: list[dict[str, Any]]) -> tuple[list[str], list[dict[str, str]]]:
    """Headings and lines: one line for each attack and budget, one column for each model."""
    found = {(row["model"], row["scored_on"]) for row in rows}
    columns = sorted(found, key=lambda key: (list(RECIPES).index(key[0]), key[1] != "static", key[1]))
    headings = ["attack", "N", *itertools.starmap(column_title, columns)]
    lines: dict[tuple[Any, ...], dict[str, str]] = {}
    for row in sorted(rows, key=_rank):
        name = row["title"] if not row["norm"] else f"{row['title']}, {ball(row['norm'], row['epsilon'])}"
        line = lines.setdefault((name, row["N"]), dict.fromkeys(headings, "") | {"attack": name, "N": str(row["N"])})
        line[column_title(row["model"], row["scored_on"])] = percent(row)
    return headings, list(lines.values())


def percent(row: dict[str, Any]) -> str:
    """A row's accuracy with its interval."""
    low, high = row["wilson95"]
    return f"{row['accuracy']:.1f} ({low:.1f}-{high:.1f})"


def quoted(row: dict[str, Any] | None, number: float | None) -> str:
    """The paper's number, and how far ours, where there is one that compares, lies above it."""
    if number is None:
        return "not in the paper"
    return f"{number:.1f}" if row is None else f"{number:.1f} ({row['accuracy'] - number:+.1f})"


def _rank(row: dict[str, Any]) -> tuple[Any, ...]:
    norms, attacks = ("linf", "l2", "l1", ""), [*KINDS, WORST, UNION]
    first = 0 if row["attack"] == "clean" else 1
    transferred = row["source"] != row["model"]
    return (
        first,
        norms.index(row["norm"]),
        row["epsilon"],
        row["attack"] in (WORST, UNION),
        transferred,
        attacks.index(row["attack"]),
    )
