"""Training: the loss of the released code, augmentations, a loop over optax with checkpoints, weights of models."""

from rbf_jax.train.augmentation import Augmentation as Augmentation
from rbf_jax.train.augmentation import add_noisy as add_noisy
from rbf_jax.train.augmentation import chain as chain
from rbf_jax.train.augmentation import flip_and_shift as flip_and_shift
from rbf_jax.train.augmentation import gaussian as gaussian
from rbf_jax.train.augmentation import through as through
from rbf_jax.train.checkpoint import load_weights as load_weights
from rbf_jax.train.checkpoint import save_weights as save_weights
from rbf_jax.train.loop import History as History
from rbf_jax.train.loop import TrainInfo as TrainInfo
from rbf_jax.train.loop import TrainState as TrainState
from rbf_jax.train.loop import fit as fit
from rbf_jax.train.loop import init as init
from rbf_jax.train.loop import make_step as make_step
from rbf_jax.train.losses import cross_entropy as cross_entropy
from rbf_jax.train.losses import smoothed_labels as smoothed_labels
