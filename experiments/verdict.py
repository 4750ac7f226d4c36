"""`VERDICT.md` in `results/`: what the defence is worth, said by the rows alone, with a commentary written by hand."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.catalogue import ball
from experiments.certification import title as certified_title
from experiments.gains import Gain, gain
from experiments.pages import Section, origin, trained_for, who
from experiments.paper_tables import (
    COMPARED,
    DEFENDED,
    Row,
    Rows,
    Table,
    budget,
    form_of,
    fullest,
    least,
    quoted_bounds,
    text,
)
from experiments.provenance import ROOT
from experiments.recipes import RECIPES
from experiments.report import format_table
from experiments.results import BETA2, column_title, strongest, union_title
from rbf_jax.evaluate import Outcomes

HOLDS = 5.0
"""Points within which a number of the paper holds."""

FEW = 10
"""Fewer certificates say nothing of the paper's: two that certify would refute it."""


def worst(rows: Rows, model: str, form: str, norm: str, epsilon: float) -> Row | None:
    """A model's worst case within a budget, of the most attacks; the lowest single attack where none was taken."""
    return fullest(rows.worst(model, norm, epsilon, form)) or least(rows.attacked(model, norm, epsilon, form))


def headline(data_set: str, rows: Rows) -> Table:
    """Within the paper's linf budget: one attack that it reports, and the worst case."""
    epsilon = budget(data_set, "linf")
    headings = ["model", "clean", "PGD, paper", "PGD, ours", "lowest attack, paper", "worst case, ours"]
    lines = []
    for model in (name for name in COMPARED if name in rows.models() and not RECIPES[name].seed):
        form, lowest = form_of(model), strongest(data_set, model)
        pgd = rows.find(model, "pgd", "linf", epsilon, form)
        values = (
            RECIPES[model].title,
            text(rows.find(model, "clean", "", 0.0, form)),
            f"{pgd['paper']:.1f}" if pgd and pgd["paper"] is not None else "–",
            text(pgd),
            "–" if lowest is None else f"{lowest[0]:.1f}",
            _counted(worst(rows, model, form, "linf", epsilon)),
        )
        lines.append(dict(zip(headings, values, strict=True)))
    return headings, lines


def _counted(row: Row | None) -> str:
    """With the number of attacks that it is the worst of."""
    if row is None:
        return text(row)
    return f"{text(row)}, {_attacks(len(row.get('attacks', ('one',))))}"


def _attacks(count: int) -> str:
    return f"{count} attack{'s' if count > 1 else ''}"


def worth(data_set: str, rows: Rows) -> Table:
    """What is left of each model in the worst case, within the paper's budgets."""
    budgets = {norm: budget(data_set, norm) for norm in ("linf", "l2", "l1")}
    headings, lines = ["model", "clean", *(ball(*each) for each in budgets.items()), "all three"], []
    for model in (name for name in COMPARED if name in rows.models()):
        for form in RECIPES[model].scored_on:
            line = {"model": column_title(model, form), "clean": text(rows.find(model, "clean", "", 0.0, form))}
            for each in budgets.items():
                line[ball(*each)] = _counted(worst(rows, model, form, *each))
            wanted = (model, form, union_title(budgets))
            unions = [row for row in rows.all if (row["model"], row["scored_on"], row["title"]) == wanted]
            line["all three"] = text(fullest(unions))
            lines.append(line)
    return headings, lines


def gains(data_set: str, ledger: Sequence[Outcomes]) -> Table:
    """Points that the front end and its noise add to the same training without them, in the worst case.

    Within the paper's budgets, and inside its linf ball where AutoAttack was run.
    """
    present = {outcomes.facts["model"] for outcomes in ledger}
    # The controls are trained on the short schedule, where there is one.
    short = "rcnn_seed1" if "rcnn_seed1" in present else "rcnn"
    pairs = [
        ("front end, clean training", ("rcnn", "static"), ("cnn", "static")),
        ("its noise, clean training", ("rcnn", "predict"), ("rcnn", "static")),
        ("front end, noisy training", ("rcnn_plus", "static"), ("cnn_plus", "static")),
        ("its noise, noisy training", ("rcnn_plus", "predict"), ("rcnn_plus", "static")),
        ("front end, adversarial training", ("rcnn_at", "static"), ("madry", "static")),
        ("its noise, adversarial training", ("rcnn_at", "predict"), ("rcnn_at", "static")),
        ("front end, against a threshold at 0.5", (short, "static"), ("threshold", "static")),
        ("front end, against a 3x3 mean", (short, "static"), ("mean", "static")),
        ("front end, against a k-means codebook", (short, "static"), ("kmeans", "static")),
    ]
    paper = [(norm, budget(data_set, norm)) for norm in ("linf", "l2", "l1")]
    attacked = {o.facts["epsilon"] for o in ledger if (o.facts["attack"], o.facts["norm"]) == ("autoattack", "linf")}
    inside = sorted(epsilon for epsilon in attacked if epsilon < budget(data_set, "linf"))
    budgets = [*(("linf", epsilon) for epsilon in inside), *paper]
    headings, lines = ["what is added", *(ball(*each) for each in budgets)], []
    for title, one, other in pairs:
        if one[0] not in present or other[0] not in present:
            continue
        line = {"what is added": title}
        for each in budgets:
            found = gain(ledger, one, other, *each)
            line[ball(*each)] = "not known" if found is None else _gained(found)
        lines.append(line)
    return headings, lines


def _gained(found: Gain) -> str:
    interval = f"{found.points:+.1f} ({found.low:+.1f} to {found.high:+.1f})"
    return f"{interval}, N={found.images}, {_attacks(found.attacks)}"


def _compared(data_set: str, rows: Rows, certified: Sequence[Row]) -> Iterator[tuple[float, Row, str, str, str, float]]:
    """The paper's number, our row, and what it is of: model, attack, norm and radius."""
    for row in rows.all:
        if row["paper"] is not None:
            model = column_title(row["model"], row["scored_on"])
            yield row["paper"], row, model, row["title"], row["norm"], row["epsilon"]
    for radius, numbers in quoted_bounds(data_set).items():
        # Within the budget Table IV repeats others.
        for name in DEFENDED if radius != budget(data_set, "linf") and rows.beta2 == BETA2 else ():
            if lowest := least(rows.attacked(name, "linf", radius, "predict")):
                attack = f"lowest attack ({lowest['title']})"
                yield numbers[name], lowest, column_title(name, "predict"), attack, "linf", radius
    for row in certified:
        model, attack = certified_title(row["model"], row["form"]), f"certificates, sigma {row['sigma']:g}"
        for at in row["certified"]:
            if at["difference"] is not None and at["N"] >= FEW:
                yield at["paper"], at, model, attack, "l2", at["radius"]


def held(data_set: str, rows: Rows, certified: Sequence[Row] = ()) -> dict[str, Table]:
    """The paper's numbers, the furthest first: that do not hold, that hold within five points, and that are unclear.

    A number holds where all of our interval is within five points of it, and does not where none of it is.

    Args:
        data_set: for Table IV's radii.
        rows: of the attacks.
        certified: of `certification.make_rows`. Radii beyond the ceiling are not compared, nor are few certificates.
    """
    headings = ["model", "attack", "budget", "paper", "ours", "difference"]
    lines: dict[str, list[dict[str, str]]] = {"far": [], "near": [], "unclear": []}
    compared = _compared(data_set, rows, certified)
    for paper, ours, *what, norm, radius in sorted(compared, key=lambda each: -abs(each[1]["accuracy"] - each[0])):
        difference = ours["accuracy"] - paper
        values = (*what, ball(norm, radius) if norm else "–", f"{paper:.1f}", text(ours), f"{difference:+.1f}")
        low, high = ours["wilson95"]
        kind = "far" if max(low - paper, paper - high) > HOLDS else "unclear"
        if max(high - paper, paper - low) <= HOLDS:
            kind = "near"
        lines[kind].append(dict(zip(headings, values, strict=True)))
    return {kind: (headings, found) for kind, found in lines.items()}


def commentary(folder: Path) -> Path | None:
    """What people wrote of the results in a folder of ``results/``; None for those of a run."""
    path = ROOT / "experiments" / "commentary" / f"{folder.name}.md"
    return path if folder.resolve().parent.name == "results" and path.exists() else None


def page(
    job: dict[str, Any],
    recipes: dict[str, dict[str, Any]],
    rows: list[Row],
    ledger: Sequence[Outcomes],
    certified: Sequence[Row],
    studies: list[Section],
    written: Path | None,
) -> str:
    """The page.

    Args:
        job: what `experiments.reproduce` wrote of itself.
        recipes: of the models.
        rows: of `results.make_rows`.
        ledger: from which they were made.
        certified: of `certification.make_rows`.
        studies: further tables that bear on the verdict.
        written: the commentary, None where there is none.
    """
    data_set, found = job["config"]["set"], Rows(rows, job["config"]["beta2"])
    numbers = {
        kind: format_table(*table) if table[1] else "None." for kind, table in held(data_set, found, certified).items()
    }
    parts = [
        f"# {job['config']['title']}: the verdict",
        who(found.models()),
        trained_for(data_set, recipes),
        origin(job, rows),
    ]
    if written is not None:
        parts.append(written.read_text().strip())
    parts += [
        "## What is left in the worst case",
        "Per example the worst of all attacks within the paper's budgets, in percent; the single lowest attack where "
        "too few met a model. The fewer attacks there were, the less it says; but where fewer leave nothing of more "
        "images, no further attack could. Neighbours are of other images where their N differ, and of noisy models "
        "other redraws pick the worst attack than score it: what is left of all budgets may lie a little above what is "
        "left of one. 'No noise' is beta2 = 0.",
        format_table(*worth(data_set, found)),
        "## What the front end adds",
        "Points of worst-case accuracy between two models that differ in one thing, with the 95 % interval of paired "
        "differences (Agresti and Min): the attacks that both met and, where there is noise, those that average over "
        "it, on the images that met them all. Not known: neither Square, SPSA nor AutoAttack met both, so that the "
        "difference may be of hidden gradients, or no attack averaged over the noise. Against the controls stands the "
        "rCNN of their schedule.",
        format_table(*gains(data_set, ledger)),
        f"## The paper's numbers that do not hold (our interval is more than {HOLDS:g} points away)",
        "Those of Tables I and III to VII, of models that were trained as said above. Of rCNN and rCNN+ Table IV does "
        "not say which attack leaves its numbers; ours, the lowest of several on other images, is too low by chance "
        f"where they are few. Of Table VI numbers beside fewer than {FEW} certificates of ours are left out.",
        numbers["far"],
        f"## The paper's numbers that hold (our interval is within {HOLDS:g} points)",
        numbers["near"],
        "## The paper's numbers that too few images leave open",
        f"Our interval reaches from within {HOLDS:g} points of them to beyond.",
        numbers["unclear"],
    ]
    for section in studies:
        parts += [f"## {section.heading}", section.text, format_table(*section.table)]
    by_hand = f"; only the commentary, `experiments/commentary/{written.name}`, is written by hand" if written else ""
    return "\n\n".join(parts) + f"\n\nMade by `make tables` from the ledgers{by_hand}.\n"
