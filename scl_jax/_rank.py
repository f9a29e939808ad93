"""Ranking numbers by counting: no sorting, no gathering, whatever the sharding."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

_BITS = 32
_HIGHEST_BIT = 1 << (_BITS - 1)
LAST, FIRST = 0, 2**_BITS - 1  # below and above the ranks of all numbers


def ranks(x: jax.Array) -> jax.Array:
    """Return uint32 in the order of the numbers, of the shape of `x`.

    It is the order of float32, in which -0 is below 0; NaN is `LAST`.
    """
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    # The bits of positive floats lie in their order, those of negative ones reversed.
    negative = bits >= jnp.uint32(_HIGHEST_BIT)
    ordered = jnp.where(negative, ~bits, bits | jnp.uint32(_HIGHEST_BIT))
    return jnp.where(jnp.isnan(x), jnp.uint32(LAST), ordered)


def count(marked: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Count along axes, exactly: int32."""
    # Floats are added faster than ints on a CPU, and as exactly up to 2**24.
    few = math.prod(marked.shape[axis] for axis in axes) <= 2**24
    counted = jnp.sum(marked, axes, dtype=jnp.float32 if few else jnp.int32)
    return counted.astype(jnp.int32)


def affordable(
    ranked: Sequence[jax.Array],
    cost: Callable[[list[jax.Array]], jax.Array],
    budget: jax.Array,
) -> list[jax.Array]:
    """Mark the highest ranks that cost at most `budget` together.

    Of equal ranks at the border as many are marked as the rest of the budget pays
    for, drawn by lots that are always the same.

    Args:
      ranked: uint32; those that are `LAST` are never marked.
      cost: from arrays of bool like `ranked` to the cost of what they mark, of the
        shape of `budget`. What is marked more costs no less.
      budget: what may be spent: shape (), or one that broadcasts to each of `ranked`,
        to spend it along some axes each for itself.

    Returns:
      bool, of the shapes of `ranked`.
    """

    def border_of(ranked, budget):
        """Return the highest t at which all from t on are too dear; else 0."""

        def decide(i, found):
            candidate = found | (jnp.uint32(_HIGHEST_BIT) >> i.astype(jnp.uint32))
            too_dear = cost([x >= candidate for x in ranked]) > budget
            return jnp.where(too_dear, candidate, found)

        return jax.lax.fori_loop(0, _BITS, decide, jnp.zeros(budget.shape, jnp.uint32))

    border = border_of(ranked, budget)
    above = [x > border for x in ranked]
    # Where all can be paid for, the border is LAST, and there is nothing to draw.
    lots, place = [], 1
    for x in ranked:
        drawing = (x == border) & (x > LAST)
        lots.append(jnp.where(drawing, _lots(x.shape, place), jnp.uint32(LAST)))
        place += x.size
    drawn = border_of(lots, budget - cost(above))
    return [a | (x > drawn) for a, x in zip(above, lots, strict=True)]


def highest(ranked: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Mark the highest rank along axes, of equal ones one, drawn by the same lots.

    It is what `affordable` marks for a budget of one, in two passes instead of 64.

    Returns:
      bool, of the shape of `ranked`; where all are `LAST` none is marked.
    """

    def marked(x):
        return (x == jnp.max(x, axes, keepdims=True)) & (x > LAST)

    lots = jnp.where(marked(ranked), _lots(ranked.shape, 1), jnp.uint32(LAST))
    return marked(lots)


def _lots(shape: tuple[int, ...], place: int) -> jax.Array:
    """Return numbers that look random, for the places from `place` on.

    Of the places from 1 to 2**32 - 1 no two lots are equal, and none is `LAST`.
    """
    x = jnp.uint32(0)
    for axis, size in enumerate(shape):
        x = x * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    x = x + jnp.uint32(place % 2**_BITS)
    # The finalizer of MurmurHash3, which maps different numbers to different ones,
    # and only 0 to 0.
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
