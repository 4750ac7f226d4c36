"""CIFAR-10 with VGG-16 (needs `make data`).

    make reproduce-cifar                       filters, plain VGG-16, rCNN, their attacks, tables, report
    make train SET=cifar10 MODEL=rcnn_plus     one model: cnn, rcnn, cnn_plus or rcnn_plus

PROFILE names a profile; without it the device decides between `cpu` and `gpu`. What a profile took and reached is in
results/cifar10/README.md once it has run; so far only `smoke` has, which takes 5 minutes on two cores and stops long
before anything is learned.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs import profiles


def get_config(profile: str | None = None) -> Any:
    """The configuration of a profile; what a field means is said in ``mnist.py``."""
    profile = profiles.chosen(profile)
    config: Any = ConfigDict(
        {
            "title": "RBF-CNN on CIFAR-10",
            "set": "cifar10",
            "profile": profile,
            "seed": 0,
            "examples": {"train": 50_000, "validation": 5_000, "test": 10_000},
            "em": {"rules": "cifar10", "steps": 501, "growth_steps": 500},
            "preset": "code",
            "beta2": 1.75,
            "draws": 10,
            "network": "vgg16",
            "models": ("cnn", "rcnn"),
            "train": {
                "epochs": 8,
                "batch_size": 64,
                "optimizer": "sgd",
                "learning_rate": 0.05,
                "weight_decay": 5e-4,
                "schedule": "cosine",
                "flips": True,
            },
            "noise": {
                "std": 0.05,
                "limit": 0.03,
                "count": 30,
                "bank_epoch": 3,
                "bank_examples": 10_000,
                "bank_steps": 10,
            },
            "attack": {
                "budgets": (("linf", 0.031),),
                "static_examples": 500,
                "eot_examples": 200,
                "batch_size": 20,
                "pgd": {"steps": 20, "step_size": 0.004, "restarts": 1},
                "apgd": {"steps": 100, "restarts": 1},
                "eot": {"steps": 20, "draws": 10},
                "selection": 10,
                "scoring": 5,
            },
        }
    )
    if profile == "smoke":
        config.examples = {"train": 2_000, "validation": 40, "test": 40}
        config.em.steps, config.em.growth_steps = 60, 60
        config.train.epochs = 1
        config.noise.bank_epoch, config.noise.bank_examples, config.noise.bank_steps = 0, 20, 2
        config.attack.pgd, config.attack.static_examples = {"steps": 3, "step_size": None, "restarts": 1}, 20
        config.attack.apgd.steps = 0  # leaves it out
        config.attack.eot = {"steps": 2, "draws": 2}
        config.attack.eot_examples = 20
        config.attack.selection, config.attack.scoring = 1, 1
        config.draws = 2
    if profile in ("gpu", "paper"):
        config.train.batch_size, config.train.learning_rate = 128, 0.1
        config.attack.static_examples, config.attack.eot_examples, config.attack.batch_size = 10_000, 1_000, 250
        config.attack.pgd = {"steps": 100, "step_size": 0.003, "restarts": 1}
        config.attack.eot = {"steps": 40, "draws": 50}
        config.train.epochs, config.noise.bank_epoch = 60, 20
    if profile == "paper":
        # Released: 50 epochs, halved five times. Here as often in proportion of the logarithm: ten times in 600.
        config.train.epochs, config.train.schedule, config.train.halve_every = 600, "halving", 60
        config.noise.bank_epoch = 200
        config.attack.pgd = {"steps": 100, "step_size": 0.003, "restarts": 10}
    return config
