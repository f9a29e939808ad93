"""Ranking numbers by counting: no sorting, no gathering, whatever the sharding."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

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


class Border(NamedTuple):
    """Where it is parted between what is marked and what is not."""

    rank: jax.Array  # shape (), uint32: all above it is marked
    lot: jax.Array  # shape (), uint32: of those that are equal to it, all above this


def affordable(
    ranked: Sequence[jax.Array],
    cost: Callable[[list[jax.Array]], jax.Array],
    budget: jax.Array,
) -> Border:
    """Return the border above which the highest ranks cost at most `budget` together.

    Of equal ranks at the border as many are above it as the rest of the budget pays
    for, drawn by lots that are always the same.

    Args:
      ranked: uint32; those that are `LAST` are never above the border.
      cost: from arrays of bool like `ranked` to the cost of what they mark, shape ().
        What is marked more costs no less.
      budget: what may be spent, shape ().
    """

    def border_of(ranked, budget):
        """Return the highest t at which all from t on are too dear; else 0."""

        def decide(i, found):
            candidate = found | (jnp.uint32(_HIGHEST_BIT) >> i.astype(jnp.uint32))
            too_dear = cost([x >= candidate for x in ranked]) > budget
            return jnp.where(too_dear, candidate, found)

        return jax.lax.fori_loop(0, _BITS, decide, jnp.uint32(0))

    rank = border_of(ranked, budget)
    # Where all can be paid for, the border is LAST, and there is nothing to draw.
    lots = [
        jnp.where((x == rank) & (x > LAST), lot, jnp.uint32(LAST))
        for x, lot in zip(ranked, _lots(ranked), strict=True)
    ]
    return Border(rank, border_of(lots, budget - cost([x > rank for x in ranked])))


def above(ranked: Sequence[jax.Array], border: Border) -> list[jax.Array]:
    """Mark what is above the border that was found for these ranks."""
    return [
        (x > border.rank) | ((x == border.rank) & (x > LAST) & (lot > border.lot))
        for x, lot in zip(ranked, _lots(ranked), strict=True)
    ]


def highest(x: jax.Array, number: int, axes: tuple[int, ...]) -> jax.Array:
    """Return the places of the highest numbers along axes, of equal ones any.

    Returns:
      uint32, of the shape of `x`, but 1 along the axes, with the number of the place
      as a first axis; see `marks`.
    """
    where = places(x.shape, axes)

    def take(left, _):
        first = left == jnp.max(left, axes, keepdims=True)
        place = jnp.max(jnp.where(first, where, 0), axes, keepdims=True)
        return jnp.where(where == place, jnp.uint32(LAST), left), place

    return jax.lax.scan(take, ranks(x), length=number)[1]


def places(shape: tuple[int, ...], axes: tuple[int, ...]) -> jax.Array:
    """Return the place of every number along axes, from 0 on: uint32, of the shape."""
    x = jnp.uint32(0)
    for axis in axes:
        index = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        x = x * jnp.uint32(shape[axis]) + index
    return jnp.broadcast_to(x, shape)


def marks(found: jax.Array, shape: tuple[int, ...], axes: tuple[int, ...]) -> jax.Array:
    """Mark the places that `highest` found: bool, of the shape."""
    return jnp.any(places(shape, axes)[None] == found, 0)


def _lots(ranked: Sequence[jax.Array]) -> list[jax.Array]:
    """Return numbers that look random, of which no two are equal and none is `LAST`.

    That holds for 2**32 - 1 numbers in all.
    """
    lots, size = [], 1
    for one in ranked:
        x = places(one.shape, tuple(range(one.ndim))) + jnp.uint32(size % 2**_BITS)
        # The finalizer of MurmurHash3, which maps different numbers to different ones,
        # and only 0 to 0.
        x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
        x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
        lots.append(x ^ (x >> 16))
        size += one.size
    return lots
