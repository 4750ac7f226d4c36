"""One rCNN over its training: whether what attacks leave later on is robustness, or gradients that hide."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import learn
from experiments.catalogue import KINDS, NORMS
from experiments.cost import Speeds
from experiments.paper_tables import Table
from experiments.recipes import RECIPES
from experiments.results import in_percent, measured, percent
from experiments.rundir import Config
from experiments.studies.common import Inputs, Row, Sample, Study, asked, budget, pivot, step_seconds
from rbf_jax import attacks, defend, models, train
from rbf_jax.attacks import Composed, Iterative
from rbf_jax.attacks.losses import cross_entropy, margin
from rbf_jax.models.classifier import Variables
from rbf_jax.types import Array, Key, LogitsFn


def settings(config: Config) -> dict[str, Any]:
    """The model, its epochs (the last one is the finished model), and the attacks."""
    studies = asked(config)
    found = studies.get("training")
    if not found or found["model"] not in config.models:
        return {}
    model = found["model"]
    if model not in config.snapshots:
        raise ValueError(f"config.snapshots must name epochs of {model}, whose training is studied")
    epochs = [epoch for epoch in config.snapshots[model] if epoch < learn.epochs(config, model)]
    return {
        "models": [model],
        "epochs": [*epochs, learn.epochs(config, model)],
        **budget(config),
        "examples": studies["few"],
        "steps": found["steps"],
        "queries": found["queries"],
        "beta1": list(found["beta1"]),
        "bpda_eot": config.attack.settings.bpda_eot.to_dict(),
        "scoring": config.attack.scoring,
    }


def measure(inputs: Inputs) -> list[Row]:
    """Each epoch under the same attacks, and the images of each met by the others."""
    settings, (model,) = inputs.settings, inputs.models
    epochs, seen = settings["epochs"], inputs.sample(inputs.settings["examples"])
    finished, record = train.load_weights(learn.weights_path(inputs.run, model))
    variables = {epoch: learn.snapshot(inputs.run, model, epoch) for epoch in epochs[:-1]} | {epochs[-1]: finished}
    forms = {epoch: learn.forms(inputs.run.config, inputs.filters, model, v) for epoch, v in variables.items()}
    total, rows, crafted = inputs.run.config.examples, [], {}
    for epoch in epochs:
        known = {"model": model, "form": "static", "epoch": epoch}
        accuracy = {"accuracy": in_percent(record["history"]["accuracy"][epoch - 1]), "wilson95": None}
        rows.append(known | {"title": "training images", "N": total.train - total.validation} | accuracy)
        found, crafted[epoch] = _accuracies(inputs, seen, epoch, forms[epoch], variables[epoch])
        rows += [known | row for row in found + _gradients(inputs, seen, forms[epoch]["static"])]
    for made in epochs:
        title = "the last epoch's images" if made == epochs[-1] else f"images of epoch {made}"
        for met in epochs:
            right = inputs.right(forms[met]["static"], seen._replace(images=crafted[made]))
            rows.append({"model": model, "form": "static", "epoch": met, "title": title} | measured(right))
    return rows


def _accuracies(
    inputs: Inputs, seen: Sample, epoch: int, forms: dict[str, LogitsFn], variables: Variables
) -> tuple[list[Row], np.ndarray]:
    """Clean and attacked, without noise and with it; and the images of PGD on the cross-entropy without noise."""
    settings, static, predict = inputs.settings, forms["static"], forms["predict"]
    norm, epsilon, steps = NORMS[settings["norm"]], settings["epsilon"], settings["steps"]
    classifier = models.logits_fn(learn.classifier(inputs.run.config), variables)
    smoother = [defend(inputs.filters, classifier, beta1=b, beta2=0.0).static for b in settings["beta1"]]
    pgd = attacks.pgd(norm, epsilon=epsilon, steps=steps)
    on_margin = attacks.pgd(norm, epsilon=epsilon, steps=steps, loss=margin)
    without: dict[str, Iterative | Composed] = {
        f"PGD-{steps}": pgd,  # the first: whose images the other epochs meet
        f"PGD-{steps}, margin": on_margin,
        f"PGD-{steps}, margin, beta1 from {', '.join(f'{b:g}' for b in settings['beta1'])}": attacks.annealed(
            on_margin, smoother
        ),
        f"Square-{settings['queries']}": attacks.square(norm, epsilon=epsilon, queries=settings["queries"]),
    }
    rows = [{"title": "clean"} | measured(inputs.right(static, seen))]
    redraws = settings["scoring"]
    rows.append({"title": "clean, with noise"} | measured(inputs.right(predict, seen, redraws=redraws)))
    facts = {name: settings[name] for name in ("norm", "epsilon", "steps", "queries", "beta1")}
    found = []
    for number, (title, attack) in enumerate(without.items()):
        found.append(np.asarray(inputs.attack(f"epoch-{epoch}-{number}", attack, static, seen, facts).images))
        rows.append({"title": title} | measured(inputs.right(static, seen._replace(images=found[-1]))))
    s = settings["bpda_eot"]
    attack = KINDS["bpda_eot"].make(norm, epsilon, s, forms)
    assert isinstance(attack, Composed)
    images = np.asarray(inputs.attack(f"epoch-{epoch}-bpda_eot", attack, forms["bpda"], seen, facts | s).images)
    right = inputs.right(predict, seen._replace(images=images), redraws=redraws)
    return [*rows, {"title": "BPDA+EoT, with noise"} | measured(right)], found[0]


@jax.jit
def _losses(logits_fn: LogitsFn, key: Key, images: Array, labels: Array, epsilon: float) -> Array:
    """By example the gradient's l2 norm, the margin, and the loss here, up its sign, and along random signs."""

    def loss(images: Array) -> Array:
        return cross_entropy(logits_fn(key, images), labels, None)

    def along(signs: Array) -> Array:
        return loss(jnp.clip(images + epsilon * signs, 0, 1))

    gradient = jax.grad(lambda images: loss(images).sum())(images)
    random = jax.random.rademacher(key, images.shape, images.dtype)
    steepness = jnp.linalg.norm(gradient.reshape(len(images), -1), axis=-1)
    gap = -margin(logits_fn(key, images), labels, None)
    return jnp.stack([steepness, gap, loss(images), along(jnp.sign(gradient)), along(random)], -1)


def _gradients(inputs: Inputs, seen: Sample, static: LogitsFn) -> list[Row]:
    size, key = inputs.run.config.attack.batch_size, inputs.key("attack")
    parts = [seen.take(np.arange(start, min(start + size, len(seen.rows)))) for start in range(0, len(seen.rows), size)]
    epsilon = inputs.settings["epsilon"]
    found = np.concatenate([_losses(static, key, part.images, part.labels, epsilon) for part in parts])
    steepness, gap, here, up, random = found.T
    values = {
        "gradient's l2 norm, median": np.median(steepness),
        "images without a gradient, %": 100 * np.mean(steepness == 0),
        "margin of the logits, median": np.median(gap),
        "cross-entropy, mean": here.mean(),
        "cross-entropy a radius up the gradient's sign": up.mean(),
        "cross-entropy a radius along random signs": random.mean(),
    }
    return [{"title": title, "N": len(found), "value": round(float(x), 6)} for title, x in values.items()]


def seconds(config: Config, settings: dict[str, Any], speed: Speeds) -> float:
    """The attacks on each epoch."""
    del config
    (model,), s = settings["models"], settings["bpda_eot"]
    steps = settings["steps"] * (3 + len(settings["beta1"])) + s["draws"] * s["steps"] + s["warm_up"]
    each = steps * step_seconds(speed, model) + settings["queries"] * speed.look(model)
    return len(settings["epochs"]) * settings["examples"] * each


def _cell(row: Row) -> str:
    if "value" in row:
        return f"{row['value']:.3g}"
    return f"{row['accuracy']:.1f}" if row["wilson95"] is None else percent(row)


def _table(rows: list[Row]) -> Table:
    return pivot(rows, RECIPES[rows[0]["model"]].title, lambda row: f"epoch {row['epoch']}", _cell)


STUDY = Study(
    "One rCNN over its training",
    "Accuracy in percent with its 95 % Wilson interval, at the tables' first budget; the training images' is the "
    "epoch's mean, on augmented images. Attacks without noise meet the model without noise; BPDA+EoT meets the noisy "
    "prediction. Images of an epoch are those of PGD on the cross-entropy without noise, met by the model of every "
    "epoch. If an attack that needs no gradient, the margin in place of a cross-entropy that has underflowed, smoother "
    "fronts first, or another epoch's images break what PGD leaves, then it was hidden, not robust.",
    settings,
    measure,
    _table,
    seconds,
)
