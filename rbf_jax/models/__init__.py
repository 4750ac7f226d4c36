"""Classifiers: Flax modules behind a pair of pure functions."""

from rbf_jax.models.classifier import Classifier as Classifier
from rbf_jax.models.classifier import behind as behind
from rbf_jax.models.classifier import from_linen as from_linen
from rbf_jax.models.classifier import from_nnx as from_nnx
from rbf_jax.models.classifier import logits_fn as logits_fn
from rbf_jax.models.cnn import CNN as CNN
from rbf_jax.models.layers import BatchNorm as BatchNorm
from rbf_jax.models.layers import Conv as Conv
from rbf_jax.models.layers import conv as conv
from rbf_jax.models.layers import max_pool as max_pool
from rbf_jax.models.vgg import VGG16 as VGG16
