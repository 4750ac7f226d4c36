"""Process settings that make JAX on CPU about twice as fast; they must stand in the environment before Python starts.

    python -m rbf_jax.process COMMAND [ARGUMENT ...]    # runs a command with them

Entry points call `ensure`, which starts the process anew, once, where a setting is missing. What the caller has set
stays.
"""

import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path

# XLA aborts the process on a flag that it does not know, so the flag is given only to versions it was tried with.
TRIED_JAXLIB = ("0.10.2",)
ACCELERATORS = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin", "libtpu")


def uses_cpu(environment: Mapping[str, str]) -> bool:
    """Whether JAX will run on the CPU: told to, or no plugin for an accelerator is installed."""
    platforms = environment.get("JAX_PLATFORMS", "")
    if platforms:
        return platforms == "cpu"
    return all(importlib.util.find_spec(name) is None for name in ACCELERATORS)


def settings(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables to add or change.

    Args:
        environment: what is set now.

    Returns:
        New values by name; empty where nothing is missing.
    """
    wanted: dict[str, str] = {}
    if "JAX_COMPILATION_CACHE_DIR" not in environment:
        wanted["JAX_COMPILATION_CACHE_DIR"] = str(Path("~/.cache/rbf_jax/xla").expanduser())
    if not uses_cpu(environment):
        return wanted
    # XLA allocates its buffers anew at each call; in small pages, page faults cost a third of a training step.
    if sys.platform == "linux" and "glibc.malloc.hugetlb" not in environment.get("GLIBC_TUNABLES", ""):
        present = environment.get("GLIBC_TUNABLES", "")
        wanted["GLIBC_TUNABLES"] = ":".join(filter(None, (present, "glibc.malloc.hugetlb=1")))
    # No YNNPACK fusions: Eigen's convolutions have the faster gradients.
    flag = "--xla_cpu_experimental_ynn_fusion_type"
    present = environment.get("XLA_FLAGS", "")
    if importlib.metadata.version("jaxlib") in TRIED_JAXLIB and flag not in present:
        wanted["XLA_FLAGS"] = f"{present} {flag}=".strip()
    return wanted


def ensure() -> None:
    """Starts this process anew with the settings where one is missing."""
    missing = settings(os.environ)
    # The marker ends a loop on a system that drops a variable.
    if missing and "RBF_JAX_SETTINGS" not in os.environ:
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **missing, "RBF_JAX_SETTINGS": "1"})


def main(command: list[str]) -> None:
    """Becomes the command, with the settings in its environment."""
    if not command:
        sys.exit(__doc__)
    environment = {**os.environ, **settings(os.environ)}
    try:
        os.execvpe(command[0], command, environment)
    except FileNotFoundError:
        sys.exit(f"process: command not found: {command[0]}")


if __name__ == "__main__":
    main(sys.argv[1:])
