"""The command line: what it says, what it writes, and how it ends."""

import flax.linen as nn
import numpy as np
import pytest
from helpers import marked_images, random_filters

from rbf_jax import certify, cli, commands, evaluate, models, rbf
from rbf_jax.evaluate import Outcomes

SHAPE = (8, 8, 1)


class Small(nn.Module):
    @nn.compact
    def __call__(self, images, *, train=False):
        return nn.Dense(4)(images.reshape(images.shape[0], -1))


@pytest.fixture
def world(monkeypatch, tmp_path, rng, standard_promotion):
    """Few small images, a small network, and a folder with filters to work in."""
    images, labels = marked_images(80, SHAPE, 0.6)
    monkeypatch.setattr(commands, "_examples", lambda *_: (images, labels))
    monkeypatch.setitem(commands.NETWORKS, "cnn", Small)
    monkeypatch.chdir(tmp_path)
    rbf.save("filters.npz", random_filters(rng, 6))
    return images, labels


def train(*more):
    return cli.main(["train", "--out", "model.npz", "--epochs", "30", "--batch-size", "20", *more])


@pytest.mark.parametrize("command", ["", *cli.COMMANDS])
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([*filter(None, [command]), "--help"])
    assert end.value.code == 0
    assert f"rbf-jax {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words", [[], ["attack"], ["train", "--epochs", "0", "--out", "x"], ["certify", "x", "--images", "-1"]]
)
def test_bad_words_end_with_2(words, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    assert end.value.code == 2
    assert "usage: rbf-jax" in capsys.readouterr().err


def test_what_is_wrong_is_one_message(world, capsys):
    assert cli.main(["attack", "none.npz"]) == 2
    assert "rbf-jax attack: " in capsys.readouterr().err
    assert train() == 0
    assert cli.main(["attack", "model.npz", "--epsilon", "0.1", "--epsilon", "0.2"]) == 2
    assert "once for each --norm (1) or never, got 2" in capsys.readouterr().err
    assert cli.main(["attack", "model.npz", "--norm", "linf", "--norm", "linf"]) == 2
    assert "--norm must name each norm once, got linf linf" in capsys.readouterr().err
    assert cli.main(["attack", "model.npz", "--seed", "9" * 23]) == 2
    assert "rbf-jax attack: " in capsys.readouterr().err
    models_only = {"params": {"w": np.ones(2, np.float32)}}
    commands.train.save_weights("foreign.npz", models_only, {"data": "mnist"})
    assert cli.main(["attack", "foreign.npz"]) == 2
    assert "its recipe has no filters, network, preset" in capsys.readouterr().err
    foreign = {"data": "mnist", "network": "resnet", "filters": None, "preset": "code"}
    commands.train.save_weights("foreign.npz", models_only, foreign)
    assert cli.main(["attack", "foreign.npz"]) == 2
    assert "the network of foreign.npz must be one of 'cnn', 'vgg16', got 'resnet'" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["fit-filters"], ["train"], ["attack", "model.npz"]])
def test_where_nothing_can_be_written_nothing_is_computed(words, world, capsys, monkeypatch):
    def refuse(*_):
        raise AssertionError("computed")

    monkeypatch.setattr(commands, "_examples", refuse)
    monkeypatch.setattr(commands, "_load", refuse)
    assert cli.main([*words, "--out", "/proc/nowhere/x.npz"]) == 2
    assert "cannot write /proc/nowhere/x.npz" in capsys.readouterr().err


def test_a_plain_network(world, capsys):
    images, labels = world
    assert train() == 0
    loaded = commands._load("model.npz")
    assert loaded.filters is None
    right = evaluate.predict(commands.jax.random.key(0), loaded.logits_fn, images).argmax(-1) == labels
    assert f"right on {100 * right.mean():.1f} %" in capsys.readouterr().out
    words = ["attack", "model.npz", "--images", "20", "--epsilon", "0.05", "--norm", "linf", "--out", "found.npz"]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    found = evaluate.load_outcomes("found.npz")
    assert found.scoring.shape == (1, 20)
    assert found.scoring.mean() <= right[:20].mean()
    assert f"worst of these       {100 * found.scoring.mean():.1f} %" in said
    assert all(name in said for name in ("fgsm, linf 0.05", "pgd-40, linf 0.05", "apgd-100, linf 0.05"))
    assert cli.main(["report", "found.npz"]) == 0
    assert f"{100 * found.scoring.mean():.1f} %" in capsys.readouterr().out


def test_options_that_would_do_nothing_are_refused(world, capsys):
    """A network without filters has no noise and no reading of beta1, and a report reads no data."""
    assert train("--preset", "code") == 2
    assert "--preset is a reading of the front end: it needs --filters, got code" in capsys.readouterr().err
    assert train() == 0
    for command in ("attack", "certify"):
        assert cli.main([command, "model.npz", "--beta2", "1.5"]) == 2
        assert "--beta2 needs a model with filters, and model.npz has none: got 1.5" in capsys.readouterr().err
    assert train("--filters", "filters.npz") == 0
    assert cli.main(["attack", "model.npz", "--beta2", "0", "--draws", "5"]) == 2
    assert "this model is attacked without any: got 5" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["report", "found.npz", "--data-dir", "data"])


def test_a_defended_network(world, capsys):
    """Trained on what the filters rebuild, with the filters in its file; attacked and certified with noise."""
    assert train("--filters", "filters.npz", "--preset", "paper") == 0
    kept, stored = commands._load("model.npz").filters, rbf.load("filters.npz")
    assert kept is not None
    np.testing.assert_array_equal(kept.variances, stored.variances)
    np.testing.assert_array_equal(kept.means, stored.means)
    words = [
        "attack",
        "model.npz",
        "--images",
        "3",
        "--draws",
        "2",
        "--norm",
        "l2",
        "--epsilon",
        "0.2",
        "--out",
        "found.npz",
    ]
    assert cli.main(words) == 0
    assert "beta2 = 1.75, mean of 2 draws" in capsys.readouterr().out
    assert evaluate.load_outcomes("found.npz").facts["attacks"] == ["pgd-eot, l2 0.2", "apgd-eot, l2 0.2"]
    assert cli.main(["certify", "model.npz", "--images", "2", "--samples", "200", "--sigma", "0.1"]) == 0
    said = capsys.readouterr().out
    assert "image 1: " in said
    assert f"{certify.certified_radius(200, 200, 0.001, 0.1):.3f} is the most that 200 samples give" in said


def test_any_name_in_the_home_will_do(world, capsys, monkeypatch, tmp_path):
    """The shell leaves the ~ of --out=~/model alone."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    assert cli.main(["train", "--out=~/model", "--epochs", "2", "--batch-size", "20"]) == 0
    assert cli.main(["attack", "~/model", "--images", "2", "--out=~/found"]) == 0
    assert sorted(path.name for path in (tmp_path / "home").iterdir()) == ["found", "model"]
    assert cli.main(["report", "~/found"]) == 0


def test_too_few_samples_certify_nothing(world, capsys):
    assert train() == 0
    assert cli.main(["certify", "model.npz", "--samples", "9"]) == 2
    assert "--samples is too few to certify anything at --alpha 0.001: 9" in capsys.readouterr().err


def test_shares_of_several_redraws_are_not_rounded():
    """On the average 5/3 of 3 images are right; the interval by its closed form."""
    p, n, z = 5 / 9, 3, 1.959964
    centre, half = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    low, high = (100 * (centre + sign * half) / (1 + z**2 / n) for sign in (-1, 1))
    right = np.array([[1, 1, 0], [1, 1, 0], [1, 0, 0]], bool)
    assert commands._share(right) == f"55.6 % ({low:.1f}-{high:.1f})"
    assert commands._share(np.ones((3, 7), bool)).startswith("100.0 % (")


def test_a_report_of_ledgers_without_a_model(tmp_path, capsys):
    outcomes = Outcomes(np.arange(4), np.zeros((0, 4), bool), np.ones((1, 4), bool), {"title": "FGSM"})
    evaluate.save_outcomes(tmp_path / "fgsm.npz", outcomes)
    assert cli.main(["report", str(tmp_path / "fgsm.npz")]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["fgsm", "4", "100.0", "%", "(51.0-100.0)", "FGSM"]


def test_report_has_a_line_for_each_file(tmp_path, capsys):
    for i, right in enumerate((0, 1)):
        outcomes = Outcomes(np.arange(4), np.zeros((0, 4), bool), np.full((1, 4), bool(right)), {"model": f"m{i}"})
        evaluate.save_outcomes(tmp_path / f"{i}.npz", outcomes)
    assert cli.main(["report", *(str(tmp_path / f"{i}.npz") for i in range(2))]) == 0
    _, first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("m0     4       0.0 %")
    assert second.startswith("m1     4       100.0 %")


def test_info_names_devices_and_data(tmp_path, capsys):
    assert cli.main(["info", "--data-dir", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "devices: " in said
    assert "mnist, not prepared" in said


def test_networks_fit_their_data():
    assert set(commands.NETWORKS) == {network for network, _ in commands.SETS.values()}
    assert commands.NETWORKS["vgg16"] is models.VGG16


@pytest.mark.full
def test_the_tour_of_the_help(tmp_path, monkeypatch, capsys, standard_promotion):
    """As printed, on fewer images."""
    monkeypatch.chdir(tmp_path)
    lines = [line.split()[1:] for line in cli.EXAMPLES.splitlines() if line.startswith("  rbf-jax")]
    assert len(lines) == 5
    for words in lines:
        assert cli.main([*words, *(["--images", "5"] if words[0] == "attack" else [])]) == 0
    assert "rcnn.npz  5" in capsys.readouterr().out
