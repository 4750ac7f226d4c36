"""How strong the attack suite is: what it leaves of a published robust network, beside what others left.

    python -m experiments.robust_net --weights=robust_checkpoints.npz [--images=500] [--publish]

The network is TRADES for MNIST (Zhang et al., ICML 2019; weights from github.com/yaodongyu/TRADES, as a file of arrays
``trades_mnist/LAYER.weight`` and ``.bias`` in PyTorch's layout), at linf 0.3. Every stage keeps its finished batches in
the run directory: the same command goes on where a stopped one was. On two cores about 6 hours for all 10,000 images.
"""

from experiments import process

if __name__ == "__main__":
    process.ensure()

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.tree_util import Partial

from experiments import jobs
from experiments.provenance import provenance
from rbf_jax import attacks, data, evaluate
from rbf_jax.evaluate import Outcomes, Parts
from rbf_jax.files import read_npz
from rbf_jax.models.layers import conv, max_pool
from rbf_jax.types import Array, Key

WEIGHTS = flags.DEFINE_string("weights", None, "file of the network's weights")
IMAGES = flags.DEFINE_integer("images", 10_000, "the first so many test images")

EPSILON = 0.3
OTHERS = {"PGD-40": 96.07, "PGD-1000": 95.60, "FAB": 93.33, "AutoAttack": 92.81, "Square": 92.58, "the record": 92.46}
"""Robust accuracy that attacks of others left, of all 10,000 images: the network's leaderboard, and AutoAttack's."""

WEAK, WEAKEST = 3000, 1000
"""Survivors of the least margin at PGD-40's image, on whom the slow attacks run; the others count as robust.

What is left is so an upper bound: more attacks could only lower it.
"""


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


def _pgd(steps: int, random_start: bool = True) -> attacks.Iterative:
    return attacks.pgd(attacks.Linf, epsilon=EPSILON, steps=steps, step_size=0.01, random_start=random_start)


def stages(images: int) -> dict[str, tuple[dict[str, attacks.Iterative], int]]:
    """By name: a suite, and how many survivors of least margin it is for (all: the number of images)."""
    standard = attacks.autoattack("standard", attacks.Linf, epsilon=EPSILON)
    more = {
        "apgd-t x4": attacks.apgd_t(attacks.Linf, epsilon=EPSILON, restarts=4),
        "square-20000": attacks.square(attacks.Linf, epsilon=EPSILON, queries=20_000),
    }
    return {
        # From the image itself they meet the board's figure; from a random start, in PyTorch too, they leave more.
        "PGD-40": ({"pgd-40": _pgd(40, random_start=False)}, images),
        "PGD-40 from a random start": ({"pgd-40": _pgd(40)}, images),
        "APGD-CE and APGD-T": ({name: standard[name] for name in ("apgd-ce", "apgd-t")}, images),
        "AutoAttack": ({name: standard[name] for name in ("fab-t", "square")}, WEAK),
        "more on the weakest survivors": (more, WEAKEST),
        "PGD-1000": ({"pgd-1000": _pgd(1000)}, WEAK),
    }


def weakest(logits_fn: Partial, images: Array, labels: Array, folder: Path) -> np.ndarray:
    """Indices of the images, the one of the least margin under PGD-40 first."""
    parts = Parts(folder, {"attack": "pgd-40"})
    found = evaluate.run_attack(
        jax.random.key(2), _pgd(40), logits_fn, images, labels, batch_size=256, parts=parts, progress="margins"
    )
    logits = evaluate.predict(jax.random.key(0), logits_fn, found.images, batch_size=256)
    return np.argsort(-np.asarray(attacks.margin(jnp.asarray(logits), jnp.asarray(labels), None)))


def job() -> None:
    """Runs the stages; each but PGD's goes on with what the one before it left."""
    logits_fn, total = load(Path(str(WEIGHTS.value))), IMAGES.value
    split = data.load("mnist", "test", jobs.DATA_DIR.value)
    images, labels = data.as_float(split.images[:total]), split.labels[:total]
    directory = jobs.run_directory(f"robust-net-{total}")
    order = weakest(logits_fn, images, labels, directory / "margins")
    left, figures = np.ones(total, bool), {}
    for name, (suite, few) in stages(total).items():
        alone, folder = name.startswith("PGD"), directory / name.replace(" ", "-")
        chosen = np.sort([row for row in order if alone or left[row]][:few])
        result = evaluate.run_suite(
            jax.random.key(1),
            suite,
            logits_fn,
            images[chosen],
            labels[chosen],
            rows=chosen,
            batch_size=256,
            directory=folder,
            progress=True,
        )
        robust = np.ones(total, bool) if alone else left.copy()
        robust[chosen] &= result.robust[0]
        left = left if alone else robust
        by = np.bincount(result.attack[~result.robust[0]], minlength=len(result.names))
        figures[name] = {
            "N": total,
            "attacked": len(chosen),
            "left, %": round(100 * float(robust.mean()), 2),
            "95 % interval": [round(100 * end, 2) for end in evaluate.wilson_interval(int(robust.sum()), total)],
            "left by others, of 10,000, %": OTHERS.get(name),
            "broken by": dict(zip(result.names, by.tolist(), strict=True)),
            "forward passes": int(result.forwards.sum()),
            "backward passes": int(result.backwards.sum()),
            "seconds": round(sum(Parts(folder / attack, {}).seconds() for attack in suite)),
        }
        facts = provenance() | {"stage": name, "epsilon": EPSILON, "seed": 1} | figures[name]
        nothing = np.zeros((0, total), bool)
        path = directory / "ledger" / f"{name.replace(' ', '-').lower()}.npz"
        evaluate.save_outcomes(path, Outcomes(np.arange(total), nothing, robust[None], facts))
        print(f"{name}: leaves {figures[name]['left, %']:.2f} % of {total}", flush=True)
    if jobs.PUBLISH.value:
        record = provenance() | {"epsilon": EPSILON, "seed": 1, "the record, %": OTHERS["the record"]} | figures
        ledgers = {path.stem: path for path in sorted((directory / "ledger").glob("*.npz"))}
        jobs.publish_record("robust_net", record, ledgers)


if __name__ == "__main__":
    jobs.main(job, needs="weights")
