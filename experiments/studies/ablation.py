"""The front end's numbers on one trained model: sharpness beta1, noise beta2 and its scale, draws m."""

import itertools
from typing import Any

import numpy as np

from experiments.catalogue import KINDS, NORMS, ball
from experiments.cost import Speeds
from experiments.paper_tables import Table, text
from experiments.recipes import RECIPES
from experiments.results import measured
from experiments.rundir import Config
from experiments.studies.common import Inputs, Row, Study, asked, budget, step_seconds
from rbf_jax import attacks, defend

GRID = ("beta1", "beta2", "scales", "draws")


def settings(config: Config) -> dict[str, Any]:
    """The grid, and PGD as in the tables.

    Raises:
        ValueError: a model that does not stand behind the filters of the EM.
    """
    studies = asked(config)
    if not all(studies.get(name) for name in (*GRID, "clean")) or studies.get("defended") not in config.models:
        return {}
    model = studies["defended"]
    if not RECIPES[model].own_filters:
        raise ValueError(f"config.studies.defended must be a model with the filters of the EM, got {model!r}")
    return (
        {name: list(studies[name]) for name in GRID}
        | budget(config)
        | {
            "models": [model],
            "examples": studies["examples"],
            "clean": studies["clean"],
            "pgd": config.attack.settings.pgd.to_dict(),
        }
    )


def _noises(settings: dict[str, Any]) -> list[tuple[float, str, int]]:
    """beta2, scale and draws; without noise all scales and draws are alike."""
    points = itertools.product(*(settings[name] for name in GRID[1:]))
    first = settings["scales"][0], settings["draws"][0]
    return [point for point in points if point[0] > 0 or point[1:] == first]


def measure(inputs: Inputs) -> list[Row]:
    """Clean accuracy and that under PGD, which is crafted without noise at the same beta1."""
    settings, config, (model,) = inputs.settings, inputs.run.config, inputs.models
    logits_fn = inputs.classifier(model)
    within = {"norm": settings["norm"], "epsilon": settings["epsilon"]}
    attacked, clean = inputs.sample(settings["examples"]), inputs.sample(settings["clean"])
    pgd = attacks.pgd(NORMS[settings["norm"]], epsilon=settings["epsilon"], **settings["pgd"])
    rows = []
    for beta1 in settings["beta1"]:
        static = defend(inputs.filters, logits_fn, beta1=beta1, beta2=0.0).static
        name, facts = f"{model}-pgd-beta1-{beta1:g}", within | settings["pgd"]
        images = np.asarray(inputs.attack(name, pgd, static, attacked, facts).images)
        for beta2, scale, draws in _noises(settings):
            predict = defend(inputs.filters, logits_fn, beta1=beta1, beta2=beta2, scale=scale, draws=draws).predict
            # As many images at once, counting the draws, as in the tables.
            size = max(1, config.attack.batch_size * config.draws // max(draws, config.draws))
            point = {"beta1": beta1, "beta2": beta2, "scale": scale, "draws": draws}
            for attack, threat, seen in (
                ("clean", {"norm": "", "epsilon": 0.0}, clean),
                (KINDS["pgd"].title.format(**settings["pgd"]), within, attacked._replace(images=images)),
            ):
                title = f"beta1 {beta1:g}, " + (f"beta2 {beta2:g} ({scale}), m {draws}" if beta2 else "no noise")
                name = f"{model}-beta1-{beta1:g}-beta2-{beta2:g}-{scale}-m-{draws}-{attack.lower()}"
                right = inputs.right(predict, seen, batch_size=size, name=name)
                row = {"model": model, "form": "predict", "title": title, "attack": attack}
                rows.append(row | threat | point | measured(right))
    return rows


def seconds(config: Config, settings: dict[str, Any], speed: Speeds) -> float:
    """An attack for each beta1, two scores for each point of the grid."""
    del config
    (model,) = settings["models"]
    crafting = (
        len(settings["beta1"]) * KINDS["pgd"].passes(settings["pgd"], settings["norm"]) * step_seconds(speed, model)
    )
    looks = len(settings["beta1"]) * sum(speed.look(model, draws) for *_, draws in _noises(settings))
    return settings["examples"] * (crafting + looks) + settings["clean"] * looks


def _column(row: Row) -> str:
    return f"{row['attack']}, {ball(row['norm'], row['epsilon'])}" if row["norm"] else row["attack"]


def _table(rows: list[Row]) -> Table:
    """A line for each front end; clean and attacked images are not equally many."""
    lines, heading = dict[str, dict[str, str]](), f"front end of {RECIPES[rows[0]['model']].title}"
    for row in rows:
        lines.setdefault(row["title"], {heading: row["title"]})[_column(row)] = text(row)
    return [heading, *dict.fromkeys(map(_column, rows))], list(lines.values())


STUDY = Study(
    "Sharpness, noise and draws",
    "Accuracy in percent with its 95 % Wilson interval of one trained model whose front end is changed in the test "
    "alone, by one noisy prediction of m draws. In brackets what the noise grows with: the "
    "filter's variance (the released code), its standard deviation, or the root of that (Eq. 4 to the letter). PGD is "
    "crafted without noise at that beta1.",
    settings,
    measure,
    _table,
    seconds,
)
