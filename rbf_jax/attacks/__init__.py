"""Adversarial attacks as pure functions, composed from norms, losses and gradient estimators.

attack = attacks.pgd(attacks.Linf, epsilon=0.3, steps=100, step_size=0.01, restarts=10, loss=attacks.margin)
result = jax.jit(attack)(key, logits_fn, images, labels)
"""

from rbf_jax.attacks.apgd import apgd as apgd
from rbf_jax.attacks.apgd import apgd_t as apgd_t
from rbf_jax.attacks.driver import Iterative as Iterative
from rbf_jax.attacks.fgsm import fgsm as fgsm
from rbf_jax.attacks.gradients import Estimator as Estimator
from rbf_jax.attacks.gradients import eot as eot
from rbf_jax.attacks.gradients import exact as exact
from rbf_jax.attacks.gradients import mean_logits as mean_logits
from rbf_jax.attacks.gradients import mean_softmax as mean_softmax
from rbf_jax.attacks.losses import Loss as Loss
from rbf_jax.attacks.losses import cross_entropy as cross_entropy
from rbf_jax.attacks.losses import dlr as dlr
from rbf_jax.attacks.losses import margin as margin
from rbf_jax.attacks.mi_fgsm import mi_fgsm as mi_fgsm
from rbf_jax.attacks.norms import L1 as L1
from rbf_jax.attacks.norms import L2 as L2
from rbf_jax.attacks.norms import Linf as Linf
from rbf_jax.attacks.norms import dense as dense
from rbf_jax.attacks.norms import sparse as sparse
from rbf_jax.attacks.pgd import pgd as pgd
