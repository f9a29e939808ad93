"""Wide residual networks for small images.

Source: Zagoruyko, Komodakis, "Wide residual networks", BMVC 2016, arXiv 1605.07146;
without dropout.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from experiments.models.base import Model
from experiments.models.conv import check_images, conv, next_in_block, norm


class WideBlock(nn.Module):
    """Two convolutions of 3x3, each after normalization and ReLU, and a shortcut.

    The shortcut is the input; where the block changes its shape, it is a convolution
    of 1x1 of the normalized input, which the first convolution reads, too.
    """

    features: int
    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array, train: bool) -> jax.Array:
        """Return activations, shape (B, ceil(H/stride), ceil(W/stride), features)."""
        x, features, stride, dtype = x_BxHxWxC, self.features, self.stride, self.dtype
        y = nn.relu(norm(train, dtype)(x))
        if stride > 1 or x.shape[-1] != features:
            x = conv(features, 1, stride=stride, dtype=dtype, name="shortcut")(y)
        y = conv(features, 3, stride=stride, dtype=dtype)(y)
        y = nn.relu(norm(train, dtype)(y))
        return x + conv(features, 3, dtype=dtype)(y)


class WideResNet(Model, kw_only=True):
    """Classify small images, with blocks of 16, 32 and 64 features times `width`.

    Attributes:
      depth: the number of layers, 6 n + 4 with n blocks of each width.
      width: the factor of the widths.
    """

    depth: int
    width: int

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array, *, train: bool = False) -> jax.Array:
        """Return logits, shape (B, classes)."""
        check_images(self, x_BxHxWxC)
        blocks, rest = divmod(self.depth - 4, 6)
        if rest or blocks < 1:
            raise ValueError(
                f"WideResNet: depth must be 10, 16, 22, ..., got {self.depth}"
            )
        x = conv(16, 3, dtype=self.dtype)(x_BxHxWxC)
        for stage, features in enumerate((16, 32, 64)):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                x = WideBlock(self.width * features, stride, self.dtype)(x, train)
        x = jnp.mean(nn.relu(norm(train, self.dtype)(x)), axis=(1, 2))
        return nn.Dense(self.classes, dtype=self.dtype)(x).astype(jnp.float32)


class WRN22x2(WideResNet):
    """Classify small images with 22 layers of double width.

    1,076,912 kernel weights and 157,730,048 MACs per example on 32x32x3 images.
    """

    next_layer: ClassVar[dict[str, str]] = next_in_block("WideBlock", 9, 2)
    depth: int = 22
    width: int = 2
