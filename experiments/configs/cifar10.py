"""CIFAR-10 with VGG-16 (needs `make data`).

    make reproduce-cifar                       6 or 7 models, every attack, certificates, studies, tables, report
    make train SET=cifar10 MODEL=rcnn_plus     one model of experiments/recipes.py

PROFILE names a profile; without it the device decides between `cpu` and `gpu`. What the profile `gpu` reached is in
results/cifar10, written by the run itself; `smoke` takes 5 minutes on two cores and stops long before anything is
learned.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs import profiles

MAIN = ("cnn", "rcnn", "cnn_plus", "rcnn_plus", "madry")
DEFENDED = ("rcnn", "rcnn_plus")
LINF, L2, L1 = (("linf", 0.031),), (("l2", 1.0),), (("l1", 20.0),)
MANY = 10_000
PLAN = (
    (MAIN, LINF, ("fgsm", "pgd", "mi_fgsm", "cw", "daa", "apgd", "square", "autoattack"), MANY),
    (MAIN, LINF, ("fgsm<cnn", "pgd<cnn", "cw<cnn"), MANY),
    (DEFENDED, LINF, ("spsa",), MANY),
    (MAIN, L2, ("pgd", "cw", "apgd", "square", "autoattack", "pgd<cnn", "cw<cnn"), MANY),
    (MAIN, L1, ("pgd", "ead", "apgd", "square", "autoattack", "pgd<cnn", "ead<cnn"), MANY),
    (DEFENDED, (*LINF, *L2, *L1), ("bpda_eot",), MANY),
    (DEFENDED, LINF, ("adaptive",), MANY),
    (DEFENDED, (*LINF, *L2, *L1), ("autoattack_rand",), MANY),
    (("rcnn_plus",), (*LINF, *L2, *L1), ("bpda_eot@1.5",), MANY),
    # Inside the paper's budget, where gradient attacks leave more behind the front end than without it.
    ((*MAIN, "mean"), (("linf", 2 / 255),), ("autoattack",), 50),
    (DEFENDED, (("linf", 2 / 255),), ("autoattack_rand",), 20),
    # Beyond the paper's budget in linf, and the usual ones in the other norms.
    (MAIN, (("linf", 0.05), ("l2", 0.5), ("l1", 12.0)), ("pgd", "apgd"), MANY),
    (DEFENDED, (("linf", 0.05),), ("bpda_eot",), 100),
    # The trivial front.
    (("mean",), LINF, ("fgsm",), 500),
    (("mean",), (*LINF, *L2, *L1), ("pgd", "apgd"), 500),
    (("mean",), (*LINF, *L2, *L1), ("square", "autoattack"), 50),
)
# Hours on two cores, and not in the profile `cpu`.
MORE = (
    (("rcnn_plus",), LINF, ("autoattack_rand@1.5",), 20),
    (MAIN, (("linf", 0.05), ("l2", 0.5), ("l1", 12.0)), ("autoattack",), 20),
    (DEFENDED, (("linf", 0.05),), ("autoattack_rand",), 20),
)
# The rCNN that is trained far longer.
LONG = (
    (("rcnn_long",), LINF, ("fgsm", "pgd", "apgd", "bpda_eot"), 500),
    (("rcnn_long",), LINF, ("square", "autoattack"), 50),
    (("rcnn_long",), LINF, ("autoattack_rand",), 20),
)
TABLE_VI = tuple((name, 0.1) for name in ("cnn", *DEFENDED))
STUDIES: dict[str, Any] = {
    "models": MAIN,
    "examples": 15,
    "few": 10,
    "curves": {
        "linf": (2 / 255, 4 / 255, 6 / 255, 8 / 255, 0.05),
        "l2": (0.125, 0.25, 0.5, 1.0, 2.0),
        "l1": (2.5, 5.0, 12.0, 20.0, 40.0),
    },
    "steps": (10, 20, 40, 100, 200),
    "restarts": (1, 2, 5),
    "stronger": {"draws": 50, "steps": 40, "warm_up": 100, "restarts": 2},
    "large": 1.0,
    "corrupted": 500,
    # All three readings of the noise: the clean row of the paper's Table VII tells which one is the paper's.
    "beta1": (17.33,),
    "beta2": (0.0, 1.5, 1.75),
    "clean": 1_000,
    "scales": ("variance", "sigma", "sqrt_sigma"),
    "draws": (1, 10),
    "levels": (1.0, 1.25, 1.5, 1.75, 2.0),
    "defended": "rcnn_plus",
}
TRAINING = {"steps": 20, "queries": 2_000, "beta1": (1.0, 3.0, 8.0)}


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
            # A factor on VGG-16's rates. In a few epochs it underfits, and dropout only slows it down.
            "dropout": 0.0,
            "models": (*MAIN, "mean"),
            "epochs": {"cnn_plus": 5, "rcnn_plus": 5, "madry": 5},
            # After these epochs a model's weights are kept, for the study of its training.
            "snapshots": {},
            "train": {
                "epochs": 12,
                "batch_size": 64,
                "optimizer": "sgd",
                "learning_rate": 0.05,
                "weight_decay": 5e-4,
                "schedule": "cosine",
                "warm_up": 0.2,
                "flips": True,
                "shift": 2,
            },
            # Released: 30 of each kind join a batch of 68.
            "noise": {
                "std": 0.05,
                "limit": 0.03,
                "count": 30,
                "bank_share": 1 / 3,
                "bank_examples": 10_000,
                "bank_steps": 10,
            },
            # One step from a random start (Wong et al. 2020); Madry's seven in the profiles `gpu` and `paper`.
            "adversarial": {"epsilon": 0.031, "steps": 1, "step_size": 1.25 * 0.031, "ramp_epochs": 1},
            "attack": {
                "plan": PLAN,
                "examples": {
                    "default": 1_000,
                    "clean": 1_000,
                    "cw linf": 100,
                    "cw": 10,
                    "cw<": 20,
                    "ead": 10,
                    "ead<": 20,
                    "daa": 20,
                    "apgd": 100,
                    "square linf": 20,
                    "square": 10,
                    "spsa": 20,
                    "bpda_eot linf": 20,
                    "bpda_eot": 10,
                    "adaptive": 10,
                    "autoattack linf": 20,
                    "autoattack": 10,
                    "autoattack_rand": 10,
                    "autoattack_rand linf": 10,
                },
                "settings": {
                    "pgd": {"steps": 20, "restarts": 1},
                    "mi_fgsm": {"steps": 20},
                    "cw": {"searches": 5, "steps": 200, "initial_c": 1.0, "linf_steps": 100},
                    "daa": {"steps": 100, "restarts": 2},
                    "ead": {"searches": 5, "steps": 200, "initial_c": 1.0},
                    "apgd": {"steps": 100, "restarts": 1},
                    "square": {"queries": 5_000},
                    "spsa": {"steps": 40, "directions": 128},
                    "bpda_eot": {"draws": 50, "steps": 20, "warm_up": 20},
                    "adaptive": {"draws": 50, "steps": 20, "warm_up": 20},
                },
                "batch_size": 50,
                "selection": 10,
                "scoring": 5,
                "redrawn": 100,
                "beta2": (1.5,),
                "beta2_models": ("rcnn_plus",),
                "unions": ({"linf": 0.031, "l2": 1.0, "l1": 20.0}, {"linf": 0.031, "l2": 0.5, "l1": 12.0}),
            },
            "certify": {
                "runs": ((50_000, 2, TABLE_VI), (10_000, 10, TABLE_VI)),
                "n0": 100,
                "alpha": 0.001,
                "radii": (0.25, 0.3, 0.35),
                "batch_size": 100,
            },
            "studies": STUDIES,
        }
    )
    settings = config.attack.settings
    examples: Any = config.attack.examples
    if profile == "smoke":
        config.examples = {"train": 2_000, "validation": 40, "test": 40}
        config.em.steps, config.em.growth_steps = 60, 60
        config.models, config.epochs, config.train.epochs = ("cnn", "rcnn"), ConfigDict(), 1
        config.noise.bank_examples, config.noise.bank_steps = 20, 2
        config.attack.plan = ((("cnn", "rcnn"), LINF, ("fgsm", "pgd"), MANY), (("rcnn",), LINF, ("bpda_eot",), MANY))
        config.attack.examples = {"default": 20, "clean": 40}
        settings.pgd.steps = 3
        settings.bpda_eot.update(draws=2, steps=2, warm_up=2)
        config.attack.selection, config.attack.scoring = 1, 1
        config.attack.beta2, config.attack.unions = (), ()
        config.draws = 2
        config.certify.runs, config.studies = (), ConfigDict()
    if profile in ("gpu", "paper"):
        config.train.batch_size, config.train.learning_rate, config.noise.count = 128, 0.1, 60
        config.train.epochs, config.epochs, config.attack.redrawn = 20, ConfigDict({"madry": 12}), 200
        config.adversarial.steps, config.adversarial.step_size, config.adversarial.ramp_epochs = 7, 0.00775, 2
        fewer = {
            "default": 1_000,
            "clean": 10_000,
            "cw linf": 1_000,
            "apgd": 1_000,
            "spsa": 100,
            "autoattack_rand": 20,
            "autoattack_rand linf": 100,
        }
        for name in examples:
            examples[name] = fewer.get(name, 200)
        config.attack.batch_size = 200
        config.studies.examples, config.studies.few, config.studies.corrupted = 100, 100, 1_000
        config.certify.runs = ((50_000, 20, TABLE_VI), (10_000, 100, TABLE_VI))
        config.certify.batch_size = 1_000
        config.attack.plan = (*PLAN, *MORE)
    if profile == "gpu":
        config.models, config.epochs.rcnn_long = (*config.models, "rcnn_long"), 60
        config.attack.plan = (*PLAN, *MORE, *LONG)
        config.snapshots, config.studies.training = {"rcnn_long": (1, 3, 10, 20, 40)}, TRAINING | {"model": "rcnn_long"}
    if profile == "paper":
        # Released: 50 epochs, halved five times. Here as often in proportion of the logarithm: ten times in 600.
        config.train.epochs, config.train.schedule, config.train.halve_every = 600, "halving", 60
        config.dropout, config.train.shift, config.train.warm_up, config.epochs = 1.0, 0, 0.0, ConfigDict()
        for name in examples:
            few = name.split()[0] in ("square", "spsa", "bpda_eot", "adaptive", "autoattack", "autoattack_rand")
            examples[name] = 1_000 if few else 10_000
        config.attack.redrawn, config.studies.examples, config.studies.few = 1_000, 1_000, 200
        config.snapshots, config.studies.training = {"rcnn": (10, 50, 100, 200, 400)}, TRAINING | {"model": "rcnn"}
        settings.pgd.steps, settings.bpda_eot.steps, settings.adaptive.steps = 100, 40, 40
        settings.cw.searches = settings.ead.searches = 9
        settings.cw.steps = settings.ead.steps = 1_000
        settings.pgd.restarts = settings.apgd.restarts = 10
        config.certify.runs = ((50_000, 100, TABLE_VI), (10_000, 500, TABLE_VI))
    return config
