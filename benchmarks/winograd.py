"""Winograd's filtering against the direct convolution, both as `rbf_jax.models.conv` has them on CPU.

    python -m benchmarks.winograd

Alone: value, and gradients of images and kernel, at the sizes of VGG-16. Whole: a training step of VGG-16 (batch 64,
Nesterov SGD) and PGD-5 on it.
"""

from rbf_jax import process

if __name__ == "__main__":
    process.ensure()

import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import optax

from benchmarks.timing import interleaved, write
from rbf_jax import attacks, models, train
from rbf_jax.models import winograd

BATCH = 64
# Side, channels, features.
SHAPES = ((16, 128, 128), (8, 128, 256), (8, 256, 256), (4, 256, 512), (4, 512, 512))
KINDS = ("direct", "Winograd")


def compared(function: Callable[..., Any], *arguments: Any) -> dict[str, float]:
    """Milliseconds of the compiled function with either convolution, and their ratio."""
    compiled: dict[str, Callable[[], Any]] = {}
    for kind in KINDS:
        jax.clear_caches()  # what was traced with the other would be taken again
        with mock.patch.object(winograd, "pays", winograd.pays if kind == "Winograd" else lambda *_: False):
            compiled[kind] = functools.partial(jax.jit(function).lower(*arguments).compile(), *arguments)
    seconds = interleaved(compiled)
    return {f"{kind} ms": round(1e3 * seconds[kind], 1) for kind in KINDS} | {
        "time Winograd / direct": round(seconds["Winograd"] / seconds["direct"], 2)
    }


def value_and_gradients(images: jax.Array, kernel: jax.Array, cotangent: jax.Array) -> Any:
    """Of one convolution."""
    value, pull = jax.vjp(models.conv, images, kernel)
    return value, pull(cotangent)


def main() -> None:
    """Measures and writes ``results/benchmarks/winograd.json``."""
    figures: dict[str, object] = {}
    key = jax.random.key(0)
    for side, channels, size in SHAPES:
        images = jax.random.normal(key, (BATCH, side, side, channels))
        kernel = jax.random.normal(key, (3, 3, channels, size)) / (9 * channels) ** 0.5
        cotangent = jax.random.normal(key, (BATCH, side, side, size))
        found = compared(value_and_gradients, images, kernel, cotangent)
        # The transform of the kernel and what memory moves are what it takes beyond its 36 products.
        flops = 3 * 2 * 36 * channels * size * BATCH * side**2 / 16
        found["products alone, GFLOP/s"] = round(flops / found["Winograd ms"] / 1e6)
        figures[f"{BATCH}x{side}x{side}, {channels} to {size}"] = found
    images, labels = jax.random.uniform(key, (BATCH, 32, 32, 3)), jnp.arange(BATCH) % 10
    classifier, optimizer = models.from_linen(models.VGG16()), optax.sgd(0.01, 0.9, nesterov=True)
    state = train.init(key, classifier, optimizer, images.shape[1:])
    step = train.make_step(classifier, optimizer)
    figures["VGG-16, training step"] = compared(step, key, state, images, labels)
    pgd = attacks.pgd(attacks.Linf, epsilon=0.031, steps=5, step_size=0.01)
    logits = models.logits_fn(classifier, state.variables)
    figures["VGG-16, PGD-5"] = compared(pgd, jax.random.split(key, BATCH), logits, images, labels)
    write("winograd", figures)


if __name__ == "__main__":
    main()
