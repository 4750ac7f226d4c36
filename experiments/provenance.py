"""Where a number comes from."""

import json
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

from rbf_jax.files import read_json, replacing

ROOT = Path(__file__).resolve().parent.parent


def published_as(config: Any) -> str:
    """The name in ``results/`` of what a configuration (or a dict of it) found; the one without a profile is `gpu`'s.

    The pages quote that one, as it attacks the most images; a run on a CPU leaves it alone.
    """
    return config["set"] if config["profile"] == "gpu" else f"{config['set']}-{config['profile']}"


FINISHED = "finished"
"""The file that says of a folder that nothing more is computed there."""


def joined(said: Iterable[Any]) -> str | None:
    """What records say of one fact, each once; a record of several sittings has commas between what they say."""
    return ", ".join(sorted({one for value in said if value is not None for one in str(value).split(", ")})) or None


def provenance(*folders: Path) -> dict[str, str | int | None]:
    """Commit (``-dirty`` behind it where files differ), device, cores that it may use, and JAX version.

    A copy without git, as in a container, is told its commit by ``RBF_JAX_COMMIT``.

    Args:
        folders: where the work that begins now keeps its batches. They remember who worked there, so that a computation
            which went on after a stop names the commits, devices and JAX versions of all its sittings; one with the
            file `FINISHED` is only read.
    """
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        commit = subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = os.environ.get("RBF_JAX_COMMIT")
    now = {"commit": commit, "device": jax.devices()[0].device_kind, "jax": jax.__version__}
    sittings = [now]
    for path in (folder / "sittings.json" for folder in folders):
        before = read_json(path, "Remove it") if path.exists() else []
        done = now in before or (path.parent / FINISHED).exists()
        if not done and jax.process_index() == 0:  # one of several processes says it
            with replacing(path) as temporary:
                temporary.write_text(json.dumps([*before, now], indent=1) + "\n")
        sittings += before
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {fact: joined(sitting[fact] for sitting in sittings) for fact in now} | {"cores": cores}
