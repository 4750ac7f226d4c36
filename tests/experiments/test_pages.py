"""The paper's tables and the verdict, from made-up rows whose every number can be computed by hand."""

from typing import Any

import pytest
from test_results import CNN, outcomes

from experiments import pages, paper_tables, verdict
from experiments.configs import mnist
from experiments.paper_tables import NOT_RUN, Rows
from experiments.results import UNION, WORST


def row(
    model, attack, accuracy, *, norm="linf", epsilon=0.3, form="predict", source=None, n=100, **more
) -> dict[str, Any]:
    if attack == "clean":
        norm, epsilon = "", 0.0
    return {
        **{"model": model, "source": source or model, "attack": attack, "title": attack.upper(), "norm": norm},
        **{
            "epsilon": epsilon,
            "scored_on": form,
            "accuracy": accuracy,
            "wilson95": [accuracy - 1, accuracy + 1],
            "N": n,
        },
        **{"paper": None, "difference": None, "attacks": ["A", "B"]},
        **{"commit": "abc", "device": "H100", "cores": 16, "jax": "0"},
        **more,
    }


def line(table, first):
    headings, lines = table
    assert all(list(each) == headings for each in lines)
    (found,) = [each for each in lines if each[headings[0]] == first]
    return found


def test_table_1_puts_ours_beside_the_papers():
    rows = Rows(
        [
            row("rcnn", "pgd", 20.0),
            row("rcnn", "pgd", 10.0, form="static"),
            row("rcnn", "pgd", 60.0, source="cnn"),
            row("rcnn", "pgd", 99.0, epsilon=0.35),
            row("rcnn_plus", "pgd", 94.9),
        ]
    )
    table = paper_tables.linf_attacks("mnist", rows)
    pgd = line(table, "PGD")
    # Table I of the paper: 78.3 and 94.9; transferred 39.6.
    assert pgd["rCNN, paper"] == "78.3 (-58.3)"
    assert pgd["rCNN, ours"] == "20.0 (19.0-21.0), N=100"
    assert pgd["rCNN, no noise"] == "10.0 (9.0-11.0), N=100"
    assert pgd["rCNN+, paper"] == "94.9 (+0.0)"
    assert line(table, "PGD (black box)")["rCNN, paper"] == "39.6 (+20.4)"
    assert line(table, "DAA")["rCNN, ours"] == NOT_RUN
    assert line(table, "DAA")["rCNN, paper"] == "41.5"
    assert line(table, "BPDA+EoT")["rCNN, no noise"] == "crafted with noise"


def test_of_several_cells_the_one_of_most_images_counts():
    rows = Rows([row("rcnn", "pgd", 1.0, n=10), row("rcnn", "pgd", 2.0, n=1000)])
    found = rows.find("rcnn", "pgd", "linf", 0.3, "predict")
    assert found is not None
    assert found["N"] == 1000


def test_table_2_scales_to_the_papers_epochs():
    config = {"examples": {"train": 60_000, "validation": 5_000}, "adversarial": {"steps": 7}}
    recipe = {"history": {"loss": [1.0] * 10}, "seconds an epoch": 20.0, "config": config}
    table = paper_tables.training_time(
        "mnist", {"madry": recipe, "rcnn_plus": recipe}, {"filters": 5.0, "bank rcnn_plus": 30.0}
    )
    madry, plus = line(table, "Madry"), line(table, "rCNN+")
    total = "total at the paper's epochs, s (extrapolated)"
    # The paper's Madry takes 85 epochs and 9,520 s, its rCNN+ 100 and 2,000.
    assert (madry["total, s"], madry[total], madry["paper's total, s (GTX 1080 Ti)"]) == ("200", "1700", "9520")
    assert madry["attack steps x images an epoch"] == str(7 * 55_000)
    assert (plus["overhead, s"], plus["total, s"], plus[total]) == ("35", "235", "2035")

    for log in ({"filters": 5.0}, {"bank rcnn_plus": 30.0}):
        table = paper_tables.training_time("mnist", {"madry": recipe, "rcnn_plus": recipe}, log)
        plus = line(table, "rCNN+")
        assert (plus["overhead, s"], plus["total, s"], plus[total]) == ("not kept",) * 3
        assert line(table, "Madry")[total] == "1700"


def test_table_3_takes_the_lowest_attack_and_the_worst_case():
    rows = Rows(
        [
            row("rcnn", "fgsm", 70.0),
            row("rcnn", "apgd", 30.0, n=50),
            row("rcnn", "pgd", 30.0),
            row("rcnn", WORST, 25.0),
            row("rcnn", "cw", 5.0, norm="l2"),
        ]
    )
    found = line(paper_tables.comparison("mnist", rows), "rCNN")
    assert found["lowest attack, ours"].startswith("30.0")
    assert found["which"] == "PGD"
    assert found["worst case of each image, ours"].startswith("25.0")
    assert found["paper"] == "39.4 (BPDA+EoT)"


def test_table_4_has_both_radii():
    beyond = {"form": "static", "epsilon": 0.35}
    rows = [row("madry", "pgd", 90.0, form="static"), row("madry", "fgsm", 35.0, **beyond)]
    table = paper_tables.bounds("mnist", Rows(rows))
    assert line(table, "0.3")["Madry, paper"] == "88.6 (+1.4)"
    assert line(table, "0.35")["Madry, ours"] == "35.0 (34.0-36.0), N=100 (FGSM)"
    # There the paper's met PGD alone.
    assert line(table, "0.35")["Madry, paper"] == "42.9"
    table = paper_tables.bounds("mnist", Rows([*rows, row("madry", "pgd", 45.0, **beyond)]))
    assert line(table, "0.35")["Madry, paper"] == "42.9 (+2.1)"
    assert line(table, "0.35")["Madry, ours"] == "35.0 (34.0-36.0), N=100 (FGSM)"


def test_table_5_knows_what_is_not_in_the_paper():
    rows = Rows(
        [row("madry", "ead", 50.0, norm="l1", epsilon=15, form="static"), row("rcnn", "cw", 7.0, norm="l2", epsilon=2)]
    )
    madry = line(paper_tables.other_norms("l1", "mnist", rows), "Madry")
    assert madry["EAD, paper"] == "90.4 (-40.4)"
    assert (madry["BPDA+EoT, paper"], madry["BPDA+EoT, ours"]) == ("not in the paper", "has no noise")
    assert line(paper_tables.other_norms("l2", "mnist", rows), "rCNN")["CW, paper"] == "72.3 (-65.3)"


def test_table_7_has_three_levels_of_noise():
    forms = {"static": 40.0, "predict@1": 50.0, "predict": 60.0}
    rows = Rows([row("rcnn_plus", "pgd", accuracy, form=form) for form, accuracy in forms.items()])
    table = paper_tables.noise_levels("mnist", rows)
    pgd = line(table, "linf 0.3, PGD")
    assert [pgd[f"beta2 = {level}, ours"][:4] for level in ("0", "1", "1.75")] == ["40.0", "50.0", "60.0"]
    assert [pgd[f"beta2 = {level}, paper"] for level in ("0", "1", "1.75")] == [
        "91.6 (-51.6)",
        "93.1 (-43.1)",
        "94.9 (-34.9)",
    ]
    assert line(table, "linf 0.3, BPDA+EoT")["beta2 = 0, ours"] == "there is no noise"


def test_at_another_level_of_noise_nothing_stands_in_the_paper_s_place():
    """A sweep over beta2: what predicts is Table VII's column of that level, and no other table's number is met."""
    rows = Rows([row("rcnn_plus", "pgd", 30.0, form=form) for form in ("static", "predict")], 1.0)
    pgd = line(paper_tables.noise_levels("mnist", rows), "linf 0.3, PGD")
    assert [pgd[f"beta2 = {level}, paper"] for level in ("0", "1", "1.75")] == ["91.6 (-61.6)", "93.1 (-63.1)", "94.9"]
    assert pgd["beta2 = 1.75, ours"] == paper_tables.NOT_RUN
    assert line(paper_tables.linf_attacks("mnist", rows), "PGD")["rCNN+, paper"] == "94.9"


@pytest.fixture
def job():
    attack = {"scoring": 5, "selection": 10, "redrawn": 1000, "unions": []}
    attack["settings"] = {"pgd": {"restarts": 1}, "bpda_eot": {"draws": 50, "steps": 40}}
    config = {"set": "mnist", "title": "RBF-CNN on MNIST", "profile": "cpu", "seed": 0, "draws": 10, "beta2": 1.75}
    config["preset"] = "code"
    facts = {"device": "cpu", "cores": 2, "jax": "0", "filters": 23, "seconds": {}}
    return facts | {"config": config | {"attack": attack}}


def test_the_page_has_every_table_and_more(job):
    took = {"crafting seconds": 3, "scoring seconds": 1, "crafted_on": "static"}
    rows = [row("rcnn", "clean", 99.0), row("rcnn", "pgd", 20.0) | took]
    rows += [row("rcnn", "pgd", 10.0, form="static") | took | {"scoring seconds": 3}, row("rcnn", WORST, 5.0)]
    # The same attack on two levels of noise is crafted twice.
    noisy = {"crafted_on": "bpda", "title": "BPDA+EoT"} | {"crafting seconds": 10, "scoring seconds": 1}
    rows += [row("rcnn", "bpda_eot", 8.0) | noisy]
    rows += [row("rcnn", "bpda_eot", 7.0, form="predict@1") | noisy | {"crafted_on": "bpda@1"}]
    more = [pages.Section("A study", "What it says.", (["a"], [{"a": "1"}]))]
    history = {"loss": [1.0], "accuracy": [0.5], "validation": [0.75]}
    recipes = {"rcnn": {"history": history, "seconds an epoch": 2.5, "config": mnist.get_config("cpu").to_dict()}}
    recipes["rcnn"] |= {"device": "cpu", "cores": 2}
    found = pages.sections(job, recipes, rows, more)
    names = [section.heading.split(":")[0] for section in found]
    assert names[:7] == [f"Table {number}" for number in ("I", "II", "III", "IV", "V, l1", "V, l2", "VII")]
    assert names[7:] == ["Worst cases", "Every attack, linf 0.3", "A study", "The models", "Seconds"]
    assert line(found[-1].table, "PGD, linf 0.3") == {"attack": "PGD, linf 0.3", "rCNN": "7"}
    assert line(found[-1].table, "BPDA+EoT, linf 0.3") == {"attack": "BPDA+EoT, linf 0.3", "rCNN": "22"}
    figures = [{"heading": "The filters", "text": "23 of them.", "file": "the-filters.png", "alt": "grey squares"}]
    text = pages.page(job, found, rows, figures)
    shown = "## The filters\n\n23 of them.\n\n![grey squares](figures/the-filters.png)"
    for part in (
        shown,
        "# RBF-CNN on MNIST",
        "## A study\n\nWhat it says.",
        "took 29 s",
        "commit abc, H100, 16 cores",
        "23 filters",
        "beta1 = 17.33 (86.64 in training)",  # the released code's 2^25 and 2^125
        "rCNN: the same behind the RBF front end",
        "2.5 | cpu, 2 cores |",
    ):
        assert part in text
    # Of models that are not on the page nothing is said.
    assert "Madry" not in pages.who(["cnn", "rcnn"])
    assert "Madry" in pages.who(["madry"])


def test_the_headline_sets_the_lowest_number_of_the_paper_against_the_worst_case():
    rows = [
        row("cnn", "clean", 99.0, form="static"),
        row("cnn", WORST, 0.0, form="static"),
        row("rcnn", "pgd", 20.0, paper=78.3),
        row("rcnn", "pgd", 1.0, epsilon=0.35, paper=None),
        row("rcnn", WORST, 3.0),
        row("cnn_plus", WORST, 0.0, form="static"),
    ]
    table = verdict.headline("mnist", Rows(rows))
    rcnn, cnn = line(table, "rCNN"), line(table, "CNN")
    # Table I: BPDA+EoT is the lowest of the rCNN's column.
    assert (rcnn["PGD, paper"], rcnn["lowest attack, paper"]) == ("78.3", "39.4")
    assert rcnn["PGD, ours"].startswith("20.0")
    assert rcnn["worst case, ours"].startswith("3.0")
    assert rcnn["clean"] == NOT_RUN
    # Table III, where Table I has no column.
    assert (cnn["lowest attack, paper"], line(table, "CNN+")["lowest attack, paper"]) == ("0.0", "–")
    assert cnn["clean"].startswith("99.0")


def test_what_the_front_end_adds_is_counted_on_the_images_that_met_all():
    ledger = [
        outcomes("square", [[1, 1, 0, 1]], scored_on="static"),
        outcomes("fgsm", [[1, 1]], rows=[0, 1], scored_on="static"),
        outcomes("square", [[1, 0, 1, 1]], **CNN),
        outcomes("clean", [[0, 0, 0, 0]], **CNN),
        *(
            outcomes("autoattack", survived, epsilon=epsilon, **of)
            for epsilon in (0.15, 0.35)  # beyond the budget is not inside
            for survived, of in (([[1, 1]], {"scored_on": "static"}), ([[1, 0]], CNN))
        ),
    ]
    plain = line(verdict.gains("mnist", ledger), "front end, clean training")
    # FGSM met the rCNN alone. Of four images Square takes one of each model: differences 0, 1, -1 and 0, half a point
    # of each sign added, sum of squares 3 of 6: 1.96 sqrt(0.5 / 6) on either side.
    assert plain == {
        "what is added": "front end, clean training",
        "linf 0.15": "+50.0 (-39.8 to +89.8), N=2, 1 attack",
        "linf 0.3": "+0.0 (-56.6 to +56.6), N=4, 1 attack",
        **{name: "not known" for name in ("l2 2", "l1 15")},
    }
    # One of the rCNN's alone would be in the table with nothing to compare.
    assert [each["what is added"] for each in verdict.gains("mnist", ledger)[1]] == [
        "front end, clean training",
        "its noise, clean training",
    ]


def test_what_people_wrote_is_of_published_results_alone(tmp_path, monkeypatch):
    """A run with another seed has other numbers."""
    monkeypatch.setattr(verdict, "ROOT", tmp_path)
    (tmp_path / "experiments" / "commentary").mkdir(parents=True)
    written = tmp_path / "experiments" / "commentary" / "mnist.md"
    written.touch()
    assert verdict.commentary(tmp_path / "results" / "mnist") == written
    assert verdict.commentary(tmp_path / "results" / "cifar10") is None
    assert verdict.commentary(tmp_path / "runs" / "mnist") is None


def test_a_table_without_lines_is_left_out(job):
    """A run of the plain CNN alone has nothing for Table V, nor a worst case."""
    took = {"crafting seconds": 3, "scoring seconds": 1, "crafted_on": "static"}
    rows = [row("cnn", "pgd", 1.0, form="static") | took]
    headings = [section.heading for section in pages.sections(job, {}, rows, [])]
    assert "Every attack, linf 0.3" in headings
    assert not {"Table V, l1: l1 attacks", "Worst cases", "The models"} & {*headings}
    assert all(section.table[1] for section in pages.sections(job, {}, rows, []))


def test_the_verdict_counts_points_and_sorts_the_papers_numbers(job, tmp_path):
    rows = [
        row("rcnn", WORST, 10.0, form="static"),
        row("cnn", WORST, 4.0, form="static"),
        # What fewer attacks leave is no worst case, lower though it may be on other images.
        row("rcnn", WORST, 11.0, n=1000, attacks=["A"]),
        row("rcnn", WORST, 12.0, n=100),
        row("rcnn", WORST, 10.0, n=50),
        row("rcnn", UNION, 8.0, norm="", epsilon=0.0, title=f"{UNION}: linf 0.3, l2 2, l1 15"),
        row("rcnn", UNION, 4.0, norm="", epsilon=0.0, title=f"{UNION}: linf 0.3, l2 2, l1 25"),
        row("rcnn", "fgsm", 94.0, paper=94.7),
        row("rcnn", "pgd", 20.0, paper=78.3),
        # Near or far, inside the interval or not: it reaches both within five points of the paper's number and beyond.
        row("rcnn", "cw", 80.0, paper=83.1) | {"wilson95": [60.0, 92.0]},
        row("rcnn", "mi_fgsm", 90.0, paper=88.0) | {"wilson95": [89.0, 94.0]},
        row("rcnn", "bpda_eot", 20.0, paper=39.4) | {"wilson95": [8.0, 35.0]},
        row("rcnn", "daa", 50.0, paper=41.5) | {"wilson95": [40.0, 60.0]},
    ]
    found = Rows(rows)
    worth = line(verdict.worth("mnist", found), "rCNN")
    assert worth["linf 0.3"] == "12.0 (11.0-13.0), N=100, 2 attacks"
    assert worth["all three"].startswith("8.0")
    # But where fewer leave nothing of more images, no further attack could.
    nothing = Rows([*rows, row("rcnn", WORST, 0.0, n=500, attacks=["A"]), row("rcnn", WORST, 0.0, n=50)])
    assert line(verdict.worth("mnist", nothing), "rCNN")["linf 0.3"] == "0.0 (-1.0-1.0), N=500, 1 attack"
    numbers = verdict.held("mnist", found)
    near, far, unclear = (numbers[kind][1] for kind in ("near", "far", "unclear"))
    assert [each["attack"] for each in unclear] == ["BPDA_EOT", "DAA", "CW", "MI_FGSM"]
    assert [each["attack"] for each in near] == ["FGSM"]
    assert [(each["attack"], each["difference"]) for each in far] == [("PGD", "-58.3")]
    recipes = {"rcnn": {"history": {"loss": [1.0] * 8}}, "cnn": {"history": {"loss": [1.0] * 8}}}
    recipes["rcnn_plus"] = {"history": {"loss": [1.0] * 3}}
    assert verdict.page(job, recipes, rows, [], [], [], None).endswith("\n\nMade by `make tables` from the ledgers.\n")
    written = tmp_path / "mnist.md"
    written.write_text("It is broken.\n")
    title, _, trained, origin, said, heading = verdict.page(job, recipes, rows, [], [], [], written).split("\n\n")[:6]
    assert trained == "Trained for 8 epochs: CNN; rCNN. 3 epochs: rCNN+. The paper trained rCNN for 100, rCNN+ for 100."
    assert (title, said) == ("# RBF-CNN on MNIST: the verdict", "It is broken.")
    assert origin.startswith("Profile cpu, seed 0, commit ")
    assert heading.startswith("## What is left")


def test_table_4_and_the_certificates_are_among_the_papers_numbers():
    rows = [
        row("rcnn", "pgd", 14.0, epsilon=0.35),
        row("rcnn", "bpda_eot", 12.0, epsilon=0.35),
        row("rcnn_plus", "pgd", 30.0, epsilon=0.35),
        # Within the budget Table IV repeats Table I; Madry's number is of PGD, and beside PGD already.
        row("rcnn", "pgd", 1.0),
        row("madry", "apgd", 1.0, epsilon=0.35, form="static"),
    ]
    certified = {"accuracy": 90.0, "wilson95": [88.0, 93.0], "N": 100, "paper": 92.7, "difference": -2.7}
    certified["radius"] = 0.5
    few = certified | {"accuracy": 100.0, "wilson95": [34.2, 100.0], "N": 2, "paper": 8.1, "difference": 91.9}
    above = {"radius": 1.0, "accuracy": None, "wilson95": None, "paper": 0.0, "difference": None}
    absent = certified | {"radius": 0.0, "paper": None, "difference": None}
    record = {"model": "cnn", "form": "static", "sigma": 0.2, "certified": [absent, certified, few, above]}
    numbers = verdict.held("mnist", Rows(rows), [record])
    near, far = numbers["near"][1], numbers["far"][1]
    assert [tuple(each.values()) for each in near] == [
        ("CNN", "certificates, sigma 0.2", "l2 0.5", "92.7", "90.0 (88.0-93.0), N=100", "-2.7"),
        ("rCNN", "lowest attack (BPDA_EOT)", "linf 0.35", "10.5", "12.0 (11.0-13.0), N=100", "+1.5"),
    ]
    assert [tuple(each.values())[:4] for each in far] == [("rCNN+", "lowest attack (PGD)", "linf 0.35", "75.8")]
    # The paper's noise is another.
    assert all(lines == [] for _, lines in verdict.held("mnist", Rows(rows, beta2=1.0)).values())
