"""The two networks: sizes counted by hand, and what training changes in their behaviour."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from rbf_jax.models import CNN, VGG16, from_linen, vgg


def shapes_of(module, shape):
    return jax.eval_shape(lambda: from_linen(module).init(jax.random.key(0), shape))


def count(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def cnn_size(side: int, channels: int, classes: int) -> int:
    convolutions = [9 * c_in * c_out + c_out for c_in, c_out in ((channels, 32), (32, 32), (32, 64), (64, 64))]
    flat = (side // 2 // 2) ** 2 * 64
    dense = [n_in * n_out + n_out for n_in, n_out in ((flat, 200), (200, 200), (200, classes))]
    return sum(convolutions) + sum(dense)


@pytest.mark.parametrize(("side", "channels", "classes"), [(28, 1, 10), (29, 3, 7)], ids=["MNIST", "other"])
def test_cnn_has_the_parameters_of_its_layers(side, channels, classes):
    variables = shapes_of(CNN(classes=classes), (side, side, channels))
    assert set(variables) == {"params"}
    assert count(variables) == cnn_size(side, channels, classes)


def test_cnn_for_mnist_has_734602_parameters():
    # 320 + 9,248 + 18,496 + 36,928 for the convolutions, 627,400 + 40,200 + 2,010 for the dense layers.
    assert count(shapes_of(CNN(), (28, 28, 1))) == 320 + 9248 + 18496 + 36928 + 627400 + 40200 + 2010 == 734602


@pytest.mark.parametrize(("side", "classes"), [(32, 10), (64, 5)], ids=["CIFAR-10", "other"])
def test_vgg16_has_the_parameters_of_its_layers(side, classes):
    widths = [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    assert len(widths) == 13
    convolutions = [9 * c_in * c_out + c_out for c_in, c_out in zip([3, *widths], widths, strict=False)]
    norms = [2 * width for width in [*widths, 512]]
    flat = (side // 2**5) ** 2 * 512
    dense = [flat * 512 + 512, 512 * classes + classes]
    variables = shapes_of(VGG16(classes=classes), (side, side, 3))
    assert set(variables) == {"params", "batch_stats"}
    assert count(variables["params"]) == sum(convolutions) + sum(norms) + sum(dense)
    assert count(variables["batch_stats"]) == sum(norms)


NETWORKS = {"CNN": (CNN, (28, 28, 1)), "VGG16": (VGG16, (32, 32, 3))}
networks = pytest.mark.parametrize(("network", "shape"), NETWORKS.values(), ids=NETWORKS.keys())


@networks
@pytest.mark.parametrize("train", [False, True], ids=["test", "train"])
def test_logits_have_one_row_for_each_image(network, shape, train):
    classifier = from_linen(network(classes=7))
    variables = shapes_of(network(classes=7), shape)
    logits, state = jax.eval_shape(
        lambda variables, images, key: classifier.apply(variables, images, train=train, key=key),
        variables,
        jax.ShapeDtypeStruct((5, *shape), jnp.float32),
        jax.random.key(0),
    )
    assert logits == jax.ShapeDtypeStruct((5, 7), jnp.float32)
    expected = {name: value for name, value in variables.items() if name != "params"}
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), expected
    )


def start(rng, name, leaf):
    """Kernels of He's scale, biases that are not 0, and the rest at 1 (running means at 0)."""
    if name == "kernel":
        return jnp.asarray(rng.normal(0, math.sqrt(2 / math.prod(leaf.shape[:-1])), leaf.shape), jnp.float32)
    if name == "bias":
        return jnp.asarray(rng.normal(0, 0.1, leaf.shape), jnp.float32)
    return jnp.full(leaf.shape, 0.0 if name == "mean" else 1.0)


class Runs:
    """A network initialised, and its training and testing forms compiled, for all tests below."""

    def __init__(self, network, shape):
        self.classifier = from_linen(network)
        # The modules' own initialisers take longer to compile than all else here.
        rng = np.random.default_rng(0)
        self.variables = jax.tree.map_with_path(
            lambda path, leaf: start(rng, path[-1].key, leaf), shapes_of(network, shape)
        )
        self.images = jax.random.uniform(jax.random.key(1), (4, *shape))
        self.test = jax.jit(lambda variables, images: self.classifier.apply(variables, images))
        self.train = jax.jit(
            lambda variables, images, key: self.classifier.apply(variables, images, train=True, key=key)
        )


def key(seed):
    """Of the generator that compiles fastest."""
    return jax.random.key(seed, impl="rbg")


@pytest.fixture(scope="module", params=["CNN", "VGG16"])
def runs(request):
    """The CNN for small images, and VGG-16 with all its layers but few channels."""
    if request.param == "CNN":
        yield Runs(CNN(), (8, 8, 1))
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vgg, "BLOCKS", tuple(tuple(width // 16 for width in block) for block in vgg.BLOCKS))
        yield Runs(VGG16(), (32, 32, 3))


def test_dropout_works_in_training_only(runs):
    plain, state = runs.test(runs.variables, runs.images)
    assert np.all(np.isfinite(plain))
    assert np.ptp(plain) > 0
    jax.tree.map(np.testing.assert_array_equal, state, {k: v for k, v in runs.variables.items() if k != "params"})
    first, again, other = (runs.train(runs.variables, runs.images, key(seed))[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3
    assert np.abs(first - plain).max() > 1e-3


def test_images_are_independent_outside_training(runs):
    whole = runs.test(runs.variables, runs.images)[0]
    swapped = runs.test(runs.variables, runs.images[::-1])[0]
    np.testing.assert_allclose(whole, swapped[::-1], atol=1e-5)
    among_others = runs.test(runs.variables, runs.images.at[1:].set(0.0))[0]
    np.testing.assert_allclose(whole[0], among_others[0], atol=1e-5)


def test_training_needs_a_key(runs):
    with pytest.raises(ValueError, match="key"):
        runs.classifier.apply(runs.variables, runs.images, train=True)


def test_cnn_dropout_is_unbiased():
    """Half of 200 units, the others doubled: over many keys the layer behind it sees what it sees in testing."""
    module = CNN()
    images = jax.random.uniform(jax.random.key(1), (1, 8, 8, 1))
    variables = Runs(module, (8, 8, 1)).variables

    def second_dense(train, key):
        _, seen = module.apply(
            variables, images, train=train, rngs={"dropout": key}, capture_intermediates=True, mutable=["intermediates"]
        )
        return seen["intermediates"]["Dense_1"]["__call__"][0]

    plain = second_dense(False, jax.random.key(0))
    drawn = np.asarray(
        jax.jit(jax.vmap(lambda key: second_dense(True, key)))(jax.random.split(jax.random.key(3), 2000))
    )
    error = drawn.std(0) / math.sqrt(2000)
    assert np.all(error > 0)
    assert np.sqrt(np.mean(((drawn.mean(0) - plain) / error) ** 2)) < 1.3


@pytest.mark.parametrize("runs", ["VGG16"], indirect=True)
def test_vgg16_keeps_running_statistics(runs):
    """The first norm sees ReLU of the first convolution; momentum 0.9."""
    state = runs.train(runs.variables, runs.images, key(0))[1]["batch_stats"]
    layer = runs.variables["params"]["Conv_0"]
    x = jax.lax.conv_general_dilated(
        runs.images, layer["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    x = np.maximum(np.asarray(x + layer["bias"], np.float64), 0)
    np.testing.assert_allclose(state["BatchNorm_0"]["mean"], 0.1 * x.mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(state["BatchNorm_0"]["var"], 0.9 + 0.1 * x.var((0, 1, 2)), atol=1e-5)
    # They are what testing uses: other statistics, other logits.
    moved = runs.test(runs.variables | {"batch_stats": state}, runs.images)[0]
    assert np.abs(moved - runs.test(runs.variables, runs.images)[0]).max() > 1e-3
    # Dropout changes none of the first norm's inputs, but all that come later.
    other = runs.train(runs.variables, runs.images, key(1))[1]["batch_stats"]
    np.testing.assert_array_equal(other["BatchNorm_0"]["mean"], state["BatchNorm_0"]["mean"])
    for name in sorted(set(state) - {"BatchNorm_0"}):
        assert np.any(np.asarray(other[name]["mean"] != state[name]["mean"])), name


def calls_of(module, shape, train):
    """The layers in the order in which they are called."""
    calls = []

    def record(next_function, args, kwargs, context):
        if context.method_name == "__call__" and context.module is not module:
            calls.append(context.module)
        return next_function(*args, **kwargs)

    def run(key):
        with nn.intercept_methods(record):
            return module.init({"params": key, "dropout": key}, jnp.zeros((2, *shape)), train=train)

    jax.eval_shape(run, jax.random.key(0))
    return [call for call in calls if type(call).__name__ in ("Conv", "BatchNorm", "Dropout", "Dense")]


def test_cnn_layers_in_order():
    calls = calls_of(CNN(), (28, 28, 1), True)
    assert [type(call).__name__ for call in calls] == ["Conv"] * 4 + ["Dense", "Dropout", "Dense", "Dense"]
    assert calls[5].rate == 0.5
    assert not calls[5].deterministic
    assert calls_of(CNN(dropout=0.1), (28, 28, 1), False)[5].rate == 0.1
    assert calls_of(CNN(), (28, 28, 1), False)[5].deterministic


@pytest.mark.parametrize("factor", [1.0, 0.5, 0.0])
def test_vgg16_layers_in_order(factor):
    calls = calls_of(VGG16(dropout=factor), (32, 32, 3), True)
    two, three = ["Conv", "BatchNorm", "Dropout", "Conv", "BatchNorm"], ["Conv", "BatchNorm", "Dropout"]
    expected = two * 2 + (three + two) * 3 + ["Dropout", "Dense", "BatchNorm", "Dropout", "Dense"]
    assert [type(call).__name__ for call in calls] == expected
    rates = [call.rate for call in calls if isinstance(call, nn.Dropout)]
    assert rates == [factor * rate for rate in (0.3, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4, 0.5, 0.5)]
    assert not any(call.deterministic for call in calls if isinstance(call, nn.Dropout))
    for call in calls_of(VGG16(), (32, 32, 3), False):
        assert not isinstance(call, nn.Dropout) or call.deterministic
