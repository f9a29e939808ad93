"""The count of connections of MaskedParams: its number, its type, its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from masked_trees import BF16, F16, F32, make_masked

from scl_jax import (
    Clipped,
    LeakyReLU,
    MaskedParams,
    ReLU,
    Softplus,
    connection_count,
    identity,
)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_connections_are_counted_in_float32(dtype):
    # 1001 is no bfloat16; and sums of ones in bfloat16 stop at 256.
    s = np.full((7, 200), -1.0, np.float32)
    s.flat[:1001] = 1.0
    masked = MaskedParams(
        {"a": jnp.zeros((7, 200)), "b": jnp.ones(2)},
        {"a": jnp.asarray(s, dtype), "b": None},
    )
    count = connection_count(masked)
    assert (count.dtype, count.shape, float(count)) == (jnp.float32, (), 1001.0)


def test_counting_nothing_gives_a_float32_zero():
    count = connection_count(MaskedParams({"w": jnp.ones(2)}, {"w": None}))
    assert (count.dtype, count.shape, float(count)) == (jnp.float32, (), 0.0)


@pytest.mark.parametrize(
    ("ste", "proxy"),
    [
        (identity, np.ones_like),
        (LeakyReLU(0.2), lambda s: np.where(s < 0, 0.2, 1.0)),
        (Softplus(3.0), lambda s: 1 / (1 + np.exp(-3.0 * s))),
        (ReLU(), lambda s: (s >= 0) * 1.0),
        (Clipped(), lambda s: (np.abs(s) <= 1) * 1.0),
        (lambda s: 1 / (1 + s * s), lambda s: 1 / (1 + s**2)),
    ],
    ids=["identity", "leaky", "softplus", "relu", "clipped", "user"],
)
def test_gradient_of_the_count_is_the_proxy_gradient(ste, proxy):
    masked = make_masked()
    gradient = jax.grad(lambda m: connection_count(m, ste=ste))(masked)
    for layer in ("conv", "dense"):
        s = np.asarray(masked.masks[layer]["kernel"], np.float64)
        np.testing.assert_allclose(
            gradient.masks[layer]["kernel"], proxy(s), rtol=1e-5, atol=1e-7
        )
    assert not any(np.asarray(g).any() for g in jax.tree.leaves(gradient.weights))
