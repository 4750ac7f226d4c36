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
    config.attack.budgets = (("linf", 0.3), ("l2", 2.0))
    if profile == "smoke":
        config.examples = {"train": 660, "validation": 20, "test": 100}
        config.em.steps, config.em.growth_steps = 40, 30
        config.attack.static_examples, config.attack.eot_examples = 40, 20
        return config
    config.train.epochs = 3
    config.attack.pgd = {"steps": 20, "step_size": None, "restarts": 1}
    config.attack.eot = {"steps": 20, "draws": 10}
    config.attack.selection = 5
    config.attack.static_examples, config.attack.eot_examples, config.attack.batch_size = 200, 100, 100
    return config
