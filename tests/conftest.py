"""Strict JAX and the inputs that many tests share."""

import hypothesis
import jax
import numpy as np
import pytest
from helpers import random_filters

from rbf_jax.data import load_embedded
from rbf_jax.rbf import RBFFilters

# Not `jax_numpy_rank_promotion="raise"`: the library broadcasts (..., P, 1) against (K,) on purpose.
jax.config.update("jax_numpy_dtype_promotion", "strict")

hypothesis.settings.register_profile("rbf_jax", deadline=None, derandomize=True, database=None, max_examples=40)
hypothesis.settings.load_profile("rbf_jax")


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
