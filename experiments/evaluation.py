"""The cells of the tables: every attack on every model, each kept in the run directory and not done again.

Attacks without noise are crafted on the ``static`` form and scored on ``static`` and on ``predict`` (the mean over m
noisy draws, fresh noise). BPDA + EoT is crafted on ``bpda``, which sees noise, and scored on ``predict``.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from experiments.learn import FRONT, Examples
from experiments.provenance import provenance
from experiments.rundir import Config, Run
from rbf_jax import attacks, evaluate
from rbf_jax.evaluate import Outcomes, Parts
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
        parts=crafted_in(run, cell),
        progress=f"{cell.attack} {cell.norm} {cell.epsilon:g} on {cell.model}",
    )


def crafted_in(run: Run, cell: Cell) -> Parts:
    """Where the adversarial images of a cell are kept."""
    return Parts(run.directory / "attacks" / cell.name, cell._asdict())


def outcome_path(run: Run, cell: Cell, form: str) -> Path:
    """Where the outcomes of a cell under one form lie."""
    return run.directory / "ledger" / f"{cell.name}-{form}.npz"


def evaluate_cell(run: Run, examples: Examples, cell: Cell, forms: dict[str, LogitsFn]) -> None:
    """Crafts and scores a cell; one ledger for each form that scores it.

    Raises:
        ValueError: a ledger that is there already is of other weights.
    """
    for form in cell.scored_on:
        path, weights = outcome_path(run, cell, form), evaluate.fingerprint(forms[form])
        if not path.exists():
            evaluate.save_outcomes(path, _outcomes(run, examples, cell, form, forms, weights))
        elif evaluate.load_outcomes(path).facts["weights"] != weights:
            raise ValueError(f"{path} is of other weights. Remove {run.directory / 'ledger'} to evaluate these")


def _outcomes(
    run: Run, examples: Examples, cell: Cell, form: str, forms: dict[str, LogitsFn], weights: str
) -> Outcomes:
    config, rows = run.config, drawn(run.config, cell.examples)
    images = craft(run, examples, cell, forms[cell.crafted_on]).images if cell.norm else examples.images[rows]
    selection, scoring = (config.attack.selection, config.attack.scoring) if form == "predict" else (0, 1)
    if cell.attack == "clean":
        selection = 0  # nothing to select
    parts = Parts(run.directory / "attacks" / f"{cell.name}-{form}", cell._asdict() | {"form": form})
    survived = evaluate.survival(
        jax.random.key(config.seed + 2),  # not the attack's: a prediction is made under fresh noise
        forms[form],
        images,
        examples.labels[rows],
        redraws=selection + scoring,
        rows=rows,
        batch_size=config.attack.batch_size,
        parts=parts,
        progress=f"  scored on {form}" if cell.norm else f"clean on {cell.model}, {form}",
    )
    facts = provenance() | {
        "profile": config.profile,
        "seed": config.seed,
        "model": cell.model,
        "attack": cell.attack,
        "norm": cell.norm,
        "epsilon": cell.epsilon,
        "crafted_on": cell.crafted_on,
        "scored_on": form,
        "gradient passes": cell.passes,
        "weights": weights,
        "crafting seconds": round(crafted_in(run, cell).seconds(), 1) if cell.norm else 0.0,
        "scoring seconds": round(parts.seconds(), 1),
    }
    run.log({"stage": "evaluate", "cell": cell.name, "form": form, "accuracy": survived[selection:].mean()} | facts)
    return Outcomes(rows, survived[:selection], survived[selection:], facts)
