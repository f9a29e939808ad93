"""What baselines train whose pruned weights have a gradient."""

from typing import Any

import jax

import scl_jax
from scl_jax import MaskedParams


def straight_through(masked: MaskedParams) -> Any:
    """Return the folded parameters, whose gradient comes to all weights as it is."""
    return jax.tree.map(
        lambda weight, folded: weight + jax.lax.stop_gradient(folded - weight),
        *(masked.weights, scl_jax.fold_masks(masked)),
    )
