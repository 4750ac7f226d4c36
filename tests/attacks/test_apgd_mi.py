"""APGD and MI-FGSM against NumPy loops, and what sets them apart from PGD."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attack_helpers import KEY, NORMS, grey, linear, mixed, mlp, own_labels, predictions
from helpers import float64

from rbf_jax import attacks
from rbf_jax.attacks.apgd_rules import check_lengths
from rbf_jax.attacks.gradients import Estimator, fold_in

norms = pytest.mark.parametrize("name", ["linf", "l2"])


def test_windows_are_the_papers():
    """Checkpoints ``w_j = ceil(p_j n)`` with p = 0, 0.22, 0.41, 0.57, 0.70, 0.80, 0.87, 0.93, 0.99 for n = 100."""
    ends = np.flatnonzero(check_lengths(100)) + 1
    assert ends.tolist() == [22, 41, 57, 70, 80, 87, 93, 99]
    assert check_lengths(100)[ends - 1].tolist() == np.diff(ends, prepend=0).tolist()
    for steps in (1, 2, 5, 10, 33):
        lengths = check_lengths(steps)
        assert lengths.sum() <= steps
        assert (lengths > 0).any()


def numpy_step(delta_from, direction, length, x0, epsilon, name):
    """``clip(x0 + project(...))``, float64."""
    delta = delta_from + length * direction - x0
    if name == "linf":
        delta = np.clip(delta, -epsilon, epsilon)
    else:
        delta = delta * np.minimum(1, epsilon / np.maximum(np.sqrt((delta**2).sum()), 1e-30))
    return np.clip(x0 + delta, 0, 1)


def unit(gradient, name):
    return np.sign(gradient) if name == "linf" else gradient / np.sqrt((gradient**2).sum())


def look(model, label):
    """Loss (margin) and gradient of one image as float64."""

    @jax.jit
    def function(x):
        return jax.value_and_grad(lambda x: attacks.margin(model(KEY, x[None]), jnp.asarray([label]), None)[0])(x)

    return lambda x: tuple(map(float64, function(jnp.asarray(x, jnp.float32))))


def numpy_apgd(see, start, x0, epsilon, steps, name):
    """Algorithm 1 of the paper, for one image, with the checks of its authors' code; returns all iterates' losses."""
    x = before = top = start
    loss, gradient = see(start)
    last = top_loss = loss
    top_gradient, step = gradient, 2 * epsilon
    losses, iterates, rises, kept, checked = [loss], [start], 0, False, loss
    windows = check_lengths(steps)
    for number in range(steps):
        ahead = numpy_step(x, unit(gradient, name), step, x0, epsilon, name)
        share = 1.0 if number == 0 else 0.75
        new = numpy_step(x + share * (ahead - x) + (1 - share) * (x - before), 0, 0, x0, epsilon, name)
        before, x = x, new
        loss, gradient = see(x)
        losses.append(loss)
        iterates.append(x)
        rises += loss > last
        last = loss
        if loss > top_loss:
            top, top_loss, top_gradient = x, loss, gradient
        if windows[number]:
            if rises <= 0.75 * windows[number] or (kept and top_loss <= checked):
                step, x, gradient, kept = step / 2, top, top_gradient, False
            else:
                kept = True
            rises, checked = 0, top_loss
    return np.array(losses), iterates


@norms
def test_apgd_is_its_algorithm_in_numpy(name):
    images, model = mixed(1, 4), mlp(1)
    labels, epsilon, steps = own_labels(model, images), {"linf": 0.05, "l2": 0.15}[name], 12
    keys = jax.random.split(KEY, 4)
    attack = jax.jit(attacks.apgd(NORMS[name], epsilon=epsilon, steps=steps, loss=attacks.margin))
    result = attack(keys, model, images, labels)
    noise = NORMS[name].sample(fold_in(fold_in(keys, 0), steps + 1), images.shape, jnp.full(4, epsilon))
    for i in range(4):
        x0 = float64(images[i])
        start = numpy_step(x0 + float64(noise[i]), 0, 0, x0, epsilon, name)
        losses, iterates = numpy_apgd(look(model, labels[i]), start, x0, epsilon, steps, name)
        found = float64(attacks.margin(model(KEY, result.images[i : i + 1]), labels[i : i + 1], None))[0]
        assert found == pytest.approx(losses.max(), abs=2e-4)
        if name == "l2":  # under linf a gradient near 0 rounds to either sign, which moves a pixel and not the loss
            np.testing.assert_allclose(result.images[i], iterates[losses.argmax()], atol=2e-4)


def numpy_sparse_apgd(see, project, start, x0, epsilon, steps):
    """APGD in l1 for one image: three balls, sparse steps; returns the losses in the last ball, and the step sizes."""
    x, losses, sizes = start, [], []
    top, part = x, int(0.3 * steps)
    for stage, (scale, length) in enumerate([(3, part), (2, part), (1, steps - 2 * part)]):
        radius, every = scale * epsilon, max(int(0.04 * length), 1)
        x = project(top, radius) if stage else x
        loss, gradient = see(x)
        top, top_loss, top_gradient = x, loss, gradient
        changed = np.sum(x != x0) if stage else x0.size
        share, step = (changed / x0.size / 1.5 if stage else 0.2), radius
        if scale == 1:
            losses.append(loss)
        for number in range(1, length + 1):
            kept = min(max(int(np.float32(share) * x0.size), 1), x0.size)
            chosen = np.abs(gradient) >= np.sort(np.abs(gradient).ravel())[-kept]
            signs = np.sign(gradient) * chosen
            x = project(x + step * signs / np.abs(signs).sum(), radius)
            loss, gradient = see(x)
            if scale == 1:
                losses.append(loss)
            if loss > top_loss:
                top, top_loss, top_gradient = x, loss, gradient
            if number % every == 0:
                before, changed = changed, np.sum(top != x0)
                share = changed / x0.size / 1.5
                if changed < 0.95 * before:
                    x, gradient, step = top, top_gradient, radius
                else:
                    step = max(step / 1.5, 0.1 * radius)
                sizes.append(step / radius)
    return np.array(losses), np.array(sizes)


def test_apgd_in_l1_is_its_algorithm_in_numpy():
    """The projection is the library's; `test_norms` has it against a solver.

    So many steps that checks lie three steps apart, and the best iterate is another than the last.
    """
    shape, steps, epsilon = (6, 6, 1), 200, 1.0
    images, model = grey(1, 4, shape), mlp(1, shape)
    labels, keys = own_labels(model, images), jax.random.split(KEY, 4)
    attack = jax.jit(attacks.apgd(attacks.L1, epsilon=epsilon, steps=steps, loss=attacks.margin))
    result = attack(keys, model, images, labels)
    # A look at the start of each of three stages, and one after each step.
    noise = attacks.L1.sample(fold_in(fold_in(keys, 0), steps + 3), images.shape, jnp.full(4, 3 * epsilon))
    confine = jax.jit(attacks.L1.confine)
    seen = []
    for i in range(4):

        def project(moved, radius, x0=images[i]):
            moved = jnp.asarray(moved, jnp.float32)
            return np.asarray(confine(x0[None], moved[None], jnp.float32(radius)[None]))[0]

        start = project(images[i] + noise[i], 3 * epsilon)
        losses, sizes = numpy_sparse_apgd(look(model, labels[i]), project, start, np.asarray(images[i]), epsilon, steps)
        found = float64(attacks.margin(model(KEY, result.images[i : i + 1]), labels[i : i + 1], None))[0]
        assert found == pytest.approx(losses.max(), abs=2e-4)
        seen.append(sizes)
    # Steps shrink, to the least, and grow again.
    assert np.min(seen) == pytest.approx(0.1)
    assert (np.diff(seen) > 0).any()


@norms
def test_mi_fgsm_is_a_loop_of_numpy(name):
    images, model = mixed(2, 4), mlp(2)
    labels, epsilon, steps = own_labels(model, images), 0.08, 4
    attack = jax.jit(attacks.mi_fgsm(NORMS[name], epsilon=epsilon, steps=steps, decay=0.8, loss=attacks.margin))
    result = attack(KEY, model, images, labels)
    for i in range(4):
        see, x0 = look(model, labels[i]), float64(images[i])
        x, momentum, losses, iterates = x0, np.zeros_like(x0), [], []
        for _ in range(steps + 1):
            loss, gradient = see(x)
            losses.append(loss)
            iterates.append(x)
            momentum = 0.8 * momentum + gradient / np.abs(gradient).sum()
            x = numpy_step(x, unit(momentum, name), epsilon / steps, x0, epsilon, name)
        np.testing.assert_allclose(result.images[i], iterates[int(np.argmax(losses))], atol=2e-5)


def test_apgd_t_goes_where_the_untargeted_loss_does_not_point():
    """Three classes: the runner-up's gradient is steep near the image but can never win; the third class can."""

    def logits(weights, key, images):
        x = images.mean((1, 2, 3)) - 0.5
        steep = 0.9 * jnp.tanh(40 * jnp.abs(x)) - 0.05  # comes near 1, never reaches it
        third = 20 * x - 0.5
        return jnp.stack([jnp.ones_like(x), steep, third, -jnp.ones_like(x) * 5], -1) + 0 * weights

    model = jax.tree_util.Partial(logits, jnp.float32(0))
    images = jnp.full((4, 4, 4, 1), 0.49)
    labels = jnp.zeros(4, jnp.int32)
    settings = {"epsilon": 0.12, "steps": 20}
    untargeted = jax.jit(attacks.apgd(attacks.Linf, loss=attacks.margin, **settings))(KEY, model, images, labels)
    assert not untargeted.success.all()
    result = jax.jit(attacks.apgd_t(attacks.Linf, classes=2, **settings))(KEY, model, images, labels)
    assert result.success.all()
    assert set(predictions(model, result.images)) == {2}


def test_apgd_t_tries_the_most_likely_wrong_classes():
    """One class allowed: it is the runner-up, and APGD-T does what APGD towards it does."""
    rng = np.random.default_rng(3)
    model, images = linear(rng.normal(size=(16, 5)), rng.normal(size=5)), grey(3, 6)
    labels = own_labels(model, images)
    runner_up = jnp.asarray(np.argsort(-np.asarray(model(KEY, images)), -1)[:, 1], jnp.int32)
    settings = {"epsilon": 0.03, "steps": 5, "loss": attacks.margin}
    found = jax.jit(attacks.apgd_t(attacks.Linf, classes=1, **settings))(KEY, model, images, labels)
    towards = jax.jit(attacks.apgd(attacks.Linf, **settings))(KEY, model, images, labels, targets=runner_up)
    np.testing.assert_allclose(found.images, towards.images, atol=1e-6)


def test_apgd_t_begins_towards_each_class_where_it_is_told_to():
    images, model = grey(0, 3), mlp(0)
    labels, start = own_labels(model, images), jnp.clip(images + 0.05, 0, 1)
    steps, classes = 2, 3
    attack = attacks.apgd_t(attacks.Linf, epsilon=0.05, steps=steps, classes=classes, restarts=2)
    problem = attack.pose(jax.random.split(KEY, 3), images, labels, start=start)
    state, began = attack.begin(model, problem), []
    for number in range(attack.count):
        state = jax.jit(attack.step)(jnp.int32(number), model, problem, state)
        if number % (steps + 1) == 0:
            began.append(bool(jnp.allclose(state.track.x, start, atol=1e-6)))
    assert began == [True] * classes + [False] * classes


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS.keys())
def test_apgd_leaves_a_start_whose_loss_is_nan(norm):
    """As one draw of many can make it, where the others still give a gradient."""
    images, model = grey(0, 6), mlp(0)
    labels = own_labels(model, images)

    def look(*arguments, with_gradient):
        seen = attacks.exact.look(*arguments, with_gradient=with_gradient)
        at_start = jnp.abs(arguments[3] - images).max((1, 2, 3)) < 1e-6
        return seen._replace(loss=jnp.where(at_start, jnp.nan, seen.loss))

    poisoned = Estimator(look, 1, 1)
    epsilon = {"linf": 0.1, "l2": 0.5, "l1": 2.0}[norm.name]
    found, expected = (
        jax.jit(attacks.apgd(norm, epsilon=epsilon, steps=20, gradient=gradient))(
            KEY, model, images, labels, start=images
        )
        for gradient in (poisoned, attacks.exact)
    )
    assert expected.success.all()
    np.testing.assert_allclose(found.images, expected.images, atol=1e-5)


def test_apgd_t_refuses_targets_and_too_many_classes():
    images, model = grey(0, 2), mlp(0)
    labels = own_labels(model, images)
    with pytest.raises(ValueError, match="targets must be None"):
        attacks.apgd_t(attacks.Linf, epsilon=0.1, classes=2)(KEY, model, images, labels, targets=labels)
    with pytest.raises(ValueError, match="classes must be below the model's 5, got 5"):
        attacks.apgd_t(attacks.Linf, epsilon=0.1, classes=5)(KEY, model, images, labels)


def test_dlr_is_its_formula_and_free_of_scale():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(30, 6)), rng.integers(0, 6, 30)
    targets = (labels + rng.integers(1, 6, 30)) % 6
    rows, ordered = np.arange(30), np.sort(logits, -1)[:, ::-1]
    others = np.where(np.arange(6) == labels[:, None], -np.inf, logits).max(-1)
    expected = (others - logits[rows, labels]) / (ordered[:, 0] - ordered[:, 2])
    towards = (logits[rows, targets] - logits[rows, labels]) / (ordered[:, 0] - 0.5 * (ordered[:, 2] + ordered[:, 3]))
    arguments = jnp.asarray(labels, jnp.int32), jnp.asarray(targets, jnp.int32)
    for scale in (1e-3, 1.0, 1e6):
        scaled = jnp.asarray(scale * logits, jnp.float32)
        np.testing.assert_allclose(attacks.dlr(scaled, arguments[0], None), expected, rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(attacks.dlr(scaled, *arguments), towards, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(("classes", "targeted"), [(2, False), (3, True)])
def test_dlr_refuses_few_classes(classes, targeted):
    labels = jnp.zeros(2, jnp.int32)
    with pytest.raises(ValueError, match=f"got {classes}: use margin"):
        attacks.dlr(jnp.zeros((2, classes)), labels, labels if targeted else None)
