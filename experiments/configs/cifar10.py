"""CIFAR-10 with VGG-16 (needs `make data`).

    make reproduce-cifar                       filters, plain VGG-16, rCNN, their attacks, tables, report
    make train SET=cifar10 MODEL=rcnn_plus     one model of experiments/recipes.py

PROFILE names a profile; without it the device decides between `cpu` and `gpu`. What a profile took and reached is in
results/cifar10/README.md once it has run; so far only `smoke` has, which takes 5 minutes on two cores and stops long
before anything is learned.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs import profiles

LINF = (("linf", 0.031),)
PLAN = (
    (("cnn", "rcnn"), LINF, ("fgsm", "pgd", "apgd"), 10_000),
    (("rcnn",), LINF, ("bpda_eot",), 10_000),
)


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
            "epochs": {},
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
                "bank_share": 1 / 3,
                "bank_examples": 10_000,
                "bank_steps": 10,
            },
            "adversarial": {"epsilon": 0.031, "steps": 7, "step_size": 0.00775, "ramp_epochs": 2},
            "attack": {
                "plan": PLAN,
                "examples": {"default": 500, "clean": 10_000, "bpda_eot": 200},
                "settings": {
                    "pgd": {"steps": 20, "restarts": 1},
                    "apgd": {"steps": 100, "restarts": 1},
                    "bpda_eot": {"draws": 50, "steps": 20, "warm_up": 20},
                },
                "batch_size": 20,
                "selection": 10,
                "scoring": 5,
                "redrawn": 1_000,
                "beta2": (),
                "beta2_models": (),
                "unions": (),
            },
            "certify": {"runs": (), "n0": 100, "alpha": 0.001, "radii": (0.25, 0.3, 0.35), "batch_size": 100},
            "studies": {},
        }
    )
    settings = config.attack.settings
    if profile == "smoke":
        config.examples = {"train": 2_000, "validation": 40, "test": 40}
        config.em.steps, config.em.growth_steps = 60, 60
        config.train.epochs = 1
        config.noise.bank_examples, config.noise.bank_steps = 20, 2
        config.attack.examples = {"default": 20, "clean": 40, "apgd": 0}
        settings.pgd.steps = 3
        settings.bpda_eot.update(draws=2, steps=2, warm_up=2)
        config.attack.selection, config.attack.scoring = 1, 1
        config.draws = 2
    if profile in ("gpu", "paper"):
        config.train.batch_size, config.train.learning_rate = 128, 0.1
        config.attack.examples, config.attack.batch_size = {"default": 10_000, "bpda_eot": 1_000}, 250
        settings.pgd.steps = 100
        settings.bpda_eot.steps = 40
        config.train.epochs = 60
    if profile == "paper":
        # Released: 50 epochs, halved five times. Here as often in proportion of the logarithm: ten times in 600.
        config.train.epochs, config.train.schedule, config.train.halve_every = 600, "halving", 60
        settings.pgd.restarts = 10
    return config
