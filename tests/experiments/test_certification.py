"""Certificates of a run: which settings, that nothing is done twice or mixed up, and what their table says."""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from ml_collections import ConfigDict
from scipy.stats import beta, norm

from experiments import certification, evaluation
from experiments.certification import Certificates, Setting
from experiments.learn import Examples
from experiments.rundir import Run
from rbf_jax.certify import ABSTAIN
from rbf_jax.evaluate import wilson_interval

SHAPE = (2, 2, 1)
SETTING = Setting("cnn", "static", 0.25, 400, 6)
TRACES = []


def _linear(weights, key, images):
    """Two classes: 1 where the mean of the pixels is above the threshold."""
    del key
    TRACES.append(images.shape)
    score = images.mean((1, 2, 3)) - weights
    return jnp.stack([-score, score], -1)


def linear(threshold=0.5):
    """A model whose boundary lies at an l2 distance of ``2 |mean - threshold|``: the mean has deviation sigma / 2."""
    return Partial(_linear, jnp.float32(threshold))


def _dice(probability, keys, images):
    """Class 1 with a probability, by each sample's own key alone."""
    del images
    ones = jax.vmap(lambda key: jax.random.bernoulli(key, probability))(keys).astype(jnp.int32)
    return jax.nn.one_hot(ones, 2)


def dice(probability=0.9):
    return Partial(_dice, jnp.float32(probability))


def configuration(**certify) -> Any:
    defaults = {
        "runs": ((400, 6, (("cnn", 0.25),)),),
        "n0": 20,
        "alpha": 0.01,
        "radii": (0.2,),
        "batch_size": 200,
    }
    config = {"seed": 3, "profile": "smoke", "models": ("cnn", "rcnn"), "examples": {"test": 40}}
    return ConfigDict(config | {"certify": defaults | certify})


def start(directory, **certify) -> Run:
    directory.mkdir(exist_ok=True)
    return Run(directory, configuration(**certify))


@pytest.fixture
def examples(rng) -> Examples:
    """Even images of 40 greys, in random order; all of class 1."""
    greys = rng.permutation(np.linspace(0.2, 0.8, 40, dtype=np.float32))
    return Examples(np.broadcast_to(greys[:, None, None, None], (40, *SHAPE)).copy(), np.ones(40, np.int32))


@pytest.fixture
def finished(tmp_path, examples) -> tuple[Run, Path]:
    run = start(tmp_path / "finished")
    return run, certification.run_setting(run, examples, SETTING, linear())


def figures(path):
    """All but the seconds."""
    found = certification.load(path)
    facts = {name: value for name, value in found.facts.items() if name != "seconds"}
    return [array.tolist() for array in found[:-1]], facts


def stop_at(monkeypatch, count) -> list[int]:
    """Makes the run stop at one of its images; returns those that are certified, as the keys' last words."""
    certify, seen = certification.certify, []

    def stopping(key, *arguments, **options):
        if len(seen) == count:
            raise KeyboardInterrupt
        seen.append(int(jax.random.key_data(key)[-1]))
        return certify(key, *arguments, **options)

    monkeypatch.setattr(certification, "certify", stopping)
    return seen


def test_settings_are_those_of_the_models_that_are_there():
    certified = (("cnn", 0.2), ("cnn", 0.3), ("rcnn", 0.3), ("madry", 0.2))
    found = list(
        certification.settings(configuration(runs=((5000, 10, certified), (9, 0, certified), (1000, 100, certified))))
    )
    assert found[:4] == [
        ("cnn", "static", 0.2, 5000, 10),
        ("cnn", "static", 0.3, 5000, 10),
        ("rcnn", "static", 0.3, 5000, 10),
        ("rcnn", "draw", 0.3, 5000, 10),
    ]
    assert found[4:] == [setting._replace(samples=1000, examples=40) for setting in found[:4]]


def test_certificates_of_a_linear_model(finished, examples):
    run, path = finished
    assert path == run.directory / "certificates" / "cnn-static-0.25-400.npz"
    found = certification.load(path)
    np.testing.assert_array_equal(found.rows, evaluation.drawn(run.config, 6))
    np.testing.assert_array_equal(found.truth, 1)
    distances = 2 * (examples.images[found.rows].mean((1, 2, 3)) - 0.5)
    assert (found.label == (distances > 0))[np.abs(distances) > 0.1].all()
    np.testing.assert_array_equal(found.counts.sum(-1), 400)
    shares = norm.cdf(distances / 0.25)
    assert (np.abs(found.counts[:, 1] - 400 * shares) < 4 * np.sqrt(400 * shares * (1 - shares)) + 1).all()
    for label, radius, counts in zip(found.label, found.radius, found.counts, strict=True):
        count = counts.max()
        lower = beta.ppf(0.01, count, 400 - count + 1)
        assert radius == pytest.approx(0.25 * norm.ppf(lower) if lower > 0.5 else 0)
        assert label == (counts.argmax() if lower > 0.5 else ABSTAIN)
    assert {name: found.facts[name] for name in Setting._fields} == SETTING._asdict()
    (record,) = run.records()
    assert (record["stage"], record["seconds"]) == ("certify", found.facts["seconds"])


def test_an_image_has_its_own_key_which_all_settings_share(tmp_path, examples, monkeypatch):
    seen = stop_at(monkeypatch, 8)
    run = start(tmp_path)
    certification.run_setting(run, examples, SETTING._replace(examples=4), dice())
    with pytest.raises(KeyboardInterrupt):
        certification.run_setting(run, examples, SETTING._replace(samples=300, examples=6), dice())
    key, small, large = jax.random.key(3 + 7), *(evaluation.drawn(run.config, count) for count in (4, 6))
    expected = [int(jax.random.key_data(jax.random.fold_in(key, row))[-1]) for row in [*small, *large[:4]]]
    assert seen == expected
    assert len(set(seen[:4])) == 4


def test_every_sample_of_a_draw_has_its_own_noise(tmp_path, examples):
    path = certification.run_setting(start(tmp_path), examples, SETTING, dice(0.9))
    ones = certification.load(path).counts[:, 1]
    assert (np.abs(ones - 360) < 4 * 6).all()  # draws shared by a batch would give 0, 200 or 400
    assert len(set(ones.tolist())) > 1


def test_n0_samples_pick_the_class(tmp_path, examples):
    # One sample of a class with probability 0.8 picks the other one now and then, and then it abstains; 100 do not.
    paths = [
        certification.run_setting(start(tmp_path / f"{n0}", n0=n0), examples, SETTING._replace(examples=20), dice(0.8))
        for n0 in (1, 100)
    ]
    one, hundred = (set(certification.load(path).label.tolist()) for path in paths)
    assert one == {1, ABSTAIN}
    assert hundred == {1}


def test_stopped_and_gone_on_it_ends_with_the_same_file(tmp_path, examples, finished, monkeypatch):
    run = start(tmp_path / "stopped")
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            certification.run_setting(run, examples, SETTING, linear())
    assert not list(run.directory.glob("certificates/*.npz"))
    seen = stop_at(monkeypatch, 2)
    path = certification.run_setting(run, examples, SETTING, linear())
    assert len(seen) == 2
    assert figures(path) == figures(finished[1])
    before = path.read_bytes()
    assert certification.run_setting(run, examples, SETTING, linear()) == path
    assert path.read_bytes() == before


OTHERS = {
    "weights": ({}, {}, SETTING, "weights"),
    "alpha": ({"alpha": 0.1}, {}, SETTING, "alpha is 0.01, not 0.1"),
    "n0": ({"n0": 10}, {}, SETTING, "n0 is 20, not 10"),
    "seed": ({}, {"seed": 4}, SETTING, "seed is 3, not 4"),
    "examples": ({}, {}, SETTING._replace(examples=7), "examples is 6, not 7"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_certificates_are_refused_until_they_are_removed(tmp_path, examples, finished, other):
    certify, changes, setting, wrong = OTHERS[other]
    run = start(tmp_path / "finished", **certify)
    run.config.update(changes)
    model = linear(0.4) if other == "weights" else linear()
    with pytest.raises(ValueError, match=wrong) as error:
        certification.run_setting(run, examples, setting, model)
    path = finished[1]
    assert str(error.value).endswith(f"Remove it and {path.with_suffix('')}")
    path.unlink()
    with pytest.raises(ValueError, match=f"Remove {path.with_suffix('')}"):
        certification.run_setting(run, examples, setting, model)
    for part in path.with_suffix("").iterdir():
        part.unlink()
    assert certification.run_setting(run, examples, setting, model) == path


def test_other_images_are_refused(tmp_path, examples, monkeypatch):
    stop_at(monkeypatch, 1)
    run = start(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        certification.run_setting(run, examples, SETTING, linear())
    with pytest.raises(ValueError, match="other attack, weights or images"):
        certification.run_setting(run, Examples(1 - examples.images, examples.labels), SETTING, linear())


@pytest.mark.parametrize("damage", ["half", "other"])
def test_a_damaged_file_is_named(finished, examples, damage):
    run, path = finished
    if damage == "half":
        path.write_bytes(path.read_bytes()[:300])
    else:
        np.savez(path, rows=np.arange(3))
    with pytest.raises(ValueError, match=f"{path} is not a file of certificates.*Remove it"):
        certification.run_setting(run, examples, SETTING, linear())
    path.unlink()
    certification.run_setting(run, examples, SETTING, linear())


def test_all_settings_take_their_model_and_compile_it_once(tmp_path, examples):
    certified = (("cnn", 0.25), ("cnn", 0.5), ("rcnn", 0.25))
    run = start(tmp_path, runs=((130, 2, certified), (90, 3, certified)), batch_size=64)
    # Class 1 always, or never.
    models: evaluation.Models = {
        "cnn": {"static": linear(-5)},
        "rcnn": {"predict": linear(), "static": linear(6), "draw": linear(-6)},
    }
    traces = len(TRACES)
    paths = certification.certify_all(run, examples, models)
    assert len(TRACES) - traces <= 3  # one compilation traces the shapes, and the loop
    found = {path.stem: certification.load(path) for path in paths}
    names = ("cnn-static-0.25", "cnn-static-0.5", "rcnn-static-0.25", "rcnn-draw-0.25")
    assert list(found) == [f"{name}-{samples}" for samples in (130, 90) for name in names]
    for samples, count in ((130, 2), (90, 3)):
        small, large, static, drawn = (found[f"{name}-{samples}"] for name in names)
        assert {len(each.rows) for each in (small, large, static, drawn)} == {count}
        assert (static.counts == [samples, 0]).all()
        for each in (small, large, drawn):
            assert (each.counts == [0, samples]).all()
        np.testing.assert_allclose(large.radius, 2 * small.radius)


def test_the_batch_size_may_change(tmp_path, examples, finished):
    path = certification.run_setting(start(tmp_path / "other", batch_size=64), examples, SETTING, linear())
    assert figures(path) == figures(finished[1])


def record(setting, label, radius, *, truth=None, alpha=0.001, counts=None, **facts):
    """Certificates of images of class 1."""
    rows = np.arange(len(label))
    truth = np.ones(len(label), int) if truth is None else np.asarray(truth)
    counts = np.zeros((len(label), 2), np.int32) if counts is None else np.asarray(counts, np.int32)
    more = {"alpha": alpha, "weights": setting.model, "seconds": 2.5, "commit": "abc"} | facts
    return Certificates(rows, truth, np.asarray(label), np.asarray(radius), counts, setting._asdict() | more)


BASELINE = Setting("cnn", "static", 0.2, 50_000, 5)
# Right at 0.4, 0.6 and 0.7 exactly, wrong at 0.72, abstained.
FIVE: Any = dict(label=[1, 1, 1, 0, ABSTAIN], radius=[0.4, 0.6, 0.7, 0.72, 0.0])


def test_numbers_of_a_row():
    (row,) = certification.make_rows([record(BASELINE, **FIVE)], "mnist", (0.5, 0.7, 1.0))
    clean, half, seven, one = row["certified"]
    assert [at["radius"] for at in row["certified"]] == [0, 0.5, 0.7, 1.0]
    assert [at["accuracy"] for at in row["certified"]] == [60.0, 40.0, 20.0, None]
    assert half["wilson95"] == pytest.approx([100 * end for end in wilson_interval(2, 5)], abs=1e-4)
    assert [at["paper"] for at in row["certified"]] == [None, 92.7, 84.4, 0.0]
    assert [at["difference"] for at in row["certified"]] == [None, -52.7, -64.4, None]
    assert (clean["paper"], one["wilson95"]) == (None, None)
    assert seven["wilson95"] == pytest.approx([100 * end for end in wilson_interval(1, 5)], abs=1e-4)
    assert (row["N"], row["abstained"], row["mean radius"]) == (5, 20.0, pytest.approx(1.7 / 5))
    # All samples agree with probability p^n: the largest p that they can exclude has p^n = alpha.
    assert row["ceiling"] == pytest.approx(0.2 * norm.ppf(math.exp(math.log(0.001) / 50_000)), abs=1e-4)
    assert (row["seconds"], row["weights"]) == (2.5, "cnn")


def test_prediction_is_from_the_same_counts():
    # Of 20 samples 3 or fewer tell the classes apart: P(X <= 3) = 0.0013, and of 2 P no more than alpha = 0.003.
    counts = [[0, 20], [3, 17], [4, 16], [20, 0], [17, 3]]
    (row,) = certification.make_rows([record(BASELINE, **FIVE, counts=counts, alpha=0.003)], "mnist", ())
    low, high = (round(100 * end, 4) for end in wilson_interval(2, 5))
    assert row["prediction"] == {"N": 5, "accuracy": 40.0, "wilson95": [low, high], "abstained": 20.0}
    (line,) = certification.table([row])[1]
    assert (line["PREDICT"], line["PREDICT abstained"]) == (f"40.0 ({low:.1f}-{high:.1f})", "20.0")


def test_table():
    records = [
        record(Setting("rcnn", "draw", 0.2, 50_000, 2), [1, 1], [0.71, 0.71]),
        record(BASELINE._replace(samples=10_000, examples=1), [1], [0.63]),
        record(Setting("rcnn", "static", 0.2, 50_000, 2), [1, 0], [0.6, 0.6], truth=[1, 0]),
        record(BASELINE, **FIVE),
    ]
    headings, lines = certification.table(certification.make_rows(iter(records), "mnist", (0.7, 1.0)))
    assert headings == [
        *("model", "sigma", "samples", "N", "radius 0", "radius 0.7", "paper's 0.7", "radius 1", "paper's 1"),
        *("abstained", "mean radius", "ceiling", "PREDICT", "PREDICT abstained"),
    ]
    assert all(list(line) == headings for line in lines)
    assert [(line["model"], line["samples"], line["N"]) for line in lines] == [
        ("CNN", "50000", "5"),
        ("CNN", "10000", "1"),
        ("rCNN, no noise", "50000", "2"),
        ("rCNN, one draw", "50000", "2"),
    ]
    baseline, fewer, static, drawn = lines
    low, high = (round(100 * end, 4) for end in wilson_interval(1, 5))
    assert baseline["radius 0.7"] == f"20.0 ({low:.1f}-{high:.1f})"
    assert baseline["paper's 0.7"] == "84.4 (-64.4)"
    # 0.2 x 3.6366 and 0.2 x 3.199: the quantiles of Cohen's Figure 2 at these n.
    assert (baseline["radius 1"], baseline["paper's 1"]) == ("above the ceiling 0.727", "0.0")
    assert (fewer["radius 0.7"], fewer["paper's 0.7"]) == ("above the ceiling 0.640", "not in the paper")
    assert (fewer["ceiling"], fewer["mean radius"], fewer["abstained"]) == ("0.640", "0.630", "0.0")
    assert (static["radius 0"][:5], static["radius 0.7"][:3]) == ("100.0", "0.0")
    assert (static["paper's 0.7"], drawn["paper's 0.7"]) == ("not in the paper", "85.3 (+14.7)")
    (of_quickstart, _) = certification.table(certification.make_rows(records, "quickstart", (0.7,)))
    assert not [heading for heading in of_quickstart if "paper" in heading]


@pytest.mark.parametrize(
    ("data_set", "setting", "radius", "number"),
    [
        # Read off Table VI, and Section IV for the deviations.
        ("mnist", ("cnn", "static", 0.2, 50_000, 9), 0.5, 92.7),
        ("mnist", ("rcnn", "draw", 0.2, 50_000, 9), 0.7, 85.3),
        ("mnist", ("rcnn_plus", "draw", 0.3, 50_000, 9), 1.0, 89.2),
        ("cifar10", ("cnn", "static", 0.1, 50_000, 9), 0.3, 8.1),
        ("cifar10", ("rcnn_plus", "draw", 0.1, 50_000, 9), 0.25, 47.2),
        # Other deviations, forms, samples, radii, models, data.
        ("mnist", ("cnn", "static", 0.3, 50_000, 9), 0.5, None),
        ("mnist", ("rcnn_plus", "draw", 0.2, 50_000, 9), 0.5, None),
        ("mnist", ("rcnn", "static", 0.2, 50_000, 9), 0.5, None),
        ("mnist", ("rcnn", "draw", 0.2, 10_000, 9), 0.5, None),
        ("mnist", ("rcnn", "draw", 0.2, 50_000, 9), 0.25, None),
        ("mnist", ("gaussian_02", "static", 0.2, 50_000, 9), 0.5, None),
        ("quickstart", ("cnn", "static", 0.2, 50_000, 9), 0.5, None),
    ],
)
def test_the_papers_number(data_set, setting, radius, number):
    assert certification.paper_number(data_set, Setting(*setting), radius) == number


def test_the_papers_numbers_of_noisy_models_are_of_its_level_of_noise():
    records = [record(BASELINE, **FIVE), record(Setting("rcnn", "draw", 0.2, 50_000, 2), [1, 1], [0.71, 0.71])]
    cnn, rcnn = certification.make_rows(records, "mnist", (0.7,), beta2=1.0)
    assert (cnn["certified"][1]["paper"], rcnn["certified"][1]["paper"]) == (84.4, None)


def test_two_weights_of_one_model_do_not_mix():
    records = [record(BASELINE, [1], [0.5]), record(BASELINE._replace(sigma=0.3), [1], [0.5], weights="other")]
    with pytest.raises(ValueError, match="several weights of one model"):
        certification.make_rows(records, "mnist", (0.5,))
