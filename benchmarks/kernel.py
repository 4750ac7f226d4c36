"""The front end's kernel against the literal transcription of the paper's graph, and against the machine's limit.

    python -m benchmarks.kernel

64 images of 32x32x3, 232 filters of 3x3x3, forward and gradient with respect to the images. The transcription is the
graph of the released code: convolutions for ``z.mu`` and ``|z|^2``, sigmoid, exponential, normalisation, a transposed
convolution.
"""

from rbf_jax import process

if __name__ == "__main__":
    process.ensure()

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks.timing import interleaved, matmul_rate, write
from rbf_jax import RBFFilters, reconstruct
from rbf_jax.patches import overlap_count

BATCH, FILTERS, BETA1 = 64, 232, 17.33


def literal(filters: RBFFilters, images: Array) -> Array:
    """The paper's graph as it is drawn."""
    dimensions = ("NHWC", "HWIO", "NHWC")

    def conv(images: Array, kernel: Array) -> Array:
        return jax.lax.conv_general_dilated(images, kernel, (1, 1), "VALID", dimension_numbers=dimensions)

    kernel = jnp.transpose(filters.means, (1, 2, 3, 0))
    variances = jnp.maximum(filters.variances, 1e-12)
    distances = conv(images**2, jnp.ones_like(kernel)) - 2 * conv(images, kernel) + (filters.means**2).sum((1, 2, 3))
    scores = -distances / (2 * variances) - 0.5 * jnp.log(variances)
    raw = jnp.exp(BETA1 * jax.nn.sigmoid(scores))
    weights = raw / raw.sum(-1, keepdims=True)
    # HWIO for the forward convolution that this one transposes: its output channels are the filters.
    total = jax.lax.conv_transpose(
        weights, kernel, (1, 1), "VALID", dimension_numbers=dimensions, transpose_kernel=True
    )
    return total / overlap_count(images.shape[1:], (3, 3))


def temporary_mib(compiled: jax.stages.Compiled) -> float | None:
    """Memory that a compiled function takes beside its arguments and results, where the platform tells."""
    analysis = compiled.memory_analysis()
    return None if analysis is None else round(analysis.temp_size_in_bytes / 2**20, 1)


def main() -> None:
    """Measures and writes ``results/benchmarks/kernel.json``."""
    rng = np.random.default_rng(0)
    means = rng.uniform(size=(FILTERS, 3, 3, 3)).astype(np.float32)
    filters = RBFFilters(jnp.asarray(means), jnp.asarray(rng.uniform(0.02, 1, FILTERS).astype(np.float32)))
    images = jnp.asarray(rng.uniform(size=(BATCH, 32, 32, 3)).astype(np.float32))

    def tiled(filters: RBFFilters, images: Array) -> Array:
        return jnp.asarray(reconstruct(filters, images, BETA1))

    figures: dict[str, object] = {"batch": BATCH, "filters": FILTERS}
    for name, transform in (
        ("forward", lambda f: f),
        ("gradient", lambda f: jax.grad(lambda filters, images: f(filters, images).sum(), argnums=1)),
    ):
        compiled = {
            label: jax.jit(transform(f)).lower(filters, images).compile()
            for label, f in (("literal", literal), ("tiled", tiled))
        }
        results = [np.asarray(f(filters, images)) for f in compiled.values()]
        seconds = interleaved({label: lambda f=f: f(filters, images) for label, f in compiled.items()})
        figures[name] = {
            "literal ms": round(1e3 * seconds["literal"], 1),
            "tiled ms": round(1e3 * seconds["tiled"], 1),
            "ratio": round(seconds["literal"] / seconds["tiled"], 2),
            "largest difference": float(np.abs(results[0] - results[1]).max()),
            **{f"{label} MiB": temporary_mib(f) for label, f in compiled.items()},
        }
    # Two matmuls, P x 29 x K and P x K x 28, forward; the tanh and exponential of P x K come on top.
    patches = BATCH * 900
    figures["floor of the forward matmuls ms"] = round(2 * patches * FILTERS * (29 + 28) / matmul_rate() / 1e6, 1)
    write("kernel", figures)


if __name__ == "__main__":
    main()
