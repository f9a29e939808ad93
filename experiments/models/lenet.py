"""LeNet-300-100 and LeNet-5-Caffe.

Source: LeCun, Bottou, Bengio, Haffner, "Gradient-based learning applied to
document recognition", Proc. IEEE 86(11), 1998; LeNet-5 in the widths of Caffe's
example, with ReLU, as the pruning literature uses it.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from experiments.models.base import Model
from experiments.models.conv import check_images


class LeNet300(Model):
    """Classify images with two hidden layers of 300 and 100 units.

    266,200 kernel weights on 28x28 images, and as many MACs per example.
    """

    next_layer: ClassVar[dict[str, str]] = {
        "Dense_0/kernel": "Dense_1/kernel",
        "Dense_1/kernel": "Dense_2/kernel",
    }

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array, *, train: bool = False) -> jax.Array:
        """Return logits, shape (B, classes)."""
        del train  # nothing is normalized
        x = x_BxHxWxC.reshape(x_BxHxWxC.shape[0], -1)
        for units in (300, 100):
            x = nn.relu(nn.Dense(units, dtype=self.dtype)(x))
        return nn.Dense(self.classes, dtype=self.dtype)(x).astype(jnp.float32)


class LeNet5(Model):
    """Classify images with two convolutions and two dense layers.

    430,500 kernel weights and 2,293,000 MACs per example on 28x28x1 images. Smaller
    ones are taken down to 16x16.
    """

    next_layer: ClassVar[dict[str, str]] = {
        "Conv_0/kernel": "Conv_1/kernel",
        "Conv_1/kernel": "Dense_0/kernel",
        "Dense_0/kernel": "Dense_1/kernel",
    }

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array, *, train: bool = False) -> jax.Array:
        """Return logits, shape (B, classes)."""
        del train  # nothing is normalized
        check_images(self, x_BxHxWxC, smallest=16)
        x = x_BxHxWxC
        for filters in (20, 50):
            x = nn.Conv(filters, (5, 5), padding="VALID", dtype=self.dtype)(x)
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = nn.relu(nn.Dense(500, dtype=self.dtype)(x.reshape(x.shape[0], -1)))
        return nn.Dense(self.classes, dtype=self.dtype)(x).astype(jnp.float32)
