"""What the entry points share: their flags, the run directory, and how they fail."""

import contextlib
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from experiments import learn, rundir, tables
from experiments.provenance import ROOT, published_as
from experiments.recipes import RECIPES
from rbf_jax import PRESETS, checks, parallel, rbf
from rbf_jax.files import as_path, copy_file, read_json

CONFIG = config_flags.DEFINE_config_file("config", None, "configuration file, :PROFILE behind it")
WORKDIR = flags.DEFINE_string("workdir", None, "run directory (default: a folder of $WORKDIR)")
DATA_DIR = flags.DEFINE_string("data_dir", os.environ.get("DATA_DIR") or None, "folder of the prepared data")
FILTERS = flags.DEFINE_string(
    "filters", os.environ.get("FILTERS") or None, "file of the authors' released filters, for rcnn_released"
)
DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "work together with other processes: all are started with the same flags and one workdir"
)
COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0; a TPU slice and Slurm say it themselves"
)
PROCESSES = flags.DEFINE_integer("processes", None, "how many processes there are; likewise")
JOIN = flags.DEFINE_integer("join_seconds", 300, "how long to wait for the others to start")
PROCESS = flags.DEFINE_integer("process", None, "which of them this is, from 0; likewise")
PUBLISH = flags.DEFINE_bool("publish", False, "also copy what was found into results/ of the checkout")


def run_directory(name: str) -> Path:
    """The folder that --workdir names, or else one of this name in $WORKDIR."""
    if WORKDIR.value:
        return as_path(WORKDIR.value)
    return as_path(os.environ.get("WORKDIR") or "~/.cache/rbf_jax/runs") / name


def open_run() -> rundir.Run:
    """The run directory that the flags name, with their configuration."""
    config = CONFIG.value
    for name in config.models:
        checks.check_choice(name, "config.models", tuple(RECIPES))
    for name, allowed in (("preset", PRESETS), ("network", learn.NETWORKS)):
        checks.check_choice(config[name], f"config.{name}", tuple(allowed))
    checks.check_choice(config.em.rules, "config.em.rules", tuple(learn.RULES))
    run = rundir.open_run(run_directory(f"{config.set}-{config.profile}"), config)
    if FILTERS.value:
        rbf.save(learn.filters_path(run, "released"), rbf.load(FILTERS.value))
    return run


def publish(run: rundir.Run, models: Sequence[str], files: Sequence[Path]) -> None:
    """Copies files of the run, and models with their recipes, into ``results/NAME/``; then makes its tables.

    Raises:
        ValueError: no ledger is among the files, and those that are there are of other weights of a model.
    """
    if jax.process_index() > 0:
        return
    directory = ROOT / "results" / published_as(run.config)
    files = [path.relative_to(run.directory) for path in files]
    measured = any(path.parent.name == "ledger" for path in files)
    for name in models:
        if not measured:
            _check_weights(run, directory, name)
        # Weights worth keeping, and small enough for a repository.
        kinds = (".npz", ".json") if run.config.set == "mnist" else (".json",)
        files = [Path("models") / f"{name}{kind}" for kind in kinds] + files
    # What a run before found, with other attacks or weights of these models, must not mix with this one.
    for folder in ("ledger", "certificates") if measured else ():
        for path in directory.glob(f"{folder}/*.npz"):
            if path.name.split("-")[0] in models and path.relative_to(directory) not in files:
                path.unlink()
    for path in directory.glob("studies/*.json") if measured else ():
        path.unlink()
    if any(path.parent.name == "figures" for path in files):
        for path in directory.glob("figures/*.png"):
            path.unlink()
    for path in files:
        copy_file(run.directory / path, directory / path)
    if (directory / "job.json").exists():
        tables.write_results(directory)


def _check_weights(run: rundir.Run, directory: Path, name: str) -> None:
    """Raises ValueError where a folder of results has ledgers of other weights of a model."""
    known, ledgers = directory / "models" / f"{name}.json", sorted(directory.glob(f"ledger/{name}-*.npz"))
    if not known.exists() or not ledgers:
        return
    weights = learn.weights_path(run, name)
    before, now = (read_json(record, "Remove it").get("sha256") for record in (known, weights.with_suffix(".json")))
    if before != now:
        raise ValueError(
            f"{directory} holds what was measured of other weights of {name} ({ledgers[0].name}): publish the whole "
            f"run, or remove these ledgers. The new weights are {weights}"
        )


def giving_back(items: Iterable[Any], every: int) -> Iterator[Any]:
    """The items, one after the other; each time so many are done, what was compiled for them is given back.

    A program is mapped into memory, and Linux allows a process 65,530 maps: beyond them the compiler crashes. A cell of
    the tables takes about 300.
    """
    for number, item in enumerate(items, 1):
        yield item
        if number % every == 0:
            jax.clear_caches()


GONE = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "Gloo", "Connection")
"""In what JAX says where a process it works with has ended."""


def _join() -> None:
    """Waits for the other processes.

    Raises:
        ValueError: which they are is neither said nor known.
    """

    def give_up() -> None:
        where = f" at {COORDINATOR.value}" if COORDINATOR.value else ""
        missing = f"not all {PROCESSES.value or ''} processes have met{where} within {JOIN.value} s".replace("  ", " ")
        print(f"\n{missing}: start every one with the same flags, or wait longer (--join_seconds)", file=sys.stderr)
        os._exit(2)

    # It would take SIGTERM for itself, which makes a training write its checkpoint, and ends everything else.
    jax.config.update("jax_enable_preemption_service", False)
    print(f"waiting up to {JOIN.value} s for the other processes", file=sys.stderr, flush=True)
    # JAX itself would end the process from within, with a dump of its stack.
    timer = threading.Timer(JOIN.value, give_up)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            COORDINATOR.value, PROCESSES.value, PROCESS.value, initialization_timeout=JOIN.value + 60
        )
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"--distributed cannot begin ({error}). Name the profile in --config, and where the processes meet: "
            "--coordinator=HOST:PORT --processes=N --process=I"
        ) from error
    finally:
        timer.cancel()


@contextlib.contextmanager
def _devices() -> Iterator[None]:
    """Splits batches over all devices there are; of several processes the first one speaks."""
    if DISTRIBUTED.value:
        _join()
    with contextlib.ExitStack() as stack:
        if jax.device_count() > 1:
            stack.enter_context(jax.set_mesh(parallel.mesh()))
        if jax.process_index() > 0:
            silence = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(silence))
            stack.enter_context(contextlib.redirect_stderr(silence))
        yield


def main(job: Callable[[], None], needs: str = "config", computes: bool = True) -> None:
    """Runs a job as a program: a failure that the user can mend is one message and exit code 2.

    Args:
        job: what is run.
        needs: a flag that must be given.
        computes: whether the job itself uses the devices; if not, it leaves their memory to the processes it starts.
    """

    def guarded(arguments: list[str]) -> None:
        if len(arguments) > 1:
            raise app.UsageError(f"unknown argument {arguments[1]!r}")
        logging.set_verbosity(logging.WARNING)  # absl shows JAX's remarks on platforms that are not there
        try:
            with _devices() if computes else contextlib.nullcontext():
                job()
        except jax.errors.JaxRuntimeError as error:
            if not DISTRIBUTED.value or not any(sign in str(error) for sign in GONE):
                raise
            reason = str(error).splitlines()[0][:200]
            print(
                f"\na process is gone ({reason}). Start all again: they go on from the last checkpoint", file=sys.stderr
            )
            os._exit(3)  # an orderly end would wait for it
        except (OSError, ValueError, FloatingPointError) as error:
            if os.environ.get("RBF_JAX_TRACEBACK"):
                traceback.print_exc()
            program = Path(sys.argv[0]).stem
            print(f"\n{program}: {error}\n(RBF_JAX_TRACEBACK=1 shows where)", file=sys.stderr)
            sys.exit(2)

    flags.mark_flag_as_required(needs)
    for flag in flags.FLAGS.get_key_flags_for_module(__name__):  # so that --help shows them
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    app.run(guarded, flags_parser=_parse)


def _parse(words: list[str]) -> list[str]:
    """The arguments that are no flags; what is wrong with one is one message and exit code 2."""
    try:
        return flags.FLAGS(words)
    except (flags.Error, AttributeError, KeyError, TypeError) as error:
        reason: Any = error
        while isinstance(reason, BaseException) and reason.args:  # ml_collections wraps one in the other
            reason = reason.args[0]
        lines = str(reason).strip().splitlines()
        said = lines[-1] if any("Traceback" in line for line in lines) else " ".join(lines)
        print(f"{Path(sys.argv[0]).stem}: {said} (--help shows the flags)", file=sys.stderr)
        sys.exit(2)
