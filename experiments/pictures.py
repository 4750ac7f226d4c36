"""The pictures of the README: the pipeline, and what the front end does to digits.

python -m experiments.pictures      # docs/pictures/*.png, from the committed filters and the embedded digits
"""

import contextlib
from pathlib import Path

import jax
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from experiments.provenance import ROOT
from rbf_jax import PRESETS, attacks, models, plots, rbf, reconstruct, sample_reconstruction, train
from rbf_jax.data import as_float, load_embedded
from rbf_jax.files import replacing

SHOWN = 8
STEPS = (
    ("image", "$x$"),
    ("3x3 patches", "$z_i$"),
    ("match with K filters", r"$w = \mathrm{softmax}(\beta_1\,\sigma(s))$"),
    ("rebuilt image", r"$\sum_j w_j z_j,\ z_j \sim \mathcal{N}(\mu_j, (\beta_2 v_j)^2)$"),
    ("CNN", "logits"),
    ("mean of m draws", "prediction"),
)


def pipeline() -> Figure:
    """Boxes from the image to the prediction."""
    figure = Figure(figsize=(12, 1.9), layout="constrained")
    axes: Axes = figure.add_subplot()
    axes.set(xlim=(-0.1, len(STEPS) * 2), ylim=(0, 1))
    axes.axis("off")
    for number, (title, formula) in enumerate(STEPS):
        left = 2 * number
        axes.add_patch(
            FancyBboxPatch((left, 0.2), 1.6, 0.6, boxstyle="round,pad=0.05", fill=False, ec="#3465a4", lw=1.5)
        )
        axes.text(left + 0.8, 0.62, title, ha="center", va="center", fontsize=11)
        axes.text(left + 0.8, 0.36, formula, ha="center", va="center", fontsize=8)
        if number:
            axes.annotate("", (left - 0.05, 0.5), (left - 0.35, 0.5), arrowprops={"arrowstyle": "->", "lw": 1.5})
    return figure


def reconstructions() -> Figure:
    """Digits, their reconstructions without and with noise, and the same under PGD."""
    folder = ROOT / "results" / "mnist"
    filters, beta1 = rbf.load(folder / "filters.npz"), PRESETS["code"].test
    variables, _ = train.load_weights(folder / "models" / "cnn.npz")
    network = models.logits_fn(models.from_linen(models.CNN()), variables)
    digits = load_embedded()["test"]
    clean, labels = as_float(digits.images[:SHOWN]), digits.labels[:SHOWN]
    attack = attacks.pgd(attacks.Linf, epsilon=0.3, steps=40)
    moved = jax.jit(attack)(jax.random.key(0), network, clean, labels).images
    rebuild, draw = jax.jit(reconstruct), jax.jit(sample_reconstruction)
    return plots.image_rows(
        {
            "clean": clean,
            "rebuilt": rebuild(filters, clean, beta1),
            "rebuilt with noise": draw(jax.random.key(1), filters, clean, beta1, 1.75),
            "PGD on a CNN": moved,
            "the same rebuilt": rebuild(filters, moved, beta1),
        }
    )


def main(folder: Path = ROOT / "docs" / "pictures") -> None:
    """Writes both."""
    for name, figure in (("pipeline", pipeline()), ("reconstructions", reconstructions())):
        with replacing(folder / f"{name}.png") as temporary, contextlib.closing(temporary.open("wb")) as file:
            file.write(plots.png(figure, dpi=100))
        print(folder / f"{name}.png")


if __name__ == "__main__":
    main()
