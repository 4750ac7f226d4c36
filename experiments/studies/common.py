"""What the studies share: what they compute from, how they attack and score, and how a table is made of their rows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import learn
from experiments.catalogue import ATTACK_STEP, first_budget
from experiments.cost import Speeds
from experiments.evaluation import Models, drawn
from experiments.learn import Examples
from experiments.paper_tables import Row, Table
from experiments.recipes import RECIPES
from experiments.results import column_title, percent
from experiments.rundir import Config, Run
from rbf_jax import evaluate, models, train
from rbf_jax.attacks import Composed, Iterative
from rbf_jax.evaluate import Parts
from rbf_jax.rbf import RBFFilters
from rbf_jax.types import Array, AttackResult, LogitsFn


class Sample(NamedTuple):
    """Test examples: their indices in the data set, images and labels."""

    rows: np.ndarray
    images: np.ndarray
    labels: np.ndarray

    def take(self, at: np.ndarray) -> "Sample":
        """Some of them."""
        return Sample(*(array[at] for array in self))


class Inputs(NamedTuple):
    """What a study computes from.

    Attributes:
        run: the run directory.
        folder: where finished batches are kept.
        settings: of the study.
        examples: all test examples.
        validation: all validation examples.
        filters: those of the EM.
        models: the forms of each model that is studied.
    """

    run: Run
    folder: Path
    settings: dict[str, Any]
    examples: Examples
    validation: Examples
    filters: RBFFilters
    models: Models

    def sample(self, count: int) -> Sample:
        """The examples that are attacked: the same that the tables' attacks meet."""
        rows = drawn(self.run.config, count)
        return Sample(rows, self.examples.images[rows], self.examples.labels[rows])

    def validating(self, count: int) -> Sample:
        """The first of the validation examples."""
        return Sample(np.arange(count), *(array[:count] for array in self.validation))

    def classifier(self, model: str) -> LogitsFn:
        """A model's trained network without its front end."""
        variables, _ = train.load_weights(learn.weights_path(self.run, model))
        return models.logits_fn(learn.classifier(self.run.config), variables)

    def key(self, name: str) -> jax.Array:
        """As for the tables: that of the attacks, or of the scores, which see noise that no attack has seen."""
        return jax.random.key(self.run.config.seed + {"attack": 1, "score": 2}[name])

    def attack(
        self,
        name: str,
        attack: Iterative | Composed,
        logits_fn: LogitsFn,
        sample: Sample,
        facts: dict[str, Any],
        *,
        number: int = 0,
        epsilon: Array | None = None,
        leave: bool = False,
    ) -> AttackResult:
        """Attacks the sample; finished batches are kept under that name, and those of other facts are refused."""
        return evaluate.run_attack(
            jax.random.fold_in(self.key("attack"), number),
            attack,
            logits_fn,
            sample.images,
            sample.labels,
            epsilon=epsilon,
            rows=sample.rows,
            leave=leave,
            batch_size=self.run.config.attack.batch_size,
            parts=Parts(self.folder / name, facts),
            progress=name,
        )

    def right(
        self,
        logits_fn: LogitsFn,
        sample: Sample,
        *,
        redraws: int = 1,
        batch_size: int | None = None,
        name: str | None = None,
    ) -> np.ndarray:
        """Which images are classified rightly, bool ``(redraws, N)``; kept where a name is given."""
        return evaluate.survival(
            self.key("score"),
            logits_fn,
            sample.images,
            sample.labels,
            redraws=redraws,
            rows=sample.rows,
            batch_size=batch_size or self.run.config.attack.batch_size,
            parts=None if name is None else Parts(self.folder / name, {"form": name}),
            progress=name,
        )


class Study(NamedTuple):
    """A study.

    Attributes:
        title: of its table.
        note: what its numbers are.
        settings: configuration -> what determines it beside the weights, JSON values, with the names of its
            ``models``; nothing where the configuration leaves it out.
        measure: computes its rows, each with ``title``, ``model``, ``form`` and ``N``.
        table: of its rows.
        seconds: (configuration, settings, speeds) -> what it will take at most.
    """

    title: str
    note: str
    settings: Callable[[Config], dict[str, Any]]
    measure: Callable[[Inputs], list[Row]]
    table: Callable[[list[Row]], Table]
    seconds: Callable[[Config, dict[str, Any], Speeds], float]


def asked(config: Config) -> dict[str, Any]:
    """The configuration's ``studies``, plain; models and images as far as they are there."""
    found = config.to_dict().get("studies") or {}
    counts = {name: min(found.get(name, 0), config.examples.test) for name in ("examples", "few", "corrupted", "clean")}
    return found | counts | {"models": [name for name in found.get("models", ()) if name in config.models]}


def budget(config: Config) -> dict[str, Any]:
    """The tables' first: norm and epsilon."""
    return dict(zip(("norm", "epsilon"), first_budget(config), strict=True))


def model_column(row: Row) -> str:
    """The column of a row's model and form."""
    return column_title(row["model"], row["form"])


def pivot(
    rows: list[Row],
    heading: str,
    column: Callable[[Row], str] = model_column,
    cell: Callable[[Row], str] = percent,
) -> Table:
    """A line for each title and number of examples, a column for each model; a dash where that was not measured."""
    headings = [heading, "N", *dict.fromkeys(map(column, rows))]
    lines: dict[tuple[str, int], dict[str, str]] = {}
    for row in rows:
        blank = dict.fromkeys(headings, "–") | {heading: row["title"], "N": str(row["N"])}
        lines.setdefault((row["title"], row["N"]), blank)[column(row)] = cell(row)
    return headings, list(lines.values())


def step_seconds(speed: Speeds, model: str) -> float:
    """Of an attack step on one image."""
    return ATTACK_STEP * speed.look(model)


def score_seconds(speed: Speeds, model: str, draws: int) -> float:
    """Of scoring one image in all its forms."""
    return sum(speed.look(model, draws if form == "predict" else 1) for form in RECIPES[model].scored_on)


def plain(tree: Any) -> Any:
    """As it is read back from JSON: tuples are lists."""
    return json.loads(json.dumps(tree))
