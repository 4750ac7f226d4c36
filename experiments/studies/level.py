"""beta2 after the paper's rule: as much noise as clean accuracy bears, decided on validation images."""

from typing import Any

from experiments.cost import Speeds
from experiments.paper_tables import Table
from experiments.recipes import RECIPES
from experiments.results import PERCENT_DIGITS, measured, percent
from experiments.rundir import Config
from experiments.studies.common import Inputs, Row, Study, asked, pivot
from rbf_jax import defend

LEAST, LOST = 85.0, 4.0
"""Clean accuracy in percent that the paper keeps on CIFAR-10 (Section IV); and what it loses there (Table VII)."""


def settings(config: Config) -> dict[str, Any]:
    """The levels of noise that are tried, and on how many validation images."""
    studies = asked(config)
    if not studies.get("levels"):
        return {}
    found = [name for name in studies["models"] if RECIPES[name].own_filters]
    count = min(studies["clean"], config.examples.validation)
    return {"models": found, "levels": sorted(studies["levels"]), "examples": count}


def measure(inputs: Inputs) -> list[Row]:
    """Accuracy of each model without noise and at each level; the highest level that the rule allows is chosen."""
    settings, config, rows = inputs.settings, inputs.run.config, []
    seen = inputs.validating(settings["examples"])
    for model in inputs.models:
        logits_fn, beta1 = inputs.classifier(model), RECIPES[model].beta1(config.preset).test
        of_model = []
        for beta2 in (0.0, *settings["levels"]):
            defense = defend(inputs.filters, logits_fn, beta1=beta1, beta2=beta2, draws=config.draws)
            form, title = "predict" if beta2 else "static", f"beta2 {beta2:g}"
            right = inputs.right(getattr(defense, form), seen, name=f"{model}-beta2-{beta2:g}")
            row = {"model": model, "form": form, "title": title, "beta2": beta2}
            of_model.append(row | measured(right))
        chosen = highest({row["beta2"]: row["accuracy"] for row in of_model})
        rows += [row | {"chosen": row["beta2"] == chosen} for row in of_model]
    return rows


def highest(accuracies: dict[float, float]) -> float:
    """The highest level whose accuracy in percent the rule allows; level 0 is without noise, and always allowed."""
    least = min(LEAST, round(accuracies[0.0] - LOST, PERCENT_DIGITS))
    return max(level for level, accuracy in accuracies.items() if accuracy >= least)


def seconds(config: Config, settings: dict[str, Any], speed: Speeds) -> float:
    """One prediction at each level."""
    looks = [speed.look(m) + len(settings["levels"]) * speed.look(m, config.draws) for m in settings["models"]]
    return settings["examples"] * sum(looks)


def _table(rows: list[Row]) -> Table:
    def cell(row: Row) -> str:
        return percent(row) + " (chosen)" * row["chosen"]

    return pivot(rows, "noise", lambda row: RECIPES[row["model"]].title, cell)


STUDY = Study(
    "The level of noise",
    "Clean accuracy in percent with its 95 % Wilson interval on validation images, by beta2. The paper's rule is to "
    f"keep {LEAST:g} %. Chosen is the highest level that does, or, for a model that begins lower than the paper's own, "
    f"that loses no more than the {LOST:g} points that it loses.",
    settings,
    measure,
    _table,
    seconds,
)
