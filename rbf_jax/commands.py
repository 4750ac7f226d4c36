"""What the commands of ``rbf-jax`` do: thin over the functions of the package, each says which it calls.

A model is a file of weights; what it was trained on, its network, filters and reading of beta1 are kept in it.
"""

import argparse
import importlib.metadata
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.tree_util import Partial

from rbf_jax import certify as smoothing
from rbf_jax import data, em, evaluate, models, train
from rbf_jax.attacks import L1, L2, Linf, apgd, autoattack, eot, fgsm, pgd
from rbf_jax.checks import check_choice
from rbf_jax.defense import Defense, defend
from rbf_jax.evaluate import Outcomes
from rbf_jax.files import as_path, check_writable
from rbf_jax.rbf import RBFFilters
from rbf_jax.rbf import load as load_filters
from rbf_jax.rbf import save as save_filters
from rbf_jax.reconstruction import PRESETS, reconstruct
from rbf_jax.types import Array, Key, LogitsFn, Norm

SETS = {"embedded": ("cnn", em.MNIST), "mnist": ("cnn", em.MNIST), "cifar10": ("vgg16", em.CIFAR10)}
NETWORKS = {"cnn": models.CNN, "vgg16": models.VGG16}
NORMS = {norm.name: norm for norm in (Linf, L2, L1)}
BUDGETS = {"mnist": {"linf": 0.3, "l2": 2.0, "l1": 15.0}, "cifar10": {"linf": 0.031, "l2": 1.0, "l1": 20.0}}
"""The paper's radii."""

PRESET, BETA2, DRAWS = "code", 1.75, 10
"""What holds where the user does not say: the reading of beta1, the noise, and the draws that are averaged."""

CHECKED = 1_000
"""Test images that a trained model is tried on."""


class Loaded(NamedTuple):
    """A model from its file."""

    path: str
    recipe: dict[str, Any]
    logits_fn: LogitsFn
    filters: RBFFilters | None

    def beta2(self, asked: float | None) -> float:
        """The noise that was asked for, or else that of the paper; none where there is no front end."""
        if self.filters is not None:
            return BETA2 if asked is None else asked
        if asked:
            raise ValueError(f"--beta2 needs a model with filters, and {self.path} has none: got {asked:g}")
        return 0.0

    def defense(self, beta2: float, draws: int) -> Defense | None:
        """The defended model; None where there is no front end."""
        if self.filters is None:
            return None
        beta1 = PRESETS[self.recipe["preset"]].test
        return defend(self.filters, self.logits_fn, beta1=beta1, beta2=beta2, draws=draws)


def _examples(name: str, split: str, data_dir: str | None) -> tuple[np.ndarray, np.ndarray]:
    found = data.load_embedded()[split] if name == "embedded" else data.load(name, split, data_dir)
    return data.as_float(found.images), found.labels


def _rebuild(filters: RBFFilters, beta1: float, key: Key, images: Array) -> Array:
    del key
    return reconstruct(filters, images, beta1)


def _load(path: str) -> Loaded:
    variables, recipe = train.load_weights(as_path(path))
    missing = {"data", "network", "filters", "preset"} - recipe.keys()
    if missing:
        raise ValueError(f"{path} was not written by `rbf-jax train`: its recipe has no {', '.join(sorted(missing))}")
    check_choice(recipe["network"], f"the network of {path}", tuple(NETWORKS))
    network = models.from_linen(NETWORKS[recipe["network"]]())
    filters = None
    if recipe["filters"] is not None:
        means, variances = (np.asarray(values, np.float32) for values in recipe["filters"])
        filters = RBFFilters(jax.numpy.asarray(means), jax.numpy.asarray(variances))
    return Loaded(path, recipe, models.logits_fn(network, variables), filters)


def _table(headings: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """The lines in columns that line up."""
    cells = [[str(cell) for cell in line] for line in (headings, *lines)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def _share(right: np.ndarray) -> str:
    """Mean in percent with its 95 % interval; ``(redraws, N)``."""
    total, mean = right.shape[-1], float(right.mean())
    low, high = evaluate.wilson_interval(min(mean * total, total), total)
    return f"{100 * mean:.1f} % ({100 * low:.1f}-{100 * high:.1f})"


def fit_filters(arguments: argparse.Namespace) -> None:
    """`em.fit` on the training images."""
    check_writable(arguments.out)
    images, _ = _examples(arguments.data, "train", arguments.data_dir)
    filters, _ = em.fit(images, config=SETS[arguments.data][1])
    save_filters(arguments.out, filters)
    print(f"{len(filters.variances)} filters: {arguments.out}")


def train_model(arguments: argparse.Namespace) -> None:
    """`train.fit`, for a model with filters on the reconstructions; then its accuracy on test images."""
    network, checkpoints = SETS[arguments.data][0], as_path(f"{arguments.out}-checkpoints")
    if arguments.preset and not arguments.filters:
        raise ValueError(f"--preset is a reading of the front end: it needs --filters, got {arguments.preset}")
    preset = arguments.preset or PRESET
    check_writable(arguments.out)
    images, labels = _examples(arguments.data, "train", arguments.data_dir)
    filters = load_filters(arguments.filters) if arguments.filters else None
    seconds = time.perf_counter()
    if filters is not None:
        front = Partial(_rebuild, filters, PRESETS[preset].train)
        images = evaluate.predict(jax.random.key(0), front, images, batch_size=500, progress="reconstructions")
    steps = max(1, len(images) // arguments.batch_size * arguments.epochs)
    variables, _ = train.fit(
        jax.random.key(arguments.seed),
        models.from_linen(NETWORKS[network]()),
        images,
        labels,
        optimizer=optax.adam(optax.cosine_decay_schedule(1e-3, steps)),
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        smoothing=arguments.smoothing,
        checkpoints=checkpoints,
    )
    recipe = {
        "data": arguments.data,
        "network": network,
        # In float32: float16, as the weights are kept, has no number as small as a variance may be.
        "filters": None if filters is None else [np.asarray(part).tolist() for part in filters],
        "preset": preset,
        "epochs": arguments.epochs,
        "smoothing": arguments.smoothing,
        "seed": arguments.seed,
        "seconds": round(time.perf_counter() - seconds),
    }
    train.save_weights(as_path(arguments.out), variables, recipe)
    # Of a finished training, which another one would not go on from. In an object store the path itself can do it.
    getattr(checkpoints, "rmtree", partial(shutil.rmtree, checkpoints))()
    test_images, test_labels = (a[:CHECKED] for a in _examples(arguments.data, "test", arguments.data_dir))
    found = _load(arguments.out)
    defense = found.defense(0.0, 1)
    logits = evaluate.predict(
        jax.random.key(0), found.logits_fn if defense is None else defense.static, test_images, batch_size=100
    )
    print(
        f"right on {_share((logits.argmax(-1) == test_labels)[None])} of {len(test_labels)} test images, without noise"
    )
    print(f"weights: {arguments.out}")


def _suite(version: str, norm: Norm, epsilon: float, noisy: bool) -> dict[str, Any]:
    if version == "autoattack":
        return autoattack("rand" if noisy else "standard", norm, epsilon=epsilon)
    if noisy:
        return {
            "pgd-eot": pgd(norm, epsilon=epsilon, steps=40, gradient=eot(10)),
            "apgd-eot": apgd(norm, epsilon=epsilon, steps=40, gradient=eot(10)),
        }
    return {
        "fgsm": fgsm(norm, epsilon=epsilon),
        "pgd-40": pgd(norm, epsilon=epsilon, steps=40),
        "apgd-100": apgd(norm, epsilon=epsilon, steps=100),
    }


def attack(arguments: argparse.Namespace) -> None:
    """`evaluate.run_suite` on test images, over all norms together; with noise the judge is the mean of the draws."""
    if arguments.out:
        check_writable(arguments.out)
    found = _load(arguments.model)
    source = found.recipe["data"]
    images, labels = (array[: arguments.images] for array in _examples(source, "test", arguments.data_dir))
    beta2 = found.beta2(arguments.beta2)
    if arguments.draws and not beta2:
        raise ValueError(f"--draws averages over noise, and this model is attacked without any: got {arguments.draws}")
    draws = arguments.draws or DRAWS
    defense = found.defense(beta2, draws)
    noisy = defense is not None and beta2 > 0
    attacked = found.logits_fn if defense is None else defense.draw if noisy else defense.static
    budgets = BUDGETS["cifar10" if source == "cifar10" else "mnist"]
    norms = arguments.norm or ["linf"]
    if len(set(norms)) < len(norms):
        raise ValueError(f"--norm must name each norm once, got {' '.join(norms)}")
    epsilons = arguments.epsilon or [budgets[name] for name in norms]
    if len(epsilons) != len(norms):
        raise ValueError(f"--epsilon must be given once for each --norm ({len(norms)}) or never, got {len(epsilons)}")
    suite: dict[str, Any] = {}
    for name, epsilon in zip(norms, epsilons, strict=True):
        parts = _suite(arguments.suite, NORMS[name], epsilon, noisy)
        suite |= {f"{part}, {name} {epsilon:g}": one for part, one in parts.items()}
    result = evaluate.run_suite(
        jax.random.key(arguments.seed),
        suite,
        attacked,
        images,
        labels,
        judge=defense.predict if defense is not None and noisy else None,
        union=False,
        progress=True,
    )
    noise = f", beta2 = {beta2:g}, mean of {draws} draws" if noisy else ""
    print(f"\n{arguments.model} on {len(images)} test images of {source}{noise}; what is left:")
    lines = [(name, f"{100 * share.mean():.1f} %") for name, share in zip(result.names, result.survived, strict=True)]
    print(_table(("attack", "accuracy"), [*lines, ("worst of these", _share(result.robust))]))
    if arguments.out:
        facts = {"model": arguments.model, "attacks": list(suite), "seed": arguments.seed} | (
            {"beta2": beta2, "draws": draws} if noisy else {}
        )
        nothing = np.zeros((0, len(images)), bool)
        evaluate.save_outcomes(as_path(arguments.out), Outcomes(np.arange(len(images)), nothing, result.robust, facts))
        print(f"outcomes by image: {arguments.out}")


def certify(arguments: argparse.Namespace) -> None:
    """`certify.certify` on test images, of one noisy draw of a defence."""
    found = _load(arguments.model)
    images, labels = (
        array[: arguments.images] for array in _examples(found.recipe["data"], "test", arguments.data_dir)
    )
    ceiling = smoothing.certified_radius(arguments.samples, arguments.samples, arguments.alpha, arguments.sigma)
    if ceiling == 0:
        raise ValueError(f"--samples is too few to certify anything at --alpha {arguments.alpha}: {arguments.samples}")
    beta2 = found.beta2(arguments.beta2)
    defense = found.defense(beta2, 1)
    logits_fn = found.logits_fn if defense is None else defense.draw if beta2 > 0 else defense.static
    radii = np.zeros(len(images))
    for i in range(len(images)):
        made = smoothing.certify(
            jax.random.fold_in(jax.random.key(arguments.seed), i),
            logits_fn,
            images[i],
            sigma=arguments.sigma,
            n=arguments.samples,
            alpha=arguments.alpha,
        )
        right = made.label == labels[i]
        radii[i] = made.radius if right else -1
        said = "abstains" if made.label == smoothing.ABSTAIN else f"class {made.label}, radius {made.radius:.3f}"
        print(f"image {i}: {said}{'' if right else f', but it is {labels[i]}'}", flush=True)
    levels = [0.0, *(round(ceiling * share, 3) for share in (0.25, 0.5, 0.75)), round(ceiling, 3) - 0.001]
    lines = [(f"{level:.3f}", _share((radii > level)[None])) for level in levels]
    print(f"\nright and certified beyond an l2 radius; {ceiling:.3f} is the most that {arguments.samples} samples give")
    print(_table(("radius", "accuracy"), lines))


def report(arguments: argparse.Namespace) -> None:
    """What files of outcomes say, a line for each."""
    lines = []
    for path in arguments.outcomes:
        found = evaluate.load_outcomes(as_path(path))
        attacks = found.facts.get("attacks") or [found.facts.get("title", "")]
        lines.append(
            (found.facts.get("model", Path(path).stem), len(found.rows), _share(found.scoring), "; ".join(attacks))
        )
    print(_table(("model", "images", "left", "attacks"), lines))


def info(arguments: argparse.Namespace) -> None:
    """Versions, devices, and which data sets are prepared."""
    print(f"rbf_jax {importlib.metadata.version('rbf_jax')}, jax {jax.__version__}")
    print(f"devices: {', '.join(str(device) for device in jax.devices())}")
    print("data: embedded (5,000 digits, always there)")
    for name in ("mnist", "cifar10"):
        try:
            there = "prepared" if data.is_prepared(name, arguments.data_dir) else "not prepared: make data"
        except ValueError as error:
            there = str(error)
        print(f"data: {name}, {there}")


COMMANDS: Mapping[str, Callable[[argparse.Namespace], None]] = {
    "fit-filters": fit_filters,
    "train": train_model,
    "attack": attack,
    "certify": certify,
    "report": report,
    "info": info,
}
