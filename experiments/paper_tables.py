"""The paper's tables with ours beside them, made from the rows of `results.make_rows` alone."""

from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from experiments.catalogue import ball
from experiments.recipes import RECIPES
from experiments.results import BETA2, PAPER, UNION, WORST, column_title, percent, quoted, strongest

Row = dict[str, Any]
Table = tuple[list[str], list[dict[str, str]]]
"""Headings, and lines by heading."""

DEFENDED = ("rcnn", "rcnn_plus")
COMPARED = (
    *("cnn", "cnn_plus", "madry", *DEFENDED, "rcnn_at", "rcnn_long"),
    *("threshold", "mean", "kmeans", "cnn_hard", "rcnn_hard", "rcnn_seed1"),
)
NAMES = {
    "clean": "clean test data",
    "fgsm": "FGSM",
    "pgd": "PGD",
    "mi_fgsm": "MI-FGSM",
    "cw": "CW",
    "daa": "DAA",
    "ead": "EAD",
    "bpda_eot": "BPDA+EoT",
    "bpda": "BPDA",
    "eot": "EoT",
    "deepfool": "DeepFool",
    "spsa": "SPSA (black box)",
    "transfer_fgsm": "FGSM (black box)",
    "transfer_pgd": "PGD (black box)",
    "transfer_cw": "CW (black box)",
    "transfer_ead": "EAD (black box)",
}
NOT_RUN = "not run"
COMPARATORS = {
    "schott_abs": "Schott et al. 2019 (quoted)",
    "buckman_thermometer": "Buckman et al. 2018 (quoted)",
    "ma_lid": "Ma et al. 2018 (quoted)",
    "dhillon_sap": "Dhillon et al. 2018 (quoted)",
    "song_pixeldefend": "Song et al. 2018 (quoted)",
    "dezfooli_cure": "Dezfooli et al. 2019 (quoted)",
}


class Rows:
    """The rows of a data set, found by what they are.

    Attributes:
        all: the rows.
        beta2: the level of noise of those that are scored on ``"predict"``.
    """

    def __init__(self, rows: Iterable[Row], beta2: float = BETA2) -> None:
        self.all, self.beta2 = list(rows), beta2

    def find(self, model: str, attack: str, norm: str, epsilon: float, form: str) -> Row | None:
        """The row of a cell; a transferred attack is called ``transfer_NAME``. Of several the one of most images."""
        kind, own = attack.removeprefix("transfer_"), not attack.startswith("transfer_")
        found = [
            row
            for row in self.all
            if (row["model"], row["attack"], row["norm"], row["epsilon"], row["scored_on"])
            == (model, kind, norm, epsilon, form)
            and (row["source"] == row["model"]) == own
        ]
        return max(found, key=lambda row: row["N"], default=None)

    def attacked(self, model: str, norm: str, epsilon: float, form: str) -> list[Row]:
        """The rows of single attacks of a model within a budget."""
        return [
            row
            for row in self.all
            if (row["model"], row["norm"], row["epsilon"], row["scored_on"]) == (model, norm, epsilon, form)
            and row["attack"] != WORST
        ]

    def worst(self, model: str, norm: str, epsilon: float, form: str) -> list[Row]:
        """The rows of a model's worst cases within a budget."""
        wanted = (model, WORST, norm, epsilon, form)
        keys = ("model", "attack", "norm", "epsilon", "scored_on")
        return [row for row in self.all if tuple(row[key] for key in keys) == wanted]

    def quoted(self, row: Row | None, number: float | None) -> str:
        """The paper's cell, and how far ours lies above it, if it is of the level of noise of all tables but VII."""
        comparable = row is not None and (row["scored_on"] == "static" or self.beta2 == BETA2)
        return quoted(row if comparable else None, number)

    def models(self) -> list[str]:
        """The models that have rows, in the order of the recipes."""
        present = {row["model"] for row in self.all}
        return [name for name in RECIPES if name in present]


def form_of(model: str) -> str:
    """The form that predicts."""
    return RECIPES[model].scored_on[-1]


def text(row: Row | None) -> str:
    """A cell of a table: accuracy, interval, and on how many images."""
    return NOT_RUN if row is None else f"{percent(row)}, N={row['N']}"


def budget(data_set: str, norm: str) -> float:
    """The paper's radius."""
    return PAPER["settings"][f"{norm}_eps"][data_set]


def linf_attacks(data_set: str, rows: Rows) -> Table:
    """Table I."""
    paper, epsilon = PAPER["table1_linf"], budget(data_set, "linf")
    columns = [name for name in DEFENDED if name in rows.models()]
    headings = ["attack"]
    for name in columns:
        title = RECIPES[name].title
        headings += [f"{title}, paper", f"{title}, ours", f"{title}, no noise"]
    lines = []
    for attack, numbers in paper["rows"].items():
        norm, radius = ("", 0.0) if attack == "clean" else ("linf", epsilon)
        line = {"attack": NAMES[attack]}
        for name in columns:
            title, row = RECIPES[name].title, rows.find(name, attack, norm, radius, "predict")
            line[f"{title}, paper"] = rows.quoted(row, numbers[paper["columns"].index(f"{data_set}/{name}")])
            line[f"{title}, ours"] = text(row)
            line[f"{title}, no noise"] = (
                "crafted with noise" if attack == "bpda_eot" else text(rows.find(name, attack, norm, radius, "static"))
            )
        lines.append(line)
    return headings, lines


def training_time(data_set: str, recipes: dict[str, dict[str, Any]], log: dict[str, float]) -> Table:
    """Table II.

    Args:
        data_set: for the paper's numbers.
        recipes: of the trained models, by name.
        log: seconds by stage: ``"filters"``, and the noise bank by ``"bank MODEL"``.
    """
    headings = [
        *("model", "epochs", "seconds an epoch", "overhead, s", "total, s", "attack steps x images an epoch"),
        *("paper's epochs", "total at the paper's epochs, s (extrapolated)", "paper's total, s (GTX 1080 Ti)"),
    ]
    lines, absent = [], "not in the paper"
    for name in ("madry", "rcnn_at", "cnn", "cnn_plus", *DEFENDED):
        if name not in recipes or recipes[name]["seconds an epoch"] is None:
            continue
        record, recipe, config = recipes[name], RECIPES[name], recipes[name]["config"]
        count, seconds = len(record["history"]["loss"]), record["seconds an epoch"]
        # A run that goes on from committed models alone does not know what came before them.
        before = ["filters"] * recipe.defended + [f"bank {name}"] * recipe.noise
        images = config["examples"]["train"] - config["examples"]["validation"]
        steps = config["adversarial"]["steps"] * images if recipe.adversarial else 0
        paper = PAPER["table2_training_time"]["rows"].get(f"{data_set}/{name}")
        totals = 3 * ["not kept"]
        if all(stage in log for stage in before):
            overhead = sum(log[stage] for stage in before)
            totals = [f"{passes * seconds + overhead:.0f}" for passes in (0, count, paper[0] if paper else 0)]
        values = (
            *(recipe.title, f"{count}", f"{seconds:.1f}", totals[0], totals[1]),
            f"{steps}",
            *((f"{paper[0]}", totals[2], f"{paper[3]}") if paper else 3 * (absent,)),
        )
        lines.append(dict(zip(headings, values, strict=True)))
    return headings, lines


def least(found: list[Row]) -> Row | None:
    """The row of the lowest accuracy, of equals that of the most images."""
    return min(found, key=lambda row: (row["accuracy"], -row["N"]), default=None)


def fullest(found: list[Row]) -> Row | None:
    """Of worst cases that of the most attacks: one of fewer attacks is not the worst, however many images it is of.

    But where fewer leave nothing of more images, no further attack could.
    """
    if nothing := [row for row in found if not row["accuracy"]]:
        return max(nothing, key=lambda row: row["N"])
    return max(found, key=lambda row: (len(row["attacks"]), row["N"]), default=None)


def comparison(data_set: str, rows: Rows) -> Table:
    """Table III: by the paper's rule (the lowest single column), and by the worst case of each example."""
    headings = ["defence", "paper", "lowest attack, ours", "which", "worst case of each image, ours"]
    epsilon, lines = budget(data_set, "linf"), []
    for name in (name for name in COMPARED if name in rows.models()):
        paper, form = strongest(data_set, name), form_of(name)
        lowest = least(rows.attacked(name, "linf", epsilon, form))
        worst = fullest(rows.worst(name, "linf", epsilon, form))
        values = (
            RECIPES[name].title,
            f"{paper[0]:.1f} ({NAMES[paper[1]]})" if paper else "not in the paper",
            text(lowest),
            "–" if lowest is None else lowest["title"],
            text(worst),
        )
        lines.append(dict(zip(headings, values, strict=True)))
    for key, title in COMPARATORS.items():
        if paper := strongest(data_set, key):
            values = (title, f"{paper[0]:.1f} ({NAMES[paper[1]]})", *3 * ("not built here",))
            lines.append(dict(zip(headings, values, strict=True)))
    return headings, lines


def quoted_bounds(data_set: str) -> dict[float, dict[str, float]]:
    """The paper's Table IV: its numbers by linf radius and model."""
    paper = PAPER["table4_linf_bounds"]
    keys = ((key.partition("/"), numbers) for key, numbers in paper["rows"].items())
    return {
        float(radius): dict(zip(paper["columns"], numbers, strict=True))
        for (of_set, _, radius), numbers in keys
        if of_set == data_set
    }


def bounds(data_set: str, rows: Rows) -> Table:
    """Table IV: the lowest single column at two radii."""
    headings, lines = ["linf bound"], []
    columns = [name for name in ("madry", *DEFENDED) if name in rows.models()]
    for name in columns:
        headings += [f"{RECIPES[name].title}, paper", f"{RECIPES[name].title}, ours"]
    for radius, numbers in quoted_bounds(data_set).items():
        line = {"linf bound": f"{radius:g}"}
        for name in columns:
            title, form = RECIPES[name].title, form_of(name)
            lowest = least(rows.attacked(name, "linf", radius, form))
            ours = NOT_RUN if lowest is None else f"{text(lowest)} ({lowest['title']})"
            met = lowest
            if name == "madry" and radius != budget(data_set, "linf"):  # the paper's met PGD alone
                met = rows.find(name, "pgd", "linf", radius, form)
            line |= {f"{title}, paper": rows.quoted(met, numbers[name]), f"{title}, ours": ours}
        lines.append(line)
    return headings, lines


def other_norms(norm: str, data_set: str, rows: Rows) -> Table:
    """Table V, a part for each norm."""
    paper, epsilon, lines, headings = PAPER["table5_l1_l2"], budget(data_set, norm), [], ["defence"]
    for attack in paper[f"columns_{norm}"]:
        headings += [f"{NAMES[attack]}, paper", f"{NAMES[attack]}, ours"]
    for name in (name for name in ("madry", *DEFENDED) if name in rows.models()):
        line, form = {"defence": RECIPES[name].title}, form_of(name)
        for attack, number in zip(paper[f"columns_{norm}"], paper[norm][f"{data_set}/{name}"], strict=True):
            row = rows.find(name, attack, norm, epsilon, form)
            missing = "has no noise" if attack == "bpda_eot" and form == "static" else NOT_RUN
            line[f"{NAMES[attack]}, paper"] = rows.quoted(row, number)
            line[f"{NAMES[attack]}, ours"] = missing if row is None else text(row)
        lines.append(line)
    return headings, lines


def noise_levels(data_set: str, rows: Rows) -> Table:
    """Table VII: rCNN+ at three levels of noise."""
    paper, headings = dict(PAPER["table7_beta2_tradeoff"][data_set]), ["attack"]
    levels = paper.pop("beta2")
    forms = ["predict" if level == rows.beta2 else f"predict@{level:g}" if level else "static" for level in levels]
    for level in levels:
        headings += [f"beta2 = {level:g}, paper", f"beta2 = {level:g}, ours"]
    lines = []
    for key, numbers in paper.items():
        norm, _, attack = key.rpartition("/")
        epsilon = budget(data_set, norm) if norm else 0.0
        line = {"attack": NAMES[attack] if not norm else f"{ball(norm, epsilon)}, {NAMES[attack]}"}
        for level, form, number in zip(levels, forms, numbers, strict=True):
            row = rows.find("rcnn_plus", attack, norm, epsilon, form)
            same = row is None and attack == "bpda_eot" and form == "static"
            line[f"beta2 = {level:g}, paper"] = quoted(row, number)
            line[f"beta2 = {level:g}, ours"] = "there is no noise" if same else text(row)
        lines.append(line)
    return headings, lines


TABLES: dict[str, tuple[str, Callable[[str, Rows], Table]]] = {
    "I": ("Accuracy under linf attacks", linf_attacks),
    "III": ("Robust accuracy, linf, beside other defences", comparison),
    "IV": ("Robust accuracy at two linf bounds: the lowest single attack", bounds),
    "V, l1": ("Accuracy under l1 attacks", partial(other_norms, "l1")),
    "V, l2": ("Accuracy under l2 attacks", partial(other_norms, "l2")),
    "VII": ("rCNN+ at several levels of noise", noise_levels),
}


def _counts(attacks: list[str]) -> list[str]:
    """How many of the attacks were within each ball."""
    return [f"{count} of {within}" for within, count in Counter(name.partition(":")[0] for name in attacks).items()]


def unions(rows: Rows) -> Table:
    """Beyond the paper: each model's worst cases, per norm and over norms."""
    found = [row for row in rows.all if row["attack"] in (WORST, UNION)]
    headings = ["model", "budgets", "left", "attacks"]
    lines = [
        {
            "model": column_title(row["model"], row["scored_on"]),
            "budgets": ball(row["norm"], row["epsilon"]) if row["norm"] else row["title"].partition(": ")[2],
            "left": text(row),
            "attacks": ", ".join(row["attacks"] if row["norm"] else _counts(row["attacks"])),
        }
        for row in found
    ]
    return headings, lines


def seconds(rows: Rows) -> Table:
    """What the attacks took on each model: crafting, and scoring in all forms."""
    models = [name for name in rows.models() if any(row["model"] == name and row["norm"] for row in rows.all)]
    headings, lines = ["attack", *(RECIPES[name].title for name in models)], dict[str, dict[str, str]]()
    taken: dict[tuple[str, str], dict[str, float]] = {}
    for row in (row for row in rows.all if row["norm"] and row["attack"] != WORST):
        key = (f"{row['title']}, {ball(row['norm'], row['epsilon'])}", RECIPES[row["model"]].title)
        # Images that several forms score were crafted once.
        parts = taken.setdefault(key, {})
        parts[row["crafted_on"]] = row["crafting seconds"]
        parts["scoring"] = parts.get("scoring", 0.0) + row["scoring seconds"]
    for (attack, model), parts in taken.items():
        attacked = lines.setdefault(attack, dict.fromkeys(headings, "–") | {"attack": attack})
        attacked[model] = f"{sum(parts.values()):.0f}"
    return headings, [lines[attack] for attack in sorted(lines)]
