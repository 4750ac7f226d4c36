"""The attacks of the tables, by name, and the cells: which model meets which attack at which budget."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from experiments.recipes import RECIPES
from experiments.rundir import Config
from rbf_jax import attacks
from rbf_jax.attacks import Composed, Iterative
from rbf_jax.types import LogitsFn, Norm

NORMS = {"linf": attacks.Linf, "l2": attacks.L2, "l1": attacks.L1}

Forms = Mapping[str, LogitsFn]
Made = Iterative | Composed | Mapping[str, Iterative | Composed]
"""An attack, or a suite of attacks whose worst image counts."""

ATTACK_STEP = 2.4
"""A step with its gradient against the forward pass alone; measured on two cores."""

FORWARD = 1 / ATTACK_STEP

GRADIENT_FREE = {"square", "spsa", "autoattack"}
"""Attacks that do without gradients, or a part of which does."""


class Kind(NamedTuple):
    """An attack as the configuration knows it.

    Attributes:
        title: in tables, with fields of the settings.
        make: (norm, epsilon, settings, forms of the attacked model) -> attack.
        passes: (settings, name of the norm) -> steps with a gradient for each example, for the estimate of the time.
        form: of the model that it is crafted on; "" for the one without noise that has a gradient.
    """

    title: str
    make: Callable[[Norm, float, dict[str, Any], Forms], Made]
    passes: Callable[[dict[str, Any], str], float]
    form: str = ""

    @property
    def noisy(self) -> bool:
        """Whether it is crafted with the noise of a front end."""
        return self.form not in ("static", "")


def _cw(norm: Norm, epsilon: float, s: dict[str, Any], forms: Forms) -> Made:
    """In linf what most papers call CW: PGD on its loss."""
    del forms
    if norm is attacks.L2:
        return attacks.cw_l2(epsilon=epsilon, searches=s["searches"], steps=s["steps"], initial_c=s["initial_c"])
    return attacks.pgd(norm, epsilon=epsilon, steps=s["linf_steps"], loss=attacks.hinge(50.0))


def warmed(
    norm: Norm,
    epsilon: float,
    s: dict[str, Any],
    forms: Forms,
    gradient: attacks.Estimator,
    loss: attacks.Loss = attacks.cross_entropy,
) -> Composed:
    """PGD under noise from where PGD without noise ended; the half step keeps it in that neighbourhood."""
    step = 1.25 * epsilon / s["steps"]
    attack = attacks.pgd(
        norm, epsilon=epsilon, steps=s["steps"], step_size=step, random_start=False, loss=loss, gradient=gradient
    )
    warm_up = attacks.pgd(norm, epsilon=epsilon, steps=s["warm_up"], restarts=s.get("restarts", 1))
    return attacks.annealed(attack, [forms["static"]], warm_up=warm_up)


def _adaptive(norm: Norm, epsilon: float, s: dict[str, Any], forms: Forms) -> Made:
    """Attacks on the noisy model beside BPDA+EoT on the cross-entropy."""
    draws, bpda = s["draws"], forms["bpda"]

    def on(form: LogitsFn, gradient: attacks.Estimator) -> Composed:
        return attacks.transfer(warmed(norm, epsilon, s, forms, gradient, attacks.margin), form)

    return {
        "BPDA+EoT, margin": on(bpda, attacks.eot(draws)),
        "exact EoT, margin": warmed(norm, epsilon, s, forms, attacks.eot(draws), attacks.margin),
        "mean softmax": warmed(norm, epsilon, s, forms, attacks.mean_softmax(draws // 2), attacks.margin),
        "mean logits": warmed(norm, epsilon, s, forms, attacks.mean_logits(draws // 2), attacks.margin),
    }


KINDS: dict[str, Kind] = {
    "clean": Kind("clean", lambda *_: {}, lambda s, n: 0),
    "fgsm": Kind("FGSM", lambda n, e, s, f: attacks.fgsm(n, epsilon=e), lambda s, n: 1),
    "pgd": Kind(
        "PGD-{steps}", lambda n, e, s, f: attacks.pgd(n, epsilon=e, **s), lambda s, n: s["steps"] * s["restarts"]
    ),
    "mi_fgsm": Kind("MI-FGSM", lambda n, e, s, f: attacks.mi_fgsm(n, epsilon=e, **s), lambda s, n: s["steps"]),
    "cw": Kind("CW", _cw, lambda s, n: s["searches"] * s["steps"] if n == "l2" else s["linf_steps"]),
    "daa": Kind("DAA", lambda n, e, s, f: attacks.daa(n, epsilon=e, **s), lambda s, n: s["steps"] * s["restarts"]),
    "ead": Kind("EAD", lambda n, e, s, f: attacks.ead(epsilon=e, **s), lambda s, n: s["steps"] * s["searches"]),
    "apgd": Kind(
        "APGD-{steps}", lambda n, e, s, f: attacks.apgd(n, epsilon=e, **s), lambda s, n: s["steps"] * s["restarts"]
    ),
    "square": Kind(
        "Square-{queries}",
        lambda n, e, s, f: attacks.square(n, epsilon=e, **s),
        lambda s, n: FORWARD * s["queries"],
        "static",
    ),
    "spsa": Kind(
        "SPSA",
        lambda n, e, s, f: attacks.spsa(n, epsilon=e, **s),
        lambda s, n: FORWARD * 2 * s["directions"] * s["steps"],
        "static",
    ),
    "bpda_eot": Kind(
        "BPDA+EoT",
        lambda n, e, s, f: warmed(n, e, s, f, attacks.eot(s["draws"])),
        lambda s, n: s["draws"] * s["steps"] + s["warm_up"],
        "bpda",
    ),
    "adaptive": Kind("adaptive suite", _adaptive, lambda s, n: 4 * (s["draws"] * s["steps"] + s["warm_up"]), "draw"),
    # At most, where nothing breaks: APGD 100 and 900, FAB 900 (two passes each), Square 5,000 forward.
    "autoattack": Kind(
        "AutoAttack", lambda n, e, s, f: attacks.autoattack("standard", n, epsilon=e), lambda s, n: 4_200
    ),
    "autoattack_rand": Kind(
        "AutoAttack rand", lambda n, e, s, f: attacks.autoattack("rand", n, epsilon=e), lambda s, n: 4_000, "draw"
    ),
}


class Cell(NamedTuple):
    """One attack on one model.

    Attributes:
        model: name of the model that is scored.
        source: name of the model that is attacked: the same, but for transfer.
        attack: a name of `KINDS`.
        norm: name of the norm, empty for clean.
        epsilon: radius of the ball, 0 for clean.
        crafted_on: the form that is attacked, empty for clean.
        scored_on: the forms that classify the result.
        examples: how many.
        settings: of the attack; JSON values.
    """

    model: str
    source: str
    attack: str
    norm: str
    epsilon: float
    crafted_on: str
    scored_on: tuple[str, ...]
    examples: int
    settings: dict[str, Any]

    @property
    def title(self) -> str:
        """Of the attack, in tables."""
        title = KINDS[self.attack].title.format(**self.settings)
        return title if self.model == self.source else f"transfer {title}"

    @property
    def crafted(self) -> str:
        """The attacked model and the attack."""
        form = self.crafted_on if self.crafted_on not in ("static", KINDS[self.attack].form) else ""
        return "-".join(filter(None, (self.source, self.attack, self.norm, f"{self.epsilon:g}", form)))

    @property
    def folder(self) -> str:
        """Of the attacked images; a transferred attack has its own, more and not only just broken."""
        return f"{self.crafted}-{self.examples}{'-leaving' * self.leaves}"

    @property
    def leaves(self) -> bool:
        """Whether an image needs no more than to be broken: its model alone looks at it, and without noise."""
        return self.model == self.source and not RECIPES[self.model].defended

    @property
    def name(self) -> str:
        """Of the cell's files."""
        if not self.norm:
            return f"{self.model}-clean"
        return self.crafted if self.model == self.source else f"{self.model}-from-{self.crafted}"

    @property
    def passes(self) -> float:
        """Gradient steps for each example, for the estimate of the time."""
        return KINDS[self.attack].passes(self.settings, self.norm)


def cells(config: Config) -> Iterator[Cell]:
    """The clean accuracies, and the cells of the configuration's plan.

    A line of it is (models, budgets, attacks, most examples), each attack ``NAME[@BETA2][<SOURCE]``: on the model with
    noise of another level, or transferred from a source.
    """
    attack, seen = config.attack, set()
    for model in config.models:
        yield _cell(config, model, "clean", "", 0.0)
    for names, budgets, wanted, most in attack.plan:
        for norm, epsilon in budgets:
            for model in filter(config.models.__contains__, names):
                for item in wanted:
                    cell = _cell(config, model, item, norm, epsilon, most)
                    if cell.examples and cell.source in config.models and cell.name not in seen:
                        seen.add(cell.name)
                        yield cell


def ball(norm: str, epsilon: float) -> str:
    """A budget as tables name it; a radius that is no short decimal is a level of 8 bits: ``linf 8/255``."""
    radius = f"{epsilon:g}"
    if len(radius) > len("0.0001"):
        radius = f"{255 * epsilon:g}/255"
    return f"{norm} {radius}"


def first_budget(config: Config) -> tuple[str, float]:
    """Norm and epsilon of the plan's first line."""
    return config.attack.plan[0][1][0]


def _cell(config: Config, model: str, item: str, norm: str, epsilon: float, most: int = 10**9) -> Cell:
    attack = config.attack
    item, _, source = item.partition("<")
    kind, _, beta2 = item.partition("@")
    recipe, noisy = RECIPES[model], KINDS[kind].noisy
    counts = attack.examples
    names = (f"{kind}<",) if source else (f"{kind} {norm}", kind)
    count = next((counts[name] for name in names if name in counts), counts["default"])
    settings = attack.settings.get(kind, {})
    settings = settings if isinstance(settings, dict) else settings.to_dict()
    if beta2 and float(beta2) not in attack.beta2:
        raise ValueError(f"config.attack.plan has {item!r}, but config.attack.beta2 is {tuple(attack.beta2)}")
    if beta2 and float(beta2) == config.beta2:
        beta2 = ""
    crafted_on = (KINDS[kind].form or RECIPES[source or model].gradient_form) if norm else ""
    level = f"@{float(beta2):g}" if beta2 else ""
    scored_on = recipe.scored_on
    if recipe.defended and noisy:
        scored_on = (f"predict{level}",)
    elif recipe.defended and model in attack.beta2_models:
        scored_on += tuple(f"predict@{level:g}" for level in attack.beta2 if level != config.beta2)
    total = min(count, most, config.examples.test)
    return Cell(model, source or model, kind, norm, epsilon, f"{crafted_on}{level}", scored_on, total, settings)
