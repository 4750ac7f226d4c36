"""MNIST with the 4-layer CNN (needs `make data`).

    make reproduce-mnist                     filters, plain CNN, rCNN, their attacks, tables, report
    make train SET=mnist MODEL=rcnn_plus     one model: cnn, rcnn, cnn_plus or rcnn_plus

PROFILE names a profile; without it the device decides between `cpu` and `gpu`. What the profile `cpu` took and reached
is in results/mnist/README.md, written by the run itself.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs import profiles


def get_config(profile: str | None = None) -> Any:
    """The configuration of a profile."""
    profile = profiles.chosen(profile)
    config: Any = ConfigDict(
        {
            "title": "RBF-CNN on MNIST",
            "set": "mnist",
            "profile": profile,
            "seed": 0,
            # Training images, those of them (the last) that validate, and test images.
            "examples": {"train": 60_000, "validation": 5_000, "test": 10_000},
            "em": {"rules": "mnist", "steps": 501, "growth_steps": 250},
            "preset": "code",
            "beta2": 1.75,
            "draws": 10,
            "network": "cnn",
            # Trained and attacked by `make reproduce-mnist`.
            "models": ("cnn", "rcnn"),
            "train": {
                "epochs": 12,
                "batch_size": 128,
                "optimizer": "adam",
                "learning_rate": 1e-3,
                "schedule": "cosine",
                "flips": False,
            },
            # CNN+ and rCNN+: `count` more images in each batch (the released code's share) with clipped Gaussian noise,
            # and from an epoch on as many with adversarial noise.
            "noise": {
                "std": 0.35,
                "limit": 0.3,
                "count": 30,
                "bank_epoch": 3,
                "bank_examples": 10_000,
                "bank_steps": 20,
            },
            "attack": {
                "budgets": (("linf", 0.3),),
                "static_examples": 1_000,
                "eot_examples": 1_000,
                "batch_size": 100,
                "pgd": {"steps": 100, "step_size": 0.01, "restarts": 1},
                "apgd": {"steps": 100, "restarts": 1},
                "eot": {"steps": 50, "draws": 20},
                # Redraws of the m-draw prediction that pick an example's worst attack, and that score it.
                "selection": 10,
                "scoring": 5,
            },
        }
    )
    if profile == "smoke":
        config.examples = {"train": 2_000, "validation": 200, "test": 500}
        config.em.steps, config.em.growth_steps = 200, 150
        config.train.epochs = 2
        config.noise.bank_epoch, config.noise.bank_examples, config.noise.bank_steps = 1, 200, 3
        config.attack.pgd, config.attack.static_examples = {"steps": 5, "step_size": None, "restarts": 1}, 100
        config.attack.apgd.steps = 0  # leaves it out
        config.attack.eot = {"steps": 2, "draws": 2}
        config.attack.eot_examples, config.attack.batch_size = 40, 20
        config.attack.selection, config.attack.scoring = 1, 2
    if profile == "gpu":
        config.train.epochs, config.noise.bank_epoch = 30, 8
        config.attack.static_examples, config.attack.batch_size = 10_000, 500
        config.attack.eot = {"steps": 100, "draws": 50}
    if profile == "paper":
        # The released schedule: halved every 20 epochs.
        config.train.epochs, config.train.schedule, config.train.halve_every = 100, "halving", 20
        config.noise.bank_epoch = 25
        config.attack.static_examples = 10_000
        config.attack.pgd = {"steps": 100, "step_size": 0.01, "restarts": 10}
        config.attack.eot = {"steps": 100, "draws": 50}
    return config
