"""Numbers that tell whether arrays and JSON are still what they were."""

import json
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def checksum(content: dict[str, Any]) -> int:
    """Return a number that changes when the JSON of the content does."""
    return zlib.crc32(json.dumps(content).encode())


def fingerprint(arrays: dict[str, jax.Array]) -> int:
    """Return a number that changes when any element of any array does."""
    sums = jax.device_get(_sums(list(arrays.values())))
    return zlib.crc32(np.asarray(sums, np.uint32).tobytes())


@jax.jit
def _sums(arrays: list[jax.Array]) -> list[jax.Array]:
    """Hash each array where it lies: a sum, so that parts of it add up.

    Source: the elements are mixed as MurmurHash3 (Appleby, 2011) ends.
    """

    def hashed(x):
        x = x.astype(jnp.uint8) if x.dtype == jnp.bool else x
        width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}
        bits = jax.lax.bitcast_convert_type(x, width[x.dtype.itemsize])
        bits = bits.astype(jnp.uint32)
        place = jnp.zeros(bits.shape, jnp.uint32)
        for axis, size in enumerate(bits.shape):
            index = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
            place = place * jnp.uint32(size) + index
        # Each step can be undone, so that a change of one element changes the sum.
        # Of several, mixed with their places like this, one in 2**32 does not.
        mixed = bits ^ (place * jnp.uint32(0x9E3779B9))
        mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)
        mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
        return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)

    return [hashed(x) for x in arrays]
