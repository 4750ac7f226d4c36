"""The pipeline on MNIST (needs `make data`).

make reproduce-mnist PROFILE=smoke   2,000 training images, a few minutes on two cores
make reproduce-mnist PROFILE=cpu     all 60,000
"""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs import quickstart


def get_config(profile: str = "cpu") -> Any:
    """The configuration of a profile, ``"cpu"`` or ``"smoke"``."""
    quickstart.check_profile(profile)
    config: Any = quickstart.get_config()
    config.name = f"mnist-{profile}"
    config.title, config.data = "RBF-CNN on MNIST", "mnist"
    if profile == "smoke":
        config.train_examples, config.test_examples = 2000, 500
        config.minutes = 2.0
        return config
    config.train_examples, config.test_examples = 60_000, 10_000
    config.minutes = 90.0
    config.em = ConfigDict({"preset": "mnist", "steps": 501, "growth_steps": 250})
    config.train.epochs = 8
    config.pgd = ConfigDict({"steps": 100, "examples": 1000})
    config.eot = ConfigDict({"steps": 20, "draws": 10, "examples": 200})
    return config
