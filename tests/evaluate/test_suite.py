"""Suites: who is broken by what, on which examples work is spent, and what fresh draws say."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attack_helpers import KEY, grey, mixed, mlp, own_labels, predictions
from jax.tree_util import Partial

from rbf_jax import attacks, evaluate
from rbf_jax.attacks import Composed, Iterative
from rbf_jax.attacks.driver import Best, no_best
from rbf_jax.evaluate import batched, live
from rbf_jax.evaluate.live import run_live

N = 37


def problem(seed=0):
    model, images = mlp(seed), mixed(seed, N)
    return model, images, own_labels(model, images)


def suite(epsilon=0.05):
    """Each breaks some examples that the ones before it leave."""
    return {
        "fgsm": attacks.fgsm(attacks.Linf, epsilon=0.5 * epsilon),
        "pgd": attacks.pgd(attacks.Linf, epsilon=epsilon, steps=10, restarts=2, loss=attacks.margin),
        "l2": attacks.pgd(attacks.L2, epsilon=4 * epsilon, steps=10, loss=attacks.margin),
    }


def test_finished_examples_leave_and_change_nothing_for_the_others():
    """Who is broken is what the whole attack says; who is not gets the same image; work is spent on fewer."""
    model, images, labels = problem()
    attack = attacks.pgd(attacks.Linf, epsilon=0.05, steps=30, restarts=3, loss=attacks.margin)
    whole, left = (
        evaluate.run_attack(KEY, attack, model, images, labels, leave=leave, batch_size=8) for leave in (False, True)
    )
    np.testing.assert_array_equal(left.success, whole.success)
    assert 0.2 < left.success.mean() < 0.95
    np.testing.assert_array_equal(left.success, predictions(model, left.images) != labels)
    robust = ~left.success
    np.testing.assert_allclose(left.images[robust], whole.images[robust], atol=1e-6)
    assert np.all(left.forwards[robust] == 93)
    assert np.all(left.forwards[left.success] <= 93)
    assert left.forwards.mean() < 0.8 * 93
    # Whatever the batches, an example's steps are its own.
    other = evaluate.run_attack(KEY, attack, model, images, labels, leave=True, batch_size=64)
    for a, b in zip(left, other, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_leaving_compiles_a_program_for_each_power_of_two():
    images = grey(1, N)
    attack = attacks.pgd(attacks.Linf, epsilon=0.03, steps=40, loss=attacks.margin)
    advance: Any = live._advance
    before = advance._cache_size()
    for seed in range(3):
        evaluate.run_attack(
            jax.random.key(seed), attack, mlp(seed), images, own_labels(mlp(seed), images), leave=True, batch_size=32
        )
    assert advance._cache_size() - before <= 3  # 8, 16, 32


class Counted(NamedTuple):
    best: Best


@pytest.mark.parametrize(("steps", "sizes"), [(100, {8}), (800, {8, 4, 2, 1})])
def test_the_last_examples_of_a_long_attack_are_not_filled_up(steps, sizes):
    """Each example is broken at the step that its epsilon says, the last one never."""
    seen = set()

    def step(number, logits_fn, p, state):
        seen.add(len(p.labels))
        best = state.best
        return Counted(
            best._replace(success=best.success | (number.astype(jnp.float32) >= p.epsilon), forwards=best.forwards + 1)
        )

    attack = Iterative(attacks.Linf, 1.0, steps, lambda logits_fn, p: Counted(no_best(p.images)), step)
    at = np.array([0, 0, 0, 0, 20, 20, 50, 1e6], np.float32)
    problem = attack.pose(jax.random.split(KEY, 8), grey(0, 8), np.zeros(8, np.int32), epsilon=at)
    found = run_live(attack, mlp(0), problem, batch_size=8)
    assert seen == sizes
    np.testing.assert_array_equal(found.success, at < steps)
    # Up to the end of the segment in which it is broken: the first one ends after 5 steps.
    np.testing.assert_array_equal(found.forwards[:4], 5)
    assert found.forwards[-1] == steps


def test_attacks_of_least_distance_do_not_leave_without_a_budget():
    model, images, labels = problem()
    attack = attacks.deepfool(attacks.L2, steps=15)
    whole, left = (
        evaluate.run_attack(KEY, attack, model, images, labels, leave=leave, batch_size=16) for leave in (False, True)
    )
    np.testing.assert_allclose(left.distance, whole.distance, rtol=1e-4)
    budget = np.full(N, np.median(whole.distance), np.float32)
    within = evaluate.run_attack(KEY, attack, model, images, labels, epsilon=budget, leave=True, batch_size=16)
    np.testing.assert_array_equal(within.success, whole.distance <= budget)


@pytest.mark.full
def test_union_spends_work_on_what_is_not_broken_yet():
    model, images, labels = problem()
    result = evaluate.run_suite(KEY, suite(), model, images, labels, batch_size=16)
    everything = evaluate.run_suite(KEY, suite(), model, images, labels, union=False, batch_size=16)
    assert result.names == ("clean", "fgsm", "pgd", "l2")
    assert result.norms == ("", "linf", "linf", "l2")
    # Per example, never the least of the accuracies.
    np.testing.assert_array_equal(result.robust[0], np.all(everything.survived == 1, axis=0))
    assert result.robust.mean() <= everything.survived.mean(1).min()
    np.testing.assert_array_equal(result.robust[0], predictions(model, result.images) == labels)
    # An attack is left out exactly where an earlier one had succeeded.
    for number in range(1, 4):
        broken = np.any(result.survived[:number] == 0, axis=0)
        np.testing.assert_array_equal(np.isnan(result.survived[number]), broken)
        assert np.all((result.forwards[number] == 0) == broken)
        assert np.all(everything.forwards[number] > 0)
    broken = ~result.robust[0]
    rows = np.flatnonzero(broken)
    assert np.all(result.survived[result.attack[rows], rows] == 0)
    assert np.all(result.attack[~broken] == 0)
    linf = np.abs(result.images - images).max((1, 2, 3))
    by_linf = np.isin(result.attack, (1, 2))
    np.testing.assert_allclose(result.distance[by_linf], linf[by_linf], rtol=1e-5)
    assert np.all(linf[by_linf] <= 0.05 + 6e-8)
    assert len(np.unique(result.attack)) == 4


def test_misclassified_images_are_attacked_by_nothing():
    model, images, labels = problem()
    wrong = np.arange(N) % 3 == 0
    labels = jnp.where(wrong, (labels + 1) % 5, labels)
    result = evaluate.run_suite(KEY, suite(1e-6), model, images, labels, batch_size=16)
    assert np.all(result.attack == 0)
    assert np.all(result.forwards[:, wrong] == 0)
    np.testing.assert_array_equal(result.robust[0], ~wrong)
    np.testing.assert_array_equal(result.images[wrong], images[wrong])
    assert np.all(result.distance[wrong] == 0)


@pytest.mark.parametrize("union", [True, False])
def test_what_no_attack_breaks_keeps_the_first_ones_image(union):
    model, images, labels = problem()
    wrong = np.arange(N) % 3 == 0
    labels = jnp.where(wrong, (labels + 1) % 5, labels)
    result = evaluate.run_suite(KEY, suite(0.02), model, images, labels, batch_size=16, union=union)
    left = result.robust[0]
    assert 0 < left.sum() < (~wrong).sum()
    assert np.all(result.attack[left] == 0)
    first = jax.jit(suite(0.02)["fgsm"])(KEY, model, images, labels)
    np.testing.assert_allclose(result.images[left], first.images[left], atol=1e-6)
    np.testing.assert_allclose(result.distance[left], first.distance[left], atol=1e-6)


def _shaky(model, key, images):
    """Right or wrong by the toss of a coin, on every image in the upper half of the brightness."""
    keys = key if key.shape else jax.random.split(key, len(images))
    heads = jax.vmap(jax.random.bernoulli)(keys)
    bright = images.mean((1, 2, 3)) > 0.5
    logits = model(key, images)
    flipped = jnp.where((heads & bright)[:, None], -logits, logits)
    return flipped


def test_a_randomised_model_is_judged_on_fresh_draws():
    model = Partial(_shaky, mlp(0))
    images = jnp.concatenate([grey(0, N) - 0.1, grey(0, N) + 0.1])
    labels = own_labels(mlp(0), images)
    weak = {"nothing": attacks.fgsm(attacks.Linf, epsilon=0.0)}
    result = evaluate.run_suite(KEY, weak, model, images, labels, judge=model, redraws=(12, 40), batch_size=16)
    assert result.robust.shape == (40, 2 * N)
    dark = np.arange(2 * N) < N
    assert np.all(result.robust[:, dark])
    # Half of the fresh draws, whatever the attack saw: one unlucky draw counts for one draw only.
    assert abs(result.robust[:, ~dark].mean() - 0.5) < 0.05
    assert np.all(result.survived[0, dark] == 1)


def _toss(key, images):
    """Right (class 0) by the toss of a coin on any image, and the less often the brighter its first pixel."""
    keys = key if key.shape else jax.random.split(key, len(images))
    luck = jax.vmap(jax.random.uniform)(keys)
    right = luck > jnp.maximum(images[:, 0, 0, 0], 0.5)
    return jnp.stack([right, ~right], -1).astype(jnp.float32)


def _paint(level):
    """An attack that sets the first pixel."""

    def attack(keys, logits_fn, images, labels, *, targets=None, epsilon=None, start=None):
        none = jnp.zeros(len(images), jnp.int32)
        painted = images.at[:, 0, 0, 0].set(level)
        return attacks.fgsm(attacks.Linf, epsilon=0.0)(keys, logits_fn, painted, labels)._replace(restart=none)

    return Composed(attacks.Linf, lambda models, *arguments, **options: attack(*arguments, **options), ())


def test_a_randomised_model_needs_a_judge():
    """Its accuracy under the one draw that an attack saw would be taken for the model's."""
    images, labels = grey(0, 40), np.zeros(40, np.int32)
    idle = {"idle": attacks.fgsm(attacks.Linf, epsilon=0.0)}
    with pytest.raises(ValueError, match="logits_fn gives other logits under another key: name the judge"):
        evaluate.run_suite(KEY, idle, Partial(_toss), images, labels)


def test_autoattack_in_several_norms_is_the_union_of_all():
    linf, l2 = (attacks.autoattack("standard", norm, epsilon=0.1, classes=5) for norm in (attacks.Linf, attacks.L2))
    assert list(linf) == ["apgd-ce-linf", "apgd-t-linf", "fab-t-linf", "square-linf"]
    assert [attack.norm.name for attack in (linf | l2).values()] == ["linf"] * 4 + ["l2"] * 4


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda images: images, "takes 1 positional argument"),
        (lambda key, images: images + jax.random.normal(key, images.shape), "single key"),
    ],
)
def test_a_model_that_cannot_be_called_is_told_how_it_is(model, reason):
    attack, images = attacks.fgsm(attacks.Linf, epsilon=0.1), grey(0, 4)
    with pytest.raises(
        ValueError, match=rf"model fails on keys \(1,\) and .*{reason}.*\(key, images\) -> logits, with"
    ):
        evaluate.run_attack(KEY, attack, model, images, np.zeros(4, np.int32))


def test_of_equals_an_attack_s_image_is_scored_not_the_clean_one():
    """Right nine times in ten under attack: on a third of the examples ten selection redraws do not tell."""

    def nine_in_ten(key, images):
        luck = jax.vmap(jax.random.uniform)(key)
        right = (luck < 0.9) | (images[:, 0, 0, 0] < 1)
        return jnp.stack([right, ~right], -1).astype(jnp.float32)

    images, labels = grey(0, 400), np.zeros(400, np.int32)
    settings: dict[str, Any] = {"judge": Partial(nine_in_ten), "redraws": (10, 20), "batch_size": 400}
    two = {"paint": _paint(1.0), "again": _paint(1.0)}
    result = evaluate.run_suite(KEY, two, Partial(nine_in_ten), images, labels, **settings)
    assert np.mean(result.survived[1] == 1) > 0.25
    assert result.robust.mean() == pytest.approx(0.9, abs=0.01)
    assert np.all(result.attack > 0)
    assert np.all(result.images[:, 0, 0, 0] == 1)


def test_the_final_score_is_on_redraws_that_nothing_was_selected_on():
    """Of twenty attacks that do nothing one looks lucky on two redraws: on fresh ones half are right all the same."""
    idle = dict.fromkeys(map(str, range(20)), attacks.fgsm(attacks.Linf, epsilon=0.0))
    images, labels = grey(0, 1000), np.zeros(1000, np.int32)
    settings: dict[str, Any] = {"judge": Partial(_toss), "redraws": (2, 2), "batch_size": 1000, "union": False}
    result = evaluate.run_suite(KEY, idle, Partial(_toss), images, labels, **settings)
    assert np.mean(result.attack > 0) > 0.5
    assert abs(result.robust.mean() - 0.5) < 0.05
    # Nor on those of the clean images.
    assert abs(result.robust[:, result.survived[0] == 1].mean() - 0.5) < 0.1


def test_of_two_noisy_attacks_the_stronger_one_counts():
    images, labels = grey(0, 50), np.zeros(50, np.int32)
    suite = {"weak": _paint(0.6), "strong": _paint(0.8), "weaker": _paint(0.55)}
    result = evaluate.run_suite(
        KEY, suite, Partial(_toss), images, labels, judge=_toss, redraws=(99, 50), batch_size=50
    )
    assert {result.names[which] for which in result.attack} == {"strong"}
    assert abs(result.robust.mean() - 0.2) < 0.03


def test_an_attack_of_ones_own_stands_beside_the_others(tmp_path):
    model, images, labels = problem()

    def own(keys, logits_fn, images, labels, *, epsilon=None, targets=None, start=None):
        return attacks.fgsm(attacks.Linf, epsilon=0.05)(keys, logits_fn, images, labels)

    both = {"own": own, "fgsm": attacks.fgsm(attacks.Linf, epsilon=0.05)}
    result = evaluate.run_suite(KEY, both, model, images, labels, union=False, directory=str(tmp_path / "kept"))
    np.testing.assert_array_equal(result.survived[1], result.survived[2])
    assert result.norms == ("", "", "linf")
    assert (tmp_path / "kept" / "own").exists()


@pytest.mark.parametrize("wrong", [attacks.pgd, "pgd"])
def test_what_is_no_attack_is_said_before_any_work(wrong):
    model, images, labels = problem()
    with pytest.raises(ValueError, match=r"suite\['pgd'\] must be an attack, as attacks.pgd\(attacks.Linf"):
        evaluate.run_suite(KEY, {"pgd": wrong}, model, images, labels)
    with pytest.raises(ValueError, match=r"rows must be the 37 examples' indices, got shape \(9,\)"):
        evaluate.run_suite(KEY, suite(), model, images, labels, rows=np.arange(9))


def test_kept_parts_lie_in_the_home_where_that_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model, images, labels = problem()
    evaluate.run_suite(KEY, suite(), model, images, labels, directory="~/kept", batch_size=8)
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["clean", "fgsm", "l2", "pgd"]
    with pytest.raises(ValueError, match="holds another computation"):
        evaluate.run_suite(jax.random.key(99), suite(), model, images, labels, directory="~/kept", batch_size=8)


def test_results_do_not_depend_on_the_batches_or_the_neighbours():
    model, images, labels = problem(2)
    rows = np.arange(100, 100 + N)
    whole = evaluate.run_suite(KEY, suite(), model, images, labels, rows=rows, batch_size=64)
    part = np.array([30, 4, 11])
    few = evaluate.run_suite(KEY, suite(), model, images[part], labels[part], rows=rows[part], batch_size=2)
    np.testing.assert_array_equal(few.attack, whole.attack[part])
    np.testing.assert_allclose(few.images, whole.images[part], atol=1e-5)
    np.testing.assert_array_equal(few.robust, whole.robust[:, part])


def test_a_stopped_suite_goes_on(tmp_path, monkeypatch):
    model, images, labels = problem()
    arguments = KEY, suite(), model, images, labels
    expected = evaluate.run_suite(*arguments, batch_size=16)
    first = evaluate.run_suite(KEY, {"fgsm": suite()["fgsm"]}, model, images, labels, batch_size=16, directory=tmp_path)
    assert first.robust.mean() >= expected.robust.mean()
    found = evaluate.run_suite(*arguments, batch_size=16, directory=tmp_path)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clean", "fgsm", "l2", "pgd"]

    def refuse(*_, **__):
        raise AssertionError("computed once more")

    monkeypatch.setattr("rbf_jax.evaluate.batched.run_live", refuse)
    again = evaluate.run_suite(*arguments, batch_size=16, directory=tmp_path)
    np.testing.assert_array_equal(again.robust, expected.robust)
    with pytest.raises(ValueError, match="holds another computation"):
        evaluate.run_suite(jax.random.key(99), *arguments[1:], batch_size=16, directory=tmp_path)


def _masked(model, key, images):
    return model(key, jax.lax.stop_gradient(images))


@pytest.mark.parametrize("change", ["radius", "function"])
def test_a_directory_of_another_suite_is_refused(change, tmp_path):
    """Also where name, images and weights are the same: a folder of an easy attack must not speak for a hard one."""
    model, images, labels = problem()
    weak, form = {"pgd": attacks.pgd(attacks.Linf, epsilon=0.01, steps=3)}, Partial(_masked, model)
    evaluate.run_suite(KEY, weak, form, images, labels, batch_size=16, directory=tmp_path)
    if change == "radius":
        weak = {"pgd": attacks.pgd(attacks.Linf, epsilon=0.4, steps=3)}
    else:
        form = model
    with pytest.raises(ValueError, match="holds another computation"):
        evaluate.run_suite(KEY, weak, form, images, labels, batch_size=16, directory=tmp_path)


def test_a_plain_function_and_numpys_integers_do():
    model, images, labels = problem()
    few = {"pgd": attacks.pgd(attacks.Linf, epsilon=0.05, steps=3)}
    given = {"images": images, "batch_size": 16}
    expected = evaluate.run_suite(KEY, few, model, labels=labels, **given)
    found = evaluate.run_suite(
        KEY, few, lambda key, x: model(key, x), labels=np.asarray(labels, np.int64), judge=None, **given
    )
    np.testing.assert_array_equal(found.robust, expected.robust)
    with pytest.raises(ValueError, match=r"a model must be a function \(key, images\) -> logits, got dict"):
        evaluate.run_suite(KEY, few, {"params": 1}, labels=labels, **given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="suite must be a dictionary of attacks by name, got list"):
        evaluate.run_suite(KEY, list(few.values()), model, labels=labels, **given)  # type: ignore[arg-type]


def test_bad_suites():
    model, images, labels = problem()
    for wrong in ({}, {"clean": suite()["fgsm"]}):
        with pytest.raises(ValueError, match="suite must hold at least one attack"):
            evaluate.run_suite(KEY, wrong, model, images, labels)


def _wide(weights, key, images):
    del key
    return jnp.tanh(images.reshape(len(images), -1) @ weights).reshape(len(images), -1, 10).sum(1)


def test_fitting_batch_falls_with_the_activations():
    images = mixed(0, 4)
    small, large = (
        evaluate.fitting_batch(Partial(_wide, jnp.ones((16, width))), images) for width in (1000, 4_000_000)
    )
    assert small == 1024
    assert 1 <= large <= 128
    assert large & (large - 1) == 0


def test_a_model_without_a_gradient_is_attacked_by_what_needs_none():
    model, images, labels = problem()

    def opaque(key, images):
        shape = jax.ShapeDtypeStruct((len(images), 5), jnp.float32)
        return jax.pure_callback(lambda images: np.asarray(model(KEY, images)), shape, images)

    free = {"square": attacks.square(attacks.Linf, epsilon=0.1, queries=20)}
    found = evaluate.run_suite(KEY, free, opaque, images, labels)
    expected = evaluate.run_suite(KEY, free, model, images, labels)
    np.testing.assert_array_equal(found.robust, expected.robust)
    assert 0 < found.robust.sum() < found.survived[0].sum()
    with pytest.raises(ValueError, match="JVP"):
        evaluate.run_suite(KEY, {"fgsm": suite()["fgsm"]}, opaque, images, labels)


def test_run_live_reports_its_progress():
    model, images, labels = problem()
    attack, seen = attacks.pgd(attacks.Linf, epsilon=0.05, steps=30, loss=attacks.margin), []
    problem_ = attack.pose(jax.random.split(KEY, N), images, labels)
    run_live(attack, model, problem_, batch_size=16, progress=seen.append)
    assert sum(seen) == pytest.approx(N)
    assert len(seen) > 2


def test_the_bar_moves_within_a_batch(monkeypatch):
    model, images, labels = problem()
    attack, seen = attacks.pgd(attacks.Linf, epsilon=0.05, steps=30, loss=attacks.margin), []

    class Bar(batched.tqdm):
        def update(self, n=1):
            seen.append(n)
            return super().update(n)

    monkeypatch.setattr(batched, "tqdm", Bar)
    # All of them in one batch, and in three.
    for size in (16, 3):
        seen.clear()
        evaluate.run_attack(KEY, attack, model, images, labels, leave=True, batch_size=size, progress="pgd")
        assert sum(seen) == N
        assert min(seen) >= 0
        assert len([n for n in seen if n]) > 3
