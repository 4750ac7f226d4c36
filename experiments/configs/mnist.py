"""MNIST with the 4-layer CNN (needs `make data`).

    make reproduce-mnist                     22 models, every attack, certificates, studies, tables, report
    make train SET=mnist MODEL=rcnn_plus     one model of experiments/recipes.py

PROFILE names a profile; without it the device decides between `cpu` and `gpu`. What the profile `gpu` reached is in
results/mnist, written by the run itself.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs import profiles

MAIN = ("cnn", "rcnn", "cnn_plus", "rcnn_plus", "madry", "rcnn_at")
DEFENDED = ("rcnn", "rcnn_plus", "rcnn_at")
OTHERS = (
    *("threshold", "mean", "kmeans", "cnn_hard", "rcnn_hard"),
    *("rcnn_v2", "rcnn_paper", "rcnn_released"),
    *(f"{name}_seed{seed}" for name in ("rcnn", "cnn_plus") for seed in (1, 2, 3)),
)
CONTROLS = ("threshold", "mean", "kmeans", "cnn_hard", "rcnn_hard", "rcnn_seed1")
LINF, L2, L1 = (("linf", 0.3),), (("l2", 2.0),), (("l1", 15.0),)
MANY = 10_000
# Models, budgets, attacks, at most so many images; what NAME@BETA2 and NAME<SOURCE are is said in catalogue.py.
PLAN = (
    (MAIN, LINF, ("fgsm", "pgd", "mi_fgsm", "cw", "daa", "apgd", "square", "autoattack"), MANY),
    (MAIN, LINF, ("fgsm<cnn", "pgd<cnn", "cw<cnn"), MANY),
    (("rcnn", "rcnn_plus"), LINF, ("spsa",), MANY),
    (MAIN, L2, ("pgd", "cw", "apgd", "square", "autoattack", "pgd<cnn", "cw<cnn"), MANY),
    (MAIN, L1, ("pgd", "ead", "apgd", "square", "autoattack", "pgd<cnn", "ead<cnn"), MANY),
    (DEFENDED, (*LINF, *L2, *L1), ("bpda_eot",), MANY),
    (DEFENDED, (*LINF, *L2, *L1), ("adaptive", "autoattack_rand"), MANY),
    (("rcnn_plus",), (*LINF, *L2, *L1), ("bpda_eot@1",), MANY),
    (("rcnn_plus",), LINF, ("autoattack_rand@1",), 50),
    # Inside the paper's budget, where gradient attacks leave more behind the front end than without it.
    ((*MAIN, *CONTROLS), (("linf", 0.15),), ("autoattack",), 50),
    (DEFENDED, (("linf", 0.15),), ("autoattack_rand",), 30),
    # Beyond the paper's budget, and the usual one in l1.
    (MAIN, (("linf", 0.35), ("l1", 10.0)), ("pgd", "apgd"), 1_000),
    (MAIN, (("linf", 0.35), ("l1", 10.0)), ("autoattack",), 50),
    (DEFENDED, (("linf", 0.35),), ("bpda_eot",), 100),
    (DEFENDED, (("linf", 0.35),), ("autoattack_rand",), 30),
    (OTHERS, LINF, ("fgsm", "pgd", "apgd"), 500),
    (OTHERS, LINF, ("square",), 50),
    (CONTROLS, (*L2, *L1), ("pgd", "apgd"), 500),
    (CONTROLS, (*LINF, *L2, *L1), ("square", "autoattack"), 50),
)
# The paper's settings, on few images with many samples and on many with fewer; then the others.
TABLE_VI = (("cnn", 0.2), ("rcnn", 0.2), ("rcnn_plus", 0.3))
OTHER_SIGMAS = (
    *(("cnn", 0.3), ("rcnn", 0.3), ("rcnn_plus", 0.2)),
    *((name, sigma) for name in ("cnn_plus", "madry", "rcnn_at", "gaussian_02", "gaussian_03") for sigma in (0.2, 0.3)),
)
RUNS = ((50_000, 5, TABLE_VI), (10_000, 25, TABLE_VI), (10_000, 10, OTHER_SIGMAS))
MORE_RUNS = ((50_000, 100, TABLE_VI), (10_000, 500, TABLE_VI), (10_000, 100, OTHER_SIGMAS))
STUDIES: dict[str, Any] = {
    "models": MAIN,
    "examples": 30,
    "few": 15,
    "curves": {
        "linf": (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4),
        "l2": (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0),
        "l1": (1.0, 2.5, 5.0, 10.0, 15.0, 25.0),
    },
    "steps": (10, 20, 40, 100, 200, 400),
    "restarts": (1, 2, 5, 10),
    "stronger": {"draws": 50, "steps": 100, "warm_up": 100, "restarts": 10},
    "large": 1.0,
    "corrupted": 1_000,
    "beta1": (5.0, 10.0, 17.33, 25.0, 50.0),
    "beta2": (0.0, 1.0, 1.75, 3.0),
    "clean": 1_000,
    "scales": ("variance",),
    "draws": (1, 10, 50),
    "defended": "rcnn_plus",
}


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
            "dropout": 0.5,
            # Trained and attacked by `make reproduce-mnist`, for `train.epochs` epochs or those of `epochs`: seeds,
            # readings and controls are on the short schedule.
            "models": (*MAIN, "gaussian_02", "gaussian_03", *OTHERS),
            "epochs": dict.fromkeys(MAIN, 8),
            "train": {
                "epochs": 3,
                "batch_size": 128,
                "optimizer": "adam",
                "learning_rate": 1e-3,
                "schedule": "cosine",
                "warm_up": 0.0,  # share of the steps in which the rate rises from 0
                "flips": False,  # mirrors each image in every other epoch, and moves it by up to `shift` pixels
                "shift": 0,
            },
            # CNN+ and rCNN+: `count` more images in each batch (the released code's share) with clipped Gaussian noise,
            # and after a share of the epochs as many with adversarial noise.
            "noise": {
                "std": 0.35,
                "limit": 0.3,
                "count": 30,
                "bank_share": 0.25,
                "bank_examples": 10_000,
                "bank_steps": 20,
            },
            # Madry and rCNN-AT; epsilon is raised from 0 over the first epochs.
            "adversarial": {"epsilon": 0.3, "steps": 7, "step_size": 0.1, "ramp_epochs": 2},
            "attack": {
                "plan": PLAN,
                # How many test images an attack meets: by name, name and norm, or name< where it is transferred.
                "examples": {
                    "default": 1_000,
                    "clean": 10_000,
                    "cw linf": 200,
                    "cw": 50,
                    "cw<": 100,
                    "ead": 50,
                    "ead<": 100,
                    "daa": 50,
                    "apgd": 200,
                    "square": 30,
                    "spsa": 20,
                    "bpda_eot": 50,
                    "bpda_eot l2": 25,
                    "bpda_eot l1": 25,
                    "adaptive": 20,
                    "adaptive l2": 10,
                    "adaptive l1": 10,
                    "autoattack": 30,
                    "autoattack_rand": 20,
                    "autoattack_rand l2": 10,
                    "autoattack_rand l1": 10,
                },
                "settings": {
                    "pgd": {"steps": 40, "restarts": 1},
                    "mi_fgsm": {"steps": 20},
                    "cw": {"searches": 5, "steps": 200, "initial_c": 1.0, "linf_steps": 100},
                    "daa": {"steps": 200, "restarts": 5},
                    "ead": {"searches": 5, "steps": 200, "initial_c": 1.0},
                    "apgd": {"steps": 100, "restarts": 1},
                    "square": {"queries": 5_000},
                    "spsa": {"steps": 50, "directions": 256},
                    "bpda_eot": {"draws": 50, "steps": 40, "warm_up": 40},
                    "adaptive": {"draws": 50, "steps": 40, "warm_up": 40},
                },
                "batch_size": 100,
                # Redraws of the m-draw prediction that pick an example's worst attack, and that score it; on more
                # examples than `redrawn` a prediction is made once.
                "selection": 10,
                "scoring": 5,
                "redrawn": 300,
                # Further levels of noise (Table VII), and the models that are scored at them.
                "beta2": (1.0,),
                "beta2_models": ("rcnn_plus",),
                # Budgets that are met together: the paper's, and the usual ones.
                "unions": ({"linf": 0.3, "l2": 2.0, "l1": 15.0}, {"linf": 0.3, "l2": 2.0, "l1": 10.0}),
            },
            # Certificates (Table VI): samples, images, (model, sigma).
            "certify": {
                "runs": RUNS,
                "n0": 100,
                "alpha": 0.001,
                "radii": (0.5, 0.7, 1.0),
                "batch_size": 500,
            },
            # What is said in studies/__init__.py.
            "studies": STUDIES,
        }
    )
    settings = config.attack.settings
    examples: Any = config.attack.examples
    if profile == "smoke":
        config.examples = {"train": 2_000, "validation": 200, "test": 500}
        config.em.steps, config.em.growth_steps = 200, 150
        config.models, config.epochs, config.train.epochs = ("cnn", "rcnn"), ConfigDict(), 2
        config.noise.bank_share, config.noise.bank_examples, config.noise.bank_steps = 0.5, 200, 3
        config.adversarial.ramp_epochs = 1
        config.attack.plan = (
            (("cnn", "rcnn"), (("linf", 0.3),), ("fgsm", "pgd", "pgd<cnn"), MANY),
            (("rcnn",), (("linf", 0.3),), ("bpda_eot",), MANY),
        )
        config.attack.examples = {"default": 100, "clean": 500, "bpda_eot": 40}
        settings.pgd.steps = 5
        settings.bpda_eot.update(draws=2, steps=2, warm_up=2)
        config.attack.batch_size, config.attack.selection, config.attack.scoring = 20, 1, 2
        config.attack.beta2, config.attack.unions = (), ()
        config.certify.runs, config.studies = (), ConfigDict()
    if profile in ("gpu", "paper"):
        config.train.epochs, config.attack.batch_size = 15, 500
        config.epochs = ConfigDict(dict.fromkeys(("cnn", "rcnn", "cnn_plus", "rcnn_plus"), 50))
        config.certify.runs = MORE_RUNS
        fewer = {
            "adaptive": 200,
            "adaptive l2": 50,
            "adaptive l1": 50,
            "autoattack": 500,
            "autoattack_rand": 200,
            "autoattack_rand l2": 50,
            "autoattack_rand l1": 50,
            "spsa": 200,
        }
        for name in examples:
            examples[name] = 10_000 if name in ("default", "clean") else fewer.get(name, 1_000)
        config.attack.redrawn = 1_000
        config.studies.examples, config.studies.few = 300, 100
    if profile == "paper":
        # The released schedule: halved every 20 epochs.
        config.train.epochs, config.train.schedule, config.train.halve_every = 100, "halving", 20
        config.epochs = ConfigDict()
        for name in examples:
            few = name.split()[0] in ("square", "spsa", "bpda_eot", "adaptive", "autoattack", "autoattack_rand")
            examples[name] = 1_000 if few else 10_000
        settings.bpda_eot.steps = settings.adaptive.steps = settings.pgd.steps = 100
        settings.cw.searches = settings.ead.searches = 9
        settings.cw.steps = settings.ead.steps = 1_000
        settings.pgd.restarts = settings.apgd.restarts = 10
    return config
