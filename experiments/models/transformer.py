"""The pre-norm transformer block: attention, and an MLP.

Initial kernels are Flax's default (normal, variance 1 / inputs), in every layer.

Source: Vaswani et al., "Attention is all you need", arXiv 1706.03762; with the
normalization in front of each half: Radford et al., "Language models are unsupervised
multitask learners", 2019, and Dosovitskiy et al., arXiv 2010.11929.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

_SPLIT_BY_HEAD = ("query/kernel", "key/kernel", "value/kernel")

# Of position embeddings, and of what else is added to tokens.
embedding_init = nn.initializers.normal(0.02)


def kernel_axes(path: str, leaf: Any) -> tuple[int, int] | int:
    """Return the feature axes of a transformer's kernel.

    Args:
      path: of the kernel, such as `Block_0/Attention_0/query/kernel`.
      leaf: the kernel; not used.

    Returns:
      (-2, -1) for query, key and value, which are (embed, heads, head_dim); -1 for
      all others.
    """
    del leaf
    return (-2, -1) if path.endswith(_SPLIT_BY_HEAD) else -1


def mlp_layers(blocks: int) -> dict[str, str]:
    """Return `next_layer` of a model with so many blocks.

    The MLP's hidden units are read by one kernel. What a block adds to its input is
    read by every later layer; and `out`, which alone reads `value`, has two input axes,
    where `scl_jax.report` knows one.
    """
    return {
        f"Block_{i}/Dense_0/kernel": f"Block_{i}/Dense_1/kernel" for i in range(blocks)
    }


class Attention(nn.Module):
    """Multi-head self-attention; products in `dtype`, the softmax in float32.

    Attributes:
      heads: their number, a divisor of the width.
      causal: whether a token attends to none behind it.
      dtype: the precision of the products.
    """

    heads: int
    causal: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        """Return what the tokens gather from each other, (B, T, D)."""
        width = x_BxTxD.shape[-1]
        if width % self.heads:
            raise ValueError(
                f"Attention: heads must divide the width, got {self.heads} heads and "
                f"width {width} at {'/'.join(self.path)}"
            )
        by_head = (self.heads, width // self.heads)
        q, k, v = (
            nn.DenseGeneral(by_head, dtype=self.dtype, name=name)(x_BxTxD)
            for name in ("query", "key", "value")
        )
        # Not Flax's own layer: with a float32 softmax, its product of the attention
        # weights and v is float32, too.
        mixed_BxTxHxK = jax.nn.dot_product_attention(
            q, k, v, is_causal=self.causal, implementation="xla"
        )
        return nn.DenseGeneral(width, axis=(-2, -1), dtype=self.dtype, name="out")(
            mixed_BxTxHxK
        )


class Block(nn.Module):
    """Add to each token what attention gathers, then what an MLP makes of it.

    Attributes:
      heads: the number of attention heads.
      mlp: the number of hidden units of the MLP.
      causal: whether a token attends to none behind it.
      dtype: the precision of the computation.
    """

    heads: int
    mlp: int
    causal: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        """Return the tokens, (B, T, D)."""
        x = x_BxTxD
        y = nn.LayerNorm(dtype=self.dtype)(x)
        x = x + Attention(self.heads, self.causal, self.dtype)(y)
        y = nn.LayerNorm(dtype=self.dtype)(x)
        y = nn.gelu(nn.Dense(self.mlp, dtype=self.dtype)(y))
        return x + nn.Dense(x.shape[-1], dtype=self.dtype)(y)
