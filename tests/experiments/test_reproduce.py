"""The entry points: what they write, how they go on after a kill, and how they refuse."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from helpers import ROOT, experiment, run_experiment

from experiments import jobs, learn, reproduce, results
from experiments.catalogue import cells
from experiments.configs import cifar10, mnist, quickstart
from experiments.recipes import RECIPES
from experiments.rundir import Run, open_run
from rbf_jax import rbf
from rbf_jax.certify import certified_radius

TINY = [
    "--config.examples.train=276",
    "--config.examples.validation=20",
    "--config.examples.test=20",
    "--config.em.steps=6",
    "--config.em.growth_steps=6",
    "--config.train.epochs=2",
    "--config.attack.settings.pgd.steps=1",
    "--config.attack.examples.default=10",
    "--config.attack.examples.bpda_eot=10",
    "--config.attack.settings.bpda_eot.steps=1",
    "--config.attack.settings.bpda_eot.warm_up=1",
    "--config.attack.settings.bpda_eot.draws=1",
    "--config.attack.batch_size=5",
    "--config.draws=2",
]


def run_all(folder, *arguments, **options):
    return run_experiment("reproduce", "quickstart.py:smoke", f"--workdir={folder}", *TINY, *arguments, **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run from beginning to end, half a minute of compilation."""
    folder = tmp_path_factory.mktemp("finished")
    result = run_all(folder)
    assert result.returncode == 0, result.stderr
    return folder, result


def figures(folder):
    """All that a run measured, without seconds, and whatever is committed meanwhile."""
    rows = json.loads((folder / "results.json").read_text())["rows"]
    return [{key: row[key] for key in row if key != "commit" and not key.endswith("seconds")} for row in rows]


@pytest.mark.full
def test_writes_results_and_report(finished):
    folder, result = finished
    assert "min  in all, roughly" in result.stdout.split("| attack")[0]
    rows = figures(folder)
    # Clean on three forms; in two norms FGSM and PGD on the CNN (one form) and the rCNN (two), EoT, three worst cases;
    # three over both norms.
    assert len(rows) == 3 + 2 * (2 * 3 + 1 + 3) + 3
    assert {row["N"] for row in rows} == {20, 10}
    assert all(row["wilson95"][0] <= row["accuracy"] <= row["wilson95"][1] for row in rows)
    report = (folder / "report.html").read_text()
    assert report.count("<img") == len(list((folder / "figures").glob("*.png"))) == 7
    assert str(folder / "report.html") in result.stdout
    assert "BPDA+EoT, l2 2" in result.stdout
    assert "BPDA+EoT, l2 2" in (folder / "README.md").read_text()


@pytest.mark.full
def test_a_finished_run_says_so_and_does_nothing_again(finished):
    folder, first = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.npz")}
    result = run_all(folder)
    assert result.returncode == 0
    assert "everything is done already" in result.stdout
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.npz")} == before
    assert (
        result.stdout.split("| attack")[1].split("report:")[0] == first.stdout.split("| attack")[1].split("report:")[0]
    )


def count_files(folder):
    return sum(len(files) for _, _, files in os.walk(folder))


@pytest.mark.parametrize(
    ("kills", "models"), [(1, ("rcnn",)), pytest.param(6, ("cnn", "rcnn"), marks=pytest.mark.full)]
)
def test_killed_at_random_places_it_ends_with_the_same_numbers(request, tmp_path, kills, models):
    """By how far it has come and not by the clock, so that slow machines are killed everywhere too."""
    chosen = f"--config.models={models}"
    if kills == 1:
        whole = tmp_path / "whole"
        assert run_all(whole, chosen).returncode == 0
    else:
        whole, _ = request.getfixturevalue("finished")
    arguments = experiment("reproduce", "quickstart.py:smoke", f"--workdir={tmp_path / 'run'}", *TINY, chosen)
    killed, total = 0, count_files(whole)
    for written in sorted(random.sample(range(1, total // 2 if kills == 1 else total), kills)):
        with subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
            while child.poll() is None and count_files(tmp_path / "run") < written:
                time.sleep(0.02)
            time.sleep(random.uniform(0, 0.5))
            killed += child.poll() is None
            child.send_signal(random.choice([signal.SIGKILL, signal.SIGTERM]))
    assert killed >= max(1, kills // 2)
    assert run_all(tmp_path / "run", chosen).returncode == 0
    assert figures(tmp_path / "run") == figures(whole)


WITH_LITTLE_ROOM = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))  # files end there, as on a full disk
os.execv(sys.argv[1], sys.argv[1:])
"""


@pytest.mark.full
def test_a_full_disk_is_one_message_and_the_run_goes_on(finished, tmp_path):
    arguments = experiment("reproduce", "quickstart.py:smoke", f"--workdir={tmp_path}", *TINY)
    full = [sys.executable, "-c", WITH_LITTLE_ROOM, *arguments]
    result = subprocess.run(full, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2, result.stderr
    assert f"cannot write checkpoint {tmp_path / 'checkpoints' / 'cnn'}" in result.stderr
    assert "Traceback" not in result.stderr
    assert run_all(tmp_path).returncode == 0
    assert figures(tmp_path) == figures(finished[0])


@pytest.mark.full
@pytest.mark.parametrize(
    ("damaged", "to_remove"),
    [
        ("models/rcnn.npz", ["models/rcnn.npz"]),
        ("ledger/cnn-clean-static.npz", ["ledger/cnn-clean-static.npz"]),
        ("attacks/rcnn-pgd-linf-0.3-10/000005.npz", ["attacks/rcnn-pgd-linf-0.3-10/000005.npz"]),
        ("config.json", None),
        ("filters.npz", None),
    ],
)
def test_a_damaged_file_is_named_and_mended_by_removing_it(finished, tmp_path, damaged, to_remove):
    shutil.copytree(finished[0], tmp_path / "run")
    path = tmp_path / "run" / damaged
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    result = run_all(tmp_path / "run")
    assert result.returncode == 2
    assert str(path) in result.stderr
    assert "Traceback" not in result.stderr
    if to_remove is not None:
        for name in to_remove:
            (tmp_path / "run" / name).unlink()
        assert run_all(tmp_path / "run").returncode == 0
        assert figures(tmp_path / "run") == figures(finished[0])


@pytest.mark.full
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_serves(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    (tmp_path / "run" / "models" / "rcnn.npz").unlink()
    _, last = sorted((tmp_path / "run" / "checkpoints" / "rcnn").iterdir(), key=lambda path: int(path.name))
    for path in last.rglob("d/*"):
        path.write_bytes(path.read_bytes()[:-100])
    result = run_all(tmp_path / "run")
    assert result.returncode == 2
    assert f"checkpoint {last}" in result.stderr
    shutil.rmtree(last)
    assert run_all(tmp_path / "run").returncode == 0
    assert figures(tmp_path / "run") == figures(finished[0])


def test_missing_data_says_what_to_run(tmp_path):
    result = run_experiment("reproduce", "mnist.py:smoke", f"--data_dir={tmp_path}", f"--workdir={tmp_path}/run")
    assert result.returncode == 2
    assert "make data" in result.stderr
    assert "Traceback" not in result.stderr


def test_another_configuration_in_the_run_directory_is_refused(tmp_path):
    open_run(tmp_path, quickstart.get_config("smoke"))
    result = run_all(tmp_path)
    assert result.returncode == 2
    assert f"{tmp_path / 'config.json'} has config." in result.stderr
    assert "Traceback" not in result.stderr


def test_unknown_models_are_refused(tmp_path):
    result = run_all(tmp_path, "--config.models=('cnn', 'svm')")
    assert result.returncode == 2
    assert f"config.models must be one of {', '.join(map(repr, RECIPES))}, got 'svm'" in result.stderr
    assert run_experiment("train", "quickstart.py:smoke", "--model=svm").returncode != 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preset": "sharp"}, "config.preset must be one of 'code', 'v2', 'paper', got 'sharp'"),
        ({"network": "resnet"}, "config.network must be one of 'cnn', 'vgg16', got 'resnet'"),
        ({"em": {"rules": "svhn"}}, "config.em.rules must be one of 'mnist', 'cifar10', got 'svhn'"),
    ],
)
def test_what_a_configuration_cannot_name_is_refused_at_once(tmp_path, monkeypatch, change, message):
    config = mnist.get_config("smoke")
    config.update(change)
    monkeypatch.setattr(jobs, "CONFIG", SimpleNamespace(value=config))
    monkeypatch.setattr(jobs, "WORKDIR", SimpleNamespace(value=str(tmp_path)))
    with pytest.raises(ValueError, match=message):
        jobs.open_run()


def test_more_examples_than_there_are_are_refused():
    config = quickstart.get_config("smoke")
    config.examples.test = 2_000
    with pytest.raises(ValueError, match=r"config\.examples\.test must be at most 1000, got 2000"):
        learn.load(config, None)


@pytest.mark.parametrize(("module", "allowed"), [(quickstart, 2), (mnist, 4), (cifar10, 4)])
def test_profiles(module, allowed):
    with pytest.raises(ValueError, match=r"PROFILE must be one of .*, got 'big'"):
        module.get_config("big")
    assert module.get_config() == module.get_config("cpu")  # the tests run on CPU
    passes = {}
    for profile in ("smoke", "cpu", "gpu", "paper")[:allowed]:
        config = module.get_config(profile)
        assert config.profile == profile
        assert config.examples.validation < config.examples.train
        for name, recipe in RECIPES.items():
            assert learn.epochs(config, name) > 0
            assert not recipe.noise or 0 <= learn.bank_epoch(config, name) < learn.epochs(config, name)
        assert set(config.epochs) <= set(config.models) <= set(RECIPES)
        assert config.train.batch_size <= config.examples.train - config.examples.validation
        # A model of the plan that is not run would be left out without a word.
        planned = {name for names, *_ in config.attack.plan for name in names}
        assert planned <= set(config.models)
        passes[profile] = sum(cell.passes * cell.examples for cell in cells(config))
    assert list(passes) == sorted(passes, key=passes.__getitem__)


@pytest.mark.parametrize("module", [mnist, cifar10])
def test_full_profiles_follow_the_paper(module):
    settings, config = results.PAPER["settings"], module.get_config("paper")
    name = config.set
    for model in config.models:
        assert learn.epochs(config, model) == settings["epochs"][name]
    assert learn.bank_epoch(config, "rcnn_plus") == settings["rcnn_plus_adversarial_noise_epoch"][name]
    noise = settings["rcnn_plus_noise"][name]
    assert (config.noise.std, config.noise.limit) == (noise["std"], noise["linf_clip"])
    assert (config.beta2, config.draws) == (settings["beta2_test"], settings["draws_m"])
    assert config.adversarial.epsilon == settings["linf_eps"][name]
    budgets = {budget for _, budgets, *_ in config.attack.plan for budget in budgets}
    assert ("linf", settings["linf_eps"][name]) in budgets
    paper = {norm: settings[f"{norm}_eps"][name] for norm in ("linf", "l2", "l1")}
    assert set(paper.items()) <= budgets
    assert all(set(union.items()) <= budgets for union in config.attack.unions)
    assert dict(config.attack.unions[0]) == paper
    certified = settings["certify"]["tau"][name]
    for profile in ("cpu", "gpu", "paper"):
        runs, radii = (module.get_config(profile).certify[field] for field in ("runs", "radii"))
        ceilings = [certified_radius(n, n, config.certify.alpha, sigma) for n, _, of in runs for _, sigma in of]
        assert max(ceilings) > max(radii)
    for samples, _, models in config.certify.runs[:2]:
        assert samples in (settings["certify"]["samples"], 10_000)
        for model, sigma in models:
            assert sigma == (certified if name == "cifar10" else certified.get(model, certified["baseline"]))
    assert config.attack.settings.bpda_eot.draws == settings["eot_draws"]
    assert config.examples.to_dict() == {
        "train": {"mnist": 60_000, "cifar10": 50_000}[name],
        "validation": 5_000,
        "test": 10_000,
    }


@pytest.mark.parametrize("module", [mnist, cifar10])
def test_every_number_of_the_papers_tables_has_its_cell(module):
    """The plan attacks what Tables I and V hold, and of III and IV what is of a known attack; VII's noise too."""
    config = module.get_config("cpu")
    levels = results.PAPER["table7_beta2_tradeoff"][config.set]["beta2"]
    assert levels == [0.0, *config.attack.beta2, config.beta2]
    found = set()
    for cell in cells(config):
        attack = cell.attack if cell.source == cell.model else f"transfer_{cell.attack}"
        for form in cell.scored_on:
            if results.paper_number(config.set, cell.model, form, attack, cell.norm, cell.epsilon) is not None:
                found.add((cell.model, attack, cell.norm))
    models, first, others = ("rcnn", "rcnn_plus"), results.PAPER["table1_linf"]["rows"], results.PAPER["table5_l1_l2"]
    expected = {(model, attack, "linf" if attack != "clean" else "") for model in models for attack in first}
    for norm in ("l1", "l2"):
        for model in (*models, "madry"):
            numbers = zip(others[f"columns_{norm}"], others[norm][f"{config.set}/{model}"], strict=True)
            expected |= {(model, attack, norm) for attack, number in numbers if number is not None}
    assert found == expected | {("cnn", "pgd", "linf"), ("madry", "daa", "linf"), ("madry", "pgd", "linf")}


def test_without_the_released_filters_the_committed_results_stand(tmp_path, monkeypatch, filters):
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    folder = tmp_path / "results" / "mnist-cpu" / "ledger"
    folder.mkdir(parents=True)
    for name in ("rcnn_released-clean-static.npz", "rcnn-clean-static.npz"):
        (folder / name).touch()
    config = mnist.get_config("cpu")
    (folder.parent / "job.json").write_text(json.dumps({"config": config.to_dict()}))
    config.models = ("cnn", "rcnn", "rcnn_released")
    run = Run(tmp_path, config)
    assert reproduce._without_filters(run) == [folder / "rcnn_released-clean-static.npz"]
    assert config.models == ("cnn", "rcnn")
    # Another seed is another result, which nobody committed.
    config.models, config.seed = ("cnn", "rcnn", "rcnn_released"), 1
    assert reproduce._without_filters(run) == []
    assert config.models == ("cnn", "rcnn")
    config.models = ("cnn", "rcnn", "rcnn_released")
    rbf.save(learn.filters_path(run, "released"), filters)
    assert reproduce._without_filters(run) == []
    assert config.models == ("cnn", "rcnn", "rcnn_released")
