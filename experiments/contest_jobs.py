"""What the programs that set many attacks on one model share: how many images, and what of it is published."""

import json
from pathlib import Path
from typing import Any

import jax
from absl import flags

from experiments import tables
from experiments.provenance import ROOT
from rbf_jax import evaluate
from rbf_jax.files import copy_file, replacing

IMAGES = flags.DEFINE_integer(
    "images",
    None,
    "how many test images are attacked (arena: 200, drawn as for the tables; robust_net: the first 10,000)",
    lower_bound=1,
)


def publish_contest(name: str, settings: dict[str, Any], folder: Path) -> None:
    """Copies the ledgers of a folder into ``results/NAME/``, says what they are of, and makes the tables.

    Ledgers that are there already stay where they are of the same images and weights.

    Args:
        name: of the folder in ``results/``.
        settings: what all attacks have in common, and their ``kind`` of page.
        folder: with the ledgers.
    """
    if jax.process_index() > 0:
        return
    target, files = ROOT / "results" / name, sorted(folder.glob("[!.]*.npz"))
    new = dict(_contest(path) for path in files)
    for path in target.glob("ledger/*.npz"):
        suite, contest = _contest(path)
        if new.get(suite, contest) != contest or contest[0] not in [rows for rows, _ in new.values()]:
            path.unlink()
    for path in files:
        copy_file(path, target / "ledger" / path.name)
    with replacing(target / "settings.json") as temporary:
        temporary.write_text(json.dumps(settings, indent=1) + "\n")
    tables.main()


def _contest(path: Path) -> tuple[str | None, tuple[list[int], str]]:
    """A ledger's suite, where there are several; and what all of it have in common: the images and the weights."""
    outcomes = evaluate.load_outcomes(path)
    return outcomes.facts.get("suite"), (outcomes.rows.tolist(), outcomes.facts.get("weights", ""))
