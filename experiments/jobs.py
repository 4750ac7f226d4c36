"""What the entry points share: their flags, the run directory, and how they fail."""

import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from experiments import learn, rundir, tables
from experiments.provenance import ROOT
from experiments.recipes import RECIPES
from rbf_jax import checks, rbf
from rbf_jax.files import replacing

CONFIG = config_flags.DEFINE_config_file("config", None, "configuration file, :PROFILE behind it")
WORKDIR = flags.DEFINE_string("workdir", None, "run directory (default: a folder of $WORKDIR)")
DATA_DIR = flags.DEFINE_string("data_dir", os.environ.get("DATA_DIR") or None, "folder of the prepared data")
FILTERS = flags.DEFINE_string(
    "filters", os.environ.get("FILTERS") or None, "file of the authors' released filters, for rcnn_released"
)
PUBLISH = flags.DEFINE_bool("publish", False, "also copy what was found into results/ of the checkout")


def run_directory(name: str) -> Path:
    """The folder that --workdir names, or else one of this name in $WORKDIR."""
    root = Path(os.environ.get("WORKDIR") or "~/.cache/rbf_jax/runs").expanduser()
    return Path(WORKDIR.value) if WORKDIR.value else root / name


def open_run() -> rundir.Run:
    """The run directory that the flags name, with their configuration."""
    config = CONFIG.value
    for name in config.models:
        checks.check_choice(name, "config.models", tuple(RECIPES))
    run = rundir.open_run(run_directory(f"{config.set}-{config.profile}"), config)
    if FILTERS.value:
        rbf.save(learn.filters_path(run, "released"), rbf.load(FILTERS.value))
    return run


def publish(run: rundir.Run, models: Sequence[str], files: Sequence[Path]) -> None:
    """Copies files of the run, and models with their recipes, into ``results/SET/``; then makes its tables."""
    directory = ROOT / "results" / run.config.set
    files = [path.relative_to(run.directory) for path in files]
    for name in models:
        # Weights worth keeping, and small enough for a repository.
        kinds = (".npz", ".json") if run.config.set == "mnist" else (".json",)
        files = [Path("models") / f"{name}{kind}" for kind in kinds] + files
    # What a run before found, with other attacks or weights of these models, must not mix with this one.
    for folder in ("ledger", "certificates") if any(path.parent.name == "ledger" for path in files) else ():
        for path in directory.glob(f"{folder}/*.npz"):
            if path.name.split("-")[0] in models and path.relative_to(directory) not in files:
                path.unlink()
    for path in files:
        with replacing(directory / path) as temporary:
            shutil.copyfile(run.directory / path, temporary)
    if (directory / "job.json").exists():
        tables.write_results(directory, run.config.set)


def publish_record(name: str, record: dict[str, Any], ledgers: dict[str, Path]) -> None:
    """Writes figures beside the benchmarks, where `make tables` makes their page, and ledgers by name."""
    for title, path in ledgers.items():
        with replacing(ROOT / "results" / name / "ledger" / f"{title}.npz") as temporary:
            shutil.copyfile(path, temporary)
    with replacing(ROOT / "results" / "benchmarks" / f"{name}.json") as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n")
    tables.main()


def main(job: Callable[[], None], needs: str = "config") -> None:
    """Runs a job as a program that needs a flag: a failure that the user can mend is one message and exit code 2."""

    def guarded(arguments: list[str]) -> None:
        if len(arguments) > 1:
            raise app.UsageError(f"unknown argument {arguments[1]!r}")
        logging.set_verbosity(logging.WARNING)  # absl shows JAX's remarks on platforms that are not there
        try:
            job()
        except (OSError, ValueError, FloatingPointError) as error:
            if os.environ.get("RBF_JAX_TRACEBACK"):
                traceback.print_exc()
            program = Path(sys.argv[0]).stem
            print(f"\n{program}: {error}\n(RBF_JAX_TRACEBACK=1 shows where)", file=sys.stderr)
            sys.exit(2)

    flags.mark_flag_as_required(needs)
    app.run(guarded)
