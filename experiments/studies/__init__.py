"""What the paper did not do: curves, convergence, signs of hidden gradients, corruptions, an ablation, a long training.

A study is kept in the run directory as ``studies/NAME.json`` and not done again; a stopped one goes on. The
configuration's ``studies`` says what is studied, and an entry that is empty or missing leaves its study out::

    models      names of the models
    examples    images that are attacked: of the curves, PGD and the ablation
    few         images of what is slow: BPDA+EoT, signs, training
    curves      {norm: radii}                            `curves`
    steps       of PGD without noise                     `convergence`
    restarts    of PGD with 100 steps                    `convergence`
    stronger    draws, steps, warm_up and restarts of    `convergence`
                BPDA+EoT, beside the tables' settings
    large       radius where nothing can be robust       `masking`
    corrupted   images                                   `corruptions`
    beta1, beta2, scales, draws                          `ablation`
                the grid
    clean       images that are not attacked             `ablation`, `level`
    defended    model that it changes                    `ablation`
    levels      beta2 that is tried on validation images `level`
    training    model (of ``config.snapshots``), steps and queries of the attacks, `training`
                and beta1 of the smoother fronts

Convergence, signs, ablation and training are at the tables' first budget.
"""

import json
from pathlib import Path
from typing import Any

from experiments.cost import Speeds, Stage
from experiments.evaluation import Models
from experiments.learn import Data
from experiments.paper_tables import Table
from experiments.provenance import provenance
from experiments.recipes import RECIPES
from experiments.rundir import Config, Run
from experiments.studies import ablation, convergence, corruptions, curves, level, masking, training
from experiments.studies.common import Inputs, plain
from rbf_jax import evaluate
from rbf_jax.evaluate import Parts
from rbf_jax.files import check_facts, read_json, replacing
from rbf_jax.rbf import RBFFilters
from rbf_jax.types import LogitsFn

STUDIES = {
    "curves": curves.STUDY,
    "convergence": convergence.STUDY,
    "masking": masking.STUDY,
    "corruptions": corruptions.STUDY,
    "ablation": ablation.STUDY,
    "level": level.STUDY,
    "training": training.STUDY,
}


def wanted(config: Config) -> dict[str, dict[str, Any]]:
    """The studies that the configuration asks for, with their settings."""
    found = {name: study.settings(config) for name, study in STUDIES.items()}
    return {name: settings for name, settings in found.items() if settings.get("models") and settings["examples"]}


def study_path(run: Run, name: str) -> Path:
    """Where a study's record lies; its batches lie in a folder beside it."""
    return run.directory / "studies" / f"{name}.json"


def study(name: str, run: Run, examples: Data, filters: RBFFilters, models: Models) -> dict[str, Any]:
    """A study's record, from its file if it is finished.

    Args:
        name: one of `wanted`.
        run: the run directory.
        examples: of which those that validate and those of the test are studied.
        filters: those of the EM.
        models: the forms of each model.

    Returns:
        Where it was computed, ``seed``, ``settings``, ``weights`` (fingerprints by model), ``seconds``, and ``rows``:
        one for each figure, with its ``model``, ``form``, ``title`` and ``N``.

    Raises:
        ValueError: a record or batches of other weights or settings, or damaged ones.
    """
    config, path, settings = run.config, study_path(run, name), wanted(run.config)[name]
    folder, chosen = path.with_suffix(""), {model: models[model] for model in settings["models"]}
    determined = plain(
        {
            "study": name,
            "set": config.set,
            "profile": config.profile,
            "seed": config.seed,
            "settings": settings,
            "weights": {model: _weights(model, forms) for model, forms in chosen.items()},
        }
    )
    if not path.exists():
        origin = provenance(folder)
        rows = STUDIES[name].measure(Inputs(run, folder, settings, examples.test, examples.validation, filters, chosen))
        seconds = round(sum(Parts(batches, {}).seconds() for batches in folder.glob("*")), 1)
        facts = origin | determined | {"seconds": seconds}
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n")
        run.log({"stage": "study"} | facts)
    way_out = f"Remove it and {folder} to study anew"
    found = read_json(path, way_out)
    check_facts(f"{path} is of another study", found, determined, way_out)
    return found


def _weights(model: str, forms: dict[str, LogitsFn]) -> str:
    return evaluate.fingerprint([forms[form] for form in RECIPES[model].scored_on])


def table(name: str, record: dict[str, Any]) -> Table:
    """Headings and lines of a study's record."""
    return STUDIES[name].table(record["rows"])


def studying(run: Run, speed: Speeds) -> list[Stage]:
    """Studies that are still to be done."""
    asked = wanted(run.config).items()
    todo = [(name, settings) for name, settings in asked if not study_path(run, name).exists()]
    return [(f"study {name}", STUDIES[name].seconds(run.config, settings, speed)) for name, settings in todo]
