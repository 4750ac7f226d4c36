"""Batch norm in training, against Flax's own layer: alone at the sizes of VGG-16, and in a whole training step.

    python -m benchmarks.batch_norm

Alone: value, gradients of input, scale and bias, and the running averages, after a ReLU. A step: VGG-16, batch 64,
Nesterov SGD, with either layer.
"""

from rbf_jax import process

if __name__ == "__main__":
    process.ensure()

import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from benchmarks.timing import interleaved, write
from rbf_jax import models, train
from rbf_jax.models import BatchNorm, vgg

BATCH = 64
SHAPES = ((32, 32, 64), (16, 16, 128), (8, 8, 256), (4, 4, 512), (2, 2, 512))


class FlaxNorm(nn.Module):
    """Flax's layer, called as ours."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Normalises."""
        return nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)


LAYERS: dict[str, type[nn.Module]] = {"Flax": FlaxNorm, "ours": BatchNorm}


def alone(layer: nn.Module, x: jax.Array, cotangent: jax.Array) -> Callable[[], Any]:
    """Value, gradients and running averages, compiled."""
    variables: Any = layer.init(jax.random.key(0), x)

    @jax.jit
    def run(params: Any, x: jax.Array, cotangent: jax.Array) -> Any:
        def value(params: Any, x: jax.Array) -> Any:
            return layer.apply({**variables, "params": params}, nn.relu(x), train=True, mutable="batch_stats")

        result, pull, state = jax.vjp(value, params, x, has_aux=True)
        return result, pull(cotangent), state

    return functools.partial(run, variables["params"], x, cotangent)


def step(layer: type[nn.Module], images: jax.Array, labels: jax.Array) -> Callable[[], Any]:
    """A training step of VGG-16 with the layer, compiled."""
    classifier, optimizer = models.from_linen(models.VGG16()), optax.sgd(0.01, 0.9, nesterov=True)
    one = jax.jit(train.make_step(classifier, optimizer))
    with mock.patch.object(vgg, "BatchNorm", layer):
        state = train.init(jax.random.key(0), classifier, optimizer, images.shape[1:])
        call = functools.partial(one, jax.random.key(0), state, images, labels)
        jax.block_until_ready(call())  # traced while the layer is in place
    return call


def main() -> None:
    """Measures and writes ``results/benchmarks/batch_norm.json``."""
    figures: dict[str, object] = {}
    for shape in SHAPES:
        x, cotangent = jax.random.normal(jax.random.key(0), (2, BATCH, *shape))
        seconds = interleaved({name: alone(layer(), x, cotangent) for name, layer in LAYERS.items()})
        # Read: input twice, cotangent; written: value, gradient.
        figures["x".join(map(str, (BATCH, *shape)))] = said(seconds) | {
            "least GB/s of ours": round(5 * x.nbytes / seconds["ours"] / 1e9, 1)
        }
    images, labels = jax.random.uniform(jax.random.key(0), (BATCH, 32, 32, 3)), jnp.arange(BATCH) % 10
    figures["VGG-16, training step"] = said(
        interleaved({name: step(layer, images, labels) for name, layer in LAYERS.items()})
    )
    write("batch_norm", figures)


def said(seconds: dict[str, float]) -> dict[str, float]:
    """Milliseconds, and their ratio."""
    return {f"{name} ms": round(1e3 * value, 1) for name, value in seconds.items()} | {
        "time ours / Flax": round(seconds["ours"] / seconds["Flax"], 2)
    }


if __name__ == "__main__":
    main()
