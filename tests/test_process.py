"""Process settings: what is added, what is left alone, and that they reach the command."""

import subprocess
import sys

import pytest

from rbf_jax import process

FLAG = "--xla_cpu_experimental_ynn_fusion_type="


@pytest.fixture(autouse=True)
def cpu_only(monkeypatch):
    monkeypatch.setattr(process, "ACCELERATORS", ())
    monkeypatch.setattr(process.importlib.metadata, "version", lambda name: process.TRIED_JAXLIB[0])
    monkeypatch.setattr(process.sys, "platform", "linux")


def test_adds_what_is_missing():
    added = process.settings({})
    assert added["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
    assert added["XLA_FLAGS"] == FLAG
    assert added["JAX_COMPILATION_CACHE_DIR"].endswith(".cache/rbf_jax/xla")


def test_keeps_what_the_caller_set():
    added = process.settings(
        {"GLIBC_TUNABLES": "glibc.malloc.check=1", "XLA_FLAGS": "--a=b", "JAX_COMPILATION_CACHE_DIR": "/x"}
    )
    assert added == {"GLIBC_TUNABLES": "glibc.malloc.check=1:glibc.malloc.hugetlb=1", "XLA_FLAGS": f"--a=b {FLAG}"}


def test_nothing_to_add_the_second_time():
    assert process.settings(process.settings({})) == {}
    assert process.settings({**process.settings({}), "XLA_FLAGS": f"{FLAG}3"}) == {}


@pytest.mark.parametrize("environment", [{"JAX_PLATFORMS": "cuda"}, {"JAX_PLATFORMS": "tpu,cpu"}])
def test_an_accelerator_gets_no_cpu_flags(environment):
    assert set(process.settings(environment)) == {"JAX_COMPILATION_CACHE_DIR"}


def test_an_installed_plugin_counts_as_accelerator(monkeypatch):
    monkeypatch.setattr(process, "ACCELERATORS", ("json",))
    assert set(process.settings({})) == {"JAX_COMPILATION_CACHE_DIR"}
    assert "XLA_FLAGS" in process.settings({"JAX_PLATFORMS": "cpu"})


def test_an_untried_jaxlib_gets_no_flag(monkeypatch):
    # XLA aborts on a flag that it does not know.
    monkeypatch.setattr(process.importlib.metadata, "version", lambda name: "99.0")
    assert "XLA_FLAGS" not in process.settings({})


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    base = {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", **environment}
    return subprocess.run([sys.executable, *command], env=base, capture_output=True, text=True, check=False)


def test_the_launcher_hands_settings_and_exit_code_on():
    code = "import os, sys; print(os.environ['JAX_COMPILATION_CACHE_DIR']); sys.exit(3)"
    result = run("-m", "rbf_jax.process", sys.executable, "-c", code)
    assert (result.stdout, result.returncode) == ("/nonexistent/.cache/rbf_jax/xla\n", 3)


def test_the_launcher_names_a_missing_command():
    result = run("-m", "rbf_jax.process", "no-such-command")
    assert result.returncode == 1
    assert "no-such-command" in result.stderr


def test_ensure_restarts_once_with_the_same_arguments():
    code = "import os, sys; from rbf_jax import process; process.ensure(); print(os.environ['RBF_JAX_SETTINGS'])"
    assert run("-c", code, "a b").stdout == "1\n"
