"""Certificates by randomized smoothing (the paper's Table VI): each setting is kept in the run directory.

The configuration's ``certify`` says what is computed::

    runs        ((samples, examples, ((model, standard deviation of the smoothing noise), ...)), ...)
    n0          samples that pick the class
    alpha       probability that a certificate may be wrong
    radii       l2 radii of the table's columns
    batch_size  samples at a time; the counts do not depend on it
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from experiments.evaluation import Models, drawn
from experiments.learn import Examples
from experiments.provenance import provenance
from experiments.recipes import RECIPES
from experiments.results import BETA2, PAPER, check_one_weight, in_percent, measured, percent, quoted
from experiments.rundir import Config, Run
from rbf_jax import evaluate
from rbf_jax.certify import ABSTAIN, certified_radius, certify, predicted_class
from rbf_jax.evaluate import Parts
from rbf_jax.files import check_facts, read_npz, write_npz
from rbf_jax.types import LogitsFn

NOTE = (
    "Certified accuracy: share of images in percent, with its 95 % Wilson interval, at which the smoothed model "
    "(Gaussian noise of standard deviation sigma on the image; Cohen et al. 2019) provably has the true class in the "
    "whole l2 ball of that radius; at radius 0, its clean accuracy. 'one draw': each sample draws the defence's own "
    "noise anew, 'no noise': beta2 = 0. PREDICT: accuracy of the smoothed model's class, where a binomial test on the "
    "same samples tells it from the second most frequent one; otherwise it abstains. The mean radius counts a wrong "
    "class as 0. Where all samples agree the radius is the ceiling; beyond it nothing is measured, and the paper's 0.0 "
    "for MNIST at radius 1 says no more."
)
_FORMS = {"static": "no noise", "draw": "one draw"}


class Setting(NamedTuple):
    """One model's certificates.

    Attributes:
        model: its name.
        form: that is smoothed: ``"static"``, or of a defence also ``"draw"``, one noisy draw.
        sigma: standard deviation of the smoothing noise.
        samples: n, that bound the class's probability.
        examples: how many images.
    """

    model: str
    form: str
    sigma: float
    samples: int
    examples: int


class Certificates(NamedTuple):
    """What a setting gave.

    Attributes:
        rows: int ``(N,)``, indices of the examples.
        truth: int ``(N,)``, their classes.
        label: int ``(N,)``, the certified classes, or `ABSTAIN`.
        radius: float64 ``(N,)``, 0 where it abstains.
        counts: int32 ``(N, classes)``, what the base model said on the n samples.
        facts: how they came about; JSON values.
    """

    rows: np.ndarray
    truth: np.ndarray
    label: np.ndarray
    radius: np.ndarray
    counts: np.ndarray
    facts: dict[str, Any]


def settings(config: Config) -> Iterator[Setting]:
    """All settings of the configuration, for those of its models that are there."""
    for samples, examples, certified in config.certify.runs:
        for model, sigma in certified:
            for form in _FORMS if RECIPES[model].defended else ("static",):
                if model in config.models and examples:
                    yield Setting(model, form, sigma, samples, min(examples, config.examples.test))


def certificates_path(run: Run, setting: Setting) -> Path:
    """Where the certificates of a setting lie; those of single images, while it runs, in a folder beside it."""
    name = f"{setting.model}-{setting.form}-{setting.sigma:g}-{setting.samples}.npz"
    return run.directory / "certificates" / name


def run_setting(run: Run, examples: Examples, setting: Setting, logits_fn: LogitsFn) -> Path:
    """Certifies the images of a setting that are not yet certified; returns its file.

    Args:
        run: the run directory.
        examples: all test examples.
        setting: one of `settings`.
        logits_fn: the form that it names, a ``jax.tree_util.Partial``.

    Raises:
        ValueError: certificates that are there already are damaged, of other weights or of other settings.
    """
    config, path = run.config, certificates_path(run, setting)
    determined = {
        **setting._asdict(),
        "n0": config.certify.n0,
        "alpha": config.certify.alpha,
        "profile": config.profile,
        "seed": config.seed,
        "weights": evaluate.fingerprint(logits_fn),
    }
    if not path.exists():
        _certify(run, examples, setting, logits_fn, determined)
    way_out = f"Remove it and {path.with_suffix('')}"
    check_facts(f"{path} is of other certificates", load(path).facts, determined, way_out)
    return path


def _certify(run: Run, examples: Examples, setting: Setting, logits_fn: LogitsFn, determined: dict[str, Any]) -> None:
    config, path = run.config, certificates_path(run, setting)
    rows, key = drawn(config, setting.examples), jax.random.key(config.seed + 7)
    images, truth = examples.images[rows], examples.labels[rows]
    origin, parts = provenance(path.with_suffix("")), Parts(path.with_suffix(""), determined)
    parts.open(evaluate.fingerprint(key, rows, images), batch_size=1)

    def one(row: int, image: np.ndarray) -> tuple[np.ndarray, ...]:
        found = certify(
            jax.random.fold_in(key, row),
            logits_fn,
            image,
            sigma=setting.sigma,
            n0=config.certify.n0,
            n=setting.samples,
            alpha=config.certify.alpha,
            batch_size=config.certify.batch_size,
        )
        return tuple(map(np.asarray, found))

    shown = f"certificates of {title(setting.model, setting.form)}, sigma {setting.sigma:g}, {setting.samples} samples"
    done = []
    for row, image in zip(tqdm(rows.tolist(), desc=shown, unit="image"), images, strict=True):
        done.append(parts.kept(row, lambda row=row, image=image: one(row, image)))
    label, radius, counts = map(np.stack, zip(*done, strict=True))
    facts = origin | determined | {"seconds": round(parts.seconds(), 1)}
    accuracy = float((label == truth).mean())
    run.log({"stage": "certify", "accuracy": accuracy, "mean radius": float(radius.mean())} | facts)
    arrays = {"rows": rows, "truth": truth, "label": label, "radius": radius, "counts": counts}
    write_npz(path, arrays | {"facts": np.array(json.dumps(facts))}, compressed=True)


def load(path: str | Path) -> Certificates:
    """Reads the certificates of a setting.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged or something else.
    """
    way_out = "Remove it to put it together again"
    stored = read_npz(path, "a file of certificates", way_out)
    try:
        arrays: dict[str, Any] = {name: stored[name] for name in Certificates._fields}
        return Certificates(**arrays | {"facts": json.loads(str(stored["facts"]))})
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} is not a file of certificates: {error}. {way_out}") from error


def certify_all(run: Run, examples: Examples, models: Models) -> list[Path]:
    """All settings of the configuration; returns their files.

    Args:
        run: the run directory.
        examples: all test examples.
        models: the forms of each model.
    """
    return [run_setting(run, examples, s, models[s.model][s.form]) for s in settings(run.config)]


def paper_number(data_set: str, setting: Setting, radius: float, beta2: float = BETA2) -> float | None:
    """The paper's certified accuracy in percent; None where it has none.

    Args:
        data_set: ``"mnist"`` or ``"cifar10"``; others are not in the paper.
        setting: the paper smooths the plain network, and rCNN and rCNN+ with their noise.
        radius: of the l2 ball.
        beta2: the level of noise of the form ``"draw"``.
    """
    model = "baseline" if setting.model == "cnn" else setting.model
    row, certified = PAPER["table6_certified_l2"].get(data_set, {}), PAPER["settings"]["certify"]
    if model not in row or radius not in row["radii"] or setting.samples != certified["samples"]:
        return None
    if setting.form == "draw" and beta2 != BETA2:
        return None
    sigma, form = certified["tau"][data_set], "static" if model == "baseline" else "draw"
    sigma = sigma[model] if isinstance(sigma, dict) else sigma
    return row[model][row["radii"].index(radius)] if (setting.sigma, setting.form) == (sigma, form) else None


def make_rows(
    records: Iterable[Certificates], data_set: str, radii: Sequence[float], beta2: float = BETA2
) -> list[dict[str, Any]]:
    """One record for each setting, with its certified accuracies at radius 0 and at the given ones.

    Args:
        records: from `load`, at least one.
        data_set: for the paper's numbers.
        radii: of l2 balls, above 0.
        beta2: the level of noise of the form ``"draw"``.

    Raises:
        ValueError: records of several weights of one model.
    """
    records = list(records)
    check_one_weight(f"{data_set} has certificates of", (record.facts for record in records), form="form")
    rows = [_row(record, data_set, radii, beta2) for record in records]
    models, forms = list(RECIPES), list(_FORMS)
    return sorted(rows, key=lambda r: (models.index(r["model"]), forms.index(r["form"]), r["sigma"], -r["samples"]))


def _row(record: Certificates, data_set: str, radii: Sequence[float], beta2: float) -> dict[str, Any]:
    facts = record.facts
    setting = Setting(*(facts[name] for name in Setting._fields))
    ceiling = certified_radius(setting.samples, setting.samples, facts["alpha"], setting.sigma)
    right = record.label == record.truth
    predicted = np.array([predicted_class(counts, facts["alpha"]) for counts in record.counts])

    def at(radius: float) -> dict[str, Any]:
        paper = paper_number(data_set, setting, radius, beta2)
        if radius > ceiling:
            return {"radius": radius, "accuracy": None, "wilson95": None, "paper": paper, "difference": None}
        certified = measured((right & (record.radius >= radius))[None])
        difference = None if paper is None else round(certified["accuracy"] - paper, 1)
        return {"radius": radius, **certified, "paper": paper, "difference": difference}

    return {
        **setting._asdict(),
        "N": len(record.rows),
        "certified": [at(radius) for radius in (0.0, *radii)],
        "abstained": in_percent(float((record.label == ABSTAIN).mean())),
        "prediction": {
            **measured((predicted == record.truth)[None]),
            "abstained": in_percent(float((predicted == ABSTAIN).mean())),
        },
        "mean radius": round(float((record.radius * right).mean()), 6),
        "ceiling": round(ceiling, 4),
        **{name: value for name, value in facts.items() if name not in Setting._fields},
    }


def table(rows: Iterable[dict[str, Any]]) -> tuple[list[str], list[dict[str, str]]]:
    """Headings and lines: one line for each setting, the paper's numbers beside; the rows are of `make_rows`."""
    rows = list(rows)
    in_paper = {at["radius"] for row in rows for at in row["certified"] if at["paper"] is not None}
    lines = []
    for row in rows:
        line = {
            "model": title(row["model"], row["form"]),
            "sigma": f"{row['sigma']:g}",
            "samples": str(row["samples"]),
            "N": str(row["N"]),
        }
        for at in row["certified"]:
            radius, above = f"{at['radius']:g}", at["accuracy"] is None
            line[f"radius {radius}"] = f"above the ceiling {row['ceiling']:.3f}" if above else percent(at)
            if at["radius"] in in_paper:
                line[f"paper's {radius}"] = quoted(None if above else at, at["paper"])
        line |= {"abstained": f"{row['abstained']:.1f}", "mean radius": f"{row['mean radius']:.3f}"}
        line |= {"ceiling": f"{row['ceiling']:.3f}", "PREDICT": percent(row["prediction"])}
        lines.append(line | {"PREDICT abstained": f"{row['prediction']['abstained']:.1f}"})
    return list(lines[0]), lines


def title(model: str, form: str) -> str:
    """What a model's form is called in the tables of certificates."""
    return f"{RECIPES[model].title}, {_FORMS[form]}" if RECIPES[model].defended else RECIPES[model].title
