"""What is learned: data, filters, networks. Each stage is kept in the run directory and not done again."""

import json
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial

from experiments.provenance import provenance
from experiments.rundir import Config, Run
from rbf_jax import PRESETS, Defense, attacks, data, defend, em, evaluate, models, rbf, reconstruct, train
from rbf_jax.data import Split
from rbf_jax.files import read_npz, replacing
from rbf_jax.models.classifier import Variables
from rbf_jax.rbf import RBFFilters
from rbf_jax.types import Array, LogitsFn

NETWORKS = {"cnn": models.CNN, "vgg16": models.VGG16}
RULES = {"mnist": em.MNIST, "cifar10": em.CIFAR10}
FRONT = {"cnn": False, "cnn_plus": False, "rcnn": True, "rcnn_plus": True}
"""The models, and whether the front end stands before them."""


class Examples(NamedTuple):
    """Images, float32 ``(N, H, W, C)`` in [0, 1], and int32 labels."""

    images: np.ndarray
    labels: np.ndarray


class Data(NamedTuple):
    """The parts of a data set: the last training images validate."""

    train: Examples
    validation: Examples
    test: Examples


def load(config: Config, data_dir: str | None) -> Data:
    """The examples that the configuration names; the embedded set is shuffled, the others keep their order."""
    counts = config.examples
    if config.set == "quickstart":
        splits = data.load_embedded()
    else:
        splits = {split: data.load(config.set, f"{split}[:{counts[split]}]", data_dir) for split in ("train", "test")}

    def part(split: Split, rows: slice) -> Examples:
        return Examples(data.as_float(split.images[rows]), split.labels[rows])

    last = counts.train - counts.validation
    return Data(
        part(splits["train"], slice(0, last)),
        part(splits["train"], slice(last, counts.train)),
        part(splits["test"], slice(0, counts.test)),
    )


def fit_filters(run: Run, examples: Data) -> RBFFilters:
    """The RBF filters of the training images."""
    path = run.directory / "filters.npz"
    if not path.exists():
        config, began = run.config.em, time.perf_counter()
        rules = RULES[config.rules]._replace(steps=config.steps, growth_steps=config.growth_steps)
        filters, _ = em.fit(examples.train.images, config=rules)
        rbf.save(path, filters)
        seconds = round(time.perf_counter() - began, 1)
        run.log({"stage": "filters", "count": len(filters.variances), "seconds": seconds})
    return rbf.load(path)


def classifier(config: Config) -> models.Classifier:
    """The network, untrained."""
    return models.from_linen(NETWORKS[config.network]())


def weights_path(run: Run, name: str) -> Path:
    """Where a finished model lies."""
    return run.directory / "models" / f"{name}.npz"


def train_model(run: Run, examples: Data, filters: RBFFilters, name: str) -> Variables:
    """A trained network, from its file of weights if it is finished; the recipe lies beside that as JSON."""
    path, made_for = weights_path(run, name), evaluate.fingerprint(filters)
    if not path.exists():
        variables, recipe = _train(run, examples, filters, name)
        train.save_weights(path, variables, recipe | {"filters": made_for})
    variables, recipe = train.load_weights(path)
    if recipe.get("filters") != made_for:
        raise ValueError(f"{path} was trained with other filters. Remove {run.directory} to begin anew")
    with replacing(path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(recipe, indent=1) + "\n")
    return variables


def _train(run: Run, examples: Data, filters: RBFFilters, name: str) -> tuple[Variables, dict[str, Any]]:
    config = run.config
    beta1 = jnp.float32(PRESETS[config.preset].train)
    front = Partial(reconstruct, filters, beta1=beta1) if FRONT[name] else None
    # Without noise in training, reconstructions are the same in every epoch: they are computed once.
    see = (lambda images: jnp.asarray(images)) if front is None else jax.jit(front)
    inputs, validation = see(examples.train.images), see(examples.validation.images)
    images, labels = jnp.asarray(examples.train.images), jnp.asarray(examples.train.labels)
    mirrored = see(jnp.flip(images, 2)) if config.train.flips else None

    def augment(epoch: int, variables: Variables) -> train.Augmentation | None:
        parts = [] if mirrored is None else [train.flip(mirrored)]
        if name.endswith("plus"):
            noise = config.noise
            bank = None
            if epoch >= noise.bank_epoch:
                bank = noise_bank(run, examples, filters, name, variables, make=epoch == noise.bank_epoch)
            settings: dict[str, Any] = {"std": noise.std, "limit": noise.limit, "count": noise.count}
            parts.append(train.add_noisy(images, labels, bank=bank, front=front, mirror=config.train.flips, **settings))
        return None if not parts else parts[0] if len(parts) == 1 else train.chain(*parts)

    variables, history = train.fit(
        jax.random.key(config.seed),
        classifier(config),
        inputs,
        labels,
        optimizer=optimizer(config, len(labels)),
        epochs=config.train.epochs,
        batch_size=config.train.batch_size,
        augment=augment,
        validation=(validation, jnp.asarray(examples.validation.labels)),
        checkpoints=run.directory / "checkpoints" / name,
        log=lambda record: run.log({"stage": "train", "model": name} | record),
        progress=f"training {name}",
    )
    seconds = [r["seconds"] for r in run.records() if (r.get("stage"), r.get("model")) == ("train", name)]
    recipe = provenance() | {
        "model": name,
        "config": config.to_dict(),
        "history": {key: [round(float(x), 4) for x in values] for key, values in history._asdict().items()},
        "seconds an epoch": round(float(np.median(seconds)), 1),
    }
    return variables, recipe


def noise_bank(run: Run, examples: Data, filters: RBFFilters, name: str, variables: Variables, *, make: bool) -> Array:
    """Adversarial noises of training images, made once by the model of the epoch in which they are first needed."""
    folder, config = run.directory / "models", run.config
    path = folder / f"{name}-bank.npz"
    way_out = f"Remove {run.directory / 'checkpoints' / name} and {folder / name}-bank* to train the model again"
    if not path.exists():
        if not make:
            raise ValueError(f"{path} is gone, and the model that made it has been trained on since. {way_out}")
        count, began = min(config.noise.bank_examples, len(examples.train.labels)), time.perf_counter()
        # Through the front end of the test: that of training is so sharp that most of its gradients vanish.
        images, labels = examples.train.images[:count], examples.train.labels[:count]
        result = evaluate.run_attack(
            jax.random.key(config.seed),
            attacks.pgd(attacks.Linf, epsilon=config.noise.limit, steps=config.noise.bank_steps),
            forms(config, filters, name, variables)["static"],
            images,
            labels,
            batch_size=config.attack.batch_size,
            parts=evaluate.Parts(folder / f"{name}-bank", {"noise": config.noise.to_dict()}),
            progress=f"noise bank of {name}",
        )
        with replacing(path) as temporary:
            np.savez(temporary, noise=result.images - images)
        run.log({"stage": "bank", "model": name, "count": count, "seconds": round(time.perf_counter() - began, 1)})
    return jnp.asarray(read_npz(path, "a noise bank", way_out)["noise"])


def optimizer(config: Config, examples: int) -> optax.GradientTransformation:
    """The recipe's optimizer with its schedule."""
    recipe = config.train
    batches = examples // recipe.batch_size
    if recipe.schedule == "cosine":
        rate = optax.cosine_decay_schedule(recipe.learning_rate, recipe.epochs * batches)
    else:
        rate = optax.exponential_decay(recipe.learning_rate, recipe.halve_every * batches, 0.5, staircase=True)
    if recipe.optimizer == "adam":
        return optax.adam(rate)
    kernels = partial(jax.tree.map, lambda parameter: parameter.ndim > 1)  # neither biases nor batch norm decay
    decay = optax.add_decayed_weights(recipe.weight_decay, mask=kernels)
    return optax.chain(decay, optax.sgd(rate, 0.9, nesterov=True))


def forms(config: Config, filters: RBFFilters, name: str, variables: Variables) -> dict[str, LogitsFn]:
    """The forms in which a model is attacked and scored: ``static``; of a defence ``draw``, ``bpda``, ``predict``."""
    logits_fn = models.logits_fn(classifier(config), variables)
    if not FRONT[name]:
        return {"static": logits_fn}
    beta1 = PRESETS[config.preset].test
    defense: Defense = defend(filters, logits_fn, beta1=beta1, beta2=config.beta2, draws=config.draws)
    return defense._asdict()
