"""Attacks on defences that hide their gradients: what fails, what gets through, and what the checks say."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attack_helpers import grey, linear, mixed, mlp, own_labels, predictions
from helpers import float64
from jax.tree_util import Partial
from scipy.special import log_softmax, logsumexp, softmax

from rbf_jax import attacks, evaluate
from rbf_jax.attacks.checks import differ
from rbf_jax.attacks.gradients import fold_in

KEY = jax.random.key(2)
SHAPE = (8, 8, 1)
COUNT = 40


def weights():
    return jnp.asarray(np.random.default_rng(3).normal(size=(64, 2)), jnp.float32)


def _score(matrix, images):
    """Two classes on one linear score, so that every front end below leaves the classes learnable by hand."""
    return (images.reshape(len(images), -1) - 0.5) @ matrix


def _saturated(sharpness_matrix, key, images):
    del key
    sharpness, matrix = sharpness_matrix
    return _score(matrix, jax.nn.sigmoid(sharpness * (images - 0.5)))


def saturated(sharpness):
    return Partial(_saturated, (jnp.float32(sharpness), weights()))


def _quantise(key, images):
    del key
    return jnp.round(images * 4) / 4


def _classify(matrix, key, images):
    del key
    return _score(matrix, images)


def quantised():
    front, classifier = Partial(_quantise), Partial(_classify, weights())
    return Partial(_compose, front, classifier), attacks.straight_through(front, classifier)


def _compose(front, classifier, key, images):
    return classifier(key, front(key, images))


def _noisy(matrix, key, images):
    """Noise far above the signal; the mean over many draws is sound."""
    keys = key if key.shape else jax.random.split(key, len(images))
    noise = jax.vmap(lambda key: jax.random.normal(key, images.shape[1:]))(keys)
    # The noise enters through the weights' signs: one draw's gradient points anywhere.
    flips = jnp.where(noise.reshape(len(images), -1) > 0.4, -1.0, 1.0)
    return ((images.reshape(len(images), -1) - 0.5) * flips) @ matrix


def noisy():
    return Partial(_noisy, weights())


def examples(model):
    """No pixel is near 0.5, where a steep sigmoid still has a slope."""
    rng = np.random.default_rng(0)
    images = rng.choice([0.38, 0.62], (COUNT, *SHAPE)) + rng.uniform(-0.05, 0.05, (COUNT, *SHAPE))
    return jnp.asarray(images, jnp.float32), own_labels(model, jnp.asarray(images, jnp.float32))


def left(attack, model, images, labels, judge=None):
    """Share of the examples that stay right, as the true model says."""
    result = jax.jit(attack)(KEY, model, images, labels)
    return np.mean(predictions(model if judge is None else judge, result.images) == labels)


EPSILON = 0.3


def test_saturated_front_needs_annealing():
    """The slope of the sigmoid underflows: PGD stands still. Surrogates of growing sharpness lead through."""
    model = saturated(1e4)
    images, labels = examples(model)
    plain = attacks.pgd(attacks.Linf, epsilon=EPSILON, steps=20, random_start=False)
    assert left(plain, model, images, labels) == 1
    annealed = attacks.annealed(plain, [saturated(s) for s in (1.0, 10.0)])
    assert left(annealed, model, images, labels) < 0.05
    flags = attacks.masking_checks(
        KEY, model, images, labels, norm=attacks.Linf, epsilon=EPSILON, large_epsilon=0.5, steps=5, queries=300
    )
    assert flags["zero gradients"].raised
    assert flags["gradient-free beats gradient-based"].raised
    assert flags["robust at a large epsilon"].raised
    assert not flags["randomness"].raised


def test_quantiser_needs_the_identity():
    model, opened = quantised()
    images, labels = examples(model)
    plain = attacks.pgd(attacks.Linf, epsilon=EPSILON, steps=20, random_start=False)
    assert left(plain, model, images, labels) == 1
    np.testing.assert_allclose(model(KEY, images), opened(KEY, images), atol=1e-5)
    assert left(plain, opened, images, labels, judge=model) < 0.05
    assert left(attacks.transfer(plain, opened), model, images, labels) < 0.05
    assert attacks.masking_checks(
        KEY, model, images, labels, norm=attacks.Linf, epsilon=EPSILON, large_epsilon=0.5, steps=5, queries=300
    )["zero gradients"].raised


def test_front_end_and_classifier_draw_noise_of_their_own():
    """Of the same key both would draw the same: the variance of the sum would be 4 instead of 2."""

    def noisy(key, images):
        draw = jax.random.normal
        noise = jax.vmap(lambda key: draw(key, (3,)))(key) if key.shape else draw(key, (len(images), 3))
        return images + noise.reshape(images.shape)

    model = attacks.straight_through(noisy, lambda key, images: noisy(key, images)[:, 0, :, 0])
    images = jnp.full((1000, 1, 3, 1), 0.5)
    for key in (KEY, jax.random.split(KEY, 1000)):
        assert 1.8 < float(jnp.var(model(key, images))) < 2.2


def test_noise_needs_eot():
    model = noisy()
    images, _ = examples(model)
    sound = linear(0.31 * float64(weights()), -0.5 * 0.31 * float64(weights()).sum(0))
    labels = own_labels(sound, images)
    rates = []
    for gradient in (attacks.exact, attacks.eot(60)):
        attack = attacks.pgd(
            attacks.Linf, epsilon=0.06, steps=3, random_start=False, loss=attacks.margin, gradient=gradient
        )
        result = jax.jit(attack)(KEY, model, images, labels)
        survived = evaluate.survival(
            jax.random.key(9), Partial(_mean_of, noisy()), result.images, labels, redraws=3, batch_size=COUNT
        )
        rates.append(survived.mean())
    assert rates[0] > 0.3
    assert rates[1] < 0.05
    flags = attacks.masking_checks(
        KEY, model, images, labels, norm=attacks.Linf, epsilon=0.06, large_epsilon=0.5, steps=2, queries=10
    )
    assert flags["randomness"].raised


def test_rounding_is_no_randomness():
    """Programs that add up in another order do not make a model a randomised one."""
    logits = np.random.default_rng(0).normal(size=(8, 10)).astype(np.float32)
    assert not differ(logits, logits + 1e-6)
    assert not differ(np.full_like(logits, np.nan), np.full_like(logits, np.nan))
    assert differ(logits, logits + 0.1)
    assert differ(logits, np.full_like(logits, np.nan))


def _mean_of(model, key, images):
    keys = jax.vmap(lambda key: jax.random.split(key, 200))(key).swapaxes(0, 1)
    return jnp.log(jax.lax.map(lambda keys: jax.nn.softmax(model(keys, images)), keys).mean(0))


def _lucky(share, key, images):
    """Says 0, but now and then 1, whatever the image."""
    keys = key if key.shape else jax.random.split(key, len(images))
    wrong = jax.vmap(jax.random.bernoulli, (0, None))(keys, share).astype(jnp.float32)
    return jnp.stack([1 - wrong, wrong], 1) + 0 * images.sum((1, 2, 3))[:, None]


def masking_checks(model, images, labels, steps=20, **options):
    return attacks.masking_checks(
        KEY, model, images, labels, norm=attacks.Linf, epsilon=0.1, large_epsilon=0.5, steps=steps, **options
    )


def test_checks_of_a_noisy_model_need_a_judge():
    """Among many looks one is misled by luck: only the judge sees that no image is."""
    images, labels = grey(0, COUNT, SHAPE), jnp.zeros(COUNT, jnp.int32)

    def checks(judge):
        flags = masking_checks(Partial(_lucky, 0.4), images, labels, queries=5, judge=judge)
        return flags["robust at a large epsilon"]

    assert checks(None).value < 0.05
    assert checks(Partial(_lucky, 0.0)) == checks(None)._replace(raised=True, value=1.0)


def _reversed(model, spread, key, images):
    """The gradient points the wrong way, and each look has noise of its own."""
    logits = model(key, images)
    keys = key if key.shape else jax.random.split(key, len(images))
    noise = jax.vmap(lambda key: jax.random.normal(key, logits.shape[1:]))(keys)
    return 2 * jax.lax.stop_gradient(logits) - logits + spread * noise


@pytest.mark.parametrize("spread", [pytest.param(0.0, marks=pytest.mark.full), 1.0])
def test_checks_find_reversed_gradients_also_behind_noise(spread):
    """A random search that compares looks under different noise keeps what was lucky, and finds next to nothing."""
    bare, images = mlp(0, (28, 28, 1)), grey(0, 20, (28, 28, 1))
    flags = attacks.masking_checks(
        KEY,
        Partial(_reversed, bare, spread),
        images,
        own_labels(bare, images),
        norm=attacks.Linf,
        epsilon=0.01,
        large_epsilon=0.5,
        judge=Partial(_reversed, bare, 0.0) if spread else None,
        steps=5,
        queries=300,
    )
    flag = flags["gradient-free beats gradient-based"]
    assert flag.raised
    assert flag.value > 0.6


def test_checks_count_what_is_wrong_from_the_start():
    """Whatever the attacks make of them, images that are misclassified as they are were not robust."""

    def quantised(key, images):
        """Right only where an attack has moved the image."""
        del key
        moved = jnp.abs(images * 255 - jnp.round(images * 255)).max((1, 2, 3)) > 0.01
        return jnp.stack([moved, ~moved], -1).astype(jnp.float32) + 0 * images.sum()

    images = jnp.round(grey(0, COUNT, SHAPE) * 255) / 255
    flags = masking_checks(quantised, images, jnp.zeros(COUNT, jnp.int32), queries=5)
    assert flags["robust at a large epsilon"].value == 0


def test_checks_find_nothing_on_a_sound_model():
    model = mlp(0, SHAPE)
    images = grey(0, COUNT, SHAPE)
    labels = own_labels(model, images)
    source = mlp(1, SHAPE)
    crafted = jax.jit(attacks.fgsm(attacks.Linf, epsilon=0.1))(KEY, source, images, own_labels(source, images)).images
    flags = masking_checks(model, images, labels, queries=100, crafted=crafted)
    assert [name for name, flag in flags.items() if flag.raised] == []
    assert len(flags) == 7


def test_checks_refuse_images_from_without_the_ball():
    model, images = mlp(0, SHAPE), grey(0, COUNT, SHAPE)
    labels = own_labels(model, images)
    for crafted, message in ((jnp.clip(images + 0.2, 0, 1), r"within epsilon .* up to 0\.2$"), (images[:2], "shape")):
        with pytest.raises(ValueError, match=message):
            masking_checks(model, images, labels, steps=1, queries=5, crafted=crafted)
    norm: Any = "linf"
    with pytest.raises(ValueError, match=r"norm must be attacks.Linf, .* got 'linf'"):
        attacks.masking_checks(KEY, model, images, labels, norm=norm, epsilon=0.1, large_epsilon=0.5, crafted=images)


@pytest.mark.parametrize("flat", [1, 2])
def test_a_single_image_is_no_sign(flat):
    """Of ten it is more than 5 %."""
    images, inner = np.array(grey(0, 10, SHAPE)), mlp(0, SHAPE)
    images[:flat, 0, 0, 0] = 1.0

    def model(key, images):
        still = (images[:, 0, 0, 0] == 1)[:, None]
        logits = inner(key, images)
        return jnp.where(still, jax.lax.stop_gradient(logits), logits)

    flag = masking_checks(model, images, own_labels(inner, images), steps=1, queries=5)["zero gradients"]
    assert flag.value == pytest.approx(flat / 10)
    assert flag.raised == (flat > 1)


def test_checks_find_that_steps_are_too_few():
    model = mlp(0, SHAPE)
    images = mixed(0, COUNT, SHAPE)
    flags = [masking_checks(model, images, own_labels(model, images), steps=steps, queries=5) for steps in (1, 20)]
    assert [flag["more iterations still help"].raised for flag in flags] == [True, False]


def test_checks_refuse_labels_that_the_model_has_not():
    model, images = mlp(0, SHAPE), grey(0, COUNT, SHAPE)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 5\)"):
        masking_checks(model, images, own_labels(model, images) + 5)


def _probabilities(model, key, images):
    return jax.nn.softmax(40 * model(key, images))


def test_checks_find_softmax_outputs_and_transfer():
    """Probabilities of a confident model are flat at 1 and 0; another model's images still mislead it."""
    bare = mlp(0, SHAPE)
    model = Partial(_probabilities, Partial(_scaled, mlp(0, SHAPE)))
    images = grey(0, COUNT, SHAPE)
    labels = own_labels(bare, images)
    crafted = jax.jit(attacks.pgd(attacks.Linf, epsilon=0.1, steps=20))(KEY, bare, images, labels).images
    flags = masking_checks(model, images, labels, steps=5, queries=50, crafted=crafted)
    assert flags["softmax outputs"].raised
    assert flags["transfer beats white-box"].raised


def _scaled(model, key, images):
    return 100 * model(key, images)


@pytest.mark.parametrize("kind", ["mean_softmax", "mean_logits"])
def test_losses_of_the_mean(kind):
    """Value and gradient of the loss of the average, against NumPy and one autodiff over all draws."""
    model, images = noisy(), mixed(0, 3, SHAPE)
    keys, labels = jax.random.split(KEY, 3), jnp.asarray([0, 1, 0], jnp.int32)
    estimator = getattr(attacks, kind)(4)
    arguments = (keys, model, attacks.cross_entropy, images, labels, None)
    seen, blind = jax.jit(lambda: tuple(estimator.look(*arguments, with_gradient=wanted) for wanted in (True, False)))()
    draws = [float64(model(fold_in(keys, i), images)) for i in range(4)]
    if kind == "mean_logits":
        expected = np.mean(draws, 0)
    else:
        expected = np.log(np.mean([softmax(logits, -1) for logits in draws], 0))
    np.testing.assert_allclose(seen.logits, expected, atol=1e-5)
    np.testing.assert_allclose(seen.loss, -log_softmax(expected, -1)[np.arange(3), labels], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(blind.loss, seen.loss, rtol=1e-6)

    def total(images):
        stacked = jnp.stack([model(fold_in(keys, i), images) for i in range(4)])
        mean = stacked.mean(0) if kind == "mean_logits" else jnp.log(jax.nn.softmax(stacked).mean(0))
        return attacks.cross_entropy(mean, labels, None).sum()

    np.testing.assert_allclose(seen.gradient, jax.jit(jax.grad(total))(images), atol=1e-5)
    assert (estimator.draws, estimator.forwards) == (4, 8)


def test_known_noise_is_one_draw():
    model = attacks.known_noise(noisy(), jax.random.key(7))
    images = mixed(0, 3, SHAPE)
    first, second = model(jax.random.key(0), images), model(jax.random.split(jax.random.key(1), 3), images)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first, noisy()(jnp.broadcast_to(jax.random.key(7), (3,)), images))
    with pytest.raises(ValueError, match="single key"):
        attacks.known_noise(noisy(), jax.random.split(KEY, 2))


def test_known_noise_of_an_image_does_not_depend_on_its_batch():
    """Also where the model would make one noise for each place from a single key."""
    model, images = attacks.known_noise(noisy(), jax.random.key(7)), mixed(0, 4, SHAPE)
    whole = model(KEY, images)
    np.testing.assert_allclose(model(KEY, images[::-1])[::-1], whole, atol=1e-5)
    np.testing.assert_allclose(model(KEY, images[2:]), whole[2:], atol=1e-5)


@pytest.mark.parametrize("size", [1.0, 40.0, 80.0])
def test_the_mean_of_very_sure_draws_still_has_a_gradient(size):
    """Two draws of a linear model, both sure of the right class by several times `size`; by hand in float64."""
    weights = np.random.default_rng(0).normal(size=(2, 64, 2))
    images = mixed(0, 1, SHAPE)
    slope = np.stack([images.reshape(64) @ w for w in weights])
    weights[:, :, 1] += (size + slope[:, 0] - slope[:, 1])[:, None] * images.reshape(64) / float((images**2).sum())

    def model(key, images):
        which = jax.random.key_data(key)[..., -1] % 2
        return jnp.einsum("bi,bik->bk", images.reshape(len(images), -1), jnp.asarray(weights, jnp.float32)[which])

    keys, labels = jax.random.split(KEY, 1), jnp.asarray([1], jnp.int32)
    seen = attacks.mean_softmax(4).look(keys, model, attacks.margin, images, labels, None, with_gradient=True)
    drawn = [int(jax.random.key_data(fold_in(keys, i))[0, -1]) % 2 for i in range(4)]
    z = np.stack([float64(images).reshape(64) @ weights[i] for i in drawn])
    log_p = log_softmax(z, -1)
    mean = logsumexp(log_p, 0) - np.log(4)
    # The margin z_0 - z_1 of the mean's logarithm; each draw counts by its share of the mean.
    share = np.exp(log_p - mean) / 4
    of_log_p = np.einsum("ik,k->ik", share, [1, -1])
    of_z = of_log_p - of_log_p.sum(-1, keepdims=True) * np.exp(log_p)
    expected = sum(of_z[i] @ weights[drawn[i]].T for i in range(4))
    np.testing.assert_allclose(seen.gradient.reshape(64), expected, rtol=1e-3, atol=1e-4)
    assert np.abs(expected).max() > 0.1


def test_transfer_scores_on_the_target():
    images, source, target = grey(0, 20, SHAPE), mlp(0, SHAPE), mlp(1, SHAPE)
    labels = own_labels(target, images)
    own = attacks.pgd(attacks.Linf, epsilon=0.2, steps=5)
    crafted = jax.jit(own)(KEY, source, images, labels)
    result = jax.jit(attacks.transfer(own, source))(KEY, target, images, labels)
    np.testing.assert_array_equal(result.images, crafted.images)
    np.testing.assert_array_equal(result.success, predictions(target, result.images) != labels)
    np.testing.assert_array_equal(result.forwards, crafted.forwards + 1)
    assert 0 < result.success.mean() < 1


def test_transfer_scores_under_noise_that_no_attack_has_seen():
    """From a noisy model to itself: FGSM's images do no better than under any other draws."""
    images, labels = grey(0, 200, SHAPE), jnp.zeros(200, jnp.int32)

    def noisy(key, images):
        keys = key if key.shape else jax.random.split(key, len(images))
        noise = jax.vmap(lambda key: jax.random.normal(key, SHAPE))(keys)
        # The class turns on whether the image goes along with the noise.
        with_it = ((images - 0.5) * noise).sum((1, 2, 3))
        return jnp.stack([0.5 - with_it, with_it], -1)

    attack = attacks.fgsm(attacks.Linf, epsilon=0.2)
    result = attacks.transfer(attack, noisy)(KEY, noisy, images, labels)
    fresh = noisy(jax.random.key(9), result.images).argmax(-1) != 0
    assert abs(result.success.mean() - fresh.mean()) < 0.15


def test_a_raw_key_is_named():
    images, model = grey(0, 4, SHAPE), mlp(0, SHAPE)
    attack = attacks.pgd(attacks.Linf, epsilon=0.1, steps=3)
    for composed in (attacks.annealed(attack, [model]), attacks.transfer(attack, model)):
        keys: tuple[Any, ...] = (0, jax.random.PRNGKey(0))
        for key in keys:
            with pytest.raises(ValueError, match=r"key must be a typed key from jax\.random\.key"):
                composed(key, model, images, own_labels(model, images))


def test_annealing_counts_all_stages_and_needs_one():
    images, model = grey(0, 4, SHAPE), mlp(0, SHAPE)
    attack = attacks.pgd(attacks.Linf, epsilon=0.1, steps=3)
    result = jax.jit(attacks.annealed(attack, [mlp(1, SHAPE), mlp(2, SHAPE)]))(
        KEY, model, images, own_labels(model, images)
    )
    assert result.forwards.tolist() == [12] * 4
    assert result.backwards.tolist() == [9] * 4
    with pytest.raises(ValueError, match="surrogates must be at least one"):
        attacks.annealed(attack, [])


def test_a_start_is_where_it_begins():
    """PGD with no room to move ends where it was told to start, brought into the ball."""
    images, model = grey(0, 3, SHAPE), mlp(0, SHAPE)
    start = jnp.clip(images + 0.3, 0, 1)
    attack = attacks.pgd(attacks.Linf, epsilon=0.1, steps=1, step_size=1e-6, random_start=False)
    result = jax.jit(attack)(KEY, model, images, own_labels(model, images), start=start)
    np.testing.assert_allclose(result.images, images + 0.1, atol=3e-6)
    for unsuited, message in ((start[:2], "start must have the images' shape"), (start + 1, "start must lie in")):
        with pytest.raises(ValueError, match=message):
            attack(KEY, model, images, own_labels(model, images), start=unsuited)
    with pytest.raises(ValueError, match="start must be None"):
        attacks.fgsm(attacks.Linf, epsilon=0.1)(KEY, model, images, own_labels(model, images), start=start)
