"""Tables: the paper's number beside the right cell, worst cases, and what a row says."""

import json
import math
import re
import shutil

import jsonschema
import numpy as np
import pytest

from experiments import gains, paper_tables, results, tables
from experiments.configs import mnist
from experiments.provenance import ROOT
from rbf_jax.evaluate import Outcomes, save_outcomes, wilson_interval


@pytest.mark.parametrize(
    ("cell", "number"),
    [
        # Read off Tables I, III and V of the paper.
        (("mnist", "rcnn", "predict", "clean", "", 0.0), 99.6),
        (("mnist", "rcnn", "predict", "fgsm", "linf", 0.3), 94.7),
        (("mnist", "rcnn", "predict", "pgd", "linf", 0.3), 78.3),
        (("mnist", "rcnn_plus", "predict", "pgd", "linf", 0.3), 94.9),
        (("cifar10", "rcnn", "predict", "mi_fgsm", "linf", 0.031), 65.8),
        (("mnist", "rcnn_plus", "predict", "cw", "linf", 0.3), 91.1),
        (("mnist", "rcnn", "predict", "daa", "linf", 0.3), 41.5),
        (("mnist", "rcnn", "predict", "bpda_eot", "linf", 0.3), 39.4),
        (("cifar10", "rcnn_plus", "predict", "spsa", "linf", 0.031), 67.6),
        (("mnist", "rcnn", "predict", "transfer_fgsm", "linf", 0.3), 77.9),
        (("mnist", "rcnn", "predict", "transfer_pgd", "linf", 0.3), 39.6),
        (("cifar10", "rcnn", "predict", "transfer_cw", "linf", 0.031), 76.5),
        (("cifar10", "rcnn", "predict", "pgd", "linf", 0.031), 63.1),
        (("cifar10", "rcnn_plus", "predict", "clean", "", 0.0), 85.1),
        (("mnist", "cnn", "static", "pgd", "linf", 0.3), 0.0),
        (("mnist", "rcnn", "predict", "pgd", "l2", 2.0), 80.0),
        (("mnist", "rcnn", "predict", "bpda_eot", "l2", 2.0), 64.2),
        (("cifar10", "rcnn_plus", "predict", "transfer_cw", "l2", 1.0), 79.5),
        (("mnist", "rcnn", "predict", "ead", "l1", 15.0), 69.9),
        (("mnist", "rcnn_plus", "predict", "transfer_ead", "l1", 15.0), 99.3),
        (("mnist", "madry", "static", "ead", "l1", 15.0), 90.4),
        (("mnist", "madry", "static", "transfer_pgd", "l1", 15.0), 97.9),
        (("mnist", "madry", "static", "cw", "l2", 2.0), 91.0),
        (("cifar10", "madry", "static", "pgd", "l1", 20.0), 34.5),
        # The strongest attack on Madry's (Table III), and PGD on it beyond the budget (Table IV).
        (("mnist", "madry", "static", "daa", "linf", 0.3), 88.6),
        (("mnist", "madry", "static", "pgd", "linf", 0.3), None),
        (("mnist", "madry", "static", "pgd", "linf", 0.35), 42.9),
        (("cifar10", "madry", "static", "pgd", "linf", 0.05), 25.7),
        (("cifar10", "madry", "static", "apgd", "linf", 0.05), None),
        (("mnist", "madry", "static", "pgd", "linf", 0.4), None),
        # Not in the paper: other budgets, the rCNN without noise, the baseline's other cells, other
        # models, FGSM in l2, CW in l1, and what it leaves blank.
        (("mnist", "rcnn", "predict", "pgd", "linf", 0.35), None),
        (("mnist", "rcnn", "predict", "pgd", "l1", 10.0), None),
        (("cifar10", "rcnn", "predict", "pgd", "l2", 2.0), None),
        (("mnist", "rcnn", "static", "pgd", "linf", 0.3), None),
        (("mnist", "rcnn", "predict@1", "pgd", "linf", 0.3), None),
        (("mnist", "rcnn_plus", "predict@3", "pgd", "linf", 0.3), None),
        (("mnist", "rcnn_plus", "predict@1", "pgd", "linf", 0.35), None),
        (("mnist", "rcnn_plus", "predict@1", "fgsm", "linf", 0.3), None),
        (("mnist", "rcnn_plus", "predict", "fgsm", "linf", 0.3, 1.0), None),
        (("mnist", "rcnn", "predict", "pgd", "linf", 0.3, 1.0), None),
        (("mnist", "rcnn_plus", "static", "bpda_eot", "l2", 2.0), None),
        # Other levels of noise, by name or because the model's own is another.
        (("mnist", "rcnn_plus", "predict@1", "pgd", "linf", 0.3), 93.1),
        (("mnist", "rcnn_plus", "predict", "pgd", "linf", 0.3, 1.0), 93.1),
        (("mnist", "rcnn_plus", "predict@1.75", "pgd", "linf", 0.3, 1.0), 94.9),
        (("mnist", "rcnn_plus", "static", "transfer_pgd", "linf", 0.3), 93.7),
        (("cifar10", "rcnn_plus", "static", "clean", "", 0.0), 89.2),
        (("cifar10", "rcnn_plus", "predict@1.5", "bpda_eot", "linf", 0.031), 50.6),
        (("mnist", "cnn", "static", "clean", "", 0.0), None),
        (("mnist", "cnn", "static", "fgsm", "linf", 0.3), None),
        (("mnist", "cnn", "static", "pgd", "l2", 2.0), None),
        (("mnist", "cnn_plus", "static", "pgd", "linf", 0.3), None),
        (("mnist", "rcnn_at", "predict", "pgd", "l2", 2.0), None),
        (("mnist", "rcnn_seed1", "predict", "clean", "", 0.0), None),
        (("mnist", "madry", "static", "clean", "", 0.0), None),
        (("mnist", "madry", "static", "bpda_eot", "l2", 2.0), None),
        (("mnist", "rcnn", "predict", "fgsm", "l2", 2.0), None),
        (("mnist", "rcnn", "predict", "cw", "l1", 15.0), None),
        (("mnist", "rcnn", "predict", "apgd", "linf", 0.3), None),
        (("mnist", "rcnn", "predict", results.WORST, "linf", 0.3), None),
        (("mnist", "rcnn", "predict", results.UNION, "", 0.0), None),
        (("quickstart", "rcnn", "predict", "clean", "", 0.0), None),
    ],
)
def test_the_papers_number(cell, number):
    assert results.paper_number(*cell) == number


TITLES = {
    **{"fgsm": "FGSM", "pgd": "PGD-9", "clean": "clean"},
    **{"bpda_eot": "BPDA+EoT", "ead": "EAD", "autoattack": "AutoAttack", "square": "Square", "spsa": "SPSA"},
}


ORIGIN = {"commit": "abc", "device": "cpu", "cores": 2, "jax": "0"}


def outcomes(attack, survived, *, rows=None, selection=None, **changes):
    """A ledger of the rCNN's prediction, or of another model and form."""
    survived = np.asarray(survived, bool)
    rows = np.arange(survived.shape[1]) if rows is None else np.asarray(rows)
    selection = np.zeros((0, len(rows)), bool) if selection is None else np.asarray(selection, bool)
    facts = {"model": "rcnn", "scored_on": "predict", "attack": attack, "norm": "linf", "epsilon": 0.3, "role": "both"}
    facts |= {"norm": "", "epsilon": 0.0, "role": "cell"} if attack == "clean" else {}
    facts |= changes
    facts = {"title": TITLES[attack], "source": facts["model"], "weights": facts["model"]} | facts
    took = {"crafted_on": "static", "crafting seconds": 1.5, "scoring seconds": 2}
    return Outcomes(rows, selection, survived, took | facts | ORIGIN)


CNN = {"model": "cnn", "scored_on": "static"}
L2 = {"norm": "l2", "epsilon": 2.0}


def of(rows, attack):
    """N, accuracy in percent, and the attacks of the rows of that name."""
    return [(row["N"], row["accuracy"], row["attacks"]) for row in rows if row["attack"] == attack]


# Rows.


def test_percentages_are_rounded_once():
    """The upper end for none of 30 is 11.351...: by way of 11.35 it would be printed as 11.3."""
    assert results.percent(results.measured(np.zeros((1, 30), bool))) == "0.0 (0.0-11.4)"


def test_a_row_is_the_mean_over_redraws():
    # How many redraws selected and scored is a fact of the ledger, too.
    (row,) = results.make_rows("mnist", [outcomes("clean", [[1, 1, 0, 1], [1, 0, 0, 1]], redraws=[0, 2])])
    assert (row["N"], row["redraws"], row["accuracy"], row["deviation over redraws"]) == (4, 2, 62.5, 12.5)
    assert row["wilson95"] == pytest.approx([100 * end for end in wilson_interval(0.625 * 4, 4)], abs=1e-4)
    assert (row["paper"], row["difference"]) == (99.6, -37.1)
    assert (row["commit"], row["crafting seconds"]) == ("abc", 1.5)


def test_a_transferred_attack_is_not_the_models_own():
    own, transferred = results.make_rows(
        "mnist", [outcomes("pgd", [[1, 1]], role="cell"), outcomes("pgd", [[1, 1]], role="cell", source="cnn")]
    )
    assert (own["paper"], transferred["paper"]) == (78.3, 39.6)
    assert (own["source"], transferred["source"]) == ("rcnn", "cnn")


def test_roles_say_what_a_ledger_counts_for():
    ledger = [
        outcomes("pgd", [[1, 1, 0, 0]], role="cell"),
        outcomes("pgd", [[1, 1], [0, 0]], rows=[0, 2], selection=[[1, 0]], role="union"),
        outcomes("fgsm", [[1, 0], [1, 0]], rows=[0, 2], selection=[[1, 1]], role="both"),
    ]
    single = [(row["attack"], row["N"]) for row in results.make_rows("mnist", ledger) if row["attack"] in TITLES]
    assert single == [("pgd", 4), ("fgsm", 2)]
    # Example 0 falls to neither on selection: the first of equals scores, PGD. Example 2 falls to PGD.
    assert of(results.make_rows("mnist", ledger), results.WORST) == [(2, 50.0, ["FGSM", "PGD-9"])]
    assert not of(results.make_rows("mnist", ledger[:2]), results.WORST)


def test_two_weights_of_one_model_do_not_mix():
    # Each form has arrays of its own, each model too.
    results.make_rows(
        "mnist", [outcomes("fgsm", [[1]], weights=form, scored_on=form) for form in ("static", "predict")]
    )
    with pytest.raises(ValueError, match=r"ledger of mnist holds several weights of one model: remove"):
        results.make_rows("mnist", [outcomes("fgsm", [[1]]), outcomes("pgd", [[1]], weights="other")])


# Worst cases.


def test_the_worst_case_is_picked_on_other_redraws_than_it_is_scored_on():
    # Example 0 falls to the first attack on the selection redraws, 1 to the second; 2 to none.
    first = outcomes("fgsm", [[0, 1, 1], [1, 1, 1]], selection=[[0, 1, 1]])
    second = outcomes("pgd", [[1, 0, 1], [1, 0, 0]], selection=[[1, 0, 1]])
    worst = results.make_rows("mnist", [first, second])[-1]
    assert (worst["attack"], worst["title"], worst["norm"], worst["epsilon"]) == (
        results.WORST,
        results.WORST,
        "linf",
        0.3,
    )
    # Scored: example 0 on the first attack (0, 1), 1 on the second (0, 0), 2 on the first of equals (1, 1).
    assert worst["accuracy"] == pytest.approx(100 * 3 / 6)
    assert worst["paper"] is None
    second.facts.update(commit="abd, abc", device="gpu", jax="1")
    worst = results.make_rows("mnist", [first, second])[-1]
    assert (worst["commit"], worst["device"], worst["jax"]) == ("abc, abd", "cpu, gpu", "0, 1")
    assert "crafting seconds" not in worst


def test_the_worst_case_takes_the_examples_that_all_have_seen():
    first = outcomes("fgsm", [[1, 0, 1, 1]], rows=[2, 4, 6, 8], **CNN)
    second = outcomes("pgd", [[1, 0, 1]], rows=[4, 6, 7], **CNN)
    # Common are 4 (0, 1) and 6 (1, 0): both fall.
    assert (2, 0.0, ["FGSM", "PGD-9"]) in of(results.make_rows("mnist", [first, second]), results.WORST)


def test_worst_cases_go_on_to_fewer_examples_and_more_attacks():
    ledger = [
        outcomes("fgsm", [[1, 1, 1, 1, 0, 1, 1, 1]], **CNN),
        outcomes("pgd", [[1, 1, 0, 1]], rows=[0, 2, 4, 6], **CNN),
        outcomes("bpda_eot", [[0, 1, 1]], rows=[0, 2, 4], **CNN),
        outcomes("ead", [[0, 0]], rows=[0, 2], **CNN),
    ]
    # One attack alone met all eight; two of them met four: 2 and 6 and 0 are left, 4 fell to both.
    both = (4, 75.0, ["FGSM", "PGD-9"])
    three, all_four = ["BPDA+EoT", "FGSM", "PGD-9"], ["BPDA+EoT", "EAD", "FGSM", "PGD-9"]
    found = of(results.make_rows("mnist", ledger), results.WORST)
    assert found == [both, (3, pytest.approx(100 / 3, abs=0.01), three), (2, 0.0, all_four)]
    assert of(results.make_rows("mnist", ledger[:2]), results.WORST) == [both]
    assert of(results.make_rows("mnist", ledger[:1]), results.WORST) == []


def test_worst_cases_are_of_one_model_form_and_budget():
    ledger = [
        outcomes("fgsm", [[1, 0]], **CNN),
        outcomes("pgd", [[0, 1]], model="rcnn", scored_on="static"),
        outcomes("pgd", [[0, 1]], **CNN, epsilon=0.2),
        outcomes("pgd", [[0, 1]], **CNN, norm="l2"),
    ]
    assert of(results.make_rows("mnist", ledger), results.WORST) == []


def test_the_worst_case_over_norms_takes_the_attacks_of_all_its_budgets():
    ledger = [
        outcomes("fgsm", [[1, 1, 0, 1]], **CNN),
        outcomes("pgd", [[1, 0, 1, 1]], **CNN, **L2),
        outcomes("ead", [[0, 0, 0, 0]], **CNN, norm="l1", epsilon=15.0),
    ]
    rows = results.make_rows("mnist", ledger, [{"linf": 0.3, "l2": 2.0}, {"linf": 0.3, "l2": 1.0}])
    assert of(rows, results.UNION) == [(4, 50.0, ["l2 2: PGD-9", "linf 0.3: FGSM"])]
    assert paper_tables.unions(paper_tables.Rows(rows))[1][-1]["attacks"] == "1 of l2 2, 1 of linf 0.3"
    assert (rows[-1]["title"], rows[-1]["norm"]) == ("worst over norms: linf 0.3, l2 2", "")
    assert (rows[-1]["model"], rows[-1]["scored_on"], rows[-1]["weights"]) == ("cnn", "static", "cnn")


def test_no_worst_case_over_norms_leaves_a_norm_out():
    """On many examples one norm's attacks were run alone: their worst case is not one over norms."""
    ledger = [
        outcomes("fgsm", [[1, 1, 1, 1]], **CNN),
        outcomes("pgd", [[1, 1, 1, 1]], **CNN),
        outcomes("pgd", [[0, 1]], rows=[0, 1], **CNN, **L2),
    ]
    rows = results.make_rows("mnist", ledger, [{"linf": 0.3, "l2": 2.0}])
    assert [(n, accuracy) for n, accuracy, _ in of(rows, results.UNION)] == [(2, 50.0)]


# Tables.


def test_the_table_has_a_line_for_each_attack_and_budget():
    ledger = [
        outcomes("fgsm", [[0, 1]], **CNN),
        outcomes("fgsm", [[0, 1]], scored_on="static"),
        outcomes("fgsm", [[0, 1]]),
        outcomes("clean", [[1, 1]]),
    ]
    headings, (clean, fgsm) = results.table(results.make_rows("quickstart", ledger))
    assert headings == ["attack", "N", "CNN", "rCNN, no noise", "rCNN"]
    assert (clean["attack"], clean["CNN"]) == ("clean", "")
    assert (fgsm["attack"], fgsm["N"]) == ("FGSM, linf 0.3", "2")
    assert fgsm["rCNN, no noise"].startswith("50.0 (")


def test_a_quoted_number_says_how_far_ours_lies_above_it():
    assert results.quoted({"accuracy": 50.0}, 94.7) == "94.7 (-44.7)"
    assert results.quoted(None, 94.7) == "94.7"
    assert results.quoted({"accuracy": 50.0}, None) == "not in the paper"


def test_the_seconds_of_a_cell_are_those_of_all_its_redraws():
    """Many images are scored once, few of them often: in two ledgers."""
    parts = [
        outcomes("fgsm", [[0, 1]], role="cell", **{results.SCORED: 3.0}),
        outcomes("fgsm", [[0, 1]], role="union", **{results.SCORED: 4.5}),
        outcomes("fgsm", [[0, 1]], scored_on="static", role="both", **{results.SCORED: 1.0}),
        outcomes("pgd", [[0, 1]], role="both", **{results.SCORED: 7.0}),
    ]
    rows = [row for row in results.make_rows("mnist", parts) if row["attack"] != results.WORST]
    assert [row[results.SCORED] for row in rows] == [7.5, 1.0, 7.0]


def test_lines_and_columns_have_their_order():
    forms = ("predict@1", "predict", "static")
    ledger = [outcomes("pgd", [[1, 1]], model="rcnn_plus", scored_on=form, role="cell") for form in forms]
    ledger += [
        outcomes("pgd", [[1, 1]], model="threshold", scored_on="static", **L2),
        outcomes("pgd", [[1, 1]], **CNN, epsilon=0.35),
        outcomes("fgsm", [[1, 1]], model="threshold", scored_on="static", source="cnn", title="transfer FGSM"),
        outcomes("fgsm", [[1, 1]], model="threshold", scored_on="static"),
        outcomes("clean", [[1, 1]], model="threshold", scored_on="static"),
    ]
    rows = results.make_rows("mnist", ledger, [{"linf": 0.3, "l2": 2.0}])
    headings, lines = results.table(rows)
    titles = ("rCNN+, no noise", "rCNN+", "rCNN+, beta2 1")
    assert headings == ["attack", "N", "CNN", *titles, "threshold at 0.5"]
    assert [line["attack"] for line in lines] == [
        "clean",
        *("FGSM, linf 0.3", "PGD-9, linf 0.3", "transfer FGSM, linf 0.3", "worst of these, linf 0.3"),
        *("PGD-9, linf 0.35", "PGD-9, l2 2", "worst over norms: linf 0.3, l2 2"),
    ]


# What `make tables` writes.


def job(folder):
    """A folder of results with one model and one cell."""
    recipe = {"history": {"loss": [1], "accuracy": [0.5], "validation": [0.75]}, "seconds an epoch": 2.5}
    config = mnist.get_config("smoke").to_dict()
    origin = {"commit": "abc", "device": "cpu", "cores": 2, "jax": "0"}
    record = origin | {"config": config | {"title": "A title", "draws": 7}, "filters": 23, "seconds": {"filters": 3.0}}
    (folder / "models").mkdir(parents=True)
    (folder / "job.json").write_text(json.dumps(record))
    (folder / "models" / "rcnn.json").write_text(json.dumps(origin | recipe | {"config": config}))
    save_outcomes(folder / "ledger" / "a.npz", outcomes("clean", [[1, 1, 0]]))


def test_tables_come_from_the_ledger_alone(tmp_path):
    job(tmp_path / "mnist")
    tables.main(tmp_path)
    page = (tmp_path / "mnist" / "README.md").read_text()
    for text in ("# A title", "66.7 (", "99.6 (-32.9)", "23 filters", "75.00", "commit abc", "7 noisy draws"):
        assert text in page
    record = json.loads((tmp_path / "mnist" / "results.json").read_text())
    assert record["rows"][0]["accuracy"] == 66.6667
    again = (tmp_path / "mnist" / "results.json").read_bytes()
    tables.main(tmp_path)
    assert (tmp_path / "mnist" / "results.json").read_bytes() == again
    assert (tmp_path / "mnist" / "README.md").read_text() == page


def test_what_is_committed_is_what_the_ledgers_say(tmp_path):
    shutil.copytree(ROOT / "results", tmp_path / "results")
    shutil.copy(ROOT / "README.md", tmp_path / "README.md")
    tables.main(tmp_path / "results")
    for path in (ROOT / "README.md", *(ROOT / "results").rglob("*.md"), *(ROOT / "results").rglob("results.json")):
        assert (tmp_path / path.relative_to(ROOT)).read_bytes() == path.read_bytes(), path


def test_a_gain_is_of_all_attacks_on_the_images_that_met_them_all():
    """Two attacks on each; by hand the worst case on images 4 and 7, which all four met, over two redraws."""
    noisy = {"selection": [[1, 1, 1]], "rows": [2, 4, 7], "scored_on": "static"}
    ledger = [
        outcomes("pgd", [[0, 1, 1], [0, 1, 0]], **noisy),
        outcomes("square", [[0, 0, 1], [0, 0, 1]], **noisy | {"selection": [[1, 0, 1]]}),
        outcomes("pgd", [[0, 0, 0]], **noisy, role="cell"),  # no part of worst cases
        outcomes("pgd", [[0, 0, 0]], **noisy, **L2),
        outcomes("pgd", [[1, 0, 0, 1]], rows=[3, 4, 5, 7], **CNN),
        outcomes("square", [[1, 0, 1]], rows=[4, 7, 8], **CNN),
    ]
    rcnn, cnn, linf = ("rcnn", "static"), ("cnn", "static"), ("linf", 0.3)
    # The rCNN: image 4 falls to Square in both redraws; 7 stands, by Square (both attacks leave it, Square is the
    # stronger one on the selection). The CNN: 4 falls to PGD, 7 to Square.
    found, back = gains.gain(ledger, rcnn, cnn, *linf), gains.gain(ledger, cnn, rcnn, *linf)
    # Differences 0 and 1, and one of either sign halved: mean 1 / 4, mean square 2 / 4.
    half = 1.959964 * math.sqrt((2 / 4 - 1 / 16) / 4)
    ends = (pytest.approx(100 * (1 / 4 + side * half), abs=0.01) for side in (-1, 1))
    assert found is not None
    assert found == (50.0, *ends, 2, 2)
    assert back == (-50.0, -found.high, -found.low, 2, 2)
    assert gains.gain(ledger, rcnn, cnn, "l2", 2.0) is None
    # What only one of them met says nothing of the other.
    assert gains.gain([*ledger, outcomes("ead", [[0, 0, 0]] * 2, **noisy)], rcnn, cnn, *linf) == found
    strangers = [outcomes("square", [[1]], scored_on="static"), outcomes("spsa", [[1]], **CNN)]
    assert gains.gain(strangers, rcnn, cnn, *linf) is None
    apart = [outcomes("square", [[1]], rows=[0], scored_on="static"), outcomes("square", [[1]], rows=[1], **CNN)]
    assert gains.gain(apart, rcnn, cnn, *linf) is None


def test_a_gain_under_gradients_alone_is_not_known():
    """What such attacks leave of one model and not of the other may be hidden gradients."""
    rcnn, cnn, linf = {"scored_on": "static"}, CNN, ("linf", 0.3)
    ledger = [outcomes("pgd", [[1, 1]], **rcnn), outcomes("pgd", [[0, 0]], **cnn)]
    both = ("rcnn", "static"), ("cnn", "static")
    assert gains.gain(ledger, *both, *linf) is None
    # Where they leave nothing there is nothing hidden.
    nothing = [outcomes("pgd", [[0, 0]], **rcnn), outcomes("pgd", [[0, 0]], **cnn)]
    assert (gains.gain(nothing, *both, *linf) or (None,))[0] == 0.0
    ledger.append(outcomes("autoattack", [[0, 0]], **rcnn))
    assert gains.gain(ledger, *both, *linf) is None
    ledger.append(outcomes("autoattack", [[0, 0]], **cnn))
    found = gains.gain(ledger, *both, *linf)
    assert found is not None
    assert (found.points, found.attacks) == (0.0, 2)


@pytest.mark.parametrize(("third", "images", "attacks"), [(0, 8, 1), (1, 2, 2)])
def test_where_fewer_attacks_leave_nothing_their_images_count(third, images, attacks):
    ledger = [
        outcomes("pgd", [[0, 0, third, 0, 0, 0, 0, 0]], scored_on="static"),
        outcomes("pgd", [[0] * 8], **CNN),
        *(outcomes("square", [[0, 0]], rows=[0, 7], **of) for of in ({"scored_on": "static"}, CNN)),
    ]
    found = gains.gain(ledger, ("rcnn", "static"), ("cnn", "static"), "linf", 0.3)
    assert found is not None
    assert (found.points, found.images, found.attacks) == (0.0, images, attacks)


def test_what_noise_gains_is_known_once_an_attack_averages_over_it():
    rcnn, noise, linf = ("rcnn", "static"), ("rcnn", "predict"), ("linf", 0.3)
    ledger = [
        outcomes("square", [[0, 1, 0, 0]], scored_on="static"),
        outcomes("square", [[1, 1, 1, 0]], selection=[[1, 1, 1, 0]]),
    ]
    assert gains.gain(ledger, noise, rcnn, *linf) is None
    ledger.append(outcomes("bpda_eot", [[0, 1, 1, 0]], selection=[[0, 1, 1, 0]]))
    found = gains.gain(ledger, noise, rcnn, *linf)
    assert found is not None
    assert (found.points, found.images, found.attacks) == (25.0, 4, 2)


def test_what_is_committed_and_what_is_made_keep_to_the_schema(tmp_path):
    schema = json.loads((ROOT / "experiments" / "results.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    job(tmp_path / "mnist")
    tables.main(tmp_path)
    committed = sorted((ROOT / "results").glob("*/results.json"))
    assert len(committed) >= 3
    for path in (tmp_path / "mnist" / "results.json", *committed):
        jsonschema.validate(json.loads(path.read_text()), schema)
    broken = json.loads((tmp_path / "mnist" / "results.json").read_text())
    broken["rows"][0]["accuracy"] = "66.7"
    with pytest.raises(jsonschema.ValidationError, match=r"66\.7"):
        jsonschema.validate(broken, schema)


def test_the_readme_keeps_what_stands_around_its_table(tmp_path):
    job(tmp_path / "results" / "mnist")
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- made by `make tables` -->\nold\n<!-- end -->\nafter\n")
    tables.main(tmp_path / "results")
    before, made, after = re.split("<!-- .* -->\n", readme.read_text())
    assert (before, after) == ("before\n", "after\n")
    assert made.startswith("\nA title, linf 0.3, accuracy in percent:\n\n| model")
    assert "66.7 (" in made
    assert "old" not in made


def test_benchmark_table_holds_every_figure(tmp_path):
    origin = {"commit": "abc", "device": "cpu", "cores": 2, "jax": "0"}
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "kernel.json").write_text(json.dumps(origin | {"forward": {"ratio": 3.25}}))
    tables.main(tmp_path)
    text = (tmp_path / "benchmarks" / "README.md").read_text()
    assert "forward: ratio" in text
    assert "3.25" in text
    assert "Commit abc" in text
