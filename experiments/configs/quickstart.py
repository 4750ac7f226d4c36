"""The whole pipeline on the embedded set: 5,000 real MNIST digits, 4,000 to train and 1,000 to test.

make quickstart                   about 3 minutes on two cores
make quickstart PROFILE=smoke     about half a minute: every stage once, too short to mean anything
"""

from typing import Any

from ml_collections import ConfigDict

PROFILES = ("cpu", "smoke")


def check_profile(profile: str) -> None:
    """Raises ValueError unless the profile is one of those that exist."""
    if profile not in PROFILES:
        raise ValueError(f"PROFILE must be one of {', '.join(PROFILES)}, got {profile!r}")


def get_config(profile: str = "cpu") -> Any:
    """The configuration of a profile, ``"cpu"`` or ``"smoke"``."""
    check_profile(profile)
    config: Any = ConfigDict()
    config.name = f"quickstart-{profile}"
    config.title = "RBF-CNN on 5,000 digits"
    config.data = "embedded"
    config.model = "cnn"
    config.train_examples, config.test_examples = 4000, 1000
    config.seed = 0
    config.minutes = 3.0
    config.em = ConfigDict({"preset": "mnist", "steps": 200, "growth_steps": 150})
    config.train = ConfigDict({"epochs": 3, "batch_size": 128, "learning_rate": 1e-3})
    config.preset, config.beta2, config.draws = "code", 1.75, 10
    config.budgets = (("linf", 0.3), ("l2", 2.0))
    config.pgd = ConfigDict({"steps": 20, "examples": 200})
    config.eot = ConfigDict({"steps": 20, "draws": 10, "examples": 100})
    config.batch_size = 100
    if profile == "smoke":
        config.minutes = 0.5
        config.train_examples, config.test_examples = 640, 100
        config.em.steps, config.em.growth_steps = 40, 30
        config.train.epochs = 2
        config.pgd = ConfigDict({"steps": 3, "examples": 40})
        config.eot = ConfigDict({"steps": 2, "draws": 2, "examples": 20})
        config.batch_size = 20
    return config
