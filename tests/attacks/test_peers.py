"""Peers on the same model: the same where they are right; where they are wrong, what is wrong, and that ours is not."""

import importlib
import sys
import warnings
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attack_helpers import KEY, grey, linear, mixed, mlp, numpy_distance, own_labels
from helpers import float64

from rbf_jax import attacks

SHAPE = (6, 6, 1)
MODEL, IMAGES = mlp(2, SHAPE), grey(2, 6, SHAPE)
LABELS = own_labels(MODEL, IMAGES)


def foolbox_images(make, model, images, labels, epsilon) -> np.ndarray:
    """Of a foolbox attack, run eagerly on the JAX model; skips where foolbox is not installed."""
    pytest.importorskip("foolbox", reason="foolbox is not installed")
    with warnings.catch_warnings(), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        warnings.simplefilter("ignore")
        foolbox: Any = importlib.import_module("foolbox")
        wrapped = foolbox.models.JAXModel(lambda x: model(KEY, x), bounds=(0, 1))
        return np.asarray(make(foolbox.attacks)(wrapped, images, labels, epsilons=epsilon)[1])


CASES = {
    "FGSM": (
        attacks.fgsm(attacks.Linf, epsilon=0.05),
        lambda fb: fb.LinfFastGradientAttack(random_start=False),
    ),
    "FGSM l2": (
        attacks.fgsm(attacks.L2, epsilon=0.05),
        lambda fb: fb.L2FastGradientAttack(random_start=False),
    ),
    "PGD linf": (
        attacks.pgd(attacks.Linf, epsilon=0.05, steps=8, step_size=0.01, random_start=False),
        lambda fb: fb.LinfProjectedGradientDescentAttack(abs_stepsize=0.01, steps=8, random_start=False),
    ),
    "PGD l2": (
        attacks.pgd(attacks.L2, epsilon=0.05, steps=8, step_size=0.01, random_start=False),
        lambda fb: fb.L2ProjectedGradientDescentAttack(abs_stepsize=0.01, steps=8, random_start=False),
    ),
}


@pytest.mark.parametrize(("ours", "theirs"), CASES.values(), ids=CASES)
def test_foolbox_ends_at_the_same_images(ours, theirs):
    """The loss rises at every step here, so that our best iterate is their last one."""
    expected = foolbox_images(theirs, MODEL, IMAGES, LABELS, 0.05)
    found = np.asarray(jax.jit(ours)(KEY, MODEL, IMAGES, LABELS).images)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(found - IMAGES).max() > 0.004


def test_foolbox_sparse_l1_leaves_its_ball():
    """Its simplex projection is off by one, before the clip to the box; ours stays inside."""
    rng = np.random.default_rng(0)
    delta = np.zeros((1, 36), np.float32)
    delta[0, :12] = rng.normal(size=12)
    pytest.importorskip("foolbox", reason="foolbox is not installed")
    eagerpy: Any = importlib.import_module("eagerpy")
    sparse: Any = importlib.import_module("foolbox.attacks.sparse_l1_descent_attack")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        project = sparse.SparseL1DescentAttack(steps=1).project
        start = eagerpy.astensor(jnp.zeros((1, 36)))
        theirs = float64(project(eagerpy.astensor(jnp.asarray(delta)) * 0.9, start, 1.0).raw)
    ours = float64(attacks.L1.project(delta * np.float32(0.9), np.ones(1, np.float32)))
    assert np.abs(ours).sum() <= 1 + 1e-6
    assert np.abs(theirs).sum() > 1.005


def torch_of(matrix, bias) -> tuple[Any, Any]:
    """A linear model on ``(B, 1, H, W)`` in PyTorch; skips where torch or torchattacks are not installed."""
    torch: Any = pytest.importorskip("torch", reason="torch is not installed")
    peer: Any = pytest.importorskip("torchattacks", reason="torchattacks is not installed")
    layer = torch.nn.Linear(*matrix.shape)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(matrix.T.astype(np.float32)))
        layer.bias.copy_(torch.from_numpy(np.asarray(bias, np.float32)))
    return peer, torch.nn.Sequential(torch.nn.Flatten(), layer).eval()


def nchw(images) -> Any:
    torch: Any = importlib.import_module("torch")
    return torch.from_numpy(np.array(images).transpose(0, 3, 1, 2).copy())


def classes(labels) -> Any:
    torch: Any = importlib.import_module("torch")
    return torch.from_numpy(np.array(labels, np.int64))


def weights() -> tuple[np.ndarray, np.ndarray]:
    matrix = np.random.default_rng(1).normal(size=(36, 3))
    return matrix, -0.5 * matrix.sum(0)


def test_torchattacks_pgd_is_the_same():
    matrix, bias = weights()
    peer, model = torch_of(matrix, bias)
    images, ours = grey(0, 5, SHAPE), linear(matrix, bias)
    labels = own_labels(ours, images)
    attack = peer.PGD(model, eps=0.05, alpha=0.01, steps=8, random_start=False)
    expected = attack(nchw(images), classes(labels)).numpy().transpose(0, 2, 3, 1)
    found = jax.jit(attacks.pgd(attacks.Linf, epsilon=0.05, steps=8, step_size=0.01, random_start=False))(
        KEY, ours, images, labels
    ).images
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_torchattacks_cw_never_moves_black_and_white_pixels():
    """Its map to tanh space is infinite there, and all of MNIST's background is; ours moves them, and not far."""
    matrix, bias = weights()
    peer, model = torch_of(matrix, bias)
    images, ours = jnp.round(mixed(0, 5, SHAPE)), linear(matrix, bias)
    labels = own_labels(ours, images)
    theirs = peer.CW(model, c=10, kappa=0, steps=100, lr=0.05)(nchw(images), classes(labels))
    np.testing.assert_allclose(theirs.numpy().transpose(0, 2, 3, 1), images, atol=1e-6)
    found = jax.jit(attacks.cw_l2(steps=200, searches=6))(KEY, ours, images, labels)
    assert np.all(found.success)


def adversarial_library() -> Any:
    pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("adv_lib", reason="adversarial-library is not installed")
    # It imports these for a logger and a distance that are not used here.
    for name in ("torchvision", "visdom"):
        sys.modules.setdefault(name, mock.MagicMock())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("adv_lib.attacks")


@pytest.mark.parametrize("name", ["linf", "l2", "l1"])
def test_adversarial_library_fab_finds_the_same_distances(name):
    matrix, bias = weights()
    torch_of(matrix, bias)
    lib, (_, model) = adversarial_library(), torch_of(matrix, bias)
    images, ours = grey(0, 5, SHAPE), linear(matrix, bias)
    labels = own_labels(ours, images)
    order = {"linf": np.inf, "l2": 2, "l1": 1}[name]
    theirs = lib.fab(model, nchw(images), classes(labels), norm=float(order), n_iter=30)
    expected = numpy_distance(theirs.numpy().transpose(0, 2, 3, 1) - float64(images), order)
    norm = {"linf": attacks.Linf, "l2": attacks.L2, "l1": attacks.L1}[name]
    found = jax.jit(attacks.fab(norm, steps=30))(KEY, ours, images, labels)
    np.testing.assert_allclose(found.distance, expected, rtol=0.01)
