"""A training step against the machine's matmul rate and against the same step in PyTorch, in turn in one run.

    python -m benchmarks.train        # needs the extra `peers`: .venv/bin/pip install '.[peers]'

The 4-layer CNN (batch 128, Adam) and VGG-16 with batch norm and dropout (batch 64, Nesterov SGD): forward, gradient of
the label-smoothed cross-entropy and update, as `rbf_jax.train` runs it (several steps in one compiled loop). PyTorch
runs eagerly, channels last, on as many threads. Each has a process of its own, so that neither's threads and allocator
disturb the other's; they take turns.
"""

from rbf_jax import process

if __name__ == "__main__":
    process.ensure()

import importlib
import importlib.metadata
import itertools
import os
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.timing import taking_turns, write
from rbf_jax import models, train
from rbf_jax.models.vgg import BLOCKS

STEPS = 5


def conv_flops(size: int, layers: tuple[tuple[int, ...], ...], channels: int) -> tuple[int, int]:
    """Forward FLOPs of 3x3 convolutions in pooled blocks for one image, and those of the first of them."""
    total = first = 0
    for widths in layers:
        for width in widths:
            total += 2 * 9 * size * size * channels * width
            first = first or total
            channels = width
        size //= 2
    return total, first


def step_flops(size: int, layers: tuple[tuple[int, ...], ...], channels: int, dense: tuple[int, ...]) -> int:
    """FLOPs of a training step for one image: forward and both gradients, none with respect to the images."""
    convolutions, first = conv_flops(size, layers, channels)
    return 3 * (convolutions + sum(2 * a * b for a, b in itertools.pairwise(dense))) - first


def jax_step(
    module: Any, optimizer: optax.GradientTransformation, images: np.ndarray, labels: np.ndarray
) -> Callable[[], None]:
    """STEPS steps of `rbf_jax.train` on one batch."""
    classifier = models.from_linen(module)
    step = train.make_step(classifier, optimizer)

    @jax.jit
    def run(state: train.TrainState, images: jax.Array, labels: jax.Array) -> train.TrainState:
        def body(i: jax.Array, state: train.TrainState) -> train.TrainState:
            return step(jax.random.fold_in(jax.random.key(0), i), state, images, labels)[0]

        return jax.lax.fori_loop(0, STEPS, body, state)

    arrays = jnp.asarray(images), jnp.asarray(labels)
    state = train.init(jax.random.key(0), classifier, optimizer, images.shape[1:])

    def call() -> None:
        nonlocal state
        state = jax.block_until_ready(run(state, *arrays))

    return call


def peer() -> Any:
    """PyTorch, which the environment for development does not have."""
    return importlib.import_module("torch")


def torch_step(model: Any, optimizer: Any, images: np.ndarray, labels: np.ndarray) -> Callable[[], None]:
    """STEPS steps of the same in PyTorch."""
    torch = peer()
    nn = torch.nn

    model = model.to(memory_format=torch.channels_last).train()
    update = optimizer(model.parameters())
    x = torch.from_numpy(images.transpose(0, 3, 1, 2)).contiguous(memory_format=torch.channels_last)
    targets = torch.from_numpy(np.clip(np.eye(10, dtype=np.float32)[labels], 0.1 / 9, 0.9))

    def call() -> None:
        for _ in range(STEPS):
            update.zero_grad(set_to_none=True)
            nn.functional.cross_entropy(model(x), targets).backward()
            update.step()

    return call


def torch_models() -> tuple[Any, Any]:
    """The two networks, layer for layer."""
    nn = peer().nn

    def conv(a: int, b: int) -> Any:
        return nn.Conv2d(a, b, 3, padding=1)

    cnn = nn.Sequential(
        *(conv(1, 32), nn.ReLU(), conv(32, 32), nn.ReLU(), nn.MaxPool2d(2)),
        *(conv(32, 64), nn.ReLU(), conv(64, 64), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(3136, 200), nn.ReLU(), nn.Dropout(0.5), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10)),
    )
    layers: list[Any] = []
    channels = 3
    for block, widths in enumerate(BLOCKS):
        for layer, features in enumerate(widths):
            layers += [conv(channels, features), nn.ReLU(), nn.BatchNorm2d(features)]
            channels = features
            if layer < len(widths) - 1:
                layers.append(nn.Dropout(0.3 if block == 0 else 0.4))
        layers.append(nn.MaxPool2d(2))
    layers += [nn.Flatten(), nn.Dropout(0.5), nn.Linear(512, 512), nn.ReLU(), nn.BatchNorm1d(512), nn.Dropout(0.5)]
    return cnn, nn.Sequential(*layers, nn.Linear(512, 10))


CASES = {
    "4-layer CNN": ((128, 28, 28, 1), step_flops(28, ((32, 32), (64, 64)), 1, (3136, 200, 200, 10)), 21),
    "VGG-16": ((64, 32, 32, 3), step_flops(32, BLOCKS, 3, (512, 512, 10)), 7),
}
"""By name: the batch's shape, FLOPs of a step for one image, rounds."""


def make_call(library: str, case: str) -> Callable[[], None]:
    """STEPS steps of a library on a case."""
    rng, shape = np.random.default_rng(0), CASES[case][0]
    images = rng.uniform(size=shape).astype(np.float32)
    labels = rng.integers(10, size=shape[0]).astype(np.int32)
    if library == "rbf_jax":
        if case == "VGG-16":
            return jax_step(models.VGG16(), optax.sgd(0.01, 0.9, nesterov=True), images, labels)
        return jax_step(models.CNN(), optax.adam(1e-3), images, labels)
    torch = peer()
    torch.set_num_threads(os.cpu_count() or 1)
    cnn, vgg = torch_models()
    if case == "VGG-16":
        return torch_step(vgg, lambda p: torch.optim.SGD(p, 0.01, 0.9, nesterov=True), images, labels)
    return torch_step(cnn, lambda p: torch.optim.Adam(p, 1e-3), images, labels)


def main() -> None:
    """Measures and writes ``results/benchmarks/train.json``."""
    figures: dict[str, Any] = {"PyTorch": importlib.metadata.version("torch")}
    for case, (shape, flops, rounds) in CASES.items():
        seconds, rates, _ = taking_turns(make_call, ("rbf_jax", "PyTorch"), case, rounds=rounds)
        # The ceiling is the best of many products, so it is the best turn that is set against it.
        rate = max(rates)
        figures[case] = {
            "batch": shape[0],
            "GFLOP a step": round(shape[0] * flops / 1e9, 1),
            "matmul GFLOP/s": round(rate),
        }
        for library, values in seconds.items():
            step, best = statistics.median(values) / STEPS, min(values) / STEPS
            figures[case] |= {
                f"{library} ms a step": round(1e3 * step, 1),
                f"{library} images/s": round(shape[0] / step),
                f"{library} GFLOP/s": round(shape[0] * flops / step / 1e9),
                f"{library} share of the matmul rate": round(shape[0] * flops / step / 1e9 / rate, 2),
                f"{library} share of the matmul rate, best turn": round(shape[0] * flops / best / 1e9 / rate, 2),
            }
        ratios = [a / b for a, b in zip(seconds["rbf_jax"], seconds["PyTorch"], strict=True)]
        figures[case] |= {
            "time rbf_jax / PyTorch": round(statistics.median(ratios), 2),
            "range of that ratio": [round(min(ratios), 2), round(max(ratios), 2)],
        }
    write("train", figures)


if __name__ == "__main__":
    main()
