"""Training: the loss of the released code, and a loop over optax."""

from rbf_jax.train.loop import TrainInfo as TrainInfo
from rbf_jax.train.loop import TrainState as TrainState
from rbf_jax.train.loop import fit as fit
from rbf_jax.train.loop import init as init
from rbf_jax.train.loop import make_step as make_step
from rbf_jax.train.losses import cross_entropy as cross_entropy
from rbf_jax.train.losses import smoothed_labels as smoothed_labels
