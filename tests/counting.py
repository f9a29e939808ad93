"""Shapes to count MACs with, and how a count that is unknown is checked."""

import jax
import jax.numpy as jnp

from scl_jax._macs import UnknownMacs


def spec(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def assert_unknown(entry, reason):
    assert isinstance(entry, UnknownMacs), entry
    assert entry.reason.startswith(reason), entry
