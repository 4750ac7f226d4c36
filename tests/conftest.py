"""Strict JAX, programs that are quickly compiled and given back, and the inputs that many tests share."""

import importlib.metadata
import os
import zlib
from collections import defaultdict

import hypothesis
import jax
import numpy as np
import pytest
from helpers import random_filters

from rbf_jax import process
from rbf_jax.data import load_embedded
from rbf_jax.rbf import RBFFilters

# Not `jax_numpy_rank_promotion="raise"`: the library broadcasts (..., P, 1) against (K,) on purpose.
jax.config.update("jax_numpy_dtype_promotion", "strict")

hypothesis.settings.register_profile("rbf_jax", deadline=None, derandomize=True, database=None, max_examples=40)
hypothesis.settings.load_profile("rbf_jax")

QUICKLY = (
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
)


def pytest_configure(config):
    """Compiling takes most of the time: it is done quickly, but as users do where all tests are run."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    if config.option.markexpr == "not full" and importlib.metadata.version("jaxlib") in process.TRIED_JAXLIB:
        os.environ["XLA_FLAGS"] = " ".join(dict.fromkeys([*flags, *QUICKLY]))


@pytest.hookimpl(tryfirst=True)  # before those that are marked are left out
def pytest_collection_modifyitems(items):
    """Of a test of the attacks with more than six cases, each a program of its own, a third stays a default one."""
    cases = defaultdict(list)
    for item in items:
        # What is refused is not compiled.
        if item.path.parent.name == "attacks" and "test_bad" not in item.name:
            cases[item.nodeid.split("[")[0]].append(item)
    for of_one in cases.values():
        if len(of_one) <= 6 or any(item.get_closest_marker("full") for item in of_one):
            continue  # the others say themselves which cases are default ones
        # Mixed, as every third may be all of one norm; the same ones each time.
        mixed = sorted(of_one, key=lambda item: zlib.crc32(item.nodeid.encode()))
        for item in mixed[-(-len(mixed) // 3) :]:
            item.add_marker(pytest.mark.full)


@pytest.fixture(autouse=True, scope="module")
def programs_are_given_back():
    """Each program is mapped into memory, and Linux allows a process 65,530 maps: beyond, the compiler crashes."""
    yield
    jax.clear_caches()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20200719)


@pytest.fixture
def filters(rng) -> RBFFilters:
    """Eight grey 3x3 filters, the first all black and the second all white, both of variance 1e-20."""
    return random_filters(rng, 8)


@pytest.fixture
def standard_promotion():
    """For optax, which multiplies parameters by Python numbers that JAX's strict promotion refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="session")
def digits() -> np.ndarray:
    """64 real digits, float32 (64, 28, 28, 1) in [0, 1]; read-only."""
    images = load_embedded()["test"].images[:64].astype(np.float32) / np.float32(255)
    images.flags.writeable = False
    return images
