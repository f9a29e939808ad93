"""Vision transformers, for images of any size.

Source: Dosovitskiy et al., "An image is worth 16x16 words", arXiv 2010.11929; the
small one: Touvron et al., arXiv 2012.12877, and Steiner et al., arXiv 2106.10270.
Without dropout.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from experiments.models.base import Model
from experiments.models.transformer import (
    Block,
    embedding_init,
    kernel_axes,
    mlp_layers,
)


class ViT(Model):
    """Classify images as sequences of patches; a subclass gives the sizes.

    An image whose size is no multiple of the patch gets zeros below and at its right.
    The position embedding is learned: parameters fit one size of images.

    Attributes:
      patch: side of the square patches, in pixels.
      width: length of a token's vector.
      blocks: number of blocks; `next_layer` is `mlp_layers` of it.
      heads: number of attention heads, a divisor of the width.
      mlp: number of hidden units of the MLPs.
    """

    feature_axes: ClassVar[Any] = staticmethod(kernel_axes)
    patch: ClassVar[int]
    width: ClassVar[int]
    blocks: ClassVar[int]
    heads: ClassVar[int]
    mlp: ClassVar[int]

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array, *, train: bool = False) -> jax.Array:
        """Return logits, shape (B, classes)."""
        del train  # LayerNorm does the same in training and evaluation
        size = (self.patch, self.patch)
        padding = [(0, -pixels % self.patch) for pixels in x_BxHxWxC.shape[1:3]]
        patches = nn.Conv(
            self.width, size, strides=size, padding=padding, dtype=self.dtype
        )(x_BxHxWxC)
        x_BxTxD = patches.reshape(len(x_BxHxWxC), -1, self.width)
        token = self.param("class_token", nn.initializers.zeros, (1, 1, self.width))
        tokens = jnp.broadcast_to(token, (len(x_BxTxD), 1, self.width))
        x = jnp.concatenate([tokens.astype(self.dtype), x_BxTxD], axis=1)
        positions = self.param("position_embedding", embedding_init, (1, *x.shape[1:]))
        x = x + positions.astype(self.dtype)
        for _ in range(self.blocks):
            x = Block(self.heads, self.mlp, dtype=self.dtype)(x)
        x = nn.LayerNorm(dtype=self.dtype)(x)[:, 0]
        return nn.Dense(self.classes, dtype=self.dtype)(x).astype(jnp.float32)


class ViTTi4(ViT):
    """Classify images of 28 or 32 pixels a side: patches of 4, 6 blocks of width 192.

    The sizes are our choice. 2,684,554 parameters and, in the kernels, 132,862,848
    MACs per example on 28x28x1 images with 10 classes.
    """

    next_layer: ClassVar[dict[str, str]] = mlp_layers(6)
    patch, width, blocks, heads, mlp = 4, 192, 6, 3, 768


class ViTS16(ViT):
    """Classify images with ViT-S/16: 12 blocks of width 384.

    22,050,664 parameters and, in the kernels, 4,241,218,560 MACs per example on
    224x224x3 images with 1,000 classes.
    """

    next_layer: ClassVar[dict[str, str]] = mlp_layers(12)
    patch, width, blocks, heads, mlp = 16, 384, 12, 6, 1536


class ViTB16(ViT):
    """Classify images with ViT-B/16: 12 blocks of width 768.

    86,567,656 parameters and, in the kernels, 16,848,500,736 MACs per example on
    224x224x3 images with 1,000 classes.
    """

    next_layer: ClassVar[dict[str, str]] = mlp_layers(12)
    patch, width, blocks, heads, mlp = 16, 768, 12, 12, 3072
