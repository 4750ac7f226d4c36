"""The four forms of a defended model."""

import collections
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import numpy_gradients, numpy_reconstruct, quick_jit, random_filters, random_images, recover_noise
from jax.tree_util import Partial
from scipy.special import log_softmax, logsumexp

from rbf_jax.defense import Defense, defend
from rbf_jax.rbf import RBFFilters
from rbf_jax.reconstruction import sample_reconstruction

BATCH, SHAPE, CLASSES, DRAWS = 8, (9, 8, 1), 5, 3
BETA1, BETA2 = 17.33, 30.0
FORMS = Defense._fields

traces: collections.Counter[str] = collections.Counter()
jit_sample = quick_jit(sample_reconstruction, static_argnames=("noise", "scale", "draws", "constant"))


@quick_jit
def run(defense, key, images):
    """The logits of all four forms, compiled as one."""
    traces["run"] += 1
    return Defense(*(form(key, images) for form in defense))


@quick_jit
def gradients(defense, key, images, cotangent):
    """Of ``sum(cotangent * logits)``, for all four forms."""
    return Defense(*(jax.grad(lambda x, form=form: jnp.vdot(cotangent, form(key, x)))(images) for form in defense))


def classify(weights, key, images):
    """Logits that are quadratic in the image, so that the gradient depends on where it is taken."""
    del key
    return jnp.square(images.reshape(len(images), -1) @ weights)


def numpy_classify(weights, images):
    return (np.asarray(images, np.float64).reshape(*images.shape[:-3], -1) @ np.asarray(weights, np.float64)) ** 2


def classify_with_noise(weights, keys, images):
    """A randomised classifier, one key for each example."""
    noise = jax.vmap(lambda key: jax.random.normal(key, (CLASSES,)))(keys)
    return classify(weights, keys, images) + noise


@pytest.fixture
def filters(rng) -> RBFFilters:
    return random_filters(rng, 6)


@pytest.fixture
def weights(rng) -> jax.Array:
    return jnp.asarray(rng.normal(0, 0.3, (math.prod(SHAPE), CLASSES)), jnp.float32)


@pytest.fixture
def images(rng) -> np.ndarray:
    return random_images(rng, (BATCH, *SHAPE))


def keys_from(seed, kind):
    return jax.random.key(seed) if kind == "single" else jax.random.split(jax.random.key(seed), BATCH)


def noise_keys(key):
    """The half of each key that the front end takes."""
    return jax.vmap(jax.random.split)(key)[:, 0] if key.shape else jax.random.split(key)[0]


def defended(filters, logits_fn, **options):
    return defend(filters, logits_fn, **({"beta1": BETA1, "beta2": BETA2, "draws": DRAWS} | options))


# ----------------------------------------------------------------------------------------------------------- forward


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("single", {}),
        ("each", {}),
        ("single", {"noise": "per_patch", "scale": "sigma", "constant": "eq9", "beta2": 3.0}),
    ],
    ids=["released-single", "released-each", "per_patch-sigma-eq9"],
)
def test_the_forms_are_those_of_their_reconstructions(filters, weights, images, options, kind):
    key = keys_from(1, kind)
    got = run(defended(filters, Partial(classify, weights), **options), key, images)

    sampling = {"beta2": BETA2} | options
    static = numpy_reconstruct(filters, images, BETA1, constant=sampling.get("constant", "none"))
    one = jit_sample(noise_keys(key), filters, images, BETA1, **sampling)
    several = jit_sample(noise_keys(key), filters, images, BETA1, **sampling, draws=DRAWS)
    np.testing.assert_allclose(got.static, numpy_classify(weights, static), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got.draw, numpy_classify(weights, one), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got.bpda, got.draw, rtol=1e-4, atol=1e-4)
    assert np.abs(got.draw - got.static).max(-1).min() > 0.01

    log_softmaxes = log_softmax(numpy_classify(weights, several), -1)
    assert np.ptp(log_softmaxes, 0).max() > 0.1  # the draws differ
    np.testing.assert_allclose(got.predict, np.log(np.exp(log_softmaxes).mean(0)), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.exp(got.predict).sum(-1), 1, rtol=0, atol=1e-5)


def test_predictions_of_a_confident_classifier_do_not_underflow(filters, weights, images):
    got = run(defended(filters, Partial(classify, 30 * weights)), jax.random.key(1), images).predict
    several = jit_sample(noise_keys(jax.random.key(1)), filters, images, BETA1, BETA2, draws=DRAWS)
    log_softmaxes = log_softmax(numpy_classify(30 * weights, several), -1)
    expected = np.asarray(logsumexp(log_softmaxes, 0)) - math.log(DRAWS)
    assert expected.min() < -200  # exp() of it is 0 in float32
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-2)


def test_draws_are_averaged_in_float32(filters, weights, images):
    """Of logits in half precision, which near one another round to ties."""

    def halved(weights, key, images):
        return classify(weights, key, images).astype(jnp.bfloat16)

    key = jax.random.key(1)
    got = run(defended(filters, Partial(halved, weights)), key, images).predict
    several = jit_sample(noise_keys(key), filters, images, BETA1, BETA2, draws=DRAWS)
    logits = np.stack([np.asarray(quick_jit(halved)(weights, None, draw), np.float64) for draw in several])
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, np.log(np.exp(log_softmax(logits, -1)).mean(0)), atol=0.02)
    assert np.abs(np.asarray(got.astype(jnp.bfloat16), np.float32) - got).max() > 1e-3


def test_without_noise_all_forms_are_static(filters, weights, images):
    got = run(defended(filters, Partial(classify, weights), beta2=0.0), jax.random.key(1), images)
    np.testing.assert_allclose(got.draw, got.static, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got.bpda, got.static, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got.predict, log_softmax(got.static, -1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["single", "each"])
def test_prediction_hands_the_classifier_all_draws_at_once_under_keys_of_their_own(filters, images, kind):
    @quick_jit
    def handed_to_the_classifier(filters, key, images):
        seen = []

        def recorder(keys, images):
            seen.append((keys, images))
            return jnp.zeros((len(images), CLASSES))

        defense = defended(filters, recorder)
        for form in (defense.predict, defense.draw, defense.bpda):
            form(key, images)
        return seen

    key = keys_from(2, kind)
    (keys, handed), (draw_keys, _), (bpda_keys, _) = handed_to_the_classifier(filters, key, images)
    several = jit_sample(noise_keys(key), filters, images, BETA1, BETA2, draws=DRAWS)
    np.testing.assert_allclose(handed, several.reshape(-1, *SHAPE), rtol=0, atol=1e-5)
    assert keys.shape == (DRAWS * BATCH,)
    # No key serves twice: neither for two images nor for the front end and the classifier.
    for model_keys in (keys, draw_keys, bpda_keys):
        taken = np.concatenate([jax.random.key_data(k).reshape(-1, 2) for k in (model_keys, noise_keys(key), key)])
        assert len(np.unique(taken, axis=0)) == len(taken)


def test_one_key_is_one_run_for_the_whole_batch(filters, weights, images):
    twins = np.repeat(images[:1], BATCH, 0)
    defense = defended(filters, Partial(classify, weights))
    for kind, shared in (("single", True), ("each", False)):
        got = run(defense, keys_from(3, kind), twins)
        for form in ("draw", "bpda", "predict"):
            spread = np.ptp(getattr(got, form), 0).max()
            assert (spread < 1e-4) if shared else (spread > 0.1), (kind, form)


@pytest.mark.parametrize("form", FORMS)
def test_with_a_key_each_an_example_does_not_depend_on_the_batch_around_it(filters, weights, images, form):
    """Noise and randomised classifier move with their example: in another order, among others, alone."""
    defense = defended(filters, Partial(classify_with_noise, weights))
    keys, others = keys_from(4, "each"), keys_from(5, "each")
    whole = np.asarray(getattr(run(defense, keys, images), form))

    order = np.asarray([5, 2, 7, 0, 1, 6, 4, 3])
    moved = getattr(run(defense, keys[order], images[order]), form)
    np.testing.assert_allclose(moved, whole[order], rtol=0, atol=1e-4)

    other_images = images[::-1].copy()
    other_images[2] = images[2]
    among_others = getattr(run(defense, others.at[2].set(keys[2]), other_images), form)
    np.testing.assert_allclose(among_others[2], whole[2], rtol=0, atol=1e-4)
    assert np.abs(np.delete(among_others - whole, 2, 0)).max(-1).min() > 0.01

    alone = getattr(run(defense, keys[2:3], images[2:3]), form)
    np.testing.assert_allclose(alone[0], whole[2], rtol=0, atol=1e-4)


# --------------------------------------------------------------------------------------------------------- gradients


def test_gradients_of_the_forms_are_those_of_float64(rng, weights):
    """All three take the classifier's slope at their own image; only `draw` stops at the clip."""
    filters = RBFFilters(
        jnp.asarray(rng.uniform(0.35, 0.65, (5, 3, 3, 1)), jnp.float32),
        jnp.asarray(rng.uniform(0.02, 0.08, 5), jnp.float32),
    )
    images = rng.uniform(0.2, 0.8, (BATCH, *SHAPE)).astype(np.float32)
    upstream = rng.normal(size=(BATCH, CLASSES)).astype(np.float32)
    key = jax.random.key(6)
    got = gradients(defended(filters, Partial(classify, weights), beta2=40.0), key, images, upstream)

    # The noise behind the key, found where nothing is clipped.
    unclipped = jit_sample(noise_keys(key), filters, images, BETA1, 1.0)
    noise = 40 * recover_noise(filters, images, BETA1, unclipped[None])[0]
    values = np.asarray(filters.means, np.float64).reshape(5, 9) + noise
    noisy = numpy_reconstruct(filters, images, BETA1, values=values)
    inside = (noisy > 0) & (noisy < 1)
    assert 0.2 < inside.mean() < 0.9

    def slope(at):
        """d sum(upstream * logits) / d rebuilt image."""
        w = np.asarray(weights, np.float64)
        return ((2 * at.reshape(BATCH, -1) @ w * upstream) @ w.T).reshape(images.shape)

    static, clipped = numpy_reconstruct(filters, images, BETA1), np.clip(noisy, 0, 1)
    expected = {
        "static": numpy_gradients(filters, images, BETA1, slope(static)),
        "bpda": numpy_gradients(filters, images, BETA1, slope(clipped)),
        "draw": numpy_gradients(filters, images, BETA1, slope(clipped) * inside, values=values),
    }
    for form, (wanted, scales) in expected.items():
        error = np.abs(getattr(got, form) - wanted.images).max()
        assert error < 2e-3 * scales.images, form
    assert np.abs(got.draw - got.bpda).max() > 0.1 * expected["draw"][1].images
    assert np.isfinite(got.predict).all()
    assert np.abs(got.predict).max() > 0


# ----------------------------------------------------------------------------------------------------- under jit, vmap


def test_new_weights_filters_and_betas_are_not_traced_again(filters, weights, images):
    key = jax.random.key(0)
    first = run(defended(filters, Partial(classify, weights)), key, images)
    before = traces["run"]
    changes = {
        "weights": lambda: defended(filters, Partial(classify, 2 * weights)),
        "filters": lambda: defended(RBFFilters(filters.means / 2, filters.variances), Partial(classify, weights)),
        "beta1": lambda: defended(filters, Partial(classify, weights), beta1=86.64),
        "beta2": lambda: defended(filters, Partial(classify, weights), beta2=jnp.float32(1.75)),
        "kinds": lambda: defended(filters, Partial(classify, weights), beta1=np.float64(25), beta2=1),
    }
    for name, change in changes.items():
        got = run(change(), key, images)
        assert traces["run"] == before, name
        assert np.abs(got.predict - first.predict).max() > 1e-3, name  # it did reach the result


def test_a_plain_function_is_taken_and_crosses_jit(filters, weights, images):
    def classifier(key, images):
        return classify(weights, key, images)

    key = jax.random.key(1)
    got = run(defended(filters, classifier), key, images)
    before = traces["run"]
    run(defended(filters, classifier, beta2=1.0), key, images)
    assert traces["run"] == before
    wanted = run(defended(filters, Partial(classify, weights)), key, images)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, wanted)


@pytest.mark.parametrize("form", FORMS)
def test_a_defense_may_be_closed_over_made_and_mapped_under_jit(filters, weights, images, form):
    defense = defended(filters, Partial(classify, weights))
    shape = (BATCH, CLASSES)
    closed = jax.jit(lambda key, images: getattr(defense, form)(key, images))
    assert closed.eval_shape(jax.random.key(0), images).shape == shape

    def made_inside(filters, weights, beta1, beta2, key, images):
        made = defended(filters, Partial(classify, weights), beta1=beta1, beta2=beta2)
        return getattr(made, form)(key, images)

    assert jax.jit(made_inside).eval_shape(filters, weights, 17.33, 1.75, jax.random.key(0), images).shape == shape
    over_keys = jax.vmap(lambda key: getattr(defense, form)(key, images))
    assert jax.eval_shape(over_keys, jax.random.split(jax.random.key(0), 3)).shape == (3, *shape)


# --------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta1": 0.0}, "beta1 must be positive and finite in float32, got 0.0"),
        ({"beta1": 101.0}, r"beta1 must be at most 100\.0 .*, got 101\.0"),
        ({"beta1": math.nan}, "beta1 must be positive and finite in float32, got nan"),
        ({"beta2": -1.75}, "beta2 must be at least 0 and finite, got -1.75"),
        ({"beta2": math.inf}, "beta2 must be at least 0 and finite, got inf"),
        ({"draws": 0}, "draws must be a whole number of at least 1, got 0"),
        ({"draws": None}, "draws must be a whole number of at least 1, got None"),
        ({"draws": 10.0}, r"draws must be a whole number of at least 1, got 10\.0"),
        ({"noise": "per_image"}, "noise must be one of 'per_run', 'per_patch', got 'per_image'"),
        ({"scale": "std"}, "scale must be one of 'variance', 'sigma', 'sqrt_sigma', got 'std'"),
        ({"constant": "eq3"}, "constant must be one of 'none', 'eq9', 'eq2', got 'eq3'"),
    ],
)
def test_bad_options_are_refused(filters, options, message):
    with pytest.raises(ValueError, match=message):
        defended(filters, classify, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f._replace(means=2 * f.means), r"filter means must lie in \[0, 1\].* to 2\.0"),
        (lambda f: f._replace(variances=f.variances[1:]), r"filter variances must have shape \(6,\), got \(5,\)"),
        (lambda f: f._replace(variances=-f.variances), "filter variances must be finite and at least 0"),
    ],
)
def test_bad_filters_are_refused(filters, change, message):
    with pytest.raises(ValueError, match=message):
        defended(change(filters), classify)


@pytest.mark.parametrize("form", FORMS)
def test_bad_images_are_refused_when_a_form_is_called(filters, weights, images, form):
    call = getattr(defended(filters, Partial(classify, weights)), form)
    for bad, message in [
        (images * 255, r"images must lie in \[0, 1\].* to 255\.0"),
        ((images * 255).astype(np.uint8), "images must be float32 .*, got uint8"),
        (np.repeat(images, 3, -1), "filters of 1 channels do not fit images of 3"),
    ]:
        with pytest.raises(ValueError, match=message):
            call(jax.random.key(0), bad)


@pytest.mark.parametrize("form", ["draw", "bpda", "predict"])
@pytest.mark.parametrize(
    ("key", "message"),
    [
        (np.zeros(2, np.uint32), "key must be a typed key from jax.random.key, got uint32"),
        (0, "key must be a typed key from jax.random.key, got int"),
        (
            jax.random.split(jax.random.key(0), BATCH - 1),
            rf"one for each of {BATCH} images, got shape \({BATCH - 1},\)",
        ),
    ],
    ids=["old", "seed", "too-few"],
)
def test_bad_keys_are_refused(filters, weights, images, form, key, message):
    with pytest.raises(ValueError, match=message):
        getattr(defended(filters, Partial(classify, weights)), form)(key, images)


def test_what_is_no_logits_is_refused(filters, images):
    """The softmax would be taken over the batch."""
    defense = defended(filters, lambda key, images: images.mean((1, 2, 3)))
    with pytest.raises(ValueError, match=r"a model must return logits \(\d+, classes\) .*got shape \(\d+,\)"):
        defense.predict(jax.random.key(0), images)
