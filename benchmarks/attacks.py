"""Attacks beside those of torchattacks, foolbox and adversarial-library, in turn in one run.

    python -m benchmarks.attacks      # needs the peers that `make bench` installs

PGD-40, APGD-100 and Square-300 (linf) on the 4-layer CNN with the weights of ``results/mnist/models/cnn.npz`` and
embedded digits, at a radius at which few of them fall, so that no attack can stop early. Each library has a process of
its own; they take turns.
"""

from rbf_jax import process

if __name__ == "__main__":
    process.ensure()

import importlib
import importlib.metadata
import os
import statistics
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import taking_turns, write
from experiments.provenance import ROOT
from rbf_jax import attacks, data, models
from rbf_jax.train import load_weights

EPSILON = 0.01
BATCH = 128
CASES = {
    "PGD-40": (("rbf_jax", "torchattacks", "foolbox", "adv_lib"), 40, 3),
    "APGD-100": (("rbf_jax", "torchattacks", "adv_lib"), 100, 2),
    "Square-300": (("rbf_jax", "torchattacks"), 300, 1),
}
"""By name: the libraries that have it, its looks at the model, rounds."""


def digits(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Embedded digits of all classes."""
    split = data.load_embedded()["test"]
    return (split.images[:count] / 255).astype(np.float32), split.labels[:count].astype(np.int32)


def weights(name: str = "cnn") -> Any:
    """Of a 4-layer CNN in ``results/``."""
    return load_weights(ROOT / "results" / "mnist" / "models" / f"{name}.npz")[0]


def jax_call(case: str) -> Callable[[], object]:
    """One attack of ours on a batch."""
    images, labels = digits(BATCH)
    logits_fn = models.logits_fn(models.from_linen(models.CNN()), weights())
    attack = {
        "PGD-40": attacks.pgd(attacks.Linf, epsilon=EPSILON, steps=40),
        "APGD-100": attacks.apgd(attacks.Linf, epsilon=EPSILON, steps=100),
        "Square-300": attacks.square(attacks.Linf, epsilon=EPSILON, queries=300),
    }[case]
    run, arguments = jax.jit(attack), (jax.random.key(0), logits_fn, jnp.asarray(images), jnp.asarray(labels))
    return lambda: jax.block_until_ready(run(*arguments))


def torch_model(torch: Any, name: str = "cnn") -> Any:
    """The same network with the same weights in PyTorch, channels last."""
    nn, params = torch.nn, weights(name)["params"]

    def tensor(array: Any) -> Any:
        return nn.Parameter(torch.from_numpy(np.array(array, np.float32)))

    layers: list[Any] = []
    for number in range(4):
        kernel = np.asarray(params[f"Conv_{number}"]["kernel"])
        layer = nn.Conv2d(kernel.shape[2], kernel.shape[3], 3, padding=1)
        layer.weight, layer.bias = tensor(kernel.transpose(3, 2, 0, 1)), tensor(params[f"Conv_{number}"]["bias"])
        layers += [layer, nn.ReLU(), *([nn.MaxPool2d(2)] if number % 2 else [])]
    layers.append(nn.Flatten())
    for number in range(3):
        kernel = np.asarray(params[f"Dense_{number}"]["kernel"])
        if number == 0:  # flattened as (C, H, W) there, as (H, W, C) here
            kernel = kernel.reshape(7, 7, 64, -1).transpose(2, 0, 1, 3).reshape(3136, -1)
        layer = nn.Linear(*kernel.shape)
        layer.weight, layer.bias = tensor(kernel.T), tensor(params[f"Dense_{number}"]["bias"])
        layers += [layer, *([nn.ReLU()] if number < 2 else [])]
    return nn.Sequential(*layers).to(memory_format=torch.channels_last).eval()


def torch_call(library: str, case: str) -> Callable[[], object]:
    """The same attack of a peer."""
    torch = importlib.import_module("torch")
    torch.set_num_threads(os.cpu_count() or 1)
    images, labels = digits(BATCH)
    x = torch.from_numpy(images.transpose(0, 3, 1, 2)).contiguous(memory_format=torch.channels_last)
    y, model = torch.from_numpy(labels.astype(np.int64)), torch_model(torch)
    if library == "torchattacks":
        peer = importlib.import_module("torchattacks")
        attack = {
            "PGD-40": lambda: peer.PGD(model, eps=EPSILON, alpha=EPSILON / 16, steps=40),
            "APGD-100": lambda: peer.APGD(model, norm="Linf", eps=EPSILON, steps=100, n_restarts=1),
            "Square-300": lambda: peer.Square(model, norm="Linf", eps=EPSILON, n_queries=300, n_restarts=1),
        }[case]()
        return lambda: attack(x, y)
    if library == "foolbox":
        peer = importlib.import_module("foolbox")
        wrapped = peer.PyTorchModel(model, bounds=(0, 1))
        attack = peer.attacks.LinfPGD(rel_stepsize=1 / 16, steps=40)
        return lambda: attack(wrapped, x, y, epsilons=EPSILON)
    # It imports these for a logger and a distance that are not used here.
    for name in ("torchvision", "visdom"):
        sys.modules.setdefault(name, mock.MagicMock())
    peer = importlib.import_module("adv_lib.attacks")
    if case == "PGD-40":
        return lambda: peer.pgd_linf(model, x, y, EPSILON, steps=40, relative_step_size=1 / 16)
    return lambda: peer.apgd(model, x, y, EPSILON, norm=float("inf"), n_iter=100, loss_function="ce")


def make_call(library: str, case: str) -> Callable[[], object]:
    """A library's attack."""
    return jax_call(case) if library == "rbf_jax" else torch_call(library, case)


def main() -> None:
    """Measures and writes ``results/benchmarks/attacks.json``."""
    names = ("torch", "torchattacks", "foolbox", "adv_lib")
    figures: dict[str, Any] = {"versions": {name: importlib.metadata.version(name) for name in names}}
    for case, (libraries, looks, rounds) in CASES.items():
        seconds = taking_turns(make_call, libraries, case, rounds=rounds).seconds
        medians = {library: statistics.median(values) for library, values in seconds.items()}
        ratios = [
            ours / min(seconds[library][turn] for library in libraries[1:])
            for turn, ours in enumerate(seconds["rbf_jax"])
        ]
        figures[case] = {
            "batch": BATCH,
            "images/s": {library: round(BATCH / value, 1) for library, value in medians.items()},
            "ms a step": {library: round(1e3 * value / looks, 1) for library, value in medians.items()},
            "time rbf_jax / fastest peer": round(statistics.median(ratios), 2),
            "range of that ratio": [round(min(ratios), 2), round(max(ratios), 2)],
        }
    write("attacks", figures)


if __name__ == "__main__":
    main()
