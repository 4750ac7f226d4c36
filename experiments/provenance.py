"""Where a number comes from."""

import os
import subprocess
from pathlib import Path
from typing import Any

import jax

ROOT = Path(__file__).resolve().parent.parent


def published_as(config: Any) -> str:
    """The name in ``results/`` of what a configuration (or a dict of it) found; the one without a profile is `gpu`'s.

    The pages quote that one, as it attacks the most images; a run on a CPU leaves it alone.
    """
    return config["set"] if config["profile"] == "gpu" else f"{config['set']}-{config['profile']}"


def provenance() -> dict[str, str | int | None]:
    """Commit (``-dirty`` behind it where files differ), device, cores that it may use, and JAX version.

    A copy without git, as in a container, is told its commit by ``RBF_JAX_COMMIT``.
    """
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        commit = subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = os.environ.get("RBF_JAX_COMMIT")
    return {
        "commit": commit,
        "device": jax.devices()[0].device_kind,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "jax": jax.__version__,
    }
