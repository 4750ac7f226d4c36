"""Cells crafted and scored: on which examples, on which redraws, on whose images, and once."""

import json
import shutil
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import jax
import numpy as np
import pytest
from attack_helpers import SHAPE, grey, linear
from helpers import float64
from jax.tree_util import Partial
from scipy.special import softmax

from experiments import evaluation, provenance
from experiments.catalogue import Cell, Kind
from experiments.configs import mnist, quickstart
from experiments.learn import Examples
from experiments.rundir import Run
from rbf_jax.evaluate import fingerprint, load_outcomes

EPSILON, TOTAL = 0.1, 12


@pytest.mark.parametrize("total", [10_000, 1_000])
def test_attacked_examples_are_drawn_once_from_all(total):
    config = mnist.get_config("cpu")
    config.examples.test = total
    many, few = evaluation.drawn(config, 500), evaluation.drawn(config, 100)
    assert len(set(many)) == 500
    assert (np.diff(many) > 0).all()
    assert set(few) < set(many)
    assert many.max() > 0.97 * total
    assert abs(many.mean() - total / 2) < 0.06 * total
    np.testing.assert_array_equal(evaluation.drawn(config, total), np.arange(total))


@pytest.fixture
def run(tmp_path):
    config = quickstart.get_config("smoke")
    config.examples.test, config.attack.batch_size = TOTAL, 4
    config.attack.redrawn, config.attack.selection, config.attack.scoring = 5, 2, 3
    return Run(tmp_path, config)


def weights(seed):
    """So that a linf ball of `EPSILON` holds images of other classes, not of all."""
    return np.random.default_rng(seed).normal(size=(np.prod(SHAPE), 5)) * 3


def _noisy(model, key, images):
    noise = jax.vmap(lambda key: jax.random.normal(key, (5,)))(key)
    return model(key, images) + 3 * noise


def model(seed):
    """A network, and the same as if it were a defence."""
    plain = linear(weights(seed), np.zeros(5))
    return {"static": plain, "draw": Partial(_noisy, plain), "bpda": plain, "predict": Partial(_noisy, plain)}


def logits(seed, images):
    return float64(images).reshape(len(images), -1) @ weights(seed)


@pytest.fixture
def models():
    return {"cnn": model(0), "rcnn": model(1)}


@pytest.fixture
def examples():
    """What both networks say of grey images is often wrong."""
    images = np.asarray(grey(0, TOTAL))
    labels = np.where(np.arange(TOTAL) % 3 > 0, logits(0, images).argmax(-1), logits(1, images).argmax(-1))
    return Examples(images, labels.astype(np.int32))


def cell(model="cnn", attack="fgsm", source=None, count=9, forms=None, **changes):
    scored_on = forms or (("static",) if model == "cnn" else ("static", "predict"))
    norm, epsilon, crafted_on = ("", 0.0, "") if attack == "clean" else ("linf", EPSILON, "static")
    found = Cell(model, source or model, attack, norm, epsilon, crafted_on, scored_on, count, {})
    return found._replace(**changes)


# Scorings.


def told(run, cell):
    return [(s.form, s.role, len(s.rows), s.selection, s.redraws) for s in evaluation.scorings(run.config, cell)]


@pytest.mark.parametrize(("count", "redraws"), [(5, 3), (6, 1)])
def test_clean_images_are_scored_often_where_they_are_few(run, count, redraws):
    found = told(run, cell("rcnn", "clean", count=count))
    assert found == [("static", "cell", count, 0, 1), ("predict", "cell", count, 0, redraws)]


def test_few_attacked_images_count_for_the_cell_and_for_the_worst_case(run):
    assert told(run, cell("rcnn", count=5)) == [("static", "both", 5, 0, 1), ("predict", "both", 5, 2, 3)]


def test_of_many_attacked_images_a_part_is_redrawn_for_the_worst_case(run):
    found = told(run, cell("rcnn", count=9, forms=("static", "predict", "predict@1")))
    assert found == [
        ("static", "both", 9, 0, 1),
        *(("predict", "cell", 9, 0, 1), ("predict", "union", 5, 2, 3)),
        *(("predict@1", "cell", 9, 0, 1), ("predict@1", "union", 5, 2, 3)),
    ]
    cell_rows, union_rows = (s.rows for s in evaluation.scorings(run.config, cell("rcnn"))[1:])
    np.testing.assert_array_equal(cell_rows, evaluation.drawn(run.config, 9))
    np.testing.assert_array_equal(union_rows, evaluation.drawn(run.config, 5))


# Cells.


def fgsm(seed, images, labels):
    """Gradient of the cross-entropy of a linear model, by hand."""
    gradient = (softmax(logits(seed, images), -1) - np.eye(5)[labels]) @ weights(seed).T
    return np.clip(float64(images) + EPSILON * np.sign(gradient).reshape(images.shape), 0, 1)


def test_a_plain_model_is_attacked_and_scored(run, examples, models):
    (path,) = evaluation.evaluate_cell(run, examples, cell(), models)
    assert path == run.directory / "ledger" / "cnn-fgsm-linf-0.1-static.npz"
    found, rows = load_outcomes(path), evaluation.drawn(run.config, 9)
    np.testing.assert_array_equal(found.rows, rows)
    assert found.selection.shape == (0, 9)
    images, labels = examples.images[rows], examples.labels[rows]
    clean, attacked = (logits(0, x).argmax(-1) == labels for x in (images, fgsm(0, images, labels)))
    np.testing.assert_array_equal(found.scoring, [clean & attacked])
    assert 0 < found.scoring.sum() < clean.sum()
    expected = {
        **{"model": "cnn", "source": "cnn", "attack": "fgsm", "title": "FGSM", "norm": "linf", "epsilon": EPSILON},
        **{"crafted_on": "static", "scored_on": "static", "role": "both", "examples": 9, "redraws": [0, 1]},
        **{"settings": {}, "profile": "smoke", "seed": 0, "weights": fingerprint(models["cnn"]["static"])},
    }
    assert {key: found.facts[key] for key in expected} == expected
    assert {"commit", "device", "crafting seconds", "scoring seconds"} <= set(found.facts)
    (line,) = [json.loads(line) for line in (run.directory / "log.jsonl").read_text().splitlines()]
    assert (line["stage"], line["cell"]) == ("evaluate", "cnn-fgsm-linf-0.1")
    assert line["accuracy"] == pytest.approx(found.scoring.mean())


def test_clean_images_are_scored_as_they_are(run, examples, models):
    (path,) = evaluation.evaluate_cell(run, examples, cell(attack="clean", count=TOTAL), models)
    assert path.name == "cnn-clean-static.npz"
    found = load_outcomes(path)
    np.testing.assert_array_equal(found.scoring[0], logits(0, examples.images).argmax(-1) == examples.labels)
    assert found.facts["crafting seconds"] == 0
    assert not (run.directory / "attacks").exists()


def test_a_noisy_prediction_has_a_ledger_for_the_cell_and_one_for_the_worst_case(run, examples, models):
    static, single, union = map(load_outcomes, evaluation.evaluate_cell(run, examples, cell("rcnn"), models))
    names = {path.name for path in (run.directory / "ledger").iterdir()}
    assert names == {f"rcnn-fgsm-linf-0.1-{form}.npz" for form in ("static", "predict", "predict-union")}
    assert [o.facts["role"] for o in (static, single, union)] == ["both", "cell", "union"]
    assert (single.selection.shape, single.scoring.shape) == ((0, 9), (1, 9))
    assert (union.selection.shape, union.scoring.shape) == ((2, 5), (3, 5))
    np.testing.assert_array_equal(union.rows, evaluation.drawn(run.config, 5))
    # The noise is strong enough to overturn some predictions, and it is drawn anew for each redraw.
    redrawn = np.concatenate([union.selection, union.scoring])
    assert len({row.tobytes() for row in redrawn}) > 1
    # Without noise, each of the images is scored as in the static form: they stand at their own rows.
    quiet = models | {"rcnn": models["rcnn"] | {"predict": models["rcnn"]["static"]}}
    other = Run(run.directory / "quiet", run.config)
    other.directory.mkdir()
    static, single, union = map(load_outcomes, evaluation.evaluate_cell(other, examples, cell("rcnn"), quiet))
    np.testing.assert_array_equal(single.scoring, static.scoring)
    np.testing.assert_array_equal(union.scoring, static.scoring[:, np.isin(static.rows, union.rows)].repeat(3, 0))


def test_a_finished_cell_is_not_done_again(run, examples, models, monkeypatch):
    calls = []
    attack = evaluation.evaluate.run_attack
    monkeypatch.setattr(evaluation.evaluate, "run_attack", lambda *a, **k: calls.append(1) or attack(*a, **k))
    paths = evaluation.evaluate_cell(run, examples, cell("rcnn"), models)
    assert calls == [1]  # one crafting serves all scorings
    before = {path: path.stat().st_mtime_ns for path in run.directory.rglob("*.*")}
    assert evaluation.evaluate_cell(run, examples, cell("rcnn"), models) == paths
    assert {path: path.stat().st_mtime_ns for path in run.directory.rglob("*.*")} == before
    # A ledger that went missing is made again from the images that are there.
    kept = load_outcomes(paths[1])
    paths[1].unlink()
    evaluation.evaluate_cell(run, examples, cell("rcnn"), models)
    np.testing.assert_array_equal(load_outcomes(paths[1]).scoring, kept.scoring)


def test_a_cell_that_was_stopped_names_the_commits_of_all_its_sittings(run, examples, models, monkeypatch):
    monkeypatch.setattr(provenance, "ROOT", run.directory)  # no checkout
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(run.directory.parent))
    monkeypatch.setenv("RBF_JAX_COMMIT", "first")
    with monkeypatch.context() as stopped:
        stopped.setattr(evaluation.evaluate, "survival", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            evaluation.evaluate_cell(run, examples, cell(), models)
    monkeypatch.setenv("RBF_JAX_COMMIT", "second")
    (path,) = evaluation.evaluate_cell(run, examples, cell(), models)
    assert load_outcomes(path).facts["commit"] == "first, second"
    # Who scores images that are there computed nothing of them, and leaves no trace for the next one.
    commits = {}
    for name in ("third", "fourth"):
        monkeypatch.setenv("RBF_JAX_COMMIT", name)
        path.unlink()
        shutil.rmtree(evaluation.scored_in(run, path))
        evaluation.evaluate_cell(run, examples, cell(), models)
        commits[name] = load_outcomes(path).facts["commit"]
    assert commits == {"third": "first, third", "fourth": "first, fourth"}
    (path,) = evaluation.evaluate_cell(run, examples, cell(attack="clean"), models)
    assert load_outcomes(path).facts["commit"] == "fourth"


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("weights", {"rcnn": model(2)}),
        ("source weights", {"cnn": model(2)}),
        ("settings", {"settings": {"steps": 3}}),
        ("examples", {"examples": 8}),
        ("redraws", {"scoring": 2}),
        ("seed", {"seed": 1}),
        ("profile", {"profile": "cpu"}),
    ],
)
def test_a_ledger_of_another_evaluation_is_refused(run, examples, models, what, change):
    transferred = cell("rcnn", source="cnn", count=5, forms=("predict",))
    (path,) = evaluation.evaluate_cell(run, examples, transferred, models)
    for name, value in change.items():
        if name in models:
            models[name] = value
        elif name in Cell._fields:
            transferred = transferred._replace(**{name: value})
        else:
            (run.config.attack if name == "scoring" else run.config)[name] = value
    with pytest.raises(ValueError, match=f"its {what} is .* Remove .* to evaluate anew") as error:
        evaluation.evaluate_cell(run, examples, transferred, models)
    assert str(path) in str(error.value)


def test_a_transferred_cell_takes_the_images_of_the_source(run, examples, models):
    transferred = cell("rcnn", source="cnn", forms=("static",))
    (path,) = evaluation.evaluate_cell(run, examples, transferred, models)
    assert path.name == "rcnn-from-cnn-fgsm-linf-0.1-static.npz"
    rows = evaluation.drawn(run.config, 9)
    images, labels = examples.images[rows], examples.labels[rows]
    attacked = fgsm(0, images, labels)
    np.testing.assert_allclose(evaluation.craft(run, examples, transferred, models), attacked, atol=1e-6)
    np.testing.assert_array_equal(load_outcomes(path).scoring, [logits(1, attacked).argmax(-1) == labels])
    # Once for all targets: what was kept serves another one.
    kept = {file: file.stat().st_mtime_ns for file in (run.directory / "attacks").rglob("*.npz")}
    evaluation.evaluate_cell(
        run, examples, transferred._replace(model="mean"), {"cnn": models["cnn"], "mean": model(3)}
    )
    assert {file: file.stat().st_mtime_ns for file in (run.directory / "attacks").rglob("*.npz")} == kept


@pytest.mark.parametrize(("crafted_on", "judged"), [("static", None), ("bpda", None), ("draw", "predict")])
def test_a_suite_on_noise_is_judged_by_the_prediction(run, examples, models, monkeypatch, crafted_on, judged):
    seen = {}

    def run_suite(key, suite, logits_fn, images, labels, **options):
        seen.update(options, suite=suite, logits_fn=logits_fn, images=images)
        return SimpleNamespace(images=images + 1)

    suite: Any = {"a": None, "b": None}
    monkeypatch.setitem(evaluation.KINDS, "autoattack", Kind("AutoAttack", lambda *_: suite, lambda s, n: 1))
    monkeypatch.setattr(evaluation.evaluate, "run_suite", run_suite)
    found = evaluation.craft(run, examples, cell("rcnn", "autoattack", crafted_on=crafted_on), models)
    rows = evaluation.drawn(run.config, 9)
    np.testing.assert_array_equal(seen["images"], examples.images[rows])
    np.testing.assert_array_equal(found, examples.images[rows] + 1)
    np.testing.assert_array_equal(seen["rows"], rows)
    assert seen["suite"] is suite
    assert seen["logits_fn"] is models["rcnn"][crafted_on]
    assert seen["judge"] is (models["rcnn"][judged] if judged else None)
    assert seen["redraws"][0] == run.config.attack.selection


def test_the_seed_decides_where_an_attack_begins(run, examples, models):
    wanted = cell("rcnn", "pgd", settings={"steps": 1, "step_size": 0.01, "restarts": 1}, count=TOTAL)

    def craft(folder, seed):
        run.config.seed = seed
        return evaluation.craft(Run(run.directory / folder, run.config), examples, wanted, models)

    first = craft("a", 0)
    assert np.abs(first - examples.images).max() <= EPSILON + 1e-6
    np.testing.assert_array_equal(craft("b", 0), first)
    assert np.all(np.abs(craft("c", 1) - first).max((1, 2, 3)) > 0.01)
