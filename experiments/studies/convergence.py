"""Accuracy against the steps and restarts of an attack: whether the tables' attacks have converged."""

from typing import Any

import numpy as np

from experiments.catalogue import KINDS, NORMS
from experiments.cost import Speeds
from experiments.recipes import RECIPES
from experiments.results import measured
from experiments.rundir import Config
from experiments.studies.common import Inputs, Row, Study, asked, budget, pivot, step_seconds
from rbf_jax import attacks

RESTARTED = 100
"""Steps of each restart."""


def settings(config: Config) -> dict[str, Any]:
    """Steps and restarts of PGD; of BPDA+EoT the tables' settings and stronger ones."""
    studies = asked(config)
    found = {name: studies.get(name) for name in ("steps", "restarts", "stronger")}
    if not studies["few"]:
        found["stronger"] = None
    if not any(found.values()):
        return {}
    return (
        found
        | budget(config)
        | {
            "models": studies["models"],
            "examples": studies["examples"],
            "few": studies["few"],
            "bpda_eot": config.attack.settings.bpda_eot.to_dict(),
            "scoring": config.attack.scoring,
        }
    )


def _adaptive(settings: dict[str, Any]) -> list[dict[str, int]]:
    """The settings of BPDA+EoT that are tried; none where there are no stronger ones."""
    return [{"restarts": 1} | settings[name] for name in ("bpda_eot", "stronger")] if settings["stronger"] else []


def measure(inputs: Inputs) -> list[Row]:
    """Each model under PGD, and those with noise under BPDA+EoT."""
    settings, rows = inputs.settings, []
    # The same attacks for all models: models of one kind then compile them once.
    counts = {*(settings["steps"] or ()), *([RESTARTED] if settings["restarts"] else [])}
    pgd = {n: attacks.pgd(NORMS[settings["norm"]], epsilon=settings["epsilon"], steps=n) for n in sorted(counts)}
    for model in inputs.models:
        rows += _pgd(inputs, model, pgd)
    for model in filter(lambda model: RECIPES[model].defended, inputs.models):
        rows += _bpda_eot(inputs, model)
    return rows


def _pgd(inputs: Inputs, model: str, pgd: dict[int, attacks.Iterative]) -> list[Row]:
    settings, forms, rows = inputs.settings, inputs.models[model], []
    ball = {"norm": settings["norm"], "epsilon": settings["epsilon"]}
    attacked = inputs.sample(settings["examples"])
    clean = inputs.right(forms["static"], attacked)[0]

    def left(steps: int, restart: int, right: np.ndarray) -> np.ndarray:
        right, at = right.copy(), np.flatnonzero(right)
        if len(at):
            name, form = f"{model}-pgd-{steps}-restart-{restart}", forms[RECIPES[model].gradient_form]
            found = inputs.attack(name, pgd[steps], form, attacked.take(at), ball, number=restart, leave=True)
            right[at] = ~np.asarray(found.success)
        return right

    def add(series: str, title: str, steps: int, restarts: int, right: np.ndarray) -> None:
        row = {"model": model, "form": "static", "attack": "PGD", "series": series, "title": title, **ball}
        rows.append(row | {"steps": steps, "restarts": restarts} | measured(right[None]))

    for steps in settings["steps"] or ():
        add("steps", f"PGD-{steps}", steps, 1, left(steps, 0, clean))
    right, restarts = clean, settings["restarts"] or ()
    for restart in range(max(restarts, default=0)):
        right = left(RESTARTED, restart, right)
        if restart + 1 in restarts:
            add("restarts", f"PGD-{RESTARTED} x {restart + 1}", RESTARTED, restart + 1, right)
    return rows


def _bpda_eot(inputs: Inputs, model: str) -> list[Row]:
    settings, forms, rows = inputs.settings, inputs.models[model], []
    ball = {"norm": settings["norm"], "epsilon": settings["epsilon"]}
    attacked = inputs.sample(settings["few"])
    for s in _adaptive(settings):
        attack = KINDS["bpda_eot"].make(NORMS[settings["norm"]], settings["epsilon"], s, forms)
        assert isinstance(attack, attacks.Composed)
        name = f"{model}-bpda_eot-" + "-".join(str(s[key]) for key in ("draws", "steps", "warm_up", "restarts"))
        images = np.asarray(inputs.attack(name, attack, forms["bpda"], attacked, ball | s).images)
        right = inputs.right(forms["predict"], attacked._replace(images=images), redraws=settings["scoring"])
        title = f"BPDA+EoT, {s['draws']} draws x {s['steps']} steps, from PGD-{s['warm_up']} x {s['restarts']}"
        row = {"model": model, "form": "predict", "attack": "BPDA+EoT", "series": "noise", "title": title}
        rows.append(row | ball | s | measured(right))
    return rows


def seconds(config: Config, settings: dict[str, Any], speed: Speeds) -> float:
    """Where nothing breaks."""
    del config
    pgd = sum(settings["steps"] or ()) + RESTARTED * max(settings["restarts"] or (), default=0)
    noise = sum(s["draws"] * s["steps"] + s["warm_up"] * s["restarts"] for s in _adaptive(settings))
    passes = {m: settings["examples"] * pgd + settings["few"] * noise * RECIPES[m].defended for m in settings["models"]}
    return sum(count * step_seconds(speed, model) for model, count in passes.items())


STUDY = Study(
    "Convergence of the attacks",
    "Accuracy in percent with its 95 % Wilson interval, at the tables' first budget. PGD: without noise, in steps of "
    "2.5 epsilon / steps; a restart attacks what the ones before it left. BPDA+EoT: on fewer images, the tables' "
    "settings and stronger ones, from PGD with so many restarts, scored by the noisy prediction as in the tables. PGD "
    "is for models without noise, BPDA+EoT for those with it.",
    settings,
    measure,
    lambda rows: pivot(rows, "attack"),
    seconds,
)
