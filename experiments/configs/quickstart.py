"""The whole pipeline on the embedded set: 5,000 real MNIST digits, 4,000 to train and 1,000 to test.

make quickstart                   about 3 minutes on two cores
make quickstart PROFILE=smoke     about half a minute: every stage once, too short to mean anything
"""

from typing import Any

from experiments.configs import mnist, profiles


def get_config(profile: str | None = None) -> Any:
    """The configuration of a profile, ``"cpu"`` (on any device) or ``"smoke"``."""
    profile = profiles.chosen(profile or "cpu", ("smoke", "cpu"))
    config = mnist.get_config("smoke")
    config.title, config.set, config.profile = "RBF-CNN on 5,000 digits", "quickstart", profile
    config.examples = {"train": 4_000, "validation": 200, "test": 1_000}
    budgets = (("linf", 0.3), ("l2", 2.0))
    config.attack.plan = (
        (("cnn", "rcnn"), budgets, ("fgsm", "pgd"), 1_000),
        (("rcnn",), budgets, ("bpda_eot",), 1_000),
    )
    config.attack.unions = ({"linf": 0.3, "l2": 2.0},)
    settings = config.attack.settings
    if profile == "smoke":
        config.examples = {"train": 660, "validation": 20, "test": 100}
        config.em.steps, config.em.growth_steps = 40, 30
        config.attack.examples = {"default": 40, "clean": 100, "bpda_eot": 20}
        return config
    config.train.epochs = 3
    settings.pgd.steps = 20
    settings.bpda_eot.update(draws=10, steps=20, warm_up=20)
    config.attack.selection = 5
    config.attack.examples, config.attack.batch_size = {"default": 200, "clean": 1_000, "bpda_eot": 100}, 100
    return config
