"""What a run will cost, before it starts: forward passes timed on this machine, times how many there will be."""

import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import certification, evaluation, learn
from experiments.catalogue import ATTACK_STEP, Cell, ball, cells
from experiments.recipes import RECIPES
from experiments.rundir import Run
from rbf_jax import RBFFilters, parallel, reconstruct

# A step of training against the forward pass alone, measured on two cores: 4.7 to 5.0 of VGG-16, 3.8 to 4.6 of the CNN.
STEP = 4.8
# The paper's number of filters: how many there will be is not known before.
FILTERS = {"mnist": 24, "cifar10": 232}


Stage = tuple[str, float]
"""What is to be done, and its seconds."""


class Speeds(NamedTuple):
    """Seconds an image of the network's forward pass, and of the reconstruction."""

    forward: float
    rebuild: float

    def look(self, model: str, draws: int = 1) -> float:
        """Of a model's forward pass, or of several draws behind one reconstruction."""
        return draws * self.forward + self.rebuild * RECIPES[model].defended


def _seconds(function: Any, *arguments: Any) -> float:
    jax.block_until_ready(function(*arguments))
    took = []
    for _ in range(5):  # as one turn may meet other work
        began = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        took.append(time.perf_counter() - began)
    return statistics.median(took)


def speeds(run: Run, examples: learn.Data) -> Speeds:
    """Times both on a batch for each device, with weights and filters of the right shapes."""
    config, images = run.config, examples.test.images
    batch = parallel.take(images, np.arange(config.attack.batch_size * parallel.count()) % len(images))
    network = learn.classifier(config)
    variables = network.init(jax.random.key(0), batch.shape[1:])
    forward = _seconds(jax.jit(lambda v, x: network.apply(v, x)[0]), variables, batch) / len(batch)
    count, channels = FILTERS[config.em.rules], batch.shape[-1]
    means = jax.random.uniform(jax.random.key(1), (count, 3, 3, channels))
    filters = RBFFilters(means, jnp.full(count, 0.1 * channels))
    rebuild = _seconds(jax.jit(lambda x: reconstruct(filters, x, 25.0)), batch) / len(batch)
    return Speeds(forward, rebuild)


def training(run: Run, examples: learn.Data, models: Sequence[str], speed: Speeds) -> list[Stage]:
    """Filters and models that are still to be learned."""
    config, noise, total = run.config, run.config.noise, len(examples.train.labels)
    stages = []
    if not learn.filters_path(run).exists() and any(RECIPES[name].defended for name in models):
        stages.append(("filters", 0.6 * speed.rebuild * 750 * config.em.steps))
    for name in models:
        if learn.weights_path(run, name).exists():
            continue
        recipe, epochs = RECIPES[name], learn.epochs(config, name)
        front, more, bank = speed.rebuild * recipe.defended, 0.0, 0.0
        if recipe.noise:
            more = 2 * noise.count / config.train.batch_size
            bank = noise.bank_examples * noise.bank_steps * ATTACK_STEP * (speed.forward + front)
        # Where images are moved each is rebuilt in each epoch, else the noisy ones alone.
        moved = config.train.flips and not recipe.adversarial
        epoch = total * (STEP * speed.forward * (1 + more) + front * (more + moved))
        if recipe.adversarial:
            epoch += total * ATTACK_STEP * (config.adversarial.steps + 1) * (speed.forward + front)
        epoch += len(examples.validation.labels) * speed.forward
        left = 1 - _steps_done(run, name) / max(1, epochs * (total // config.train.batch_size))
        stages.append((f"training {name}, {epochs} epochs", left * (epochs * epoch + bank)))
    return stages


def _steps_done(run: Run, name: str) -> int:
    """Up to the last checkpoint of a model."""
    checkpoints = (run.directory / "checkpoints" / name).glob("[0-9]*")
    return max((int(path.name) for path in checkpoints if path.name.isdigit()), default=0)


def _crafted(run: Run, cell: Cell) -> float:
    """Share of a cell's images that are crafted; of a suite nothing is known before its end."""
    # A file is called by its first image. Where images leave, it holds several batches.
    starts = sorted(int(path.stem) for path in evaluation.crafted_in(run, cell).glob("[0-9]*.npz"))
    size = starts[1] if len(starts) > 1 else run.config.attack.batch_size
    return min(1.0, len(starts) * size / cell.examples)


def attacking(run: Run, speed: Speeds) -> list[Stage]:
    """Cells that are still to be attacked and scored."""
    config, stages, crafted = run.config, [], set()
    for cell in cells(config):
        todo = [s for s in evaluation.scorings(config, cell) if not evaluation.outcome_path(run, cell, s).exists()]
        seconds = 0.0
        for scoring in todo:
            draws = config.draws if scoring.form.startswith("predict") else 1
            seconds += len(scoring.rows) * (scoring.selection + scoring.redraws) * speed.look(cell.model, draws)
        if todo and cell.folder not in crafted:
            crafted.add(cell.folder)
            share = 1 - _crafted(run, cell)
            seconds += share * cell.examples * cell.passes * ATTACK_STEP * speed.look(cell.source)
        if todo:
            met = f"{cell.title} {ball(cell.norm, cell.epsilon)}" if cell.norm else cell.title
            title = f"{met} on {cell.model}"
            stages.append((f"{title}, {cell.examples} images", seconds))
    return stages


def certifying(run: Run, speed: Speeds) -> list[Stage]:
    """Certificates that are still to be computed."""
    config, stages = run.config.certify, []
    for setting in certification.settings(run.config):
        if certification.certificates_path(run, setting).exists():
            continue
        batches = -(-config.n0 // config.batch_size) - (-setting.samples // config.batch_size)
        once = speed.look(setting.model)
        title = f"certificates of {setting.model}, {setting.form}, sigma {setting.sigma:g}, {setting.samples} samples"
        stages.append((f"{title}, {setting.examples} images", setting.examples * batches * config.batch_size * once))
    return stages


def say(stages: list[Stage]) -> str:
    """The estimate as text."""
    if not stages:
        return "  everything is done already; remove that folder to do it again"
    lines = [f"  {seconds / 60:6.1f} min  {name}" for name, seconds in stages]
    total = sum(seconds for _, seconds in stages) / 60
    return "\n".join([*lines, f"  {total:6.1f} min  in all, roughly; attacks that break their images early take less"])
