"""The paper's 4-layer CNN for MNIST."""

import flax.linen as nn
from jax import Array

from rbf_jax.models.layers import Conv, max_pool


class CNN(nn.Module):
    """conv 32, 32, pool, 64, 64, pool, dense 200 (dropout), 200, classes; 3x3 kernels, zero padding, ReLU.

    Attributes:
        classes: number of classes.
        dropout: rate after the first dense layer.

    Reference: Section IV; the layers are the released code's.
    """

    classes: int = 10
    dropout: float = 0.5

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Array:
        """Images ``(B, H, W, C)`` -> logits ``(B, classes)``; in training it draws from rng ``dropout``."""
        x = images
        for features in (32, 64):
            for _ in range(2):
                x = nn.relu(Conv(features)(x))
            x = max_pool(x)
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(200)(x))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        x = nn.relu(nn.Dense(200)(x))
        return nn.Dense(self.classes)(x)
