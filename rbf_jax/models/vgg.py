"""The paper's VGG-16 for CIFAR-10."""

import flax.linen as nn
from jax import Array

from rbf_jax.models.layers import BatchNorm, Conv, max_pool

BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG16(nn.Module):
    """Thirteen 3x3 convolutions in five pooled blocks, each with ReLU and batch norm, then dense 512, classes.

    Dropout as released: 0.3 in the first block, 0.4 between the convolutions of the others, 0.5 around the dense layer.
    32x32 images reach the last block as 2x2.

    Attributes:
        classes: number of classes.
        dropout: factor on all rates; 0 turns dropout off.

    Reference: Section IV; Simonyan and Zisserman, ICLR 2015; the order ReLU, batch norm is the released code's.
    """

    classes: int = 10
    dropout: float = 1.0

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Array:
        """Images ``(B, H, W, C)`` in [0, 1], H and W at least 32 -> logits ``(B, classes)``.

        In training it draws from the rng ``dropout`` and updates the collection ``batch_stats``.
        """

        def dropout(x: Array, rate: float) -> Array:
            return nn.Dropout(self.dropout * rate, deterministic=not train)(x)

        def norm(x: Array) -> Array:
            return BatchNorm()(x, train=train)

        x = images
        for block, widths in enumerate(BLOCKS):
            for layer, features in enumerate(widths):
                x = norm(nn.relu(Conv(features)(x)))
                if layer < len(widths) - 1:
                    x = dropout(x, 0.3 if block == 0 else 0.4)
            x = max_pool(x)
        x = dropout(x.reshape(x.shape[0], -1), 0.5)
        x = dropout(norm(nn.relu(nn.Dense(512)(x))), 0.5)
        return nn.Dense(self.classes)(x)
