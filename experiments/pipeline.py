"""The whole main job: filters, a plain CNN and an rCNN, attacks on both, a table and a report.

Each stage is a function of what came before; `run` puts them together in a run directory.
"""

import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from experiments.provenance import provenance
from rbf_jax import PRESETS, Defense, attacks, data, defend, em, evaluate, models, rbf, reconstruct, train
from rbf_jax.files import replacing
from rbf_jax.rbf import RBFFilters
from rbf_jax.types import Array, AttackResult, LogitsFn

Config = Any
"""An ml_collections.ConfigDict, whose attributes have no static types."""

NORMS = {"linf": attacks.Linf, "l2": attacks.L2}
MODELS = {"cnn": models.CNN, "vgg16": models.VGG16}
EM_RULES = {"mnist": em.MNIST, "cifar10": em.CIFAR10}


class Data(NamedTuple):
    """Training and test images, float32 ``(N, H, W, C)``, and labels."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


class Models(NamedTuple):
    """What was learned: the filters, the plain network, the defended one."""

    filters: RBFFilters
    cnn: LogitsFn
    rcnn: Defense


class Row(NamedTuple):
    """One cell of the table: how many of N examples a model still classifies rightly."""

    model: str
    attack: str
    norm: str
    epsilon: float
    correct: int
    total: int
    seconds: float


def load(config: Config, data_dir: str | None) -> Data:
    """The examples that the configuration names; the embedded set is shuffled, the others keep their order."""
    if config.data == "embedded":
        splits = data.load_embedded()
    else:
        splits = {
            split: data.load(config.data, f"{split}[:{count}]", data_dir)
            for split, count in (("train", config.train_examples), ("test", config.test_examples))
        }
    kept = [
        array[:count]
        for split, count in (("train", config.train_examples), ("test", config.test_examples))
        for array in (data.as_float(splits[split].images), splits[split].labels)
    ]
    return Data(*kept)


def learn(config: Config, examples: Data) -> Models:
    """Fits the filters, then trains the plain network on the images and the defended one on their reconstructions."""
    rules = EM_RULES[config.em.preset]._replace(steps=config.em.steps, growth_steps=config.em.growth_steps)
    filters, _ = em.fit(examples.train_images, config=rules)
    beta1 = PRESETS[config.preset]
    # Without noise in training, the reconstructions are the same in every epoch: they are computed once.
    reconstructions = jax.jit(reconstruct)(filters, examples.train_images, beta1.train)
    classifier = models.from_linen(MODELS[config.model]())
    optimizer = optax.adam(
        optax.cosine_decay_schedule(
            config.train.learning_rate, config.train.epochs * (len(examples.train_labels) // config.train.batch_size)
        )
    )

    def trained(name: str, images: Array) -> LogitsFn:
        variables, _ = train.fit(
            jax.random.key(config.seed),
            classifier,
            images,
            examples.train_labels,
            optimizer=optimizer,
            epochs=config.train.epochs,
            batch_size=config.train.batch_size,
            progress=f"training the {name}",
        )
        return models.logits_fn(classifier, variables)

    cnn = trained("plain CNN", examples.train_images)
    defense = defend(
        filters, trained("rCNN", reconstructions), beta1=beta1.test, beta2=config.beta2, draws=config.draws
    )
    return Models(filters, cnn, defense)


def attack_all(
    config: Config, examples: Data, learned: Models
) -> tuple[list[Row], dict[tuple[str, str], AttackResult]]:
    """Every cell of the table, and the PGD results by (model, norm) for the figures.

    Static cells of the rCNN are crafted without noise and scored without (beta2 = 0) and with it (the prediction over m
    draws). BPDA + EoT sees noise, and is scored under fresh draws.
    """
    key = jax.random.key(config.seed + 1)
    scored = {"CNN": learned.cnn, "rCNN, no noise": learned.rcnn.static, "rCNN": learned.rcnn.predict}
    rows: list[Row] = []
    crafted: dict[tuple[str, str], AttackResult] = {}

    def score(model: str, attack: str, norm: str, epsilon: float, images: Array, began: float) -> None:
        labels = examples.test_labels[: len(images)]
        # Not the attack's key: a prediction is made under fresh noise.
        logits = evaluate.predict(jax.random.fold_in(key, 1), scored[model], images, batch_size=config.batch_size)
        correct = int((logits.argmax(-1) == labels).sum())
        rows.append(Row(model, attack, norm, epsilon, correct, len(labels), time.perf_counter() - began))

    def craft(name: str, attack: Any, logits_fn: LogitsFn, count: int) -> AttackResult:
        count = min(count, len(examples.test_labels))
        return evaluate.run_attack(
            key,
            attack,
            logits_fn,
            examples.test_images[:count],
            examples.test_labels[:count],
            batch_size=config.batch_size,
            progress=name,
        )

    for model in scored:
        score(model, "clean", "", 0.0, examples.test_images, time.perf_counter())
    for norm, epsilon in config.budgets:
        ball, steps = NORMS[norm], config.pgd.steps
        static = {
            "FGSM": attacks.fgsm(ball, epsilon=epsilon),
            f"PGD-{steps}": attacks.pgd(ball, epsilon=epsilon, steps=steps),
        }
        for name, attack in static.items():
            for source, logits_fn in (("CNN", learned.cnn), ("rCNN", learned.rcnn.static)):
                began = time.perf_counter()
                result = craft(f"{name} {norm} on the {source}", attack, logits_fn, config.pgd.examples)
                crafted[source, norm] = result
                for model in scored:
                    if model.startswith(source):
                        score(model, name, norm, epsilon, result.images, began)
        began = time.perf_counter()
        eot = attacks.pgd(ball, epsilon=epsilon, steps=config.eot.steps, gradient=attacks.eot(config.eot.draws))
        result = craft(f"BPDA+EoT {norm} on the rCNN", eot, learned.rcnn.bpda, config.eot.examples)
        score("rCNN", "BPDA+EoT", norm, epsilon, result.images, began)
    return rows, crafted


def save(directory: Path, config: Config, learned: Models, rows: list[Row], note: str, seconds: float) -> None:
    """Writes ``filters.npz`` and ``results.json`` into the run directory."""
    rbf.save(directory / "filters.npz", learned.filters)
    results = provenance() | {
        "config": config.to_dict(),
        "filters": len(learned.filters.variances),
        "seconds": round(seconds, 1),
        "note": note,
        "rows": [row._asdict() | {"wilson95": evaluate.wilson_interval(row.correct, row.total)} for row in rows],
    }
    with replacing(directory / "results.json") as temporary:
        temporary.write_text(json.dumps(results, indent=1) + "\n")


class Distances(NamedTuple):
    """Distances of attacked images from their originals, and of their reconstructions; by norm, ``(N,)`` each."""

    images: dict[str, np.ndarray]
    reconstructions: dict[str, np.ndarray]


def distances(config: Config, examples: Data, learned: Models, attacked: np.ndarray) -> Distances:
    """Fig. 3. The perturbations are scaled down at random, so that all sizes up to the budget occur."""
    count = len(attacked)
    share = np.random.default_rng(config.seed).uniform(size=(count, 1, 1, 1)).astype(np.float32)
    clean = examples.test_images[:count]
    moved = clean + share * (attacked - clean)

    def measured(a: np.ndarray, b: np.ndarray) -> dict[str, np.ndarray]:
        deltas = (np.asarray(b) - np.asarray(a)).reshape(count, -1)
        return {
            name: np.linalg.norm(deltas, order, axis=-1) for name, order in (("linf", np.inf), ("l2", 2), ("l1", 1))
        }

    return Distances(measured(clean, moved), measured(rebuilt(config, learned, clean), rebuilt(config, learned, moved)))


def rebuilt(config: Config, learned: Models, images: np.ndarray) -> np.ndarray:
    """Static reconstructions with the test-time beta1."""
    return np.asarray(jax.jit(reconstruct)(learned.filters, images, PRESETS[config.preset].test))
