"""A small vision transformer, whose layers are one stack: scanned, and rematerialized.

Products are in bfloat16, parameters in float32.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

LAYERS, WIDTH, PATCH = 2, 48, 7


class Block(nn.Module):
    """Add what attention gathers, then what an MLP makes of it."""

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array, _: None) -> tuple[jax.Array, None]:
        """Return the tokens, and nothing for the scan to collect."""
        x, options = x_BxTxD, {"dtype": jnp.bfloat16, "use_bias": False}
        y = nn.LayerNorm(**options)(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=4, **options)(y)
        y = nn.LayerNorm(**options)(x)
        y = nn.gelu(nn.Dense(2 * WIDTH, **options)(y))
        return x + nn.Dense(WIDTH, **options)(y), None


class Transformer(nn.Module):
    """Read patches of an image through a stack of blocks, and all tokens at its end."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Return logits (batch, 10), float32."""
        patches = nn.Conv(WIDTH, (PATCH, PATCH), PATCH, dtype=jnp.bfloat16)
        x_BxTxD = patches(images).reshape(len(images), -1, WIDTH)
        normal = nn.initializers.normal(0.02)
        place_TxD = self.param("place", normal, x_BxTxD.shape[1:])
        x_BxTxD += place_TxD[None].astype(x_BxTxD.dtype)
        stack = nn.scan(
            nn.remat(Block, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=LAYERS,
        )
        x_BxTxD, _ = stack(name="blocks")(x_BxTxD, None)
        return nn.Dense(10)(x_BxTxD.reshape(len(images), -1).astype(jnp.float32))


def axes(path: str, leaf: Any) -> tuple[int, ...]:
    """Return the axes of a kernel that tell its features apart.

    For query, key and value they are the heads and the units of a head. In the stack,
    the layer is one of them.
    """
    del leaf
    by_head = path.endswith(("query/kernel", "key/kernel", "value/kernel"))
    own = (-2, -1) if by_head else (-1,)
    return (0, *own) if path.startswith("blocks/") else own
