"""The pipeline on CIFAR-10 with VGG-16 (needs `make data`).

make reproduce-cifar PROFILE=smoke   2,000 training images, some minutes on two cores
make reproduce-cifar PROFILE=cpu     all 50,000
"""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs import quickstart


def get_config(profile: str = "cpu") -> Any:
    """The configuration of a profile, ``"cpu"`` or ``"smoke"``."""
    quickstart.check_profile(profile)
    config: Any = quickstart.get_config()
    config.name = f"cifar10-{profile}"
    config.title, config.data, config.model = "RBF-CNN on CIFAR-10", "cifar10", "vgg16"
    config.budgets = (("linf", 0.031), ("l2", 1.0))
    config.batch_size = 20
    config.train.batch_size = 64
    if profile == "smoke":
        config.train_examples, config.test_examples = 2000, 100
        config.minutes = 5.0
        config.em = ConfigDict({"preset": "cifar10", "steps": 60, "growth_steps": 60})
        config.train.epochs = 2
        config.pgd = ConfigDict({"steps": 5, "examples": 20})
        config.eot = ConfigDict({"steps": 2, "draws": 2, "examples": 20})
        return config
    config.train_examples, config.test_examples = 50_000, 10_000
    config.minutes = 240.0
    config.em = ConfigDict({"preset": "cifar10", "steps": 501, "growth_steps": 500})
    config.train.epochs = 5
    config.pgd = ConfigDict({"steps": 20, "examples": 500})
    config.eot = ConfigDict({"steps": 20, "draws": 10, "examples": 100})
    return config
