"""What is published: rows and tables, made from the ledger alone."""

import json
from collections.abc import Iterable
from typing import Any

import numpy as np

from experiments.provenance import ROOT
from experiments.report import format_table
from rbf_jax import evaluate
from rbf_jax.evaluate import Outcomes

PAPER = json.loads((ROOT / "experiments" / "paper_results.json").read_text())
TITLES = {
    ("cnn", "static"): "CNN",
    ("cnn_plus", "static"): "CNN+",
    ("rcnn", "static"): "rCNN, no noise",
    ("rcnn", "predict"): "rCNN",
    ("rcnn_plus", "static"): "rCNN+, no noise",
    ("rcnn_plus", "predict"): "rCNN+",
}
WORST = "worst of these"


def paper_number(data_set: str, model: str, form: str, attack: str, norm: str, epsilon: float) -> float | None:
    """The paper's accuracy in percent for a cell; None where it has none."""
    if data_set not in PAPER["settings"]["linf_eps"]:
        return None
    name = {"clean": "clean", "FGSM": "fgsm", "BPDA+EoT": "bpda_eot"}.get(attack, attack.split("-")[0].lower())
    within = norm == "" or epsilon == PAPER["settings"][f"{norm}_eps"][data_set]
    if not within or (form, model) == ("static", "rcnn") or (form, model) == ("static", "rcnn_plus"):
        return None
    if model == "cnn":
        value, strongest = PAPER["table3_linf_comparison"][data_set]["baseline"]
        return float(value) if norm == "linf" and name == strongest else None
    if norm in ("", "linf"):
        column = PAPER["table1_linf"]["columns"].index(f"{data_set}/{model}") if model.startswith("rcnn") else None
        row = PAPER["table1_linf"]["rows"].get(name)
        return None if column is None or row is None else row[column]
    columns = PAPER["table5_l1_l2"][f"columns_{norm}"]
    row = PAPER["table5_l1_l2"][norm].get(f"{data_set}/{model}")
    return row[columns.index(name)] if row is not None and name in columns else None


def make_rows(data_set: str, ledger: Iterable[Outcomes]) -> list[dict[str, Any]]:
    """One record for each cell, then each model's worst case over the attacks of one norm."""
    ledger = list(ledger)
    weights = {(o.facts["model"], o.facts["scored_on"], o.facts["weights"]) for o in ledger}
    if len(weights) > len({key[:2] for key in weights}):
        raise ValueError(f"the ledger of {data_set} holds several weights of one model: remove the older ones")
    rows = [_row(data_set, outcomes.facts, outcomes.scoring) for outcomes in ledger]
    groups: dict[tuple[Any, ...], list[Outcomes]] = {}
    for outcomes in ledger:
        facts = outcomes.facts
        if facts["norm"]:
            groups.setdefault((facts["model"], facts["scored_on"], facts["norm"], facts["epsilon"]), []).append(
                outcomes
            )
    for group in groups.values():
        # Over the examples that all of the attacks have seen. A deterministic model's one outcome also selects.
        common = sorted(set.intersection(*(set(outcomes.rows.tolist()) for outcomes in group)))
        if len(group) < 2 or not common:
            continue
        seen = [np.searchsorted(outcomes.rows, common) for outcomes in group]
        scoring = np.stack([o.scoring[:, at] for o, at in zip(group, seen, strict=True)])
        selection = np.stack([o.selection[:, at] for o, at in zip(group, seen, strict=True)])
        survived = evaluate.worst_case(selection if selection.shape[1] else scoring, scoring)
        shared = ("commit", "device", "cores", "jax", "profile", "seed", "weights", "model", "scored_on")
        facts = {key: value for key, value in group[-1].facts.items() if key in (*shared, "norm", "epsilon")}
        rows.append(_row(data_set, facts | {"attack": WORST}, survived))
    return rows


def _row(data_set: str, facts: dict[str, Any], survived: np.ndarray) -> dict[str, Any]:
    by_redraw = survived.mean(1)
    total, accuracy = survived.shape[1], float(by_redraw.mean())
    low, high = evaluate.wilson_interval(round(accuracy * total), total)
    keys = ("model", "scored_on", "attack", "norm", "epsilon")
    paper = paper_number(data_set, *(facts[key] for key in keys))
    return {
        **{key: facts[key] for key in keys},
        "N": total,
        "accuracy": round(100 * accuracy, 2),
        "wilson95": [round(100 * low, 2), round(100 * high, 2)],
        "redraws": len(by_redraw),
        "deviation over redraws": round(100 * float(by_redraw.std()), 2),
        "paper": paper,
        "difference": None if paper is None else round(100 * accuracy - paper, 1),
        **{key: value for key, value in facts.items() if key not in keys},
    }


def table(rows: list[dict[str, Any]]) -> tuple[list[str], list[dict[str, str]]]:
    """Headings and lines: one line for each attack and budget, one column for each model, the paper's number beside."""
    found = {(row["model"], row["scored_on"]): None for row in rows}
    columns = [key for key in TITLES if key in found]
    quoted = [key for key in columns if any(row["paper"] is not None and key == _column(row) for row in rows)]
    headings = ["attack", "N"]
    for key in columns:
        headings += [TITLES[key], *([f"paper's {TITLES[key]}"] if key in quoted else [])]
    lines: dict[tuple[Any, ...], dict[str, str]] = {}
    for row in sorted(rows, key=_rank):
        name = row["attack"] if not row["norm"] else f"{row['attack']}, {row['norm']} {row['epsilon']:g}"
        line = lines.setdefault((name, row["N"]), dict.fromkeys(headings, "") | {"attack": name, "N": str(row["N"])})
        low, high = row["wilson95"]
        line[TITLES[_column(row)]] = f"{row['accuracy']:.1f} ({low:.1f}-{high:.1f})"
        if _column(row) in quoted:
            text = "not in the paper" if row["paper"] is None else f"{row['paper']:.1f} ({row['difference']:+.1f})"
            line[f"paper's {TITLES[_column(row)]}"] = text
    return headings, list(lines.values())


def _rank(row: dict[str, Any]) -> tuple[int, float, int]:
    norms, attacks = ("", "linf", "l2", "l1"), ("clean", "FGSM", "PGD", "APGD", "BPDA+EoT", WORST)
    return norms.index(row["norm"]), row["epsilon"], attacks.index(row["attack"].split("-")[0])


def _attack(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["model"], row["attack"], row["norm"], row["epsilon"]


def _column(row: dict[str, Any]) -> tuple[str, str]:
    return row["model"], row["scored_on"]


def note(config: dict[str, Any]) -> str:
    """What the table's numbers are."""
    attack = config["attack"]
    return (
        "Accuracy in percent with its 95 % Wilson interval; in brackets behind the paper's number the difference, ours "
        f"minus the paper's. rCNN: mean of {config['draws']} noisy draws at beta2 = {config['beta2']:g}, scored on "
        f"{attack['scoring']} fresh redraws. FGSM, PGD and APGD maximise the cross-entropy and are crafted without "
        f"noise, PGD from {attack['pgd']['restarts']} start(s), step {attack['pgd']['step_size'] or 'by default'}; "
        f"BPDA+EoT ({attack['eot']['draws']} draws x {attack['eot']['steps']} steps) is crafted with noise. '{WORST}': "
        f"per example, its worst attack picked on {attack['selection']} other redraws. The paper says "
        "nothing of steps, restarts and losses. Stronger attacks leave less."
    )


def page(job: dict[str, Any], recipes: dict[str, dict[str, Any]], rows: list[dict[str, Any]]) -> str:
    """The Markdown page of a data set's results."""
    config = job["config"]
    headings, lines = table(rows)
    trained = [
        {
            "model": name,
            "epochs": len(recipe["history"]["loss"]),
            "seconds an epoch": recipe["seconds an epoch"],
            "training accuracy": f"{100 * recipe['history']['accuracy'][-1]:.2f}",
            "validation accuracy": f"{100 * recipe['history']['validation'][-1]:.2f}",
        }
        for name, recipe in recipes.items()
    ]
    commits = ", ".join(sorted({str(row["commit"]) for row in rows}))
    crafting = {_attack(row): row["crafting seconds"] for row in rows if row["attack"] != WORST}
    seconds = sum(crafting.values()) + sum(row.get("scoring seconds", 0) for row in rows)
    origin = (
        f"Profile {config['profile']}, seed {config['seed']}, commit {commits}, {job['device']}, {job['cores']} cores, "
        f"jax {job['jax']}; {job['filters']} filters; attacks and scoring took {seconds:.0f} s."
    )
    return "\n\n".join(
        [
            f"# {config['title']}",
            note(config),
            origin,
            format_table(headings, lines),
            "## The models\n\nTraining accuracy is that of the steps' batches, with dropout.",
            format_table(list(trained[0]), trained),
            "Made by `make tables` from `ledger/`, `models/` and `job.json`; `results.json` has every figure with its "
            "deviation over redraws and its seconds.\n",
        ]
    )
