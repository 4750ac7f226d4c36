"""What is learned: data, filters, networks. Each stage is kept in the run directory and not done again."""

import functools
import hashlib
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.tree_util import Partial

from experiments.provenance import provenance
from experiments.recipes import RECIPES, front_end, kmeans_filters, optimizer
from experiments.rundir import Config, Run
from rbf_jax import attacks, data, defend, em, evaluate, models, rbf, train
from rbf_jax.data import Split
from rbf_jax.files import check_facts, read_npz, replacing, write_npz
from rbf_jax.models.classifier import Variables
from rbf_jax.rbf import RBFFilters
from rbf_jax.types import Array, Key, LogitsFn

NETWORKS = {"cnn": models.CNN, "vgg16": models.VGG16}
RULES = {"mnist": em.MNIST, "cifar10": em.CIFAR10}


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
    for split, found in splits.items():
        if counts[split] > len(found.labels):
            raise ValueError(f"config.examples.{split} must be at most {len(found.labels)}, got {counts[split]}")

    def part(split: Split, rows: slice) -> Examples:
        return Examples(data.as_float(split.images[rows]), split.labels[rows])

    last = counts.train - counts.validation
    return Data(
        part(splits["train"], slice(0, last)),
        part(splits["train"], slice(last, counts.train)),
        part(splits["test"], slice(0, counts.test)),
    )


def filters_path(run: Run, kind: str = "own") -> Path:
    """Where the filters of a kind lie: ``"own"`` of the EM, ``"kmeans"`` or ``"released"``."""
    return run.directory / ("filters.npz" if kind == "own" else f"filters-{kind}.npz")


def fit_filters(run: Run, examples: Data, kind: str = "own") -> RBFFilters:
    """The RBF filters of the training images; the authors' released ones must lie in the run directory already."""
    path, config = filters_path(run, kind), run.config
    if kind == "released" and not path.exists():
        raise FileNotFoundError(f"{path} is missing: name the authors' released filters (FILTERS=path.npz)")
    if not path.exists():
        began = time.perf_counter()
        if kind == "own":
            rules = RULES[config.em.rules]._replace(steps=config.em.steps, growth_steps=config.em.growth_steps)
            filters, _ = em.fit(examples.train.images, config=rules)
        else:
            filters = kmeans_filters(examples.train.images, len(fit_filters(run, examples).variances), config.seed)
        rbf.save(path, filters)
        seconds = round(time.perf_counter() - began, 1)
        run.log({"stage": "filters", "kind": kind, "count": len(filters.variances), "seconds": seconds})
    return rbf.load(path)


def filters_of(run: Run, examples: Data, name: str) -> RBFFilters | None:
    """The filters of a model's front end, None where it has none."""
    recipe = RECIPES[name]
    return fit_filters(run, examples, recipe.filters) if recipe.defended else None


@functools.cache
def _network(name: str, dropout: float) -> models.Classifier:
    return models.from_linen(NETWORKS[name](dropout=dropout))


def classifier(config: Config) -> models.Classifier:
    """The network, untrained; always the same functions, so that models share what is compiled."""
    return _network(config.network, config.dropout)


def epochs(config: Config, name: str) -> int:
    """How long a model is trained."""
    return config.epochs.get(name, config.train.epochs)


def weights_path(run: Run, name: str) -> Path:
    """Where a finished model lies."""
    return run.directory / "models" / f"{name}.npz"


def snapshot_path(run: Run, name: str, epoch: int) -> Path:
    """Where the weights after an epoch lie, of those that ``config.snapshots`` names."""
    return run.directory / "models" / "snapshots" / f"{name}-{epoch}.npz"


def snapshot(run: Run, name: str, epoch: int) -> Variables:
    """The weights of a model after an epoch of its training.

    Raises:
        FileNotFoundError: it was not kept.
        ValueError: it is of a training of another length.
    """
    path = snapshot_path(run, name, epoch)
    variables, record = train.load_weights(path)
    if record["epochs"] != epochs(run.config, name):
        wrong = f"is of a training of {record['epochs']} epochs, not of {epochs(run.config, name)}"
        raise ValueError(f"{path} {wrong}. Remove the models of {path.parent.parent} named {name} to train it again")
    return variables


def _keep_snapshot(run: Run, name: str, epoch: int, variables: Variables) -> None:
    """Keeps the weights with which a training's next epoch begins, if it is asked to."""
    path = snapshot_path(run, name, epoch)
    if epoch == 0:
        for old in path.parent.glob(f"{name}-*.npz"):
            old.unlink(missing_ok=True)  # of a training before this one; several processes may do so
    # A training that goes on in the middle of an epoch has them already: they are written before its first step.
    if epoch in run.config.get("snapshots", {}).get(name, ()) and not path.exists():
        train.save_weights(path, variables, {"model": name, "epochs": epochs(run.config, name)})


def train_model(run: Run, examples: Data, name: str) -> Variables:
    """A trained network, from its file of weights if it is finished; beside that lies the recipe, with its hash."""
    path, filters = weights_path(run, name), filters_of(run, examples, name)
    made_of = _made_of(run, filters, name)
    if not path.exists():
        variables, record = _train(run, examples, filters, name)
        if jax.process_index() == 0:  # each says its own seconds
            train.save_weights(path, variables, record | made_of)
        multihost_utils.sync_global_devices(f"weights of {name}")
    variables, record = train.load_weights(path)
    for what, value in made_of.items():
        if record.get(what) != value:
            wrong = f"its {what} differ from those asked for ({record.get(what)!r}, not {value!r})"
            raise ValueError(f"{path} is of another training: {wrong}. Remove it to train the model again")
    if jax.process_index() == 0:
        record["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        with replacing(path.with_suffix(".json")) as temporary:
            temporary.write_text(json.dumps(record, indent=1) + "\n")
    return variables


def _made_of(run: Run, filters: RBFFilters | None, name: str) -> dict[str, Any]:
    """What of a training the run directory does not determine."""
    return {"filters": evaluate.fingerprint(filters) if filters else None, "epochs": epochs(run.config, name)}


def _train(run: Run, examples: Data, filters: RBFFilters | None, name: str) -> tuple[Variables, dict[str, Any]]:
    # Not beside the checkpoints, as that folder tells all processes together whether there are some.
    config, recipe, origin = run.config, RECIPES[name], provenance(run.directory / "sittings" / name)
    images, labels = jnp.asarray(examples.train.images), jnp.asarray(examples.train.labels)
    network, inputs, validation, attack, epsilon = classifier(config), images, examples.validation.images, None, None
    front = front_end(recipe, config.preset, filters, testing=recipe.adversarial)
    batches = len(labels) // config.train.batch_size
    if config.train.shift and not config.train.flips:
        raise ValueError(f"config.train.shift must be 0 without config.train.flips, got {config.train.shift}")
    if any(epoch < 1 for epoch in config.get("snapshots", {}).get(name, ())):
        raise ValueError(f"config.snapshots.{name} must be epochs from 1, got {config.snapshots[name]}")
    if recipe.adversarial:
        # Attacked through the front end of the test, which is the one that attacks will meet.
        network = network if front is None else models.behind(front, network)
        settings = config.adversarial
        attack = attacks.pgd(attacks.Linf, epsilon=settings.epsilon, steps=settings.steps, step_size=settings.step_size)
        if settings.ramp_epochs:  # optax takes 0 steps for no rise at all
            epsilon = optax.linear_schedule(0.0, settings.epsilon, settings.ramp_epochs * batches)
        front = None
    elif front is not None:
        validation = rebuilt(front, validation)
        if not config.train.flips:
            # Reconstructions are then the same in every epoch: they are computed once.
            inputs = rebuilt(front, images)

    def augment(epoch: int, variables: Variables) -> train.Augmentation | None:
        _keep_snapshot(run, name, epoch, variables)
        parts = []
        if config.train.flips:
            coins = jax.random.fold_in(jax.random.key(config.seed + recipe.seed), 1)
            parts.append(train.flip_and_shift(coins, len(labels), epoch, pixels=config.train.shift))
            if front is not None:
                # After that, as the border holds other patches; it takes 3 % of a step of VGG-16.
                parts.append(train.through(front))
        if recipe.gaussian:
            parts.append(train.gaussian(recipe.gaussian))
        if recipe.noise:
            noise = config.noise
            bank, first = None, bank_epoch(config, name)
            if epoch >= first:
                bank = noise_bank(run, examples, filters, name, variables, make=epoch == first)
            limits: dict[str, Any] = {"std": noise.std, "limit": noise.limit, "count": noise.count}
            parts.append(train.add_noisy(images, labels, bank=bank, front=front, mirror=config.train.flips, **limits))
        return functools.reduce(train.chain, parts) if parts else None

    variables, history = train.fit(
        jax.random.key(config.seed + recipe.seed),
        network,
        inputs,
        labels,
        optimizer=optimizer(config, batches, epochs(config, name)),
        epochs=epochs(config, name),
        batch_size=config.train.batch_size,
        augment=augment,
        attack=attack,
        epsilon=epsilon,
        smoothing=recipe.smoothing,
        validation=(validation, examples.validation.labels),
        checkpoints=run.directory / "checkpoints" / name,
        log=lambda record: run.log({"stage": "train", "model": name} | record),
        progress=f"training {name}",
    )
    # Of the last training of this name; an epoch that was cut short says its own speed.
    trained = [r for r in run.records() if (r.get("stage"), r.get("model")) == ("train", name)][-epochs(config, name) :]
    seconds = [batches * config.train.batch_size / r["images_per_second"] for r in trained]
    return variables, origin | {
        "model": name,
        "recipe": recipe._asdict(),
        "config": config.to_dict(),
        "history": {key: [round(float(x), 4) for x in values] for key, values in history._asdict().items()},
        "seconds an epoch": round(float(np.median(seconds)), 1) if seconds else None,
        "overheads": {k: s for k, s in run.overheads().items() if k in ("filters", f"bank {name}")},
    }


def bank_epoch(config: Config, name: str) -> int:
    """The epoch before which the noise bank of CNN+ or rCNN+ is made; never by an untrained network if it can be."""
    total = epochs(config, name)
    return max(int(config.noise.bank_share * total), min(1, total - 1))


def noise_bank(
    run: Run, examples: Data, filters: RBFFilters | None, name: str, variables: Variables, *, make: bool
) -> Array:
    """Adversarial noises of training images, made once by the model of the epoch in which they are first needed."""
    folder, config = run.directory / "models", run.config
    path, made_of = folder / f"{name}-bank.npz", _made_of(run, filters, name)
    way_out = f"Remove {run.directory / 'checkpoints' / name} and {folder / name}-bank* to train the model again"
    if not path.exists():
        if not make:
            raise ValueError(f"{path} is gone, and the model that made it has been trained on since. {way_out}")
        # Through the front end of the test, which is the one that attacks will meet.
        images, labels = (array[: config.noise.bank_examples] for array in examples.train)
        parts = evaluate.Parts(folder / f"{name}-bank", {"noise": config.noise.to_dict()})
        result = evaluate.run_attack(
            jax.random.key(config.seed),
            attacks.pgd(attacks.Linf, epsilon=config.noise.limit, steps=config.noise.bank_steps),
            forms(config, filters, name, variables)["static"],
            images,
            labels,
            batch_size=config.attack.batch_size,
            parts=parts,
            progress=f"noise bank of {name}",
        )
        write_npz(path, {"noise": result.images - images, "facts": np.array(json.dumps(made_of))})
        run.log({"stage": "bank", "model": name, "count": len(labels), "seconds": round(parts.seconds(), 1)})
    stored = read_npz(path, "a noise bank", way_out)
    check_facts(f"{path} is of another training", json.loads(str(stored.get("facts", "{}"))), made_of, way_out)
    return jnp.asarray(stored["noise"])


def forms(config: Config, filters: RBFFilters | None, name: str, variables: Variables) -> dict[str, LogitsFn]:
    """The forms in which a model is attacked and scored.

    ``static``, without noise. Of a defence also ``draw``, ``bpda`` and ``predict``, and the same at each other level of
    noise that the configuration names (``bpda@1``). Before a front end without a gradient ``bpda`` takes the identity.
    """
    recipe, logits_fn = RECIPES[name], models.logits_fn(classifier(config), variables)
    if recipe.defended:
        assert filters is not None
        beta1, found = recipe.beta1(config.preset).test, {}
        for beta2 in (config.beta2, *config.attack.beta2):
            defense = defend(filters, logits_fn, beta1=beta1, beta2=beta2, draws=config.draws)._asdict()
            found |= {form if beta2 == config.beta2 else f"{form}@{beta2:g}": fn for form, fn in defense.items()}
        return found
    front = front_end(recipe, config.preset, None, testing=True)
    if front is None:
        return {"static": logits_fn}
    found: dict[str, LogitsFn] = {"static": Partial(_behind, front, logits_fn)}
    if recipe.gradient_form == "bpda":
        found["bpda"] = attacks.straight_through(Partial(keyed, front), logits_fn)
    return found


def rebuilt(front: Partial, images: Array) -> np.ndarray:
    """What a front end makes of many images."""
    return evaluate.predict(jax.random.key(0), Partial(keyed, front), images, batch_size=500)


def keyed(front: Partial, key: Key, images: Array) -> Array:
    """A front end as a model's part sees it, which takes a key."""
    del key
    return front(images)


def _behind(front: Partial, logits_fn: LogitsFn, key: Key, images: Array) -> Array:
    return logits_fn(key, front(images))
