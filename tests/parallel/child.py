"""All that is split over devices, computed on so many simulated ones: child.py DEVICES RESULT.npz, in a new process.

With one device nothing is split: what the others must equal.
"""

import os
import sys
from pathlib import Path

DEVICES, RESULT = int(sys.argv[1]), sys.argv[2]
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)  # what is not compiled is not dumped
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        f"--xla_force_host_platform_device_count={DEVICES}",
        "--xla_backend_optimization_level=0",
        f"--xla_dump_to={RESULT}.hlo --xla_dump_hlo_as_text --xla_dump_hlo_module_re=jit_",
    ]
)

sys.path.append(str(Path(__file__).parents[1]))

import contextlib  # noqa: E402

import flax.linen as nn  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
import pytest  # noqa: E402
from helpers import random_filters, random_images  # noqa: E402
from jax.tree_util import Partial  # noqa: E402

from rbf_jax import attacks, certify, defend, em, evaluate, models, parallel, reconstruct, train  # noqa: E402
from rbf_jax.models.layers import BatchNorm, Conv, max_pool  # noqa: E402

SHAPE, BATCH, EXAMPLES = (16, 16, 1), 16, 50
KEY = jax.random.key(0)


class Net(nn.Module):
    """A bit of everything: convolution, batch normalisation, a pool, dropout."""

    @nn.compact
    def __call__(self, images, *, train=False):
        x = nn.relu(BatchNorm()(Conv(4)(images), train=train))
        x = max_pool(max_pool(x))
        x = nn.Dropout(0.2, deterministic=not train)(x.reshape(x.shape[0], -1))
        return nn.Dense(3)(x)


def rebuilt(filters, images):
    return reconstruct(filters, images, 25.0)


def compute():
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=EXAMPLES).astype(np.int32)
    images = random_images(rng, (EXAMPLES, *SHAPE))
    yield "part", parallel.take(images, np.arange(BATCH)).addressable_shards[0].data

    # Neither these images nor those that validate are a multiple of the devices.
    filters, classifier = random_filters(rng, 8), models.from_linen(Net())
    known = em.init(1)._replace(filters=filters, num_filters=np.int32(6))
    config = em.EMConfig(images_per_step=21, steps=5, growth_steps=3)
    yield "em", em.fit(images, config=config, state=known, progress=False)[0]

    front = Partial(rebuilt, filters)
    steps = {"optimizer": optax.sgd(0.05, momentum=0.9), "epochs": 2, "batch_size": BATCH, "progress": None}
    with pytest.raises(ValueError, match="must be a multiple of the") if DEVICES > 1 else contextlib.nullcontext():
        train.fit(KEY, classifier, images, labels, **{**steps, "batch_size": 6})
    noisy = train.add_noisy(images, labels, std=0.1, limit=0.3, count=BATCH, front=front)
    yield "everywhere", [len(leaf.devices()) for leaf in jax.tree.leaves(parallel.everywhere(noisy))]
    validation = images[:21], labels[:21]

    def augment(epoch, _):
        moved = train.flip_and_shift(KEY, len(images), epoch, pixels=1)
        return train.chain(train.chain(moved, train.through(front)), noisy)

    yield "training", train.fit(KEY, classifier, images, labels, augment=augment, validation=validation, **steps)
    # In l2: linf's sign of a gradient that is 0 but for rounding may go either way.
    pgd = attacks.pgd(attacks.L2, epsilon=1.0, steps=3)
    behind = models.behind(front, classifier)
    yield "adversarial training", train.fit(KEY, behind, images, labels, attack=pgd, **steps)

    network = models.logits_fn(classifier, classifier.init(jax.random.key(1), SHAPE))
    defended = defend(filters, network, beta1=25.0, beta2=1.0, draws=2)
    logits = evaluate.predict(KEY, defended.static, images, batch_size=5)
    yield "logits", logits
    labels = logits.argmax(-1).astype(np.int32)
    yield "survival", evaluate.survival(KEY, defended.draw, images, labels, redraws=3, batch_size=5)
    # Goes on where a run on another number of devices was.
    folder = Path(RESULT).parent / "parts"
    for path in sorted(folder.glob("*.npz"))[::2]:
        path.unlink()
    kept = evaluate.Parts(folder, {})
    yield "kept", evaluate.survival(KEY, defended.draw, images, labels, redraws=3, batch_size=5, parts=kept)
    # So few that every device gets less than a batch.
    yield "few", evaluate.survival(KEY, defended.draw, images, labels, redraws=3, batch_size=40)
    suite = {
        "pgd": attacks.pgd(attacks.Linf, epsilon=0.02, steps=12),
        "square": attacks.square(attacks.L2, epsilon=0.3, queries=20),
    }
    # For the same reason not the images themselves.
    found = evaluate.run_suite(KEY, suite, defended.static, images, labels, batch_size=4)
    yield "suite", found._replace(images=None)
    eot = {"bpda": attacks.pgd(attacks.Linf, epsilon=0.02, steps=3, gradient=attacks.eot(2))}
    judged = {"judge": defended.predict, "batch_size": 4}
    yield "noisy suite", evaluate.run_suite(KEY, eot, defended.bpda, images, labels, **judged)._replace(images=None)
    yield "certificate", certify.certify(KEY, defended.draw, images[0], sigma=0.2, n0=30, n=201, batch_size=20)


with jax.set_mesh(parallel.mesh()) if DEVICES > 1 else contextlib.nullcontext():
    found = {
        f"{name}/{i}": np.asarray(leaf) for name, tree in compute() for i, leaf in enumerate(jax.tree.leaves(tree))
    }
np.savez(RESULT, allow_pickle=False, **found)
