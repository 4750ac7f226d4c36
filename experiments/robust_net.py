"""How strong the attack suite is: what it leaves of a published robust network, beside what others left.

    python -m experiments.robust_net --weights=robust_checkpoints.npz [--images=500] [--publish]

The network is TRADES for MNIST (Zhang et al., ICML 2019; weights from github.com/yaodongyu/TRADES, as a file of arrays
``trades_mnist/LAYER.weight`` and ``.bias`` in PyTorch's layout), at linf 0.3. Slow attacks meet the images that stood
closest to being broken by those before; the others count as robust, so what is left is an upper bound: more attacks
could only lower it. Every stage keeps its finished batches in the run directory: the same command goes on where a
stopped one was. On one core about 2 hours for all 10,000 images.
"""

from rbf_jax import process

if __name__ == "__main__":
    process.ensure()

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.tree_util import Partial

from experiments import contest_jobs, jobs
from experiments.provenance import provenance
from experiments.report import slug
from rbf_jax import attacks, data, evaluate
from rbf_jax.evaluate import Outcomes, Parts
from rbf_jax.files import read_npz
from rbf_jax.models.layers import conv, max_pool
from rbf_jax.types import Array, Key

WEIGHTS = flags.DEFINE_string("weights", None, "file of the network's weights")

EPSILON = 0.3
OTHERS = {"PGD-40": 96.07, "PGD-1000": 95.60, "FAB": 93.33, "AutoAttack": 92.81, "Square": 92.58, "the record": 92.46}
"""Robust accuracy that attacks of others left, of all 10,000 images: the network's leaderboard, and AutoAttack's."""

BATCH = 64


def network(params: dict[str, Array], key: Key, images: Array) -> Array:
    """Two blocks of two unpadded 3x3 convolutions and a pool, then three dense layers."""
    del key
    x = images
    for name in ("conv1", "conv2", "conv3", "conv4"):
        # The border is what zero padding would add.
        x = jax.nn.relu(conv(x, params[f"{name}.weight"])[:, 1:-1, 1:-1] + params[f"{name}.bias"])
        x = max_pool(x) if name in ("conv2", "conv4") else x
    x = x.reshape(len(x), -1)
    for name in ("fc1", "fc2", "fc3"):
        x = x @ params[f"{name}.weight"] + params[f"{name}.bias"]
        x = x if name == "fc3" else jax.nn.relu(x)
    return x


def load(path: Path) -> Partial:
    """The network with the file's weights, brought from PyTorch's layout to ours.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it holds other arrays.
    """
    stored = read_npz(path, "a file of weights", "Name another (--weights)")
    params: dict[str, Array] = {}
    for name, array in stored.items():
        if name.startswith("trades_mnist/"):
            # feature_extractor.conv1.weight -> conv1.weight
            params[".".join(name.split("/")[1].split(".")[-2:])] = np.asarray(array)
    layers = ("conv1", "conv2", "conv3", "conv4", "fc1", "fc2", "fc3")
    wanted = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    if params.keys() != wanted:
        raise ValueError(f"{path} must hold trades_mnist/ with {sorted(wanted)}, got {sorted(params)}")
    for name, array in params.items():
        if array.ndim == 4:
            params[name] = array.transpose(2, 3, 1, 0)
        elif array.ndim == 2:
            rows = array.T
            if name == "fc1.weight":  # flattened as (C, H, W) there, as (H, W, C) here
                rows = rows.reshape(64, 4, 4, -1).transpose(1, 2, 0, 3).reshape(1024, -1)
            params[name] = rows
    return Partial(network, {name: jnp.asarray(array) for name, array in params.items()})


class Stage(NamedTuple):
    """An attack, and whom it meets.

    Attributes:
        attack: the attack.
        few: at most so many images, those of the least margin so far.
        alone: whether its own figure is asked for: it then also meets images that are broken already.
    """

    attack: attacks.Iterative
    few: int
    alone: bool = False


def _pgd(steps: int, random_start: bool = True) -> attacks.Iterative:
    return attacks.pgd(attacks.Linf, epsilon=EPSILON, steps=steps, step_size=0.01, random_start=random_start)


def stages() -> dict[str, Stage]:
    """By name, in their order."""
    standard = attacks.autoattack("standard", attacks.Linf, epsilon=EPSILON)
    return {
        # From the image itself it meets the board's figure; from a random start, in PyTorch too, it leaves more.
        "PGD-40": Stage(_pgd(40, random_start=False), 10_000, alone=True),
        "PGD-40 from a random start": Stage(_pgd(40), 3_000, alone=True),
        "APGD-CE": Stage(standard["apgd-ce-linf"], 3_000),
        "PGD-1000": Stage(_pgd(1000), 1_200, alone=True),
        "APGD-T": Stage(standard["apgd-t-linf"], 1_000),
        "Square, 20,000 queries": Stage(attacks.square(attacks.Linf, epsilon=EPSILON, queries=20_000), 300),
        "FAB-T": Stage(standard["fab-t-linf"], 300),
        "APGD-T, 4 more starts": Stage(attacks.apgd_t(attacks.Linf, epsilon=EPSILON, restarts=4), 200),
    }


def job() -> None:
    """Runs the stages."""
    logits_fn, total = load(Path(str(WEIGHTS.value))), contest_jobs.IMAGES.value or 10_000
    split = data.load("mnist", "test", jobs.DATA_DIR.value)
    images, labels = data.as_float(split.images[:total]), split.labels[:total]
    directory = jobs.run_directory(f"robust-net-{total}")

    def look(images: Array, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which images are classified rightly, and their margins: below 0 while they are."""
        logits = evaluate.predict(jax.random.key(0), logits_fn, images, batch_size=BATCH)
        return logits.argmax(-1) == labels, np.array(attacks.margin(jnp.asarray(logits), jnp.asarray(labels), None))

    clean, closest = look(images, labels)
    left = clean.copy()
    for number, (name, stage) in enumerate(stages().items()):
        order = np.argsort(-closest)
        chosen = np.sort(order[(clean if stage.alone else left)[order]][: stage.few])
        parts = Parts(directory / slug(name), {"attack": name})
        origin = provenance(parts.directory)
        found = evaluate.run_attack(
            jax.random.key(number),
            stage.attack,
            logits_fn,
            images[chosen],
            labels[chosen],
            rows=chosen,
            leave=True,
            batch_size=BATCH,
            parts=parts,
            progress=name,
        )
        right, level = look(found.images, labels[chosen])
        closest[chosen] = np.maximum(closest[chosen], level)
        left[chosen] &= right
        alone = clean.copy()
        alone[chosen] = right
        robust = alone if stage.alone else left
        facts = origin | {
            "stage": name,
            "seed": number,
            "epsilon": EPSILON,
            "attacked": len(chosen),
            "alone": stage.alone,
            "weights": evaluate.fingerprint(logits_fn),
            "forward passes": int(found.forwards.sum()),
            "backward passes": int(found.backwards.sum()),
            "seconds": round(parts.seconds()),
        }
        path = directory / "ledger" / f"{slug(name)}.npz"
        evaluate.save_outcomes(path, Outcomes(np.arange(total), np.zeros((0, total), bool), robust[None], facts))
        shares = f"{100 * robust.mean():.2f} % of {total}, all so far {100 * left.mean():.2f} %"
        print(f"{name}: leaves {shares}", flush=True)
        if jobs.PUBLISH.value:  # each at once: on a machine that is taken away, nothing else stays
            settings = {"kind": "robust_net", "epsilon": EPSILON, "others": OTHERS}
            contest_jobs.publish_contest("robust_net", settings, directory / "ledger")


if __name__ == "__main__":
    jobs.main(job, needs="weights")
