"""The catalogue of attacks, and the cells that a plan asks for."""

import jax
import numpy as np
import pytest
from attack_helpers import SHAPE, grey, linear, own_labels
from helpers import float64, quick_jit

from experiments import evaluation
from experiments.catalogue import FORWARD, KINDS, NORMS, ball, cells
from experiments.configs import cifar10, mnist, quickstart
from experiments.recipes import RECIPES
from experiments.rundir import Run
from rbf_jax.attacks import Composed, Iterative
from rbf_jax.types import LogitsFn

PROFILES = [
    *((module, profile) for module in (mnist, cifar10) for profile in ("smoke", "cpu", "gpu", "paper")),
    *((quickstart, profile) for profile in ("smoke", "cpu")),
]
BUDGETS = {"linf": 0.05, "l2": 0.2, "l1": 0.5}
SETTINGS = {
    "pgd": {"steps": 3, "restarts": 2},
    "mi_fgsm": {"steps": 3},
    "cw": {"searches": 2, "steps": 3, "initial_c": 0.01, "linf_steps": 4},
    "daa": {"steps": 3, "restarts": 2},
    "ead": {"searches": 2, "steps": 3},
    "apgd": {"steps": 10, "restarts": 2},
    "square": {"queries": 20},
    "spsa": {"steps": 2, "directions": 16},
    "bpda_eot": {"draws": 2, "steps": 3, "warm_up": 2},
    "adaptive": {"draws": 2, "steps": 3, "warm_up": 2},
}


@pytest.fixture(scope="module")
def model():
    rng = np.random.default_rng(0)
    return linear(rng.normal(size=(np.prod(SHAPE), 10)), rng.normal(size=10))


def everywhere(model: LogitsFn) -> dict[str, LogitsFn]:
    """The same in all forms."""
    return {"static": model, "draw": model, "bpda": model, "predict": model}


def make(kind, norm, model, **forms):
    return KINDS[kind].make(NORMS[norm], BUDGETS[norm], SETTINGS.get(kind, {}), everywhere(model) | forms)


# The attacks.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", NORMS)
def test_every_kind_is_an_attack_of_the_norm_and_radius(model, kind, norm):
    made = make(kind, norm, model)
    suite = made if isinstance(made, dict) else {kind: made}
    assert (kind == "clean") == (not suite)
    for attack in suite.values():
        assert isinstance(attack, Iterative | Composed)
        assert attack.norm.name == ("l1" if kind == "ead" else norm)  # EAD knows one norm
        if isinstance(attack, Iterative):
            assert attack.epsilon == BUDGETS[norm]
    assert KINDS[kind].passes(SETTINGS.get(kind, {}), norm) >= (0 if kind == "clean" else 1)
    assert KINDS[kind].title.format(**SETTINGS.get(kind, {}))


def run(attack, model, images, labels):
    result = quick_jit(attack)(jax.random.key(0), model, images, labels)
    return np.asarray(result.images), np.asarray(result.forwards), np.asarray(result.backwards)


@pytest.mark.parametrize(
    ("kind", "norm"),
    [
        *(("fgsm", "l2"), ("pgd", "linf"), ("square", "linf")),
        *(
            pytest.param(kind, norm, marks=pytest.mark.full)
            for kind, norm in (
                *(("mi_fgsm", "linf"), ("cw", "l2"), ("cw", "linf"), ("daa", "linf"), ("ead", "l1")),
                *(("apgd", "l2"), ("spsa", "linf"), ("pgd", "l1"), ("bpda_eot", "l1")),
            )
        ),
    ],
)
def test_passes_are_those_that_an_attack_makes(model, kind, norm):
    images = grey(0, 4)
    found, forwards, backwards = run(make(kind, norm, model), model, images, own_labels(model, images))
    order = {"linf": np.inf, "l2": 2, "l1": 1}[norm]
    lengths = np.linalg.norm((float64(found) - float64(images)).reshape(4, -1), order, -1)
    assert np.all(lengths <= BUDGETS[norm] + 1e-6)
    told = KINDS[kind].passes(SETTINGS.get(kind, {}), norm)
    if kind in ("square", "spsa"):
        # Forward passes alone; each counted as that part of a step with its gradient.
        assert not backwards.any()
        np.testing.assert_allclose(forwards * FORWARD, told, rtol=0.15)
    else:
        # APGD looks once more at each of its beginnings.
        assert np.all((backwards >= told) & (backwards <= 1.1 * told + 0.5))


def test_cw_seeks_the_least_distance_in_l2_alone(model):
    assert [getattr(make("cw", norm, model), "minimal", None) for norm in NORMS] == [False, True, False]


def two_classes(scale):
    """Logits whose gradient has the same sign everywhere."""
    half = scale * np.random.default_rng(1).normal(size=(np.prod(SHAPE), 1))
    return linear(np.concatenate([half, -half], 1), np.zeros(2)), np.sign(half).reshape(SHAPE)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("bpda_eot", "BPDA+EoT"),
        *(
            pytest.param("adaptive", name, marks=pytest.mark.full)
            for name in ("BPDA+EoT, margin", "exact EoT, margin", "mean softmax", "mean logits")
        ),
    ],
)
@pytest.mark.parametrize(("scale", "reached"), [(0.0, -1.0), (-1.0, 0.25)])
def test_noise_is_met_where_pgd_without_noise_ended(kind, name, scale, reached):
    """PGD ends in a corner of the ball; without a gradient the images stay there, against it they go 1.25 epsilon."""
    static, sign = two_classes(1.0)
    noisy, silent = two_classes(scale)[0], two_classes(0.0)[0]
    # Which form is attacked: the one that was handed over, or the suite's own BPDA form.
    given, own = (silent, noisy) if name == "BPDA+EoT, margin" else (noisy, silent)
    attack = make(kind, "linf", static, bpda=own, draw=silent)
    images, labels = grey(0, 3), np.zeros(3, np.int32)
    found, _, _ = run(attack[name] if isinstance(attack, dict) else attack, given, images, labels)
    np.testing.assert_allclose(found, images + reached * BUDGETS["linf"] * sign, atol=1e-6)


# The cells.


def planned(*plan, models=("cnn", "rcnn", "rcnn_plus", "threshold", "mean"), **counts):
    config = mnist.get_config("smoke")
    config.models, config.attack.plan, config.attack.beta2 = models, plan, (1.0,)
    config.attack.examples = {"default": 100, **{name.replace("_on_", " "): count for name, count in counts.items()}}
    return config


def cell(item, model, norm="linf", epsilon=0.3, most=10_000, **counts):
    config = planned(((model,), ((norm, epsilon),), (item,), most), **counts)
    (found,) = (cell for cell in cells(config) if cell.norm)
    return found


def test_each_model_is_scored_on_clean_images_first():
    config = planned(models=("rcnn", "cnn"), clean=300)
    first, second = cells(config)
    assert (first.name, first.scored_on, first.examples) == ("rcnn-clean", ("static", "predict"), 300)
    assert (second.name, second.scored_on) == ("cnn-clean", ("static",))
    assert (first.norm, first.epsilon, first.crafted_on, first.passes) == ("", 0.0, "", 0)


def test_a_plan_crosses_models_budgets_and_attacks():
    plan = ((("cnn", "rcnn"), (("linf", 0.3), ("l2", 2.0)), ("fgsm", "pgd"), 50), (("mean",), (), ("fgsm",), 50))
    found = [(c.model, c.source, c.attack, c.norm, c.epsilon) for c in cells(planned(*plan)) if c.norm]
    expected = {
        (model, model, attack, norm, epsilon)
        for model in ("cnn", "rcnn")
        for norm, epsilon in (("linf", 0.3), ("l2", 2.0))
        for attack in ("fgsm", "pgd")
    }
    assert len(found) == len(expected)
    assert set(found) == expected


def test_models_that_are_not_asked_for_are_left_out():
    plan = (("cnn", "rcnn"), (("linf", 0.3),), ("fgsm",), 50)
    assert {c.model for c in cells(planned(plan, models=("rcnn",)))} == {"rcnn"}


def test_a_cell_that_was_planned_before_is_not_planned_again():
    line = (("cnn",), (("linf", 0.3),), ("fgsm", "pgd"), 50)
    found = [c for c in cells(planned(line, (*line[:3], 20))) if c.norm]
    assert [(c.attack, c.examples) for c in found] == [("fgsm", 50), ("pgd", 50)]


def test_a_defended_model_is_attacked_without_noise_and_scored_with_it_too():
    found = cell("pgd", "rcnn")
    assert (found.crafted_on, found.scored_on) == ("static", ("static", "predict"))
    assert (found.name, found.folder) == ("rcnn-pgd-linf-0.3", "rcnn-pgd-linf-0.3-100")
    assert found.title == "PGD-5"
    assert found.settings == {"steps": 5, "restarts": 1}
    assert type(found.settings) is dict  # as it is kept and compared as JSON
    # The model that shows the trade-off is scored at the other levels of noise as well.
    assert cell("pgd", "rcnn_plus").scored_on == ("static", "predict", "predict@1")


@pytest.mark.parametrize(("kind", "form"), [("bpda_eot", "bpda"), ("adaptive", "draw"), ("autoattack_rand", "draw")])
def test_attacks_that_know_the_noise_are_crafted_and_scored_with_it(kind, form):
    found = cell(kind, "rcnn_plus")
    assert (found.crafted_on, found.scored_on) == (form, ("predict",))
    assert found.name == f"rcnn_plus-{kind}-linf-0.3"


def test_another_level_of_noise_stands_behind_an_at():
    found = cell("bpda_eot@1", "rcnn_plus")
    assert (found.attack, found.crafted_on, found.scored_on) == ("bpda_eot", "bpda@1", ("predict@1",))
    assert found.name == "rcnn_plus-bpda_eot-linf-0.3-bpda@1"
    assert found.settings == {"draws": 2, "steps": 2, "warm_up": 2}


def test_a_source_stands_behind_a_less_than():
    found = cell("pgd<cnn", "rcnn")
    assert (found.model, found.source, found.crafted_on) == ("rcnn", "cnn", "static")
    assert found.scored_on == ("static", "predict")
    assert (found.name, found.title) == ("rcnn-from-cnn-pgd-linf-0.3", "transfer PGD-5")
    # All its targets share the images, but the source's own attack has others: its examples leave when broken.
    assert found.folder == cell("pgd<cnn", "threshold").folder == "cnn-pgd-linf-0.3-100"
    assert cell("pgd", "cnn").folder == "cnn-pgd-linf-0.3-100-leaving"
    # A model's transfer to itself is the attack itself.
    assert cell("pgd<cnn", "cnn").name == "cnn-pgd-linf-0.3"


def test_a_front_without_a_gradient_is_attacked_through_the_identity():
    found = cell("pgd", "threshold")
    assert (found.crafted_on, found.scored_on, found.name) == ("bpda", ("static",), "threshold-pgd-linf-0.3-bpda")
    # Those that ask for no gradient attack the true model.
    assert cell("square", "threshold").crafted_on == cell("spsa", "threshold").crafted_on == "static"
    assert cell("pgd", "mean").crafted_on == "static"


@pytest.mark.parametrize(
    ("item", "norm", "counts", "most", "expected"),
    [
        ("pgd", "l2", {}, 10_000, 100),
        ("pgd", "l2", {"pgd": 40}, 10_000, 40),
        ("pgd", "l2", {"pgd": 40, "pgd_on_l2": 30}, 10_000, 30),
        ("pgd", "linf", {"pgd": 40, "pgd_on_l2": 30}, 10_000, 40),
        # Where it is transferred, images are cheap: other counts.
        ("pgd<cnn", "l2", {"pgd": 40, "pgd_on_l2": 30}, 10_000, 100),
        ("pgd<cnn", "l2", {"pgd": 40, "pgd<": 60}, 10_000, 60),
        ("bpda_eot@1", "linf", {"bpda_eot": 20}, 10_000, 20),
        # Never more than the line's most, nor than there are.
        ("pgd", "linf", {"pgd": 40}, 25, 25),
        ("pgd", "linf", {"pgd": 2_000}, 10_000, 500),
    ],
)
def test_how_many_images_an_attack_meets(item, norm, counts, most, expected):
    assert cell(item, "rcnn", norm, most=most, **counts).examples == expected


def test_no_images_leave_an_attack_out():
    assert [c.name for c in cells(planned((("cnn",), (("linf", 0.3),), ("pgd", "fgsm"), 50), pgd=0)) if c.norm] == [
        "cnn-fgsm-linf-0.3"
    ]


def test_broken_examples_leave_where_their_model_alone_sees_them_without_noise():
    assert [cell("pgd", model).leaves for model in ("cnn", "threshold", "mean", "rcnn")] == [True, True, True, False]
    assert not cell("pgd<cnn", "threshold").leaves


@pytest.mark.parametrize(("module", "profile"), PROFILES)
def test_every_planned_attack_can_be_made_and_has_files_of_its_own(module, profile, model, tmp_path):
    config = module.get_config(profile)
    run, paths, folders = Run(tmp_path, config), [], {}
    for found in cells(config):
        # What is removed before a model is published anew begins with its name.
        assert found.name.split("-")[0] == found.model
        paths += [evaluation.outcome_path(run, found, scoring) for scoring in evaluation.scorings(config, found)]
        if found.norm:
            assert KINDS[found.attack].make(NORMS[found.norm], found.epsilon, found.settings, everywhere(model))
            crafted = (*found[1:6], found.examples, found.settings, found.leaves)
            assert folders.setdefault(found.folder, crafted) == crafted
            assert found.source in config.models
            assert found.crafted_on in ("static", "bpda") or RECIPES[found.source].defended
    assert len(set(paths)) == len(paths)
    # Also where a file system does not tell capitals apart.
    assert len({str(path).lower() for path in paths}) == len(paths)


@pytest.mark.parametrize(
    ("norm", "epsilon", "expected"),
    [("linf", 0.031, "linf 0.031"), ("linf", 8 / 255, "linf 8/255"), ("l2", 0.5, "l2 0.5"), ("l1", 15.0, "l1 15")],
)
def test_a_budget_is_named_as_it_was_meant(norm, epsilon, expected):
    assert ball(norm, epsilon) == expected


@pytest.mark.parametrize("beta2", [0.0, 1.0, 1.75])
def test_a_level_that_is_the_model_s_own_has_no_other_name(beta2):
    """The sweep over beta2 that docs/scale.md shows: `learn.forms` has each level once."""
    config = mnist.get_config("cpu")
    config.beta2 = beta2
    others = [f"@{level:g}" for level in config.attack.beta2 if level != beta2]
    there = {"static", "", *(form + level for form in ("draw", "bpda", "predict") for level in ("", *others))}
    assert {form for cell in cells(config) for form in (*cell.scored_on, cell.crafted_on)} <= there
    assert len({cell.name for cell in cells(config)}) == len(list(cells(config)))
