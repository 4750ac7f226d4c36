"""The cells of the tables: every attack on every model, each kept in the run directory and not done again.

Attacks without noise are crafted on the ``static`` form and scored on ``static`` and on ``predict`` (the mean over m
noisy draws, fresh noise). BPDA + EoT is crafted on ``bpda``, which sees noise, and scored on ``predict``.
"""

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.learn import FRONT, Examples
from experiments.provenance import provenance
from experiments.rundir import Config, Run
from rbf_jax import attacks, evaluate
from rbf_jax.evaluate import Outcomes
from rbf_jax.types import Attack, AttackResult, LogitsFn

NORMS = {"linf": attacks.Linf, "l2": attacks.L2}


class Cell(NamedTuple):
    """One attack on one model.

    Attributes:
        model: name of the model.
        attack: ``"clean"`` for none.
        norm: name of the norm, empty for clean.
        epsilon: radius of the ball.
        crafted_on: the form that is attacked.
        scored_on: the forms that classify the result.
        examples: how many.
        passes: gradient passes for each example, for the estimate of the time.
    """

    model: str
    attack: str
    norm: str
    epsilon: float
    crafted_on: str
    scored_on: tuple[str, ...]
    examples: int
    passes: int

    @property
    def name(self) -> str:
        """Of its files."""
        attack = self.attack.lower().replace("+", "-")
        return "-".join(filter(None, (self.model, attack, self.norm, f"{self.epsilon:g}" if self.norm else "")))


def cells(config: Config) -> Iterator[Cell]:
    """All cells, in the order of the table."""
    attack, total = config.attack, config.examples.test
    for model in config.models:
        both = ("static", "predict") if FRONT[model] else ("static",)
        yield Cell(model, "clean", "", 0.0, "", both, total, 0)
    for norm, epsilon in attack.budgets:
        for model in config.models:
            both = ("static", "predict") if FRONT[model] else ("static",)
            count = min(attack.static_examples, total)
            pgd = attack.pgd.steps * attack.pgd.restarts
            yield Cell(model, "FGSM", norm, epsilon, "static", both, count, 1)
            yield Cell(model, f"PGD-{attack.pgd.steps}", norm, epsilon, "static", both, count, pgd)
            if FRONT[model]:
                count = min(attack.eot_examples, total)
                passes = attack.eot.steps * attack.eot.draws
                yield Cell(model, "BPDA+EoT", norm, epsilon, "bpda", ("predict",), count, passes)


def make_attack(config: Config, cell: Cell) -> Attack:
    """The attack of a cell."""
    norm, settings = NORMS[cell.norm], config.attack
    if cell.attack == "FGSM":
        return attacks.fgsm(norm, epsilon=cell.epsilon)
    if cell.attack == "BPDA+EoT":
        return attacks.pgd(
            norm, epsilon=cell.epsilon, steps=settings.eot.steps, gradient=attacks.eot(settings.eot.draws)
        )
    return attacks.pgd(norm, epsilon=cell.epsilon, **settings.pgd)


def drawn(config: Config, count: int) -> np.ndarray:
    """Indices of the examples that are attacked: drawn once from all test examples, in their order."""
    total = config.examples.test
    return np.sort(np.random.default_rng(config.seed).permutation(total)[:count])


def craft(run: Run, examples: Examples, cell: Cell, logits_fn: LogitsFn) -> AttackResult:
    """The adversarial images of a cell; from the run directory where they are finished."""
    rows = drawn(run.config, cell.examples)
    return evaluate.run_attack(
        jax.random.key(run.config.seed + 1),
        make_attack(run.config, cell),
        logits_fn,
        examples.images[rows],
        examples.labels[rows],
        rows=rows,
        batch_size=run.config.attack.batch_size,
        parts=run.directory / "attacks" / cell.name,
        progress=f"{cell.attack} {cell.norm} {cell.epsilon:g} on {cell.model}",
    )


def outcome_path(run: Run, cell: Cell, form: str) -> Any:
    """Where the outcomes of a cell under one form lie."""
    return run.directory / "ledger" / f"{cell.name}-{form}.npz"


def evaluate_cell(run: Run, examples: Examples, cell: Cell, forms: dict[str, LogitsFn]) -> list[Outcomes]:
    """Crafts and scores a cell; one ledger for each form that scores it."""
    config, began = run.config, time.perf_counter()
    missing = [form for form in cell.scored_on if not outcome_path(run, cell, form).exists()]
    if missing:
        rows = drawn(config, cell.examples)
        crafted = craft(run, examples, cell, forms[cell.crafted_on]).images if cell.norm else examples.images[rows]
        for form in missing:
            redraws = (config.attack.selection, config.attack.scoring) if form == "predict" else (0, 1)
            if cell.attack == "clean":
                redraws = (0, redraws[1])  # nothing to select
            # Not the attack's key: a prediction is made under fresh noise.
            survived = evaluate.survival(
                jax.random.key(config.seed + 2),
                forms[form],
                crafted,
                examples.labels[rows],
                redraws=sum(redraws),
                rows=rows,
                batch_size=config.attack.batch_size,
                parts=run.directory / "attacks" / f"{cell.name}-{form}",
                progress=f"scoring it on {cell.model}, {form}",
            )
            facts = provenance() | {
                **{"model": cell.model, "attack": cell.attack, "norm": cell.norm, "epsilon": cell.epsilon},
                **{"crafted_on": cell.crafted_on, "scored_on": form, "passes": cell.passes},
                **{"profile": config.profile, "seed": config.seed, "weights": evaluate.fingerprint(forms[form])},
                # Crafting and scoring; only this process's where a killed run went on.
                "seconds": round(time.perf_counter() - began, 1),
            }
            selection, scoring = np.split(survived, [redraws[0]])
            evaluate.save_outcomes(outcome_path(run, cell, form), Outcomes(rows, selection, scoring, facts))
            run.log({"stage": "evaluate", "cell": cell.name, "form": form, "accuracy": float(scoring.mean())} | facts)
    return [evaluate.load_outcomes(outcome_path(run, cell, form)) for form in cell.scored_on]
