"""The whole suite on a defended model beside torchattacks': AutoAttack without noise, EoT with it.

    python -m benchmarks.suites      # needs the peers that `make bench` installs

The model is the rCNN of ``results/mnist`` (filters and weights), the images are embedded digits. The same model stands
in PyTorch; that both predict the same is checked first. Each library has a process of its own; they take turns. At the
paper's budget every image falls, at the smallest one none: there a suite's time is that of the survivors. The peer's
AutoAttack takes 10 steps where the published one takes 100; here its parts take as many as ours.
"""

from rbf_jax import process

if __name__ == "__main__":
    process.ensure()

import importlib
import importlib.metadata
import os
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.attacks import digits, torch_model, weights
from benchmarks.timing import taking_turns, write
from experiments.provenance import ROOT
from rbf_jax import PRESETS, Defense, attacks, defend, evaluate, models, rbf
from rbf_jax.rbf import VARIANCE_FLOOR

WEIGHTS = "rcnn"
BETA1, BETA2 = PRESETS["code"].test, 1.75
DRAWS, STEPS = 50, 4
LIBRARIES = "rbf_jax", "torchattacks"
CASES = {
    "AutoAttack, linf 0.3": (64, 0.3, 2),
    "AutoAttack, linf 0.2": (32, 0.2, 2),
    "AutoAttack, linf 0.1": (8, 0.1, 2),
    f"EoT-PGD with {DRAWS} draws, {STEPS} steps, linf 0.3": (64, 0.3, 3),
}
"""By name: images, epsilon, rounds."""


def defense() -> Defense:
    """Ours."""
    folder = ROOT / "results" / "mnist"
    classifier = models.logits_fn(models.from_linen(models.CNN()), weights(WEIGHTS))
    return defend(rbf.load(folder / "filters.npz"), classifier, beta1=BETA1, beta2=BETA2)


def torch_defense(torch: Any, beta2: float) -> Any:
    """The same in PyTorch: a matmul for the scores, a softmax, a matmul for the patches, overlaps averaged."""
    functional, cnn = torch.nn.functional, torch_model(torch, WEIGHTS)
    filters = rbf.load(ROOT / "results" / "mnist" / "filters.npz")
    means = torch.from_numpy(np.array(filters.flat_means))
    variances = torch.from_numpy(np.array(filters.variances))
    floored = variances.clamp_min(VARIANCE_FLOOR)
    levels = means.mean(-1, keepdim=True)
    textures = means - levels
    overlaps = functional.fold(functional.unfold(torch.ones(1, 1, 28, 28), 3), (28, 28), 3)

    class Defended(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cnn = cnn

        def forward(self, images: Any) -> Any:
            patches = functional.unfold(images, 3).transpose(1, 2)
            level = patches.mean(-1, keepdim=True)
            texture = patches - level
            distances = texture.square().sum(-1, keepdim=True) - 2 * texture @ textures.T + textures.square().sum(-1)
            distances = distances.clamp_min(0) + means.shape[1] * (level - levels[:, 0]).square()
            scores = -0.5 * floored.log() - distances / (2 * floored)
            weights = torch.softmax(BETA1 * torch.sigmoid(scores), -1)
            values = means + beta2 * variances[:, None] * torch.randn_like(means) if beta2 else means
            rebuilt = functional.fold((weights @ values).transpose(1, 2), (28, 28), 3)
            return self.cnn((rebuilt / overlaps).clamp(0, 1).contiguous(memory_format=torch.channels_last))

    return Defended().eval()


def jax_call(case: str) -> Callable[[], float]:
    """Our attack on a case; returns the share of images that it leaves."""
    count, epsilon, _ = CASES[case]
    images, labels = digits(count)
    forms = defense()
    if case.startswith("AutoAttack"):
        suite = attacks.autoattack("standard", attacks.Linf, epsilon=epsilon)

        def run() -> float:
            result = evaluate.run_suite(jax.random.key(0), suite, forms.static, images, labels, batch_size=count)
            return float(result.robust.mean())

        return run
    attack = jax.jit(attacks.pgd(attacks.Linf, epsilon=epsilon, steps=STEPS, gradient=attacks.eot(DRAWS)))
    arguments = (jax.random.key(0), forms.draw, jnp.asarray(images), jnp.asarray(labels))
    return lambda: 1 - float(attack(*arguments).success.mean())


def torch_call(case: str) -> Callable[[], float]:
    """The peer's."""
    torch, peer = importlib.import_module("torch"), importlib.import_module("torchattacks")
    torch.set_num_threads(os.cpu_count() or 1)
    count, epsilon, _ = CASES[case]
    images, labels = digits(count)
    x, y = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), torch.from_numpy(labels.astype(np.int64))
    still = torch_defense(torch, 0.0)
    ours = evaluate.predict(jax.random.key(0), defense().static, jnp.asarray(images))
    with torch.no_grad():
        np.testing.assert_allclose(still(x).numpy(), ours, atol=1e-2)
    if case.startswith("AutoAttack"):
        shared = {"model": still, "norm": "Linf", "eps": epsilon, "seed": 0}
        parts = [
            peer.APGD(**shared, steps=100),
            peer.APGDT(**shared, steps=100),
            peer.FAB(**shared, steps=100, multi_targeted=True),
            peer.Square(**shared, n_queries=5000),
        ]
        model, attack = still, peer.MultiAttack(parts)
    else:
        model = torch_defense(torch, BETA2)
        attack = peer.EOTPGD(model, eps=epsilon, alpha=2.5 * epsilon / STEPS, steps=STEPS, eot_iter=DRAWS)

    def run() -> float:
        moved = attack(x, y)
        with torch.no_grad():
            return float((model(moved).argmax(1) == y).float().mean())

    return run


def make_call(library: str, case: str) -> Callable[[], float]:
    """A library's attack."""
    return jax_call(case) if library == "rbf_jax" else torch_call(case)


def main() -> None:
    """Measures and writes ``results/benchmarks/suites.json``."""
    figures: dict[str, Any] = {
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "torchattacks")}
    }
    for case, (count, _, rounds) in CASES.items():
        turns = taking_turns(make_call, LIBRARIES, case, rounds=rounds, settle=False)
        ours, theirs = (turns.seconds[library] for library in LIBRARIES)
        ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
        figures[case] = {
            "images": count,
            "left, %": {library: round(100 * turns.returned[library], 1) for library in LIBRARIES},
            "seconds": {library: round(statistics.median(values), 1) for library, values in turns.seconds.items()},
            "times faster": round(statistics.median(ratios), 2),
            "range": [round(min(ratios), 2), round(max(ratios), 2)],
        }
    write("suites", figures)


if __name__ == "__main__":
    main()
