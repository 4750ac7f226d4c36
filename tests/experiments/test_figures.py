"""The figures of a report: which of them a configuration has, and that they show and say what was measured."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import float64, numpy_reconstruct, random_filters
from jax.tree_util import Partial
from scipy.special import log_softmax

from experiments import evaluation, figures
from experiments.configs import quickstart
from experiments.evaluation import Models
from experiments.learn import Examples
from experiments.rundir import Run
from rbf_jax import PRESETS, attacks, evaluate
from rbf_jax.types import AttackResult

COUNT = 24
BUDGETS = (("linf", 0.3), ("l2", 2.0), ("l1", 15.0))
# What each attack breaks: every so manieth image.
BREAKS = {("rcnn", "ead"): 2, ("rcnn", "cw"): 3, ("rcnn_plus", "ead"): 6, ("rcnn_plus", "cw"): 24}


def brightest(scale, key, images):
    """A model that sees the class whose pixel, one of the first ten, is the brightest."""
    del key
    return scale * images.reshape(len(images), -1)[:, :10]


def images_of(classes, rng):
    images = rng.uniform(0, 0.5, (len(classes), 6, 6, 1)).astype(np.float32)
    images.reshape(len(classes), -1)[np.arange(len(classes)), classes] = 1
    return images


def classes_of(images):
    return np.asarray(images).reshape(len(images), -1)[:, :10].argmax(-1)


def configured(models, plan):
    config = quickstart.get_config("smoke")
    config.examples.test, config.models, config.attack.plan = COUNT, models, plan
    config.attack.examples = {"default": COUNT}
    for kind in ("cw", "ead"):
        config.attack.settings[kind] = {"searches": 1, "steps": 1, "linf_steps": 1}
    return config


def pictures(figure):
    """Rows of images, by label, and their titles."""
    found, titles, label = {}, {}, ""
    for axes in figure.axes:
        label = axes.get_ylabel().replace("\n", " ") or label
        (image,) = axes.images
        found.setdefault(label, []).append(np.asarray(image.get_array())[..., None])
        titles.setdefault(label, []).append(axes.get_title().replace("\n", " "))
    return {label: np.stack(row) for label, row in found.items()}, titles


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The sections of a run with all of the paper's attacks, whose images are made up; and what goes with them."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, COUNT).astype(np.int32)
    test = Examples(images_of(labels, rng), labels)
    models = ("cnn", "rcnn", "rcnn_plus", "kmeans")
    plan = (
        (("kmeans", *models), BUDGETS, ("pgd<cnn", "pgd"), COUNT),
        (models, (("linf", 0.35), *BUDGETS[2:]), ("pgd", "ead"), COUNT),
        (models, BUDGETS[1:2], ("cw",), COUNT),
    )
    run = Run(tmp_path_factory.mktemp("run"), configured(models, plan))
    forms: Models = {name: {"static": Partial(brightest, jnp.float32(scale))} for scale, name in enumerate(models, 5)}
    attacked = {}

    def craft(run, examples, cell, models):
        if cell.attack == "pgd":
            budget = rng.uniform(-0.3, 0.3, examples.images.shape) * BUDGETS[0][1]
            attacked[cell.name] = np.clip(examples.images + budget, 0, 1).astype(np.float32)
        else:
            every = BREAKS[cell.model, cell.attack]
            wrong = images_of((labels + 1) % 10, rng)
            attacked[cell.name] = np.where(np.arange(COUNT)[:, None, None, None] % every, examples.images, wrong)
        return attacked[cell.name]

    filters = random_filters(rng, 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "craft", craft)
        return run, test, filters, forms, attacked, figures.sections(run, test, filters, forms)


def section(made, heading):
    (found,) = (section for section in made[-1] if heading in section[0])
    return found


def test_every_figure_of_the_paper_is_there_and_described(made):
    headings = [heading for heading, *_ in made[-1]]
    assert re.findall(r"Fig. (\d)", " ".join(headings)) == list("2333456")
    assert all(text.strip() and alt.strip() for _, text, _, alt in made[-1])
    assert len(set(headings)) == len(headings)
    assert {cell.split("-")[0] for cell in made[4]} == {"rcnn", "rcnn_plus"}  # nothing else is read


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_distances_are_those_of_the_defended_model_under_pgd(made, norm):
    run, test, filters, _, attacked, _ = made
    _, text, figure, _ = section(made, f"attacked in {norm} (Fig. 3)")
    budget = dict(BUDGETS)[norm]
    assert f"{COUNT} test images under PGD-5, {norm} {budget:g}, on rCNN," in text
    share = np.random.default_rng(run.config.seed).uniform(size=COUNT)
    images = attacked[f"rcnn-pgd-{norm}-{budget:g}"]
    beta1 = PRESETS[run.config.preset].test
    orders = {"linf": np.inf, "l2": 2, "l1": 1}
    points = {name: [] for name in orders}
    for one, other, part in zip(float64(test.images), float64(images), share, strict=True):
        moved = one + part * (other - one)
        rebuilt = numpy_reconstruct(filters, np.stack([one, moved]), beta1)
        for name, order in orders.items():
            points[name].append(
                [np.linalg.norm((b - a).ravel(), order) for a, b in ((one, moved), (rebuilt[0], rebuilt[1]))]
            )
    for axes, (name, expected) in zip(figure.axes, points.items(), strict=True):
        expected = np.array(expected)
        (drawn,) = axes.collections
        np.testing.assert_allclose(drawn.get_offsets(), expected, rtol=1e-3, atol=1e-5)
        ratios = expected[:, 1] / expected[:, 0]
        assert f"{name}: median ratio {np.median(ratios):.2f}, {np.mean(ratios > 1):.1%} above the diagonal" in text


def test_originals_stand_above_their_reconstructions(made):
    run, test, filters, _, attacked, _ = made
    rows, _ = pictures(section(made, "Originals")[2])
    images, beta1 = attacked["rcnn-pgd-linf-0.3"][:8], PRESETS[run.config.preset].test
    np.testing.assert_array_equal(rows["clean"], test.images[:8])
    np.testing.assert_array_equal(rows["attacked"], images)
    np.testing.assert_allclose(rows["rebuilt"], numpy_reconstruct(filters, test.images[:8], beta1), atol=1e-4)
    np.testing.assert_allclose(rows["attacked, rebuilt"], numpy_reconstruct(filters, images, beta1), atol=1e-4)


def test_the_images_that_most_attacks_broke_are_shown_with_their_classes(made):
    _, test, _, _, attacked, _ = made
    _, _, figure, _ = section(made, "Fig. 4")
    rows, titles = pictures(figure)
    # By how many of 2, 3, 6 and 24 divide the index, the first of equals.
    chosen = [0, 6, 12, 18, 2, 3, 4, 8]
    names = {
        "EAD, l1 15, on rCNN": "rcnn-ead-l1-15",
        "EAD, l1 15, on rCNN+": "rcnn_plus-ead-l1-15",
        "CW, l2 2, on rCNN": "rcnn-cw-l2-2",
        "CW, l2 2, on rCNN+": "rcnn_plus-cw-l2-2",
    }
    assert list(rows) == ["clean", *names]
    np.testing.assert_array_equal(rows["clean"], test.images[chosen])
    assert titles["clean"] == [str(label) for label in test.labels[chosen]]
    for title, cell in names.items():
        np.testing.assert_array_equal(rows[title], attacked[cell][chosen])
        assert titles[title] == [str(seen) for seen in classes_of(attacked[cell][chosen])]


def test_gradients_are_those_of_the_compared_models(made):
    rows, _ = pictures(section(made, "Fig. 5")[2])
    assert list(rows) == ["image", "CNN", "rCNN", "rCNN+"]
    np.testing.assert_array_equal(rows["image"], made[1].images[:8])
    for name in ("CNN", "rCNN", "rCNN+"):
        flat = rows[name].reshape(8, -1)
        assert (np.abs(flat[:, :10] - 0.5) > 1e-6).any(1).all()  # the loss hangs on these pixels alone
        np.testing.assert_allclose(flat[:, 10:], 0.5, atol=1e-6)


def drawn_losses(drawn):
    """Losses by panel and model, and the distances."""
    ((_, _, figure, _),) = [one for one in drawn if "loss around" in one[0]]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    lines = {axes.get_title(): dict(zip(labels, axes.get_lines(), strict=True)) for axes in figure.axes}
    found = {title: {name: np.asarray(line.get_ydata()) for name, line in of.items()} for title, of in lines.items()}
    return found, np.asarray(figure.axes[0].get_lines()[0].get_xdata())


def mean_loss(scale, images, labels):
    logits = scale * float64(images).reshape(len(images), -1)[:, :10]
    return -log_softmax(logits, -1)[np.arange(len(labels)), labels].mean()


def test_losses_along_the_gradient_and_towards_attacked_images(made, tmp_path):
    _, test, _, forms, _, drawn = made
    found, distances = drawn_losses(drawn)
    assert list(found) == ["up the gradient's sign", "along random signs"]  # APGD was not run
    up = found["up the gradient's sign"]
    # The loss grows with every pixel but the label's own; where it is 0 in float32 it has no gradient.
    signs = np.zeros((COUNT, 36))
    signs[:, :10] = 1
    signs[np.arange(COUNT), test.labels] = -1
    for scale, name in enumerate(("CNN", "rCNN", "rCNN+"), 5):
        moved = (np.clip(test.images + x * 0.3 * signs.reshape(test.images.shape), 0, 1) for x in distances)
        np.testing.assert_allclose(up[name], [mean_loss(scale, images, test.labels) for images in moved], rtol=1e-3)

    config = configured(("cnn", "rcnn"), ((("rcnn", "cnn"), (("linf", 0.3),), ("apgd",), COUNT),))
    config.attack.settings.apgd.steps = 7
    run = Run(tmp_path, config)
    towards = drawn_losses(figures._losses(run, test, {name: forms[name] for name in ("cnn", "rcnn")}))[0]
    assert list(towards)[2:] == ["towards APGD-7's image"]
    attack = attacks.apgd(attacks.Linf, epsilon=0.3, steps=7)
    for scale, (name, title) in enumerate({"cnn": "CNN", "rcnn": "rCNN"}.items(), 5):
        # Also those that are broken at once are driven on.
        images = attack(jax.random.key(1), forms[name]["static"], test.images, test.labels).images
        one = towards["towards APGD-7's image"][title]
        np.testing.assert_allclose(one[distances == 1], mean_loss(scale, images, test.labels), rtol=0.02)
        np.testing.assert_allclose(one[distances == 0], mean_loss(scale, test.images, test.labels), rtol=1e-4)


def test_images_far_beyond_the_budget_are_crafted_once(made):
    run, test, filters, forms, _, _ = made
    rows, titles = pictures(section(made, "Fig. 6")[2])
    assert list(rows) == ["clean", "CNN", "rCNN", "rCNN+"]
    np.testing.assert_array_equal(rows["clean"], test.images[:8])
    for name, row in rows.items():
        lengths = np.linalg.norm((float64(row) - float64(test.images[:8])).reshape(8, -1), axis=-1)
        assert (lengths <= 6 * (1 + 1e-6)).all()
        assert name == "clean" or (lengths > 1).all()
        assert titles[name] == [str(seen) for seen in classes_of(row)]
        assert (classes_of(row) == test.labels[:8]).all() == (name == "clean")
    kept = {path: path.stat().st_mtime_ns for path in run.directory.rglob("attacks/figure-6-*/0*.npz")}
    assert len(kept) == 3
    run = run._replace(config=configured(("cnn", "rcnn", "rcnn_plus"), ()))
    again = figures.sections(run, test, filters, forms)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    np.testing.assert_array_equal(pictures(again[-1][2])[0]["rCNN"], rows["rCNN"])
    with pytest.raises(ValueError, match="figure-6-cnn holds another computation"):
        figures.sections(run, test, filters, {"cnn": forms["rcnn"]})


def test_colour_images_have_the_paper_s_budget_and_names(made, tmp_path, monkeypatch):
    _, test, filters, forms, _, _ = made
    config, budgets = configured(("cnn",), ()), []
    config.set = "cifar10"

    def unchanged(key, attack, logits_fn, images, labels, *, batch_size, parts):
        budgets.append((attack.epsilon, parts.facts["epsilon"]))
        return AttackResult(images, *[np.zeros(len(images))] * 5)

    monkeypatch.setattr(evaluate, "run_attack", unchanged)
    _, text, figure, _ = figures.sections(Run(tmp_path, config), test, filters, {"cnn": forms["cnn"]})[-1]
    assert budgets == [(3, 3)]
    assert "PGD-100 in l2 within 3, 3 times" in text
    assert pictures(figure)[1]["clean"] == [figures.CIFAR10[label] for label in test.labels[:8]]


def test_the_studies_asked_for_are_drawn(made, tmp_path):
    _, test, filters, _, _, _ = made
    run = Run(tmp_path, configured(("rcnn", "cnn"), ((("cnn",), BUDGETS, ("pgd",), COUNT),)))
    assert len(figures.sections(run, test, filters, {})) == 1  # the filters
    run.config.studies = {"models": ("rcnn", "cnn"), "curves": {"l2": (0.3,)}, "steps": (1,), "examples": 5}
    run.config.attack.settings.apgd = {"steps": 1, "restarts": 1}
    curves = [
        {"model": model, "form": form, "norm": norm, "epsilon": epsilon, "accuracy": 90 - 100 * epsilon, "N": 200}
        for norm in ("l2", "linf")
        for model, form in (("rcnn", "predict"), ("rcnn", "static"), ("cnn", "static"))
        for epsilon in (0.3, 0.1, 0.2)
    ]
    shared = {"model": "cnn", "form": "static", "norm": "l1", "epsilon": 3}
    convergence = [
        shared | {"series": "steps", "steps": 100, "restarts": 1, "accuracy": 4, "N": 50},
        shared | {"series": "restarts", "steps": 100, "restarts": 5, "accuracy": 3, "N": 50},
        shared | {"series": "steps", "steps": 10, "restarts": 1, "accuracy": 5, "N": 40},
        shared | {"series": "noise", "steps": 40, "restarts": 2, "accuracy": 2, "N": 20},
    ]
    (tmp_path / "studies").mkdir()
    for name, rows in (("curves", curves), ("convergence", convergence)):
        (tmp_path / "studies" / f"{name}.json").write_text(json.dumps({"commit": "abc", "rows": rows}))
    _, *found = figures.sections(run, test, filters, {})
    assert [section[0].split(" the ")[1] for section in found] == ["budget", "attack's iterations", "attack's restarts"]
    assert [section[2].axes[0].get_xscale() for section in found] == ["linear", "log", "log"]
    for section, count in zip(found, ("200", "40 or 50", "50"), strict=True):
        assert f"of {count} test images" in section[1]
    first = found[0][2].axes
    assert [axes.get_title() for axes in first] == [r"$\ell_\infty$", r"$\ell_2$"]
    for axes in first:
        assert len(axes.lines) == 2
        for line in axes.lines:
            np.testing.assert_allclose(np.asarray(line.get_xydata()), [[0.1, 80], [0.2, 70], [0.3, 60]])
    (legend,) = found[0][2].legends
    assert [text.get_text() for text in legend.get_texts()] == ["rCNN, no noise", "CNN"]  # its attack knows no noise
    for section, expected in zip(found[1:], ([[10, 5], [100, 4]], [[5, 3]]), strict=True):
        (line,) = section[2].axes[0].lines
        np.testing.assert_array_equal(line.get_xydata(), expected)


def test_figures_are_kept_with_what_is_said_of_them(made, tmp_path):
    *_, drawn = made
    paths = figures.save(tmp_path, drawn)
    told = json.loads((tmp_path / "figures.json").read_text())
    assert [(each["heading"], each["text"], each["alt"]) for each in told] == [(h, t, a) for h, t, _, a in drawn]
    assert [tmp_path / each["file"] for each in told] == paths[:-1]
    assert len({path.name for path in paths}) == len(drawn) + 1
    for path in paths[:-1]:
        assert path.read_bytes().startswith(b"\x89PNG")
