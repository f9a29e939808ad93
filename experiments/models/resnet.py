"""Residual networks: the ones of CIFAR, with parameter-free shortcuts, and ResNet-50.

Source: He, Zhang, Ren, Sun, "Deep residual learning for image recognition", CVPR
2016, arXiv 1512.03385: section 4.2 for CIFAR, table 1 for ImageNet.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from experiments.models.base import Model
from experiments.models.conv import check_images, conv, next_in_block, norm


def pad_shortcut(x_BxHxWxC: jax.Array, features: int, stride: int) -> jax.Array:
    """Take every `stride`-th pixel, and append channels of zeros up to `features`.

    The shortcut "A" of the paper, which has no parameters.
    """
    x = x_BxHxWxC[:, ::stride, ::stride]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, features - x.shape[-1])))


class BasicBlock(nn.Module):
    """Two convolutions of 3x3, the first with the stride, added to the input."""

    features: int
    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array, train: bool) -> jax.Array:
        """Return activations, shape (B, ceil(H/stride), ceil(W/stride), features)."""
        y = conv(self.features, 3, stride=self.stride, dtype=self.dtype)(x_BxHxWxC)
        y = nn.relu(norm(train, self.dtype)(y))
        y = norm(train, self.dtype)(conv(self.features, 3, dtype=self.dtype)(y))
        return nn.relu(y + pad_shortcut(x_BxHxWxC, self.features, self.stride))


class ResNet(Model, kw_only=True):
    """Classify small images, with blocks of 16, 32 and 64 features.

    Attributes:
      depth: the number of layers with weights, 6 n + 2 with n blocks of each width.
    """

    depth: int

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array, *, train: bool = False) -> jax.Array:
        """Return logits, shape (B, classes)."""
        check_images(self, x_BxHxWxC)
        blocks, rest = divmod(self.depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"ResNet: depth must be 8, 14, 20, ..., got {self.depth}")
        x = conv(16, 3, dtype=self.dtype)(x_BxHxWxC)
        x = nn.relu(norm(train, self.dtype)(x))
        for stage, features in enumerate((16, 32, 64)):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                x = BasicBlock(features, stride, self.dtype)(x, train)
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(self.classes, dtype=self.dtype)(x).astype(jnp.float32)


class ResNet20(ResNet):
    """Classify small images with 20 layers.

    268,336 kernel weights and 40,551,040 MACs per example on 32x32x3 images.
    """

    next_layer: ClassVar[dict[str, str]] = next_in_block("BasicBlock", 9, 2)
    depth: int = 20


class ResNet32(ResNet):
    """Classify small images with 32 layers.

    461,872 kernel weights and 68,862,592 MACs per example on 32x32x3 images.
    """

    next_layer: ClassVar[dict[str, str]] = next_in_block("BasicBlock", 15, 2)
    depth: int = 32


class ResNet56(ResNet):
    """Classify small images with 56 layers.

    848,944 kernel weights and 125,485,696 MACs per example on 32x32x3 images.
    """

    next_layer: ClassVar[dict[str, str]] = next_in_block("BasicBlock", 27, 2)
    depth: int = 56


class ResNet110(ResNet):
    """Classify small images with 110 layers.

    1,719,856 kernel weights and 252,887,680 MACs per example on 32x32x3 images.
    """

    next_layer: ClassVar[dict[str, str]] = next_in_block("BasicBlock", 54, 2)
    depth: int = 110


class Bottleneck(nn.Module):
    """Convolutions of 1x1, 3x3 and 1x1, the second with the stride, and a shortcut."""

    features: int
    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array, train: bool) -> jax.Array:
        """Return activations, shape (B, ceil(H/stride), ceil(W/stride), 4 features)."""
        x, stride, dtype = x_BxHxWxC, self.stride, self.dtype
        y = nn.relu(norm(train, dtype)(conv(self.features, 1, dtype=dtype)(x)))
        y = conv(self.features, 3, stride=stride, dtype=dtype)(y)
        y = nn.relu(norm(train, dtype)(y))
        y = norm(train, dtype)(conv(4 * self.features, 1, dtype=dtype)(y))
        if stride > 1 or x.shape[-1] != y.shape[-1]:
            shortcut = conv(y.shape[-1], 1, stride=stride, dtype=dtype, name="shortcut")
            x = norm(train, dtype)(shortcut(x))
        return nn.relu(y + x)


class ResNet50(Model):
    """Classify images with 50 layers, the stride in the 3x3 convolutions ("v1.5").

    25,502,912 kernel weights and 4,089,184,256 MACs per example on 224x224x3 images
    of 1,000 classes. Where a side is less than 64 pixels, the first convolution has
    stride 1 and the max-pool is left out; the parameters are the same.

    Attributes:
      stages: the number of blocks of 64, 128, 256, ... features.
    """

    next_layer: ClassVar[dict[str, str]] = next_in_block("Bottleneck", 16, 3)
    stages: tuple[int, ...] = (3, 4, 6, 3)

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array, *, train: bool = False) -> jax.Array:
        """Return logits, shape (B, classes)."""
        check_images(self, x_BxHxWxC)
        small = min(x_BxHxWxC.shape[1:3]) < 64
        x = conv(64, 7, stride=1 if small else 2, dtype=self.dtype)(x_BxHxWxC)
        x = nn.relu(norm(train, self.dtype)(x))
        if not small:
            # Zeros do as padding, because nothing that a ReLU makes is below.
            x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
            x = nn.max_pool(x, (3, 3), strides=(2, 2))
        for stage, blocks in enumerate(self.stages):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                x = Bottleneck(64 * 2**stage, stride, self.dtype)(x, train)
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(self.classes, dtype=self.dtype)(x).astype(jnp.float32)
