"""Every attack on one defended model, side by side, and both unions: secret noise and known noise.

    python -m experiments.arena --config=experiments/configs/mnist.py:cpu [--model=rcnn] [--images=200] [--publish]

The model is the one that `experiments.reproduce` or `experiments.train` left in the run directory (trained first where
it is missing). Every attack meets all images and is scored on fresh noise. Its ledger is kept, so that the same command
goes on where a stopped one was, also on another machine that was given the ledgers: ``arena/MODEL-N/ledger`` of the run
directory holds them, ``results/arena_MODEL/ledger`` those that were published. About 2 hours on one core for 200 images
of MNIST.
"""

from rbf_jax import process

if __name__ == "__main__":
    process.ensure()

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from jax.tree_util import Partial

from experiments import contest_jobs, contests, evaluation, jobs, learn
from experiments.catalogue import NORMS, first_budget, warmed
from experiments.learn import Examples
from experiments.provenance import provenance
from experiments.recipes import RECIPES, front_end
from experiments.report import slug
from rbf_jax import attacks, defend, evaluate, models
from rbf_jax.attacks import Composed, Iterative, eot, transfer
from rbf_jax.evaluate import Outcomes, Parts
from rbf_jax.files import check_facts
from rbf_jax.types import LogitsFn, Norm

MODEL = flags.DEFINE_enum("model", "rcnn", [name for name, recipe in RECIPES.items() if recipe.defended], "which model")

SURROGATES = (1.0, 3.0, 8.0)
"""Sharpness of the fronts that are attacked before the real one, where the exponent is annealed."""


class Suite(NamedTuple):
    """Attacks of one threat model.

    Attributes:
        title: the threat model.
        attacks: by name.
        logits_fn: what is attacked, by attacks that do not bring a form of their own.
        judge: the prediction that scores.
        redraws: of the judge, for picking an example's worst attack and for scoring it.
        budget: norm and radius of the attacks.
    """

    title: str
    attacks: Mapping[str, Iterative | Composed]
    logits_fn: LogitsFn
    judge: LogitsFn
    redraws: tuple[int, int]
    budget: tuple[str, float]


def secret(
    forms: dict[str, LogitsFn],
    smoother: list[LogitsFn],
    identity: LogitsFn,
    source: LogitsFn,
    norm: Norm,
    epsilon: float,
) -> dict[str, Iterative | Composed]:
    """Attacks that do not know the noise that they will be scored under; without a form of their own, on ``static``.

    Args:
        forms: of the model.
        smoother: its static form with duller fronts, in the order in which they are attacked.
        identity: its static form with the identity for the front's gradient.
        source: the plain CNN.
        norm: of the ball.
        epsilon: its radius.
    """
    ball: dict[str, Any] = {"epsilon": epsilon}
    pgd = attacks.pgd(norm, steps=100, step_size=0.01, **ball)

    def adaptive(form: str, gradient: attacks.Estimator, loss: attacks.Loss = attacks.cross_entropy) -> Composed:
        settings = {"steps": 40, "warm_up": 100}
        return transfer(warmed(norm, epsilon, settings, forms, gradient, loss), forms[form])

    return {
        "FGSM": attacks.fgsm(norm, **ball),
        "MI-FGSM": attacks.mi_fgsm(norm, steps=10, **ball),
        "PGD-100": pgd,
        "APGD-CE": attacks.apgd(norm, **ball),
        "APGD-DLR": attacks.apgd(norm, loss=attacks.dlr, **ball),
        "BPDA+EoT": adaptive("bpda", eot(50)),
        "PGD-100, transfer from the CNN": transfer(pgd, source),
        "PGD-100, identity BPDA": transfer(pgd, identity),
        "annealed PGD-100": attacks.annealed(pgd, smoother),
        "CW (PGD-100, hinge)": attacks.pgd(norm, steps=100, step_size=0.01, loss=attacks.hinge(50.0), **ball),
        "DAA": attacks.daa(norm, steps=200, step_size=0.01, **ball),
        "PGD-100 x 5": attacks.pgd(norm, steps=100, step_size=0.01, restarts=5, **ball),
        "BPDA+EoT, margin": adaptive("bpda", eot(20), attacks.margin),
        "exact EoT": adaptive("draw", eot(20)),
        "mean softmax": adaptive("draw", attacks.mean_softmax(10), attacks.margin),
        "mean logits": adaptive("draw", attacks.mean_logits(10), attacks.margin),
        "DeepFool": attacks.deepfool(norm, **ball),
        "APGD-T": attacks.apgd_t(norm, **ball),
        "FAB-T": attacks.fab_t(norm, **ball),
        "CW-linf": attacks.cw_linf(steps=1000, patience=100, **ball),
        "Square": attacks.square(norm, queries=2000, **ball),
        "RayS": attacks.rays(queries=2000, **ball),
        "SPSA": attacks.spsa(norm, steps=30, directions=64, **ball),
        "noise": attacks.random_noise(norm, **ball),
    }


def known(norm: Norm, epsilon: float) -> dict[str, Iterative | Composed]:
    """Attacks on the prediction under a draw that they know."""
    return {
        "APGD-DLR, known noise": attacks.apgd(norm, epsilon=epsilon, steps=50, loss=attacks.dlr),
        "APGD-CE, known noise": attacks.apgd(norm, epsilon=epsilon, steps=50),
        "PGD-40, known noise": attacks.pgd(norm, epsilon=epsilon, steps=40),
    }


def meet(
    name: str,
    number: int,
    suite: Suite,
    targets: Examples,
    rows: np.ndarray,
    batch_size: int,
    seed: int,
    folder: Path,
    facts: dict[str, Any],
) -> Outcomes:
    """An attack on all examples and its score, from its ledger where that is there.

    Args:
        name: of the attack; ``"clean"`` for none.
        number: of the attack in its suite, for its key.
        suite: where it stands.
        targets: images and labels.
        rows: their indices in the data set.
        batch_size: images at a time.
        seed: of all keys.
        folder: for ledgers and finished batches.
        facts: what else determines the outcomes.
    """
    path = folder / "ledger" / f"{slug(suite.title)}-{slug(name)}.npz"
    determined: dict[str, Any] = facts | {
        "attack": name,
        "suite": suite.title,
        "budget": list(suite.budget),
        "seed": seed,
        "redraws": list(suite.redraws),
        "weights": evaluate.fingerprint(suite.judge),
        "examples": len(rows),
    }
    if path.exists():
        outcomes = evaluate.load_outcomes(path)
        check_facts(f"{path} is of another evaluation", outcomes.facts, determined, "Remove it to evaluate anew")
        return outcomes
    images, passes, origin = targets.images, dict[str, Any](), provenance(folder / path.stem)
    if name in suite.attacks:
        parts = Parts(folder / path.stem, {"attack": name})
        key = jax.random.fold_in(jax.random.key(seed + 4), number)
        found = evaluate.run_attack(
            key,
            suite.attacks[name],
            suite.logits_fn,
            images,
            targets.labels,
            rows=rows,
            batch_size=batch_size,
            parts=parts,
            progress=name,
        )
        images = found.images
        passes = {
            "forward passes an image": round(float(np.mean(found.forwards))),
            "backward passes an image": round(float(np.mean(found.backwards))),
            "seconds an image": round(parts.seconds() / len(rows), 3),
        }
    right = evaluate.survival(
        jax.random.key(seed + 2),  # not the attack's: a prediction is made under fresh noise
        suite.judge,
        images,
        targets.labels,
        redraws=sum(suite.redraws),
        rows=rows,
        batch_size=batch_size,
    )
    selection = suite.redraws[0]
    outcomes = Outcomes(rows, right[:selection], right[selection:], origin | determined | passes)
    evaluate.save_outcomes(path, outcomes)
    return outcomes


def job() -> None:
    """Runs both suites and says what each attack left, and the worst of them for each example."""
    run, name, count = jobs.open_run(), str(MODEL.value), contest_jobs.IMAGES.value or 200
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
    budget = norm_name, epsilon = first_budget(config)
    norm, rows = NORMS[norm_name], evaluation.drawn(config, count)
    targets = Examples(examples.test.images[rows], examples.test.labels[rows])
    under_one_draw = attacks.known_noise(forms["predict"], jax.random.key(config.seed + 3))
    redraws = config.attack.selection, config.attack.scoring
    hidden = secret(forms, smoother, identity, source, norm, epsilon)
    suites = (
        Suite("secret noise", hidden, forms["static"], forms["predict"], redraws, budget),
        Suite("known noise", known(norm, epsilon), under_one_draw, under_one_draw, (1, 1), budget),
    )
    folder = run.directory / "arena" / f"{name}-{count}"
    facts = {"draws": config.draws, "source weights": evaluate.fingerprint(source)}
    settings = {
        "kind": "arena",
        "model": name,
        "set": config.set,
        "norm": norm_name,
        "epsilon": epsilon,
        "N": len(rows),
        "beta2": config.beta2,
        "draws": config.draws,
    }
    for suite in suites:
        met = []
        for number, attack in enumerate(("clean", *suite.attacks)):
            met.append(meet(attack, number, suite, targets, rows, config.attack.batch_size, config.seed, folder, facts))
            left, union = (100 * right.mean() for right in (met[-1].scoring, contests.union(met)))
            print(f"{attack}: leaves {left:.1f} %, the worst of all so far {union:.1f} %", flush=True)
            if jobs.PUBLISH.value:  # each at once: on a machine that is taken away, nothing else stays
                contest_jobs.publish_contest(f"arena_{name}", settings, folder / "ledger")


if __name__ == "__main__":
    jobs.main(job)
