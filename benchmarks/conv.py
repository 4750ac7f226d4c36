"""The convolution layer inside a compiled loop, against the native op and against straight-line code.

    python -m benchmarks.conv

Value and both gradients of a 3x3 convolution, at the sizes of the 4-layer CNN and of VGG-16's last block, four times:
in ``lax.fori_loop`` and unrolled.
"""

from rbf_jax import process

if __name__ == "__main__":
    process.ensure()

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from benchmarks.timing import interleaved, write
from rbf_jax.models.layers import conv

ROUNDS = 4
CASES = {
    "28x28x32, batch 32": (32, 28, 28, 32),
    "16x16x128, batch 16": (16, 16, 16, 128),
    "2x2x512, batch 64": (64, 2, 2, 512),
}


def native(images: Array, kernel: Array) -> Array:
    """The op that Flax's own layer calls."""
    return jax.lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def repeated(layer: Callable[[Array, Array], Array], in_loop: bool) -> Callable[[Array, Array], tuple[Array, Array]]:
    """Value and both gradients, ROUNDS times one after the other."""

    def once(_, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        images, kernel = carry
        gradients = jax.grad(lambda x, k: jnp.sum(layer(x, k) ** 2), argnums=(0, 1))(images, kernel)
        return images - 1e-6 * gradients[0], kernel - 1e-6 * gradients[1]

    def run(images: Array, kernel: Array) -> tuple[Array, Array]:
        if in_loop:
            return jax.lax.fori_loop(0, ROUNDS, once, (images, kernel))
        carry = (images, kernel)
        for i in range(ROUNDS):
            carry = once(i, carry)
        return carry

    return jax.jit(run)


def main() -> None:
    """Measures and writes ``results/benchmarks/conv.json``."""
    figures: dict[str, object] = {}
    for name, shape in CASES.items():
        images = jax.random.normal(jax.random.key(0), shape)
        kernel = jax.random.normal(jax.random.key(1), (3, 3, shape[-1], shape[-1])) / (9 * shape[-1]) ** 0.5
        compiled = {
            f"{label}, {place}": functools.partial(repeated(layer, place == "loop"), images, kernel)
            for label, layer in (("native", native), ("ours", conv))
            for place in ("loop", "unrolled")
        }
        seconds = interleaved(compiled, repeats=3)
        flops = 3 * ROUNDS * 2 * 9 * shape[0] * shape[1] * shape[2] * shape[3] ** 2
        figures[name] = {f"{label} ms": round(1e3 * value, 1) for label, value in seconds.items()} | {
            "in-loop ratio native / ours": round(seconds["native, loop"] / seconds["ours, loop"], 1),
            "ours in loop / unrolled": round(seconds["ours, loop"] / seconds["ours, unrolled"], 2),
            "ours in loop GFLOP/s": round(flops / seconds["ours, loop"] / 1e9),
        }
    write("conv", figures)


if __name__ == "__main__":
    main()
