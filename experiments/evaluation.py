"""The cells of the tables: every attack on every model, each kept in the run directory and not done again.

Attacks without noise are crafted on the ``static`` form and scored on ``static`` and on ``predict`` (the mean over m
noisy draws, fresh noise). BPDA + EoT is crafted on ``bpda``, which sees noise, and scored on ``predict``.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.learn import FRONT, Examples
from experiments.provenance import provenance
from experiments.rundir import Config, Run
from rbf_jax import attacks, evaluate
from rbf_jax.evaluate import Outcomes, Parts
from rbf_jax.types import Attack, AttackResult, LogitsFn

NORMS = {"linf": attacks.Linf, "l2": attacks.L2, "l1": attacks.L1}


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
        settings: of the attack; JSON values.
    """

    model: str
    attack: str
    norm: str
    epsilon: float
    crafted_on: str
    scored_on: tuple[str, ...]
    examples: int
    passes: int
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        """Of its files."""
        attack = self.attack.lower().replace("+", "-")
        return "-".join(filter(None, (self.model, attack, self.norm, f"{self.epsilon:g}" if self.norm else "")))


def cells(config: Config) -> Iterator[Cell]:
    """All cells, in the order of the table."""
    attack, total = config.attack, config.examples.test
    pgd, apgd, eot = (attack[name].to_dict() for name in ("pgd", "apgd", "eot"))
    for model in config.models:
        both = ("static", "predict") if FRONT[model] else ("static",)
        yield Cell(model, "clean", "", 0.0, "", both, total, 0, {})
    for norm, epsilon in attack.budgets:
        for model in config.models:
            both = ("static", "predict") if FRONT[model] else ("static",)
            count = min(attack.static_examples, total)
            for name, passes, settings in (
                ("FGSM", 1, {}),
                (f"PGD-{pgd['steps']}", pgd["steps"] * pgd["restarts"], pgd),
                (f"APGD-{apgd['steps']}", (apgd["steps"] + 1) * apgd["restarts"], apgd),
            ):
                if settings.get("steps") != 0:  # 0 leaves an attack out
                    yield Cell(model, name, norm, epsilon, "static", both, count, passes, settings)
            if FRONT[model]:
                count = min(attack.eot_examples, total)
                passes = eot["steps"] * eot["draws"]
                yield Cell(model, "BPDA+EoT", norm, epsilon, "bpda", ("predict",), count, passes, eot)


def make_attack(cell: Cell) -> Attack:
    """The attack of a cell."""
    norm, settings = NORMS[cell.norm], cell.settings
    if cell.attack == "FGSM":
        return attacks.fgsm(norm, epsilon=cell.epsilon)
    if cell.attack.startswith("APGD"):
        return attacks.apgd(norm, epsilon=cell.epsilon, **settings)
    if cell.attack == "BPDA+EoT":
        return attacks.pgd(norm, epsilon=cell.epsilon, steps=settings["steps"], gradient=attacks.eot(settings["draws"]))
    return attacks.pgd(norm, epsilon=cell.epsilon, **settings)


def drawn(config: Config, count: int) -> np.ndarray:
    """Indices of the examples that are attacked: drawn once from all test examples, in their order."""
    total = config.examples.test
    return np.sort(np.random.default_rng(config.seed).permutation(total)[:count])


def craft(run: Run, examples: Examples, cell: Cell, logits_fn: LogitsFn) -> AttackResult:
    """The adversarial images of a cell; from the run directory where they are finished."""
    rows = drawn(run.config, cell.examples)
    return evaluate.run_attack(
        jax.random.key(run.config.seed + 1),
        make_attack(cell),
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
        ValueError: a ledger that is there already is of other weights or of other settings.
    """
    for form in cell.scored_on:
        path, config = outcome_path(run, cell, form), run.config
        redraws = (config.attack.selection, config.attack.scoring) if form == "predict" else (0, 1)
        if cell.attack == "clean":
            redraws = (0, redraws[1])  # nothing to select
        determined = {
            **cell._asdict(),
            "scored_on": form,
            "redraws": redraws,
            "profile": config.profile,
            "seed": config.seed,
            "weights": evaluate.fingerprint(forms[form]),
        }
        determined = json.loads(json.dumps(determined))
        if not path.exists():
            evaluate.save_outcomes(path, _outcomes(run, examples, cell, forms, determined))
        found = evaluate.load_outcomes(path).facts
        for name, value in determined.items():
            if found.get(name) != value:
                wrong = f"its {name} is {found.get(name)!r}, not {value!r}"
                raise ValueError(f"{path} is of another evaluation: {wrong}. Remove {path.parent} to evaluate anew")


def _outcomes(
    run: Run, examples: Examples, cell: Cell, forms: dict[str, LogitsFn], determined: dict[str, Any]
) -> Outcomes:
    config, rows, form = run.config, drawn(run.config, cell.examples), determined["scored_on"]
    selection, scoring = determined["redraws"]
    images = craft(run, examples, cell, forms[cell.crafted_on]).images if cell.norm else examples.images[rows]
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
    facts = provenance() | determined
    facts["crafting seconds"] = round(crafted_in(run, cell).seconds(), 1) if cell.norm else 0.0
    facts["scoring seconds"] = round(parts.seconds(), 1)
    run.log({"stage": "evaluate", "cell": cell.name, "form": form, "accuracy": survived[selection:].mean()} | facts)
    return Outcomes(rows, survived[:selection], survived[selection:], facts)
