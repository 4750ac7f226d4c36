"""The real data sets and the authors' released filters: EM's results, figures known from elsewhere, and whole runs.

Needs the data sets, prepared in their default folder or as raw files (in the folder RBF_JAX_RAW), and for comparisons
the folder with the authors' filters (RBF_JAX_REFERENCE). Skips what is not there.
"""

import json
import math
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import run_experiment

from benchmarks.em import FLOORS, RULES, quality, random_patches
from rbf_jax import data, em, extract_patches, mixing_weights, rbf
from rbf_jax.bounds import best_filter_is_certain
from rbf_jax.reconstruction import sample_std

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    raw = os.environ.get("RBF_JAX_RAW")
    if raw is None:
        if not all(data.is_prepared(name) for name in RULES):
            pytest.skip("no data: set RBF_JAX_RAW to a folder with the official raw files, or run `make data`")
        return None
    folder = tmp_path_factory.mktemp("data")
    for name in RULES:
        data.prepare(name, raw, folder)
    return folder


def released(name: str) -> rbf.RBFFilters:
    reference = os.environ.get("RBF_JAX_REFERENCE")
    if reference is None:
        pytest.skip("no released filters: set RBF_JAX_REFERENCE to the folder that holds rbf_filters_*.npz")
    return rbf.load(Path(reference) / f"rbf_filters_{name}.npz")


@pytest.mark.parametrize(("name", "least", "most"), [("mnist", 20, 30), ("cifar10", 200, 260)])
def test_em_on_the_full_set(data_dir, name, least, most):
    theirs = released(name)
    images = jnp.asarray(data.as_float(data.load(name, "train", data_dir).images))
    filters, _ = em.fit(images, config=RULES[name], progress=False)
    assert least <= len(filters.variances) <= most
    patches = random_patches(data.load(name, "test", data_dir).images)
    ours, authors = (quality(f, patches, FLOORS[name]) for f in (filters, theirs))
    assert ours.score_not_black > authors.score_not_black - 0.10
    assert ours.squared_distance < 1.05 * authors.squared_distance


@pytest.fixture(scope="module")
def mnist_patches(data_dir):
    """Patches of the first 300 test images that are not exactly black."""
    images = data.as_float(data.load("mnist", "test[:300]", data_dir).images)
    patches = np.asarray(extract_patches(jnp.asarray(images))).reshape(-1, 9)
    black = (patches == 0).all(-1)
    assert black.mean() == pytest.approx(0.63, abs=0.03)
    return patches[~black]


@pytest.mark.parametrize(("constant", "error"), [("none", 0.101), ("eq9", 0.121), ("eq2", 0.149)])
def test_the_normalisers_cost_what_was_measured(mnist_patches, constant, error):
    filters = released("mnist")
    weights = np.asarray(mixing_weights(filters, mnist_patches, 25 * math.log(2), constant=constant))
    rebuilt = weights @ np.asarray(filters.flat_means)
    assert np.abs(rebuilt - mnist_patches).mean() == pytest.approx(error, abs=0.005)


@pytest.mark.parametrize(("epsilon", "share"), [(0.031, 0.57), (0.3, 0.0)])
def test_what_claim_1_is_worth(mnist_patches, epsilon, share):
    certain = best_filter_is_certain(released("mnist"), mnist_patches, epsilon, math.inf, rule="cauchy")
    assert np.asarray(certain).mean() == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize(("scale", "median"), [("variance", 0.43), ("sigma", 0.86), ("sqrt_sigma", 0.93)])
def test_noise_of_the_three_rules(scale, median):
    assert np.median(sample_std(released("mnist"), 1.75, scale)) == pytest.approx(median, abs=0.005)


@pytest.mark.parametrize(("name", "paper"), [("mnist", 78.3), ("cifar10", 63.1)])
def test_the_smoke_profile_ends_with_the_papers_numbers_beside_ours(data_dir, tmp_path, name, paper):
    folders = [f"--workdir={tmp_path}", *([f"--data_dir={data_dir}"] if data_dir else [])]
    result = run_experiment("reproduce", f"{name}.py:smoke", *folders)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "report.html").is_file()
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    papers = {(row["model"], row["attack"], row["scored_on"]): row["paper"] for row in rows}
    assert papers["rcnn", "pgd", "predict"] == paper
    assert {("cnn", "pgd", "static"), ("rcnn", "fgsm", "predict"), ("rcnn", "bpda_eot", "predict")} <= papers.keys()
    assert f"| {paper} (" in (tmp_path / "README.md").read_text()
