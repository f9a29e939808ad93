"""A decoder-only language model.

Source: Radford, Wu, Child, Luan, Amodei, Sutskever, "Language models are unsupervised
multitask learners", 2019 (GPT-2); smaller, without dropout, and with a head that is a
kernel of its own instead of the token embedding's transpose.
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


class LanguageModel(Model):
    """Predict each next token of a text from those up to it.

    Logits at place t are those of token t + 1. 834,560 parameters and, in the kernels,
    102,252,544 MACs per 128 tokens with a vocabulary of 97. Other sizes are a subclass.

    Attributes:
      context: the largest number of tokens.
      width: length of a token's vector.
      blocks: number of blocks; `next_layer` is `mlp_layers` of it.
      heads: number of attention heads, a divisor of the width.
      mlp: number of hidden units of the MLPs.
    """

    next_layer: ClassVar[dict[str, str]] = mlp_layers(4)
    feature_axes: ClassVar[Any] = staticmethod(kernel_axes)
    context: ClassVar[int] = 128
    width: ClassVar[int] = 128
    blocks: ClassVar[int] = 4
    heads: ClassVar[int] = 4
    mlp: ClassVar[int] = 512

    @nn.compact
    def __call__(self, x_BxT: jax.Array, *, train: bool = False) -> jax.Array:
        """Return logits, shape (B, T, classes).

        A text with a token of `classes` or more gets NaN.

        Raises:
          TypeError: if the tokens are no integers.
          ValueError: if they have not the shape (B, T), T at most `context`.
        """
        del train  # LayerNorm does the same in training and evaluation
        if not jnp.issubdtype(x_BxT.dtype, jnp.integer):
            raise TypeError(
                f"LanguageModel: tokens must be integers, got {x_BxT.dtype} of shape "
                f"{x_BxT.shape}"
            )
        if x_BxT.ndim != 2 or x_BxT.shape[1] > self.context:
            raise ValueError(
                "LanguageModel: tokens must have the shape (B, T) with T at most "
                f"context={self.context}, got {x_BxT.shape}"
            )
        x = nn.Embed(self.classes, self.width, dtype=self.dtype)(x_BxT)
        positions = self.param(
            "position_embedding", embedding_init, (1, self.context, self.width)
        )
        x = x + positions[:, : x.shape[1]].astype(self.dtype)
        for _ in range(self.blocks):
            x = Block(self.heads, self.mlp, causal=True, dtype=self.dtype)(x)
        x = nn.LayerNorm(dtype=self.dtype)(x)
        head = nn.Dense(self.classes, use_bias=False, dtype=self.dtype)
        return head(x).astype(jnp.float32)
