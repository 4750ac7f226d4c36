"""What computing costs: FLOPs, bytes and memory of each stage for one image, and the profiles on three machines.

    python -m benchmarks.cost      # results/benchmarks/cost.json; `make tables` makes its page

FLOPs and bytes of the networks are counted by XLA on their programs for a GPU (on CPU large convolutions take fewer);
those of the reconstruction, whose loop over tiles XLA counts once, by hand. Seconds on two cores are measured; on the
other machines the larger of FLOPs by the rate that is reached and bytes by the bandwidth. Which rate is reached, and
what an hour costs, are assumptions, and written out.
"""

import types
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import write
from experiments import cost, learn, studies
from experiments.catalogue import ATTACK_STEP
from experiments.configs import cifar10, mnist
from experiments.rundir import Run

CONFIGS = {"mnist": mnist, "cifar10": cifar10}
SHAPES = {"mnist": (28, 28, 1), "cifar10": (32, 32, 3)}


class Machine(NamedTuple):
    """A machine by its data sheet, and what is assumed of it.

    Attributes:
        peak: FLOP/s at JAX's default precision: TF32 without sparsity, bfloat16 on a TPU.
        bandwidth: of its memory, bytes/s.
        share: of the peak that is reached, low as the convolutions have few channels; of an H100 by the published runs,
            where training reached 1 to 4 % beside other work on the card; of a TPU assumed.
        dollars: an hour; assumed, a list price of 2026.
    """

    peak: float
    bandwidth: float
    share: float
    dollars: float


MACHINES = {
    "one H100": Machine(495e12, 3.35e12, 0.02, 3.0),
    "one TPU v5e-8": Machine(8 * 197e12, 8 * 819e9, 0.02, 9.6),
}
CORES_DOLLARS = 0.10


class Work(NamedTuple):
    """Of one image."""

    flops: float
    bytes: float

    def seconds(self, machine: Machine) -> float:
        """On a machine, whichever of both takes longer."""
        return max(self.flops / (machine.share * machine.peak), self.bytes / machine.bandwidth)


def network_work(config: Any, shape: tuple[int, ...], batch: int = 64) -> tuple[Work, float, float]:
    """The forward pass of an image, and the memory of a forward pass and of a gradient, bytes an image."""
    network = learn.classifier(config)
    variables = network.init(jax.random.key(0), shape)
    images = jnp.zeros((batch, *shape))

    def forward(images: Any) -> Any:
        return network.apply(variables, images)[0]

    counted: Any = jax.jit(forward).trace(images).lower(lowering_platforms=("cuda",)).cost_analysis()

    def memory(function: Any) -> float:
        analysis: Any = jax.jit(function).lower(images).compile().memory_analysis()
        return analysis.temp_size_in_bytes / batch

    work = Work(counted["flops"] / batch, counted["bytes accessed"] / batch)
    return work, memory(forward), memory(jax.grad(lambda images: forward(images).sum()))


def rebuild_work(config: Any, shape: tuple[int, ...]) -> Work:
    """The reconstruction of an image: two products of P patches with K filters, and exp, tanh and division between.

    Its maps of scores and weights, P K numbers each, go through memory four times where they do not fit a cache.
    """
    height, width, channels = shape
    pairs = (height - 2) * (width - 2) * cost.FILTERS[config.em.rules]
    return Work(pairs * (4 * 9 * channels + 25), 4 * 4 * pairs)


def hours(config: Any, speed: cost.Speeds) -> dict[str, float]:
    """Of the stages of a profile, on an empty run directory."""
    run = Run(Path("/nonexistent"), config)
    validation = np.zeros(config.examples.validation, np.int32)
    training = np.zeros(config.examples.train - len(validation), np.int32)
    examples: Any = types.SimpleNamespace(
        train=types.SimpleNamespace(labels=training), validation=types.SimpleNamespace(labels=validation)
    )
    stages = {
        "training": cost.training(run, examples, config.models, speed),
        "attacks": cost.attacking(run, speed),
        "certificates": cost.certifying(run, speed),
        "studies": studies.studying(run, speed),
    }
    return {name: round(sum(seconds for _, seconds in found) / 3600, 2) for name, found in stages.items()}


def main() -> None:
    """Counts, measures and writes."""
    figures: dict[str, Any] = {
        "assumed": {
            name: f"{m.share:.0%} of {m.peak / 1e12:.0f} TFLOP/s, {m.bandwidth / 1e12:.2f} TB/s, ${m.dollars:g} an hour"
            for name, m in MACHINES.items()
        }
        | {"two CPU cores": f"${CORES_DOLLARS:g} an hour"}
    }
    for name, module in CONFIGS.items():
        config, shape = module.get_config("paper"), SHAPES[name]
        forward, memory, memory_gradient = network_work(config, shape)
        rebuild = rebuild_work(config, shape)
        images = np.random.default_rng(0).uniform(size=(config.attack.batch_size, *shape)).astype(np.float32)
        examples: Any = types.SimpleNamespace(test=types.SimpleNamespace(images=images))
        measured = cost.speeds(Run(Path("/nonexistent"), config), examples)
        figures[f"{name}, an image"] = {
            "forward pass, MFLOP": round(forward.flops / 1e6, 1),
            "forward pass, MB": round(forward.bytes / 1e6, 2),
            "forward pass, memory, MB": round(memory / 1e6, 2),
            "with gradient, memory, MB": round(memory_gradient / 1e6, 2),
            "reconstruction, MFLOP": round(rebuild.flops / 1e6, 1),
            "reconstruction, MB": round(rebuild.bytes / 1e6, 2),
            "prediction of 10 draws, MFLOP": round((10 * forward.flops + rebuild.flops) / 1e6, 1),
            "attack step on an rCNN, MFLOP": round((2 * forward.flops + 3 * rebuild.flops) / 1e6, 1),
            "training step, MFLOP": round(3 * forward.flops / 1e6, 1),
            "two cores, measured: forward pass, ms": round(1e3 * measured.forward, 3),
            "two cores, measured: forward pass, GFLOP/s": round(forward.flops / measured.forward / 1e9, 1),
            "two cores, measured: reconstruction, ms": round(1e3 * measured.rebuild, 3),
            "two cores: attack step on an rCNN, ms": round(
                1e3 * ATTACK_STEP * (measured.forward + measured.rebuild), 3
            ),
        }
        speeds = {
            title: (cost.Speeds(forward.seconds(m), rebuild.seconds(m)), m.dollars) for title, m in MACHINES.items()
        } | {"two CPU cores": (measured, CORES_DOLLARS)}
        for profile in ("cpu", "gpu", "paper"):
            for title, (speed, dollars) in speeds.items():
                found = hours(module.get_config(profile), speed)
                total = sum(found.values())
                figures.setdefault(f"{name}, profile {profile}, hours", {})[title] = (
                    f"{total:.1f} ({', '.join(f'{part} {h:.1f}' for part, h in found.items())}): ${total * dollars:.2f}"
                )
    write("cost", figures)


if __name__ == "__main__":
    main()
