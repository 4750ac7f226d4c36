"""Adversarial attacks as pure functions, composed from norms, losses and gradient estimators.

attack = attacks.pgd(attacks.Linf, epsilon=0.3, steps=100, step_size=0.01, restarts=10, loss=attacks.margin)
result = jax.jit(attack)(key, logits_fn, images, labels)
"""

from rbf_jax.attacks.adaptive import annealed as annealed
from rbf_jax.attacks.adaptive import known_noise as known_noise
from rbf_jax.attacks.adaptive import straight_through as straight_through
from rbf_jax.attacks.adaptive import transfer as transfer
from rbf_jax.attacks.apgd import apgd as apgd
from rbf_jax.attacks.apgd import apgd_t as apgd_t
from rbf_jax.attacks.autoattack import autoattack as autoattack
from rbf_jax.attacks.checks import Flag as Flag
from rbf_jax.attacks.checks import masking_checks as masking_checks
from rbf_jax.attacks.cw import cw_l2 as cw_l2
from rbf_jax.attacks.cw import cw_linf as cw_linf
from rbf_jax.attacks.daa import blob as blob
from rbf_jax.attacks.daa import daa as daa
from rbf_jax.attacks.daa import dgf as dgf
from rbf_jax.attacks.deepfool import deepfool as deepfool
from rbf_jax.attacks.driver import Composed as Composed
from rbf_jax.attacks.driver import Iterative as Iterative
from rbf_jax.attacks.driver import success_at as success_at
from rbf_jax.attacks.ead import ead as ead
from rbf_jax.attacks.ead import elastic_net as elastic_net
from rbf_jax.attacks.ead import l1_rule as l1_rule
from rbf_jax.attacks.fab import fab as fab
from rbf_jax.attacks.fab import fab_t as fab_t
from rbf_jax.attacks.fgsm import fgsm as fgsm
from rbf_jax.attacks.gradients import Estimator as Estimator
from rbf_jax.attacks.gradients import eot as eot
from rbf_jax.attacks.gradients import exact as exact
from rbf_jax.attacks.gradients import mean_logits as mean_logits
from rbf_jax.attacks.gradients import mean_softmax as mean_softmax
from rbf_jax.attacks.losses import Loss as Loss
from rbf_jax.attacks.losses import cross_entropy as cross_entropy
from rbf_jax.attacks.losses import dlr as dlr
from rbf_jax.attacks.losses import hinge as hinge
from rbf_jax.attacks.losses import margin as margin
from rbf_jax.attacks.mi_fgsm import mi_fgsm as mi_fgsm
from rbf_jax.attacks.norms import L1 as L1
from rbf_jax.attacks.norms import L2 as L2
from rbf_jax.attacks.norms import Linf as Linf
from rbf_jax.attacks.norms import dense as dense
from rbf_jax.attacks.norms import sparse as sparse
from rbf_jax.attacks.pgd import pgd as pgd
from rbf_jax.attacks.random_noise import random_noise as random_noise
from rbf_jax.attacks.rays import rays as rays
from rbf_jax.attacks.spsa import spsa as spsa
from rbf_jax.attacks.square import square as square
