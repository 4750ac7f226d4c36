"""RBF-CNN in JAX: an approximate manifold defence for image classifiers, and the attacks that test it.

Nandy, Hsu, Lee: Approximate Manifold Defense Against Multiple Adversarial Perturbations, IJCNN 2020.
"""

from rbf_jax import attacks as attacks
from rbf_jax import bounds as bounds
from rbf_jax import certify as certify
from rbf_jax import data as data
from rbf_jax import em as em
from rbf_jax import evaluate as evaluate
from rbf_jax import models as models
from rbf_jax import parallel as parallel
from rbf_jax import patches as patches
from rbf_jax import rbf as rbf
from rbf_jax import reconstruction as reconstruction
from rbf_jax import saliency as saliency
from rbf_jax import train as train
from rbf_jax.defense import Defense as Defense
from rbf_jax.defense import defend as defend
from rbf_jax.patches import extract_patches as extract_patches
from rbf_jax.patches import stitch_patches as stitch_patches
from rbf_jax.rbf import RBFFilters as RBFFilters
from rbf_jax.rbf import match_scores as match_scores
from rbf_jax.reconstruction import PRESETS as PRESETS
from rbf_jax.reconstruction import Beta1 as Beta1
from rbf_jax.reconstruction import mixing_weights as mixing_weights
from rbf_jax.reconstruction import reconstruct as reconstruct
from rbf_jax.reconstruction import sample_reconstruction as sample_reconstruction
from rbf_jax.types import Attack as Attack
from rbf_jax.types import AttackResult as AttackResult
from rbf_jax.types import LogitsFn as LogitsFn
from rbf_jax.types import Norm as Norm

__version__ = "0.1.0"
