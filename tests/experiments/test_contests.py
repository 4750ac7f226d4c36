"""Pages of many attacks on one model: worst cases by hand, threat models apart, the strongest attack first."""

import json

import numpy as np
import pytest

from experiments import contest_jobs, contests, tables
from rbf_jax.evaluate import Outcomes, save_outcomes

ORIGIN = {"commit": "abc", "device": "cpu", "cores": 1, "jax": "0", "weights": "0123456789"}
SPENT = {"forward passes an image": 101, "backward passes an image": 100, "seconds an image": 0.25}


def outcomes(selection, scoring, **facts):
    selection, scoring = (np.array(rows, bool).reshape(-1, 4) for rows in (selection, scoring))
    return Outcomes(np.arange(4), selection, scoring, ORIGIN | facts)


def lines(page):
    """Cells of each line by the first one; of several the last."""
    found = [[cell.strip() for cell in line.strip("| ").split("|")] for line in page.splitlines() if "|" in line]
    return {first: rest for first, *rest in found}


@pytest.fixture
def met():
    secret, known = {"suite": "secret noise"}, {"suite": "known noise"}
    return [
        outcomes([[1, 1, 1, 1]], [[1, 1, 1, 1], [1, 1, 1, 1]], attack="clean", **secret),
        # Worst for the first two, lucky on the first image's score, and the strongest where all are equal: the fourth.
        outcomes([[0, 0, 1, 1]], [[1, 0, 1, 1], [1, 0, 1, 0]], attack="one", **secret, **SPENT),
        # Worst for the third alone: that it also breaks the fourth on the score does not count.
        outcomes([[1, 1, 0, 1]], [[0, 1, 0, 0], [0, 1, 0, 0]], attack="two", **secret, **SPENT),
        outcomes([], [[0, 0, 0, 0]], attack="three", **known),
    ]


def test_each_image_is_scored_under_its_worst_attack(met):
    for order in (met[:3], met[2::-1]):
        assert contests.union(order).astype(int).tolist() == [[1, 0, 0, 1], [1, 0, 0, 0]]


def publish(folder, settings, met):
    folder.mkdir(parents=True)
    (folder / "settings.json").write_text(json.dumps(settings))
    for number, ledger in enumerate(met):
        save_outcomes(folder / "ledger" / f"{number}.npz", ledger)


def test_the_arena_keeps_threat_models_apart(tmp_path, met):
    met[-1] = met[-1]._replace(selection=met[-1].scoring)
    settings = {"kind": "arena", "model": "rcnn", "set": "mnist", "norm": "linf", "epsilon": 0.3, "N": 4}
    publish(tmp_path / "arena_rcnn", settings | {"beta2": 1.75, "draws": 10}, met)
    tables.main(tmp_path)
    page = (tmp_path / "arena_rcnn" / "README.md").read_text()
    assert page.startswith("# Every attack on one model: rCNN, mnist, linf 0.3\n")
    assert "Commit abc, cpu, 1 core(s)" in page
    assert "the fingerprint 01234567 (" in page
    before, secret, known = page.split("\n## ")
    assert secret.startswith("Secret noise")
    assert [name for name in lines(secret) if name in ("one", "two", "clean")] == ["two", "one", "clean"]
    assert lines(secret)["two"] == ["25.00 (4.56-69.94)", "101", "100", "0.25"]
    assert lines(secret)["the worst of all"][0].startswith("37.50 ")
    assert lines(known)["the worst of all"][0].startswith("0.00 ")
    assert "three" not in lines(secret)
    assert "0.00" not in before


def test_the_robust_net_counts_images_broken_by_any_attack_so_far(tmp_path):
    spent = {"forward passes": 7, "backward passes": 6, "seconds": 5}
    met = [
        outcomes([], [[1, 1, 1, 0]], stage="a", seed=0, attacked=4, alone=True, **spent),
        outcomes([], [[0, 1, 1, 0]], stage="b", seed=1, attacked=3, alone=False, **spent),
        outcomes([], [[1, 0, 1, 1]], stage="c", seed=2, attacked=2, alone=True, **spent),
    ]
    publish(tmp_path / "robust_net", {"kind": "robust_net", "epsilon": 0.3, "others": {"them": 92.8}}, met)
    tables.main(tmp_path)
    found = lines((tmp_path / "robust_net" / "README.md").read_text())
    assert [found[name][1].split(" ")[0] for name in "abc"] == ["75.00", "–", "75.00"]
    assert [found[name][2].split(" ")[0] for name in "abc"] == ["75.00", "50.00", "25.00"]
    assert found["b"][0] == "3"
    assert found["them"] == ["92.80"]


def test_what_another_run_published_does_not_mix_with_this_one(tmp_path, monkeypatch, met):
    """Ledgers of other images or weights go; a suite that is not yet there again stays where it is of both."""
    monkeypatch.setattr(contest_jobs, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "main", lambda: None)
    target = tmp_path / "results" / "arena_rcnn" / "ledger"
    other_weights = met[1]._replace(facts=met[1].facts | {"weights": "other"})
    few = Outcomes(np.arange(2), np.ones((1, 2), bool), np.ones((1, 2), bool), met[1].facts)
    before = {"same": met[2], "other-weights": other_weights, "few": few, "known": met[3]}
    for name, ledger in before.items():
        save_outcomes(target / f"{name}.npz", ledger)
    save_outcomes(tmp_path / "run" / "new.npz", met[0])
    contest_jobs.publish_contest("arena_rcnn", {"kind": "arena"}, tmp_path / "run")
    assert sorted(path.stem for path in target.iterdir()) == ["known", "new", "same"]
    assert json.loads((target.parent / "settings.json").read_text()) == {"kind": "arena"}
