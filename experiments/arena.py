"""Every attack on one defended model, side by side, and both unions: secret noise and known noise.

    python -m experiments.arena --config=experiments/configs/mnist.py:cpu [--model=rcnn] [--images=200] [--publish]

The model is the one that `experiments.reproduce` or `experiments.train` left in the run directory (trained first where
it is missing). Every attack meets all images; what is finished is kept, and the same command goes on. About 3 hours on
two cores for 200 images of MNIST in the profile `cpu`.
"""

from experiments import process

if __name__ == "__main__":
    process.ensure()

from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.tree_util import Partial

from experiments import evaluation, jobs, learn
from experiments.catalogue import NORMS, first_budget, warmed
from experiments.provenance import provenance
from experiments.recipes import RECIPES, front_end
from rbf_jax import attacks, defend, evaluate, models
from rbf_jax.attacks import Composed, Iterative, eot, transfer
from rbf_jax.evaluate import Outcomes, Parts, SuiteResult
from rbf_jax.types import LogitsFn, Norm

MODEL = flags.DEFINE_enum("model", "rcnn", [name for name, recipe in RECIPES.items() if recipe.defended], "which model")
IMAGES = flags.DEFINE_integer("images", 200, "how many test images, drawn as for the tables")

SURROGATES = (1.0, 3.0, 8.0)
"""Sharpness of the fronts that are attacked before the real one, where the exponent is annealed."""

DRAWS, STEPS = 50, 40


def secret(
    forms: dict[str, LogitsFn],
    smoother: list[LogitsFn],
    identity: LogitsFn,
    source: LogitsFn,
    norm: Norm,
    epsilon: float,
) -> dict[str, Iterative | Composed]:
    """Attacks that do not know the noise that they will be scored under.

    Args:
        forms: of the model.
        smoother: its static form with duller fronts, in the order in which they are attacked.
        identity: its static form with the identity for the front's gradient.
        source: the plain CNN.
        norm: of the ball.
        epsilon: its radius.
    """
    static = forms["static"]
    ball: dict[str, Any] = {"epsilon": epsilon}
    pgd = attacks.pgd(norm, steps=100, step_size=0.01, **ball)

    def adaptive(form: str, gradient: attacks.Estimator, loss: attacks.Loss = attacks.cross_entropy) -> Composed:
        settings = {"steps": STEPS, "warm_up": 100}
        return transfer(warmed(norm, epsilon, settings, forms, gradient, loss), forms[form])

    on_static: dict[str, Iterative | Composed] = {
        "noise": attacks.random_noise(norm, **ball),
        "FGSM": attacks.fgsm(norm, **ball),
        "MI-FGSM": attacks.mi_fgsm(norm, steps=10, **ball),
        "PGD-100": pgd,
        "PGD-100 x 10": attacks.pgd(norm, steps=100, step_size=0.01, restarts=10, **ball),
        "CW (PGD-100, hinge)": attacks.pgd(norm, steps=100, step_size=0.01, loss=attacks.hinge(50.0), **ball),
        "CW-linf": attacks.cw_linf(steps=2000, patience=100, **ball),
        "DAA": attacks.daa(norm, steps=200, step_size=0.01, **ball),
        "APGD-CE": attacks.apgd(norm, **ball),
        "APGD-DLR": attacks.apgd(norm, loss=attacks.dlr, **ball),
        "APGD-T": attacks.apgd_t(norm, **ball),
        "FAB-T": attacks.fab_t(norm, **ball),
        "DeepFool": attacks.deepfool(norm, **ball),
        "SPSA": attacks.spsa(norm, steps=50, directions=128, **ball),
        "Square": attacks.square(norm, queries=5000, **ball),
        "RayS": attacks.rays(queries=5000, **ball),
        "annealed PGD-100": attacks.annealed(pgd, smoother),
    }
    return {
        **{f"{name}, static": transfer(attack, static) for name, attack in on_static.items()},
        "PGD-100, identity BPDA": transfer(pgd, identity),
        "PGD-100, transfer from the CNN": transfer(pgd, source),
        "BPDA+EoT": adaptive("bpda", eot(DRAWS)),
        "BPDA+EoT, margin": adaptive("bpda", eot(DRAWS), attacks.margin),
        "exact EoT": adaptive("draw", eot(DRAWS)),
        "mean softmax": adaptive("draw", attacks.mean_softmax(DRAWS // 2), attacks.margin),
        "mean logits": adaptive("draw", attacks.mean_logits(DRAWS // 2), attacks.margin),
    }


def known(norm: Norm, epsilon: float) -> dict[str, Iterative | Composed]:
    """Attacks on the prediction under a draw that they know."""
    return {
        "PGD-100, known noise": attacks.pgd(norm, epsilon=epsilon, steps=100, step_size=0.01),
        "APGD-CE, known noise": attacks.apgd(norm, epsilon=epsilon),
        "APGD-DLR, known noise": attacks.apgd(norm, epsilon=epsilon, loss=attacks.dlr),
    }


def figures(result: SuiteResult, folder: Path) -> dict[str, Any]:
    """What is published of a suite: a line for each attack, and the union."""
    lines, total = {}, result.survived.shape[1]
    for number, name in enumerate(result.names):
        survived = result.survived[number]
        low, high = evaluate.wilson_interval(round(float(survived.sum())), total)
        seconds = Parts(folder / name, {}).seconds() if number else 0.0
        lines[name] = {
            "left, %": round(100 * float(survived.mean()), 1),
            "95 % interval": [round(100 * low, 1), round(100 * high, 1)],
            "forward passes an image": round(float(result.forwards[number].mean())),
            "backward passes an image": round(float(result.backwards[number].mean())),
            "seconds an image": round(seconds / total, 3),
        }
    mean = result.robust.mean(1)
    lines["union, fresh draws"] = {
        "left, %": round(100 * float(mean.mean()), 1),
        "over redraws, %": [round(100 * float(value), 1) for value in (mean.min(), mean.max())],
    }
    return lines


def job() -> None:
    """Runs both suites and writes what they left."""
    run, name, count = jobs.open_run(), str(MODEL.value), int(IMAGES.value or 0)
    config = run.config
    examples = learn.load(config, jobs.DATA_DIR.value)
    filters = learn.fit_filters(run, examples, RECIPES[name].filters)
    variables = learn.train_model(run, examples, name)
    forms = learn.forms(config, filters, name, variables)
    source = learn.forms(config, None, "cnn", learn.train_model(run, examples, "cnn"))["static"]
    classifier = models.logits_fn(learn.classifier(config), variables)
    smoother: list[LogitsFn] = [defend(filters, classifier, beta1=beta1, beta2=0.0).static for beta1 in SURROGATES]
    rebuild = Partial(learn.keyed, front_end(RECIPES[name], config.preset, filters, testing=True))
    identity = attacks.straight_through(rebuild, classifier)
    norm_name, epsilon = first_budget(config)
    norm, rows = NORMS[norm_name], evaluation.drawn(config, count)
    images, labels = examples.test.images[rows], examples.test.labels[rows]
    noise_key = jax.random.key(config.seed + 3)
    suites = {
        "secret noise": (secret(forms, smoother, identity, source, norm, epsilon), forms["static"], forms["predict"]),
        "known noise": (known(norm, epsilon), attacks.known_noise(forms["predict"], noise_key), None),
    }
    record: dict[str, Any] = provenance() | {
        "model": name,
        "set": config.set,
        "norm": norm_name,
        "epsilon": epsilon,
        "N": count,
        "seed": config.seed,
        "beta2": config.beta2,
        "m": config.draws,
    }
    ledgers: dict[str, Path] = {}
    for title, (suite, logits_fn, judge) in suites.items():
        folder = run.directory / "arena" / f"{name}-{count}" / title.replace(" ", "-")
        result = evaluate.run_suite(
            jax.random.key(config.seed + 4),
            suite,
            logits_fn,
            images,
            labels,
            judge=judge,
            union=False,
            rows=rows,
            batch_size=config.attack.batch_size,
            directory=folder,
            progress=True,
        )
        record[title] = figures(result, folder)
        facts = provenance() | {"suite": list(suite)} | record[title]
        outcomes = Outcomes(rows, np.zeros((0, count), bool), result.robust, facts)
        evaluate.save_outcomes(folder / "ledger.npz", outcomes)
        print(f"{title}: the union leaves {record[title]['union, fresh draws']['left, %']} %", flush=True)
        ledgers[title.replace(" ", "-")] = folder / "ledger.npz"
    if jobs.PUBLISH.value:
        jobs.publish_record(f"arena_{name}", record, ledgers)


if __name__ == "__main__":
    jobs.main(job)
