"""The figures of a report: the paper's for a configuration, and the curves of the studies that were run."""

import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from experiments import evaluation, learn, results, studies
from experiments.catalogue import KINDS, NORMS, Cell, ball, cells, first_budget
from experiments.evaluation import Models
from experiments.learn import Examples
from experiments.recipes import RECIPES
from experiments.report import slug
from experiments.rundir import Config, Run
from rbf_jax import PRESETS, attacks, evaluate, parallel, plots, reconstruct, saliency
from rbf_jax.evaluate import Parts
from rbf_jax.files import read_json, replacing
from rbf_jax.plots import Figure
from rbf_jax.rbf import RBFFilters
from rbf_jax.types import LogitsFn

Section = tuple[str, str, Figure, str]
"""Heading, text, figure, and what the figure shows for those who cannot see it."""

# The paper's, and beside them what tells the part of the front end from that of the training.
COMPARED = ("cnn", "cnn_plus", "madry", "rcnn", "rcnn_plus", "rcnn_at")
SHOWN, POINTS, CUT = 8, 1_000, 30
FAR, FAR_STEPS = 3, 100
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def save(directory: Path, drawn: Sequence[Section]) -> list[Path]:
    """Writes figures as ``.png``, and what belongs to them as ``figures.json``; returns all files."""
    told, paths = [], []
    for heading, text, figure, alt in drawn:
        path = directory / f"{slug(heading)}.png"
        with replacing(path) as temporary:
            temporary.write_bytes(plots.png(figure, 100))
        paths.append(path)
        told.append({"heading": heading, "text": text, "file": path.name, "alt": alt})
    with replacing(directory / "figures.json") as temporary:
        temporary.write_text(json.dumps(told, indent=1) + "\n")
    return [*paths, directory / "figures.json"]


def sections(run: Run, test: Examples, filters: RBFFilters, forms: Models) -> list[Section]:
    """The figures for which the configuration has the models, the attacks and the studies."""
    everyone, count = forms, len(filters.variances)
    forms = {name: forms[name] for name in COMPARED if name in forms}
    text = f"The EM found {count} filters, templates of 3x3 patches. Every image is rebuilt from them."
    return [
        ("The filters (Fig. 2)", text, plots.filters(filters), f"{count} filter means"),
        *_reconstructions(run, test, filters, forms),
        *_perception(run, test, forms),
        *_gradients(test, forms),
        *_losses(run, test, forms | {name: everyone[name] for name in ("rcnn_long",) if name in everyone}),
        *_far(run, test, forms),
        *_studies(run),
    ]


def _reconstructions(run: Run, test: Examples, filters: RBFFilters, forms: Models) -> Iterator[Section]:
    """Fig. 3, for the first defended model that PGD attacked in each norm, and some of the images."""
    config = run.config
    front = Partial(reconstruct, filters, beta1=PRESETS[config.preset].test)
    rebuilt = functools.partial(learn.rebuilt, front)
    first = {norm: _attacked(config, forms, "pgd", norm)[:1] for norm in NORMS}
    for number, (norm, cell) in enumerate((norm, cell) for norm, found in first.items() for cell in found):
        rows = evaluation.drawn(config, min(cell.examples, POINTS))
        clean, moved, by = test.images[rows], _images(run, test, cell, forms, rows), _title(cell)
        if not number:
            before, after = clean[:SHOWN], moved[:SHOWN]
            pictures = {"clean": before, "rebuilt": rebuilt(before)}
            pictures |= {"attacked": after, "attacked, rebuilt": rebuilt(after)}
            yield (
                "Originals and reconstructions",
                f"Clean test images and the same under {by}, each above its reconstruction without noise.",
                plots.image_rows(pictures),
                "rows of clean, rebuilt, attacked and rebuilt attacked images",
            )
        distant = distances(config, clean, moved, rebuilt)
        measured = {name: contraction(*(side[name] for side in distant)) for name in NORMS}
        found = "; ".join(
            f"{name}: median ratio {ratio:.2f}, {above:.1%} above the diagonal"
            for name, (ratio, above) in measured.items()
        )
        yield (
            f"What reconstruction does to distances, attacked in {norm} (Fig. 3)",
            f"Each point is one of {len(rows)} test images under {by}, the perturbation scaled down by a random factor "
            "so that all sizes occur: its distance from the original, and the distance between the reconstructions of "
            "both, without noise. Below the diagonal the front end brings them closer, as Claim 1 of the paper has it; "
            f"above it Claim 1 fails.\n\nDistance after / before, measured in {found}.",
            plots.reconstruction_distances(*distant),
            f"distances before and after reconstruction. {found}",
        )


def distances(
    config: Config, clean: np.ndarray, attacked: np.ndarray, rebuilt: Any
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Fig. 3: by norm ``(N,)``, of attacked images from their originals, and the same of their reconstructions.

    The perturbations are scaled down at random, so that all sizes up to the budget occur.
    """
    share = np.random.default_rng(config.seed).uniform(size=(len(clean), 1, 1, 1)).astype(np.float32)
    moved = clean + share * (attacked - clean)

    def measured(a: np.ndarray, b: np.ndarray) -> dict[str, np.ndarray]:
        deltas = (np.asarray(b) - np.asarray(a)).reshape(len(a), -1)
        return {
            name: np.linalg.norm(deltas, order, axis=-1) for name, order in (("linf", np.inf), ("l2", 2), ("l1", 1))
        }

    return measured(clean, moved), measured(rebuilt(clean), rebuilt(moved))


def contraction(before: np.ndarray, after: np.ndarray) -> tuple[float, float]:
    """Median of after / before, and the share of pairs that moved apart; equal inputs count in neither."""
    ratios = after[before > 0] / before[before > 0]
    return float(np.median(ratios)), float(np.mean(ratios > 1))


def _perception(run: Run, test: Examples, forms: Models) -> Iterator[Section]:
    """Fig. 4: the images that most of the attacks broke."""
    config = run.config
    found = _attacked(config, forms, "ead", "l1") + _attacked(config, forms, "cw", "l2")
    met = {_title(cell): cell for cell in found}
    if not met:
        return
    rows = evaluation.drawn(config, min(cell.examples for cell in met.values()))
    images = {title: _images(run, test, cell, forms, rows) for title, cell in met.items()}
    classes = {title: _classes(forms[cell.model]["static"], images[title]) for title, cell in met.items()}
    labels = test.labels[rows]
    often = np.sum([found != labels for found in classes.values()], axis=0)
    most = np.argsort(-often, kind="stable")[:SHOWN]
    most = most[often[most] > 0]
    if not len(most):
        return
    shown = {"clean": test.images[rows][most]} | {title: images[title][most] for title in met}
    names = {title: _names(config, found[most]) for title, found in ({"clean": labels} | classes).items()}
    yield (
        "What EAD and CW change (Fig. 4)",
        f"Of {len(rows)} test images those that most of these attacks broke, above each attacked image the class that "
        "its model sees without noise, above the originals the true one. In the paper the digits themselves change at "
        "these budgets. How many each attack breaks stands under 'Every attack'.",
        plots.image_rows(shown, titles=names),
        "rows of clean and attacked images with the classes that the models see",
    )


_loss_gradients, _losses_along = jax.jit(saliency.loss_gradients), jax.jit(saliency.losses_along)


def _gradients(test: Examples, forms: Models) -> Iterator[Section]:
    """Fig. 5."""
    if not forms:
        return
    clean, labels = test.images[:SHOWN], test.labels[:SHOWN]
    maps = {
        name: parallel.fetch(_loss_gradients(jax.random.key(0), model["static"], clean, labels))
        for name, model in forms.items()
    }
    yield (
        "Loss gradients (Fig. 5)",
        "Gradient of each image's cross-entropy with respect to its pixels, in one step, for each model without noise. "
        "The paper sees noise for the CNN and the object's own shape for the rCNN.",
        plots.saliency(clean, {RECIPES[name].title: found for name, found in maps.items()}),
        "loss gradients of the models",
    )


def _losses(run: Run, test: Examples, forms: Models) -> Iterator[Section]:
    """Cuts through the loss surface at the tables' first budget; towards APGD's images where the plan has APGD."""
    config = run.config
    if not forms or not config.attack.plan:
        return
    norm, epsilon = first_budget(config)
    settings = config.attack.settings.get("apgd") if any(cell.attack == "apgd" for cell in cells(config)) else None
    rows = evaluation.drawn(config, min(CUT, config.examples.test))
    images, labels, key = test.images[rows], test.labels[rows], jax.random.key(0)
    shares, random = (
        np.linspace(-2, 2, 17, dtype=np.float32),
        jax.random.rademacher(jax.random.key(1), images.shape, images.dtype),
    )
    panels: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    for name, model in forms.items():
        static = model["static"]
        directions = {
            "up the gradient's sign": jnp.sign(_loss_gradients(key, static, images, labels)),
            "along random signs": random,
        }
        if settings:
            # Not the images of the tables, which are left as they are once they are broken.
            facts = {"attack": "apgd", "norm": norm, "epsilon": epsilon, **settings}
            result = evaluate.run_attack(
                jax.random.key(config.seed + 1),
                attacks.apgd(NORMS[norm], epsilon=epsilon, **settings),
                static,
                images,
                labels,
                batch_size=min(config.attack.batch_size, CUT),
                parts=Parts(run.directory / "attacks" / f"figure-loss-{name}", facts),
            )
            moved = jnp.asarray(result.images) - images
            directions[f"towards {KINDS['apgd'].title.format(**settings)}'s image"] = moved / epsilon
        for title, direction in directions.items():
            losses = parallel.fetch(_losses_along(key, static, images, labels, direction, epsilon * shares))
            panels.setdefault(title, {})[RECIPES[name].title] = (shares, losses.mean(-1))
    yield (
        "The loss around an image",
        f"Mean cross-entropy of {len(rows)} test images, each moved along a line, for each model without noise: cuts "
        f"through its loss surface. A distance of 1 is {ball(norm, epsilon)}, or the attacked image. Where the loss "
        "rises little up the gradient's sign, and much towards an image that more steps have found, the gradient at "
        "the image does not show the way.",
        plots.curves(panels, "distance", "cross-entropy"),
        "lines of the mean cross-entropy against the distance from the images, for each model",
    )


def _far(run: Run, test: Examples, forms: Models) -> Iterator[Section]:
    """Fig. 6; the images are crafted once."""
    if not forms:
        return
    config, budgets = run.config, results.PAPER["settings"]["l2_eps"]
    epsilon = FAR * budgets.get(config.set, budgets["mnist"])  # the embedded digits are MNIST's
    attack = attacks.pgd(attacks.L2, epsilon=epsilon, steps=FAR_STEPS)
    clean, labels = test.images[:SHOWN], test.labels[:SHOWN]
    shown, names = {"clean": clean}, {"clean": _names(config, labels)}
    for model, of_model in forms.items():
        directory, title = run.directory / "attacks" / f"figure-6-{model}", RECIPES[model].title
        result = evaluate.run_attack(
            jax.random.key(config.seed + 1),
            attack,
            of_model["static"],
            clean,
            labels,
            batch_size=SHOWN,
            parts=Parts(directory, {"attack": "pgd", "norm": "l2", "epsilon": epsilon, "steps": FAR_STEPS}),
        )
        shown[title] = np.asarray(result.images)
        names[title] = _names(config, _classes(of_model["static"], shown[title]))
    yield (
        "Attacked far beyond the budget (Fig. 6)",
        f"PGD-{FAR_STEPS} in l2 within {epsilon:g}, {FAR} times the paper's budget, on each model without noise; above "
        "each image the class that the model sees, above the originals the true one. In the paper sharp features of "
        "another class appear for the rCNN, and a noisy version of the original for the CNN.",
        plots.image_rows(shown, titles=names),
        "rows of clean images and of those attacked on each model, with the classes that the models see",
    )


def _studies(run: Run) -> Iterator[Section]:
    """Accuracy against what a study varied; the studies that the configuration asks for are in the run directory."""
    for study, varied, what in (
        ("curves", "epsilon", "the budget"),
        ("convergence", "steps", "the attack's iterations"),
        ("convergence", "restarts", "the attack's restarts"),
    ):
        if study not in studies.wanted(run.config):
            continue
        rows = read_json(studies.study_path(run, study), "Remove it to study anew")["rows"]
        # The curves' attack knows nothing of noise, so that what it leaves with noise is no curve of robustness.
        shown = ("static",) if study == "curves" else ("static", "predict")
        rows = [row for row in rows if row.get("series", varied) == varied and row["form"] in shown]
        panels: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
        for row in sorted(rows, key=lambda row: (list(NORMS).index(row["norm"]), row[varied])):
            title = results.column_title(row["model"], row["form"])
            x, y = panels.setdefault(row["norm"], {}).setdefault(title, ([], []))
            x.append(row[varied])
            y.append(row["accuracy"])
        if rows:
            yield (
                f"Accuracy against {what}",
                f"Accuracy in percent of {' or '.join(map(str, sorted({row['N'] for row in rows})))} test images, by "
                f"{varied}{', without noise' * (study == 'curves')}. How it was made is said at the table "
                f"'{studies.STUDIES[study].title}'.",
                plots.curves(panels, varied, "accuracy (%)", log=varied != "epsilon"),
                f"lines of accuracy against {varied}, for each norm and model",
            )


def _attacked(config: Config, forms: Models, attack: str, norm: str) -> list[Cell]:
    """For each defended model the first cell in which it was itself under the attack."""
    first: dict[str, Cell] = {}
    for cell in cells(config):
        known = cell.model in forms and RECIPES[cell.model].defended
        if known and (cell.attack, cell.norm, cell.source) == (attack, norm, cell.model):
            first.setdefault(cell.model, cell)
    return list(first.values())


def _images(run: Run, test: Examples, cell: Cell, forms: Models, rows: np.ndarray) -> np.ndarray:
    """Attacked images of some of a cell's rows."""
    everyone = evaluation.drawn(run.config, cell.examples)
    return evaluation.craft(run, test, cell, forms)[np.searchsorted(everyone, rows)]


def _title(cell: Cell) -> str:
    return f"{cell.title}, {ball(cell.norm, cell.epsilon)}, on {RECIPES[cell.model].title}"


def _classes(logits_fn: LogitsFn, images: np.ndarray) -> np.ndarray:
    return evaluate.predict(jax.random.key(0), logits_fn, images).argmax(-1)


def _names(config: Config, classes: np.ndarray) -> list[str]:
    return [CIFAR10[label] if config.set == "cifar10" else str(label) for label in classes]
