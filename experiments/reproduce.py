"""Runs the pipeline of one configuration and writes results and a report into its run directory.

    python -m experiments.reproduce --config=experiments/configs/quickstart.py:smoke [--config.train.epochs=3]

Exit code 2 with one message where data is missing or the configuration makes no sense.
"""

import os
import sys
import time
from pathlib import Path

from experiments import process

if __name__ == "__main__":
    process.ensure()

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

from experiments import pipeline
from experiments.provenance import ROOT
from experiments.report import format_table, write_report
from rbf_jax import evaluate, plots, saliency

CONFIG = config_flags.DEFINE_config_file("config", None, "configuration file, :PROFILE behind it")
WORKDIR = flags.DEFINE_string("workdir", None, "run directory (default: a folder of $WORKDIR)")
PUBLISH = flags.DEFINE_bool("publish", False, "also write the results into results/ of the checkout")
DATA_DIR = flags.DEFINE_string("data_dir", os.environ.get("DATA_DIR") or None, "folder of the prepared data")
COLUMNS = ("attack", "N", "CNN", "rCNN, no noise", "rCNN")


def table(rows: list[pipeline.Row]) -> list[dict[str, str]]:
    """One row for each attack and budget, one column for each model: accuracy in percent with its 95 % interval."""
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        name = row.attack if row.attack == "clean" else f"{row.attack}, {row.norm} {row.epsilon:g}"
        line = lines.setdefault((name, str(row.total)), {"attack": name, "N": str(row.total)})
        low, high = (100 * end for end in evaluate.wilson_interval(row.correct, row.total))
        line[row.model] = f"{100 * row.correct / row.total:.1f} ({low:.0f}-{high:.0f})"
    return [{column: line.get(column, "") for column in COLUMNS} for line in lines.values()]


def sections(config: pipeline.Config, examples: pipeline.Data, learned: pipeline.Models, crafted: dict) -> list:
    """The report's figures, each with heading, text and a description."""
    attacked = crafted["rCNN", "linf"].images
    shown = slice(0, 8)
    clean = examples.test_images[shown]
    labels = np.asarray(examples.test_labels[shown])
    maps = {
        name: np.asarray(jax.jit(saliency.loss_gradients)(jax.random.key(0), logits_fn, clean, labels))
        for name, logits_fn in (("CNN", learned.cnn), ("rCNN", learned.rcnn.static))
    }
    before, after = pipeline.distances(config, examples, learned, attacked)
    count = len(learned.filters.variances)
    return [
        (
            "The filters (Fig. 2)",
            f"The EM found {count} filters, templates of 3x3 patches. Every image is rebuilt from them.",
            plots.filters(learned.filters),
            f"{count} filter means",
        ),
        (
            "Originals and reconstructions",
            "Clean test images and images attacked on the rCNN (PGD, linf), each above its static reconstruction.",
            plots.image_rows(
                {
                    "clean": clean,
                    "rebuilt": pipeline.rebuilt(config, learned, clean),
                    "attacked": attacked[shown],
                    "attacked, rebuilt": pipeline.rebuilt(config, learned, attacked[shown]),
                }
            ),
            "rows of clean, rebuilt, attacked and rebuilt attacked images",
        ),
        (
            "What reconstruction does to distances (Fig. 3)",
            "Each point is an attacked image: its distance from the original, and the distance between the two "
            "reconstructions. Below the diagonal the front end brings them closer, above it drives them apart. "
            "Claim 1 of the paper says that it brings them closer.",
            plots.reconstruction_distances(before, after),
            "distances before and after reconstruction in three norms",
        ),
        (
            "Loss gradients (Fig. 5)",
            "Gradient of each image's loss with respect to its pixels, for the plain CNN and the rCNN without noise.",
            plots.saliency(clean, maps),
            "loss gradients of both models",
        ),
    ]


def main(arguments: list[str]) -> None:
    """Runs it all; prints the table and the report's path."""
    if len(arguments) > 1:
        raise app.UsageError(f"unknown argument {arguments[1]!r}")
    logging.set_verbosity(logging.WARNING)  # absl shows JAX's remarks on platforms that are not there
    config = CONFIG.value
    root = Path(os.environ.get("WORKDIR") or "~/.cache/rbf_jax/runs").expanduser()
    directory = Path(WORKDIR.value) if WORKDIR.value else root / config.name
    print(
        f"{config.title}: {config.train_examples} training and {config.test_examples} test images, "
        f"about {config.minutes:g} minutes on two CPU cores; results go to {directory}",
        flush=True,
    )
    began = time.perf_counter()
    try:
        examples = pipeline.load(config, DATA_DIR.value)
    except (FileNotFoundError, ValueError) as error:
        print(f"reproduce: {error}", file=sys.stderr)
        sys.exit(2)
    learned = pipeline.learn(config, examples)
    rows, crafted = pipeline.attack_all(config, examples, learned)
    seconds = time.perf_counter() - began
    lines = table(rows)
    note = (
        f"Accuracy in percent with its 95 % Wilson interval. rCNN: mean of {config.draws} noisy draws at beta2 = "
        f"{config.beta2:g}; static attacks are crafted without noise, BPDA+EoT ({config.eot.draws} draws x "
        f"{config.eot.steps} steps) with it, and all are scored under fresh noise. One training run, one restart: "
        "a first look, not an evaluation. Stronger attacks leave less."
    )
    pipeline.save(directory, config, learned, rows, note, seconds)
    if PUBLISH.value:
        pipeline.save(ROOT / "results" / config.name, config, learned, rows, note, seconds)
    report = directory / "report.html"
    write_report(
        report,
        title=config.title,
        summary=f"{note} Computed in {seconds:.0f} s on {jax.devices()[0].device_kind}.",
        table=lines,
        sections=sections(config, examples, learned, crafted),
    )
    print(f"\n{format_table(COLUMNS, lines)}\n\n{note}\n\nreport: {report}  ({time.perf_counter() - began:.0f} s)")


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main)
