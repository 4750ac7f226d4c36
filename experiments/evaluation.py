"""The cells of the tables, crafted and scored: each is kept in the run directory and not done again.

Attacks without noise are crafted on the ``static`` form and scored on ``static`` and on ``predict`` (the mean over m
noisy draws, fresh noise). Those that know the noise are crafted on a noisy form and scored on ``predict``.
"""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.catalogue import KINDS, NORMS, Cell, ball
from experiments.learn import Examples
from experiments.provenance import FINISHED, provenance
from experiments.rundir import Config, Run
from rbf_jax import evaluate
from rbf_jax.evaluate import Outcomes, Parts
from rbf_jax.files import check_facts
from rbf_jax.types import LogitsFn

Models = dict[str, dict[str, LogitsFn]]
"""The forms of each model."""


_fingerprint = functools.cache(evaluate.fingerprint)
"""Of a form, which is known by its object: the weights of a VGG-16 are read once, not for each ledger."""


class Scoring(NamedTuple):
    """How a form scores a cell: a ledger of its own.

    Attributes:
        form: which.
        role: ``"cell"`` for a number of its own, ``"union"`` for worst cases only, ``"both"``.
        rows: indices of the examples.
        selection: redraws that pick an example's worst attack.
        redraws: redraws that score.
    """

    form: str
    role: str
    rows: np.ndarray
    selection: int
    redraws: int


def drawn(config: Config, count: int) -> np.ndarray:
    """Indices of the examples that are attacked: drawn once from all test examples, in their order."""
    total = config.examples.test
    return np.sort(np.random.default_rng(config.seed).permutation(total)[:count])


def scorings(config: Config, cell: Cell) -> list[Scoring]:
    """A noisy prediction is scored once on many examples, and often on those that the worst cases are taken over."""
    attack, rows, found = config.attack, drawn(config, cell.examples), []
    for form in cell.scored_on:
        if not form.startswith("predict"):
            found.append(Scoring(form, "both" if cell.norm else "cell", rows, 0, 1))
        elif not cell.norm:
            found.append(Scoring(form, "cell", rows, 0, 1 if len(rows) > attack.redrawn else attack.scoring))
        elif len(rows) <= attack.redrawn:
            found.append(Scoring(form, "both", rows, attack.selection, attack.scoring))
        else:
            few = drawn(config, attack.redrawn)
            found.append(Scoring(form, "cell", rows, 0, 1))
            found.append(Scoring(form, "union", few, attack.selection, attack.scoring))
    return found


def outcome_path(run: Run, cell: Cell, scoring: Scoring) -> Path:
    """Where the outcomes of a cell lie."""
    role = "-union" if scoring.role == "union" else ""
    return run.directory / "ledger" / f"{cell.name}-{scoring.form}{role}.npz"


def crafted_in(run: Run, cell: Cell) -> Path:
    """Where the attacked images of a cell are kept."""
    return run.directory / "attacks" / cell.folder


def scored_in(run: Run, path: Path) -> Path:
    """Where the finished batches of a ledger's scores are kept."""
    return run.directory / "scores" / path.stem


def craft(run: Run, examples: Examples, cell: Cell, models: Models) -> np.ndarray:
    """The attacked images of a cell, ``(N, H, W, C)``; from the run directory where they are finished."""
    rows, config = drawn(run.config, cell.examples), run.config
    if not cell.norm:
        return examples.images[rows]
    form, at, level = cell.crafted_on.partition("@")
    of_source = models[cell.source]
    # The same names at the level of noise that the cell asks for; without noise there is but one.
    forms = {
        name: of_source[name if name == "static" else f"{name}{at}{level}"] for name in of_source if "@" not in name
    }
    attack = KINDS[cell.attack].make(NORMS[cell.norm], cell.epsilon, cell.settings, forms)
    key, directory = jax.random.key(config.seed + 1), crafted_in(run, cell)
    images, labels, logits_fn = examples.images[rows], examples.labels[rows], forms[form]
    if isinstance(attack, Mapping):
        result = evaluate.run_suite(
            key,
            attack,
            logits_fn,
            images,
            labels,
            judge=forms["predict"] if form == "draw" else None,
            redraws=(config.attack.selection, 1),
            rows=rows,
            batch_size=config.attack.batch_size,
            directory=directory,
            progress=True,
        )
        return result.images
    result = evaluate.run_attack(
        key,
        attack,
        logits_fn,
        images,
        labels,
        rows=rows,
        leave=cell.leaves,
        batch_size=config.attack.batch_size,
        parts=Parts(directory, {"attack": cell.attack, "norm": cell.norm, "epsilon": cell.epsilon} | cell.settings),
        progress=f"{cell.title} {ball(cell.norm, cell.epsilon)} on {cell.source}",
    )
    return np.asarray(result.images)


def evaluate_cell(run: Run, examples: Examples, cell: Cell, models: Models) -> list[Path]:
    """Crafts and scores a cell; returns its ledgers.

    Raises:
        ValueError: a ledger that is there already is of other weights or of other settings.
    """
    paths, config, images = [], run.config, None
    for scoring in scorings(config, cell):
        path, logits_fn = outcome_path(run, cell, scoring), models[cell.model][scoring.form]
        determined = {
            **cell._asdict(),
            "title": cell.title,
            "leaving": cell.leaves,
            "scored_on": scoring.form,
            "role": scoring.role,
            "examples": len(scoring.rows),
            "redraws": [scoring.selection, scoring.redraws],
            "profile": config.profile,
            "seed": config.seed,
            "weights": _fingerprint(logits_fn),
            "source weights": _fingerprint(models[cell.source]["static"]),
        }
        determined = json.loads(json.dumps(determined))
        if not path.exists():
            origin = provenance(scored_in(run, path), *([crafted_in(run, cell)] if cell.norm else []))
            if images is None:
                images = craft(run, examples, cell, models)
                if cell.norm:  # whoever reads them later computed nothing of them
                    (crafted_in(run, cell) / FINISHED).touch()
            outcomes = _outcomes(run, examples, cell, scoring, images, logits_fn, origin | determined)
            evaluate.save_outcomes(path, outcomes)
        way_out = f"Remove {path}, {crafted_in(run, cell)} and {scored_in(run, path)} to evaluate anew"
        check_facts(f"{path} is of another evaluation", evaluate.load_outcomes(path).facts, determined, way_out)
        paths.append(path)
    return paths


def _outcomes(
    run: Run,
    examples: Examples,
    cell: Cell,
    scoring: Scoring,
    images: np.ndarray,
    logits_fn: LogitsFn,
    facts: dict[str, Any],
) -> Outcomes:
    config, path = run.config, outcome_path(run, cell, scoring)
    taken = np.searchsorted(drawn(config, cell.examples), scoring.rows)
    parts = Parts(scored_in(run, path), {"cell": cell.name, "form": scoring.form})
    survived = evaluate.survival(
        jax.random.key(config.seed + 2),  # not the attack's: a prediction is made under fresh noise
        logits_fn,
        images[taken],
        examples.labels[scoring.rows],
        redraws=scoring.selection + scoring.redraws,
        rows=scoring.rows,
        batch_size=config.attack.batch_size,
        parts=parts,
        progress=f"  {cell.title} scored on {cell.model}, {scoring.form}",
    )
    crafted = crafted_in(run, cell)
    folders = [crafted, *(path for path in crafted.rglob("*") if path.is_dir())] if cell.norm else []
    facts = facts | {
        "crafting seconds": round(sum(Parts(folder, {}).seconds() for folder in folders), 1),
        "scoring seconds": round(parts.seconds(), 1),
    }
    accuracy = survived[scoring.selection :].mean()
    run.log({"stage": "evaluate", "cell": cell.name, "form": scoring.form, "accuracy": accuracy} | facts)
    return Outcomes(scoring.rows, survived[: scoring.selection], survived[scoring.selection :], facts)
