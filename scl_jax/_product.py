"""The product W * H(S) of a weight and its mask, and the gradients it hands back."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from scl_jax._step import STE, proxy_gradient


def checked_part(pruned_gradient: Any, caller: str) -> float:
    """Return `pruned_gradient`, or raise where it is no number from 0 to 1."""
    if not isinstance(pruned_gradient, int | float):
        raise TypeError(
            f"{caller}: pruned_gradient must be a number, got {pruned_gradient!r}"
        )
    if not 0 <= pruned_gradient <= 1:
        raise ValueError(
            f"{caller}: pruned_gradient must be from 0 to 1, got {pruned_gradient}"
        )
    return float(pruned_gradient)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def masked_product(weight: jax.Array, mask: jax.Array, ste: STE, part: float) -> Any:
    """Return W * H(S); its gradient at a pruned weight is a part of the exact one's."""
    del ste, part
    # Selected by conditions, which are the same in the gradient: of masks that rest XLA
    # then keeps a byte for each in a loop over steps, and does not read S again.
    kept = jnp.where(mask < 0, jnp.zeros_like(weight), weight)
    return jnp.where(jnp.isnan(mask), jnp.full_like(weight, jnp.nan), kept)


def _product_forward(weight, mask, ste, part):
    return masked_product(weight, mask, ste, part), (weight, mask)


def _product_backward(ste, part, saved, g):
    weight, mask = saved
    to_weight = jnp.where(mask < 0, (part * g).astype(g.dtype), g)
    to_mask = (g * weight).astype(mask.dtype) * proxy_gradient(ste, mask)
    return to_weight, to_mask


masked_product.defvjp(_product_forward, _product_backward)
