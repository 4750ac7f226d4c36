"""Accuracy on corrupted images, with no adversary."""

from typing import Any

import numpy as np

from experiments.corruptions import CORRUPTIONS
from experiments.cost import Speeds
from experiments.recipes import RECIPES
from experiments.results import measured
from experiments.rundir import Config
from experiments.studies.common import Inputs, Row, Study, asked, pivot, score_seconds


def settings(config: Config) -> dict[str, Any]:
    """How many images, and the severities."""
    studies = asked(config)
    if not studies.get("corrupted"):
        return {}
    severities = {name: list(corruption.severities) for name, corruption in CORRUPTIONS.items()}
    return {"models": studies["models"], "examples": studies["corrupted"], "severities": severities}


def measure(inputs: Inputs) -> list[Row]:
    """Each model on clean images and under each corruption at each severity."""
    clean = inputs.sample(inputs.settings["examples"])
    versions = [("clean", 0.0, "clean", clean.images)]
    for name, severities in inputs.settings["severities"].items():
        for severity in severities:
            # The same seed: each image moves in the same direction at every severity.
            images = CORRUPTIONS[name].apply(clean.images, severity, np.random.default_rng(inputs.run.config.seed))
            versions.append((name, severity, f"{name}, {severity:g} {CORRUPTIONS[name].unit}", images))
    rows = []
    for name, severity, title, images in versions:
        for model, forms in inputs.models.items():
            for form in RECIPES[model].scored_on:
                kept = f"{model}-{form}-{name}-{severity:g}"
                right = inputs.right(forms[form], clean._replace(images=images), name=kept)
                row = {"model": model, "form": form, "corruption": name, "severity": severity, "title": title}
                rows.append(row | measured(right))
    return rows


def seconds(config: Config, settings: dict[str, Any], speed: Speeds) -> float:
    """All forms of all models."""
    count = settings["examples"] * (1 + sum(map(len, settings["severities"].values())))
    return count * sum(score_seconds(speed, model, config.draws) for model in settings["models"])


STUDY = Study(
    "Corruptions",
    "Accuracy in percent with its 95 % Wilson interval on corrupted images, with no adversary; the noisy prediction is "
    "made once. At every severity an image is moved in the same direction.",
    settings,
    measure,
    lambda rows: pivot(rows, "corruption"),
    seconds,
)
