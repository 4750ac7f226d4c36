"""Networks as pairs of pure functions: nothing lost between Flax and the rest of the package."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.tree_util import Partial

from rbf_jax.models import behind, from_linen, from_nnx, logits_fn

SHAPE = (6, 5, 2)


class SmallLinen(nn.Module):
    @nn.compact
    def __call__(self, images, *, train=False):
        x = nn.Conv(3, (3, 3))(images)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.8)(x)
        x = nn.Dropout(0.3, deterministic=not train)(x.reshape(len(x), -1))
        seen = self.variable("counter", "calls", lambda: jnp.zeros((), jnp.int32))
        if train:
            seen.value += 1
        return nn.Dense(4)(x)


class SmallNNX(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(2, 3, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(3, momentum=0.8, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.dense = nnx.Linear(6 * 5 * 3, 4, rngs=rngs)

    def __call__(self, images):
        x = self.norm(nnx.relu(self.conv(images)))
        return self.dense(self.dropout(x.reshape(len(x), -1)))


RNGS = {
    "one stream": lambda: nnx.Rngs(0),
    "streams by name": lambda: nnx.Rngs(params=0, dropout=1),
}


@pytest.fixture
def images():
    return jax.random.uniform(jax.random.key(5), (4, *SHAPE))


@pytest.fixture(params=RNGS.values(), ids=list(RNGS))
def module(request):
    return SmallNNX(request.param())


def plain(leaf):
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def assert_same_tree(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(plain(x), plain(y)), a, b)


def differs(a, b) -> bool:
    return any(jax.tree.leaves(jax.tree.map(lambda x, y: bool(np.any(np.asarray(x) != np.asarray(y))), a, b)))


def test_linen_apply_is_the_modules(images):
    module, classifier = SmallLinen(), from_linen(SmallLinen())
    variables = classifier.init(jax.random.key(0), SHAPE)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), images, train=False))
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(lambda leaf: leaf.shape, shapes)
    logits, state = classifier.apply(variables, images)
    np.testing.assert_array_equal(logits, module.apply(variables, images, train=False))
    assert set(state) == {"batch_stats", "counter"}
    assert_same_tree(state, {name: variables[name] for name in state})

    key = jax.random.key(3)
    logits, state = classifier.apply(variables, images, train=True, key=key)
    collections = ["batch_stats", "counter"]
    expected = module.apply(variables, images, train=True, rngs={"dropout": key}, mutable=collections)
    assert_same_tree((logits, dict(state)), (expected[0], dict(expected[1])))
    assert state["counter"]["calls"] == 1
    assert differs(state["batch_stats"], variables["batch_stats"])
    # The new state and the old parameters are variables again.
    assert classifier.apply(variables | dict(state), images, train=True, key=key)[1]["counter"]["calls"] == 2


def test_linen_that_knows_of_no_training(images):
    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4)(x.reshape(len(x), -1))

    classifier = from_linen(Plain())
    variables = classifier.init(jax.random.key(0), SHAPE)
    expected = Plain().apply(variables, images)
    for mode in ({}, {"train": True, "key": jax.random.key(1)}):
        logits, state = classifier.apply(variables, images, **mode)
        np.testing.assert_array_equal(logits, expected)
        assert state == {}


@pytest.mark.parametrize("name", ["training", "is_train", "deterministic", "use_running_average"])
def test_linen_that_is_told_of_training_by_another_name_is_refused(name):
    source = f"lambda self, x, {name}=False: x"
    module = type("Other", (nn.Module,), {"__call__": eval(source)})()
    with pytest.raises(ValueError, match=rf"Other must be called \(images\) or .*, got \(x, {name}\)"):
        from_linen(module)


def test_linen_that_hands_everything_on_is_taken(images):
    module = nn.Sequential([lambda x: x.reshape(len(x), -1), nn.Dense(4)])
    classifier = from_linen(module)
    variables = classifier.init(jax.random.key(0), SHAPE)
    np.testing.assert_array_equal(classifier.apply(variables, images)[0], module.apply(variables, images))


def test_training_without_a_key_is_refused(images, module):
    linen = from_linen(SmallLinen())
    for classifier in (linen, from_nnx(module)):
        variables = classifier.init(jax.random.key(0), SHAPE)
        with pytest.raises(ValueError, match="key must be given"):
            classifier.apply(variables, images, train=True)


def test_logits_fn_is_the_network_and_ignores_the_key(images):
    classifier = from_linen(SmallLinen())
    variables = classifier.init(jax.random.key(0), SHAPE)
    model = logits_fn(classifier, variables)
    expected = classifier.apply(variables, images)[0]
    for key in (jax.random.key(0), jax.random.split(jax.random.key(1), 4)):
        np.testing.assert_array_equal(model(key, images), expected)


def test_logits_fn_of_a_module_is_refused():
    with pytest.raises(ValueError, match=r"classifier must be a Classifier, as models\.from_linen .*, got SmallLinen"):
        logits_fn(SmallLinen(), {})  # type: ignore[arg-type]


def test_logits_fn_crosses_jit_and_new_variables_compile_nothing(images):
    classifier = from_linen(SmallLinen())
    first = classifier.init(jax.random.key(0), SHAPE)
    traces = []

    @jax.jit
    def run(model, images):
        traces.append(1)
        return model(jax.random.key(0), images)

    for scale in (1.0, 0.5, 2.0):
        variables = first | {"params": jax.tree.map(lambda leaf, scale=scale: leaf * scale, first["params"])}
        model = logits_fn(classifier, variables)
        assert isinstance(model, Partial)
        np.testing.assert_allclose(run(model, images), classifier.apply(variables, images)[0], atol=1e-5)
    assert len(traces) == 1


def test_behind_a_front_end(images):
    """The network of what the front makes of the images, in training too, and the chain rule."""
    classifier = from_linen(SmallLinen())
    whole = behind(jnp.square, classifier)
    variables, key = whole.init(jax.random.key(0), SHAPE), jax.random.key(3)
    assert_same_tree(variables, classifier.init(jax.random.key(0), SHAPE))
    assert_same_tree(whole.apply(variables, images), classifier.apply(variables, images**2))
    trained = whole.apply(variables, images, train=True, key=key)
    assert_same_tree(trained, classifier.apply(variables, images**2, train=True, key=key))

    def slope(network, images):
        return jax.grad(lambda images: jnp.sum(jnp.sin(network.apply(variables, images)[0])))(images)

    expected = 2 * images * slope(classifier, images**2)
    assert np.abs(expected).max() > 0.01
    np.testing.assert_allclose(slope(whole, images), expected, atol=1e-5)


def test_nnx_logits_are_the_modules(images, module):
    classifier = from_nnx(module)
    variables = classifier.init(jax.random.key(0), SHAPE)
    logits, state = classifier.apply(variables, images)
    module.eval()
    np.testing.assert_allclose(logits, module(images), atol=1e-6)
    assert set(variables) == {"params", "state"}
    assert_same_tree(state, {"state": variables["state"]})
    assert_same_tree(jax.jit(classifier.apply)(variables, images)[1], state)


def test_nnx_training_updates_the_batch_norm(images, module):
    classifier = from_nnx(module)
    variables = classifier.init(jax.random.key(0), SHAPE)
    _, state = classifier.apply(variables, images, train=True, key=jax.random.key(0))
    x = np.maximum(np.asarray(module.conv(images), np.float64), 0)
    mean, var = state["state"]["norm"]["mean"], state["state"]["norm"]["var"]
    np.testing.assert_allclose(mean[...], 0.2 * x.mean((0, 1, 2)), atol=1e-6)
    np.testing.assert_allclose(var[...], 0.8 + 0.2 * x.var((0, 1, 2)), atol=1e-6)
    # Nothing has happened to the module itself, nor to the variables given.
    assert np.all(module.norm.mean[...] == 0)
    assert np.all(variables["state"]["norm"]["mean"][...] == 0)
    # What was learned shows in testing.
    after = classifier.apply(variables | state, images)[0]
    assert np.abs(after - classifier.apply(variables, images)[0]).max() > 1e-3


def test_nnx_dropout_follows_the_key(images, module):
    classifier = from_nnx(module)
    variables = classifier.init(jax.random.key(0), SHAPE)
    first, again, other = (
        classifier.apply(variables, images, train=True, key=jax.random.key(seed))[0] for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3


def test_nnx_gradients_flow_to_the_parameters(images, module):
    classifier = from_nnx(module)
    variables = classifier.init(jax.random.key(0), SHAPE)

    def loss(params, train):
        logits, state = classifier.apply(variables | {"params": params}, images, train=train, key=jax.random.key(0))
        return jnp.sum(logits**2), state

    for train in (False, True):
        (value, _), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)(
            variables["params"], train
        )
        assert jax.tree.structure(gradient) == jax.tree.structure(variables["params"])
        # The kernel of the dense layer: a finite difference along the gradient itself.
        length = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(gradient)))
        assert length > 0.1
        step = jax.tree.map(lambda p, g, scale=1e-3 / length: p + scale * g, variables["params"], gradient)
        assert float(loss(step, train)[0] - value) == pytest.approx(1e-3 * float(length), rel=0.1)
