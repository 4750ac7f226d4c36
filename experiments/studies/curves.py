"""Accuracy against epsilon, beyond the paper's budget (Carlini et al., arXiv:1902.06705)."""

from typing import Any

import numpy as np

from experiments.catalogue import KINDS, NORMS, ball
from experiments.cost import Speeds
from experiments.recipes import RECIPES
from experiments.results import measured
from experiments.rundir import Config
from experiments.studies.common import (
    Inputs,
    Row,
    Study,
    asked,
    pivot,
    step_seconds,
)
from rbf_jax import attacks
from rbf_jax.attacks import Iterative

LOSSES = {"cross-entropy": attacks.cross_entropy, "margin": attacks.margin}


def settings(config: Config) -> dict[str, Any]:
    """Radii by norm, and the settings of APGD, which are the tables'."""
    studies = asked(config)
    if not studies.get("curves"):
        return {}
    return {
        "models": studies["models"],
        "examples": studies["examples"],
        "curves": {norm: sorted(studies["curves"][norm]) for norm in NORMS if norm in studies["curves"]},
        "apgd": config.attack.settings.apgd.to_dict(),
    }


def measure(inputs: Inputs) -> list[Row]:
    """The curve of each norm and model."""
    rows = []
    for norm, radii in inputs.settings["curves"].items():
        # One attack for all radii, which are given with the examples: it compiles once.
        suite = {
            name: attacks.apgd(NORMS[norm], epsilon=radii[-1], loss=loss, **inputs.settings["apgd"])
            for name, loss in LOSSES.items()
        }
        for model in inputs.models:
            rows += _curve(inputs, model, norm, suite)
    return rows


def _curve(inputs: Inputs, model: str, norm: str, suite: dict[str, Iterative]) -> list[Row]:
    forms, noisy, rows = inputs.models[model], RECIPES[model].defended, []
    attacked, batch_size = inputs.sample(inputs.settings["examples"]), inputs.run.config.attack.batch_size
    images = attacked.images.copy()
    right = {"static": inputs.right(forms["static"], attacked)}
    if noisy:
        # On one redraw that says which examples are broken, and on one that scores them.
        right["predict"] = inputs.right(forms["predict"], attacked, redraws=2)

    def add(epsilon: float) -> None:
        for form in RECIPES[model].scored_on:
            row = {"model": model, "form": form, "norm": norm, "epsilon": epsilon}
            rows.append(row | measured(right[form][-1:]))

    add(0.0)
    for epsilon in inputs.settings["curves"][norm]:
        for number, (name, attack) in enumerate(suite.items()):
            live = np.any([found[0] for found in right.values()], 0)
            if not live.any():
                break
            # Batches are filled up with broken examples, which stay as they are: fewer shapes to compile.
            filled = -(-live.sum() // batch_size) * batch_size
            at = np.sort(np.argsort(~live, kind="stable")[:filled])
            found = inputs.attack(
                f"{model}-{norm}-{epsilon:g}-{name}",
                attack,
                forms[RECIPES[model].gradient_form],
                attacked.take(at),
                {"loss": name, "norm": norm} | inputs.settings["apgd"],
                number=number,
                epsilon=np.full(len(at), epsilon, np.float32),
                leave=not noisy,
            )
            right["static"][0, at] &= ~np.asarray(found.success)
            if noisy:
                moved = right["predict"][0, at]
                images[at[moved]] = found.images[moved]
                scored = inputs.right(forms["predict"], attacked._replace(images=images).take(at), redraws=2)
                right["predict"][:, at[moved]] = scored[:, moved]
        add(epsilon)
    return rows


def seconds(config: Config, settings: dict[str, Any], speed: Speeds) -> float:
    """Where nothing breaks."""
    del config
    passes = sum(
        len(radii) * KINDS["apgd"].passes(settings["apgd"], norm) for norm, radii in settings["curves"].items()
    )
    steps = settings["examples"] * len(LOSSES) * passes
    return steps * sum(step_seconds(speed, model) for model in settings["models"])


STUDY = Study(
    "Accuracy against epsilon",
    "Accuracy in percent with its 95 % Wilson interval, under APGD on the cross-entropy and then on the margin loss, "
    "both crafted without noise. Each epsilon attacks what the smaller ones left: an example that is broken stays so, "
    "and the accuracy without noise cannot rise. With noise, an example that one redraw calls broken keeps its image, "
    "and the number is that of another redraw: it may rise by what a redraw does, and attacks that know the noise "
    "may leave far less ('Worst cases'). Images of models with noise are driven on where they are broken without it.",
    settings,
    measure,
    lambda rows: pivot([row | {"title": ball(row["norm"], row["epsilon"])} for row in rows], "budget"),
    seconds,
)
