"""Tables: the paper's number beside the right cell, worst cases, and what a row says."""

import json

import numpy as np
import pytest

from experiments import results, tables
from rbf_jax.evaluate import Outcomes, save_outcomes, wilson_interval


@pytest.mark.parametrize(
    ("cell", "number"),
    [
        # Read off Tables I, III and V of the paper.
        (("mnist", "rcnn", "predict", "clean", "", 0.0), 99.6),
        (("mnist", "rcnn", "predict", "FGSM", "linf", 0.3), 94.7),
        (("mnist", "rcnn", "predict", "PGD-100", "linf", 0.3), 78.3),
        (("mnist", "rcnn_plus", "predict", "PGD-100", "linf", 0.3), 94.9),
        (("mnist", "rcnn", "predict", "BPDA+EoT", "linf", 0.3), 39.4),
        (("cifar10", "rcnn", "predict", "PGD-20", "linf", 0.031), 63.1),
        (("cifar10", "rcnn_plus", "predict", "clean", "", 0.0), 85.1),
        (("mnist", "cnn", "static", "PGD-100", "linf", 0.3), 0.0),
        (("mnist", "rcnn", "predict", "PGD-40", "l2", 2.0), 80.0),
        (("mnist", "rcnn", "predict", "BPDA+EoT", "l2", 2.0), 64.2),
        # Not in the paper: other budgets, the form without noise, the baseline's other cells, CNN+, l2 FGSM.
        (("mnist", "rcnn", "predict", "PGD-100", "linf", 0.35), None),
        (("mnist", "rcnn", "static", "PGD-100", "linf", 0.3), None),
        (("mnist", "cnn", "static", "clean", "", 0.0), None),
        (("mnist", "cnn", "static", "FGSM", "linf", 0.3), None),
        (("mnist", "cnn_plus", "static", "PGD-100", "linf", 0.3), None),
        (("mnist", "rcnn", "predict", "FGSM", "l2", 2.0), None),
        (("mnist", "rcnn", "predict", results.WORST, "linf", 0.3), None),
        (("quickstart", "rcnn", "predict", "clean", "", 0.0), None),
    ],
)
def test_the_papers_number(cell, number):
    assert results.paper_number(*cell) == number


def outcomes(attack, survived, *, rows=None, selection=None, model="rcnn", form="predict"):
    survived = np.asarray(survived, bool)
    rows = np.arange(survived.shape[1]) if rows is None else np.asarray(rows)
    selection = np.zeros((0, len(rows)), bool) if selection is None else np.asarray(selection, bool)
    norm, epsilon = ("", 0.0) if attack == "clean" else ("linf", 0.3)
    facts = {"model": model, "scored_on": form, "attack": attack, "norm": norm, "epsilon": epsilon, "weights": model}
    return Outcomes(rows, selection, survived, facts | {"commit": "abc", "crafting seconds": 1.5, "scoring seconds": 2})


def test_a_row_is_the_mean_over_redraws():
    (row,) = results.make_rows("mnist", [outcomes("clean", [[1, 1, 0, 1], [1, 0, 0, 1]])])
    assert (row["N"], row["redraws"], row["accuracy"], row["deviation over redraws"]) == (4, 2, 62.5, 12.5)
    assert row["wilson95"] == [round(100 * end, 2) for end in wilson_interval(round(0.625 * 4), 4)]
    assert (row["paper"], row["difference"]) == (99.6, -37.1)


def test_the_worst_case_is_picked_on_other_redraws_than_it_is_scored_on():
    # Example 0 falls to the first attack on the selection redraws, 1 to the second; 2 to none.
    first = outcomes("FGSM", [[0, 1, 1], [1, 1, 1]], selection=[[0, 1, 1]])
    second = outcomes("PGD-9", [[1, 0, 1], [1, 0, 0]], selection=[[1, 0, 1]])
    rows = results.make_rows("mnist", [first, second])
    worst = rows[-1]
    assert worst["attack"] == results.WORST
    # Scored: example 0 on the first attack (0, 1), 1 on the second (0, 0), 2 on the first of equals (1, 1).
    assert worst["accuracy"] == pytest.approx(100 * 3 / 6)


def test_two_weights_of_one_model_do_not_mix():
    one, other = outcomes("FGSM", [[1]]), outcomes("PGD-9", [[1]])
    other.facts["weights"] = "other"
    with pytest.raises(ValueError, match="several weights of one model"):
        results.make_rows("mnist", [one, other])


def test_the_worst_case_takes_the_examples_that_all_have_seen():
    first = outcomes("FGSM", [[1, 0, 1, 1]], rows=[2, 4, 6, 8], model="cnn", form="static")
    second = outcomes("PGD-9", [[1, 0, 1]], rows=[4, 6, 7], model="cnn", form="static")
    worst = results.make_rows("mnist", [first, second])[-1]
    # Common are 4 (0, 1) and 6 (1, 0): both fall.
    assert (worst["N"], worst["accuracy"]) == (2, 0.0)


def test_the_table_puts_the_papers_number_beside_ours():
    ledger = [
        outcomes("FGSM", [[0, 1]], model="cnn", form="static"),
        outcomes("FGSM", [[0, 1]], form="static"),
        outcomes("FGSM", [[0, 1]]),
        outcomes("clean", [[1, 1]]),
    ]
    headings, (clean, fgsm) = results.table(results.make_rows("mnist", ledger))
    assert headings == ["attack", "N", "CNN", "rCNN, no noise", "rCNN", "paper's rCNN"]
    assert (clean["attack"], clean["CNN"], clean["paper's rCNN"]) == ("clean", "", "99.6 (+0.4)")
    assert (fgsm["attack"], fgsm["N"]) == ("FGSM, linf 0.3", "2")
    assert fgsm["rCNN, no noise"].startswith("50.0 (")
    assert fgsm["paper's rCNN"] == "94.7 (-44.7)"


def job(tmp_path):
    recipe = {"history": {"loss": [1], "accuracy": [0.5], "validation": [0.75]}, "seconds an epoch": 2.5}
    config = {
        "title": "A title",
        **{"profile": "smoke", "seed": 3, "draws": 10, "beta2": 1.75},
        "attack": {
            "scoring": 5,
            "selection": 10,
            "pgd": {"restarts": 1, "step_size": 0.01},
            "eot": {"draws": 2, "steps": 3},
        },
    }
    record = {"commit": "abc", "device": "cpu", "cores": 2, "jax": "0", "config": config, "filters": 23}
    (tmp_path / "mnist" / "models").mkdir(parents=True)
    (tmp_path / "mnist" / "job.json").write_text(json.dumps(record))
    (tmp_path / "mnist" / "models" / "rcnn.json").write_text(json.dumps(recipe))
    save_outcomes(tmp_path / "mnist" / "ledger" / "a.npz", outcomes("clean", [[1, 1, 0]]))


def test_tables_come_from_the_ledger_alone(tmp_path):
    job(tmp_path)
    tables.main(tmp_path)
    page = (tmp_path / "mnist" / "README.md").read_text()
    for text in ("# A title", "66.7 (", "99.6 (-32.9)", "23 filters", "75.00", "commit abc", "10 noisy draws"):
        assert text in page
    record = json.loads((tmp_path / "mnist" / "results.json").read_text())
    assert record["rows"][0]["accuracy"] == 66.67
    again = (tmp_path / "mnist" / "results.json").read_bytes()
    tables.main(tmp_path)
    assert (tmp_path / "mnist" / "results.json").read_bytes() == again


def test_benchmark_table_holds_every_figure(tmp_path):
    origin = {"commit": "abc", "device": "cpu", "cores": 2, "jax": "0"}
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "kernel.json").write_text(json.dumps(origin | {"forward": {"ratio": 3.25}}))
    tables.main(tmp_path)
    text = (tmp_path / "benchmarks" / "README.md").read_text()
    assert "forward: ratio" in text
    assert "3.25" in text
    assert "Commit abc" in text
