"""Signs of hidden gradients (Athalye et al., ICML 2018; Carlini et al., arXiv:1902.06705)."""

import math
from functools import partial
from typing import Any

import numpy as np

from experiments.catalogue import FORWARD, NORMS
from experiments.cost import Speeds
from experiments.recipes import RECIPES
from experiments.results import column_title
from experiments.rundir import Config
from experiments.studies.common import Inputs, Row, Sample, Study, asked, budget, pivot, step_seconds
from rbf_jax import attacks, evaluate
from rbf_jax.evaluate import Parts
from rbf_jax.types import LogitsFn

PASSES = 40 + 400 + 40 + FORWARD * 1000
"""Of the checks: PGD thrice, and Square."""

_BUDGET = ("norm", "epsilon", "large")


def settings(config: Config) -> dict[str, Any]:
    """The budget, and the radius at which nothing can be robust."""
    studies = asked(config)
    if not studies.get("large"):
        return {}
    return budget(config) | {"models": studies["models"], "examples": studies["few"], "large": studies["large"]}


def measure(inputs: Inputs) -> list[Row]:
    """The flags of each model without noise, and of one noisy draw as the noisy prediction judges its images."""
    settings, rows, seen = inputs.settings, [], inputs.sample(inputs.settings["examples"])
    for model, forms in inputs.models.items():
        for form in ("static", "draw") if RECIPES[model].defended else ("static",):
            judge = {"judge": forms["predict"]} if form == "draw" else {}
            parts = Parts(inputs.folder / f"{model}-{form}", {name: settings[name] for name in _BUDGET})
            parts.open(evaluate.fingerprint(forms[form], judge, seen), len(seen.rows))
            flags = parts.kept(0, partial(_flags, inputs, seen, forms[form], judge))
            for name, raised, value, meaning in zip(*flags, strict=True):
                row = {"model": model, "form": form, "title": str(name), "N": len(seen.rows), "raised": bool(raised)}
                # JSON has no infinity: logits that cannot be probabilities. Adding 0 takes the sign off -0.
                value = round(float(value), 6) + 0.0 if math.isfinite(value) else None
                rows.append(row | {"value": value, "meaning": str(meaning)})
    return rows


def _flags(inputs: Inputs, seen: Sample, logits_fn: LogitsFn, judge: dict[str, Any]) -> tuple[np.ndarray, ...]:
    """Names, whether raised, values and meanings."""
    norm, epsilon, large = (inputs.settings[name] for name in _BUDGET)
    ball = {"norm": NORMS[norm], "epsilon": epsilon, "large_epsilon": large}
    flags = attacks.masking_checks(inputs.key("attack"), logits_fn, seen.images, seen.labels, **ball, **judge)
    return tuple(map(np.array, ([*flags], *zip(*flags.values(), strict=True))))


def seconds(config: Config, settings: dict[str, Any], speed: Speeds) -> float:
    """All forms of all models."""
    del config
    steps = PASSES * settings["examples"]
    return sum(steps * len(RECIPES[model].scored_on) * step_seconds(speed, model) for model in settings["models"])


def _column(row: Row) -> str:
    return column_title(row["model"], "static") if row["form"] == "static" else f"{RECIPES[row['model']].title}, a draw"


def _cell(row: Row) -> str:
    value = "–" if row["value"] is None else f"{row['value']:.3g}"
    return f"{value} (raised)" if row["raised"] else value


STUDY = Study(
    "Signs of hidden gradients",
    "What `attacks.masking_checks` measured, and whether it raised its flag, at the tables' first budget. With noise "
    "the gradients are those of one draw, and the noisy prediction says which images are broken. 'randomness' is then "
    "the noise itself. A flag takes two images (up to commit ad0e68d one), which of few may be chance.",
    settings,
    measure,
    lambda rows: pivot(rows, "sign", _column, _cell),
    seconds,
)
