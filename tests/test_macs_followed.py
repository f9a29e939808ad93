"""What a weight may go through on its way to the product: its MACs stay the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from counting import spec
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from scl_jax._macs import count_macs


def doubled(w):
    return 2 * w


custom_jvp_doubled = jax.custom_jvp(doubled)
custom_jvp_doubled.defjvps(lambda g, y, w: 2 * g)
custom_vjp_doubled = jax.custom_vjp(doubled)
custom_vjp_doubled.defvjp(lambda w: (2 * w, None), lambda _, g: (2 * g,))


def placed(w):
    mesh = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere = jax.sharding.PartitionSpec()
    return lax.with_sharding_constraint(w, jax.NamedSharding(mesh, everywhere))


def resharded(w):
    mesh = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Explicit,))
    everywhere = jax.sharding.PartitionSpec()
    return jax.sharding.reshard(w, jax.NamedSharding(mesh, everywhere))


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.astype(jnp.bfloat16),
        lambda w: w.reshape(2, 10).reshape(4, 5),
        lambda w: w.T.T,
        lambda w: jnp.flip(w, 0),
        lambda w: -w,
        lambda w: w[None].squeeze(0),
        lambda w: 0.5 * w / jnp.arange(1.0, 6.0)[None],
        lambda w: jnp.where(np.eye(4, 5) > 0, w, 0),
        lambda w: w * jax.random.bernoulli(jax.random.key(0), 0.5, (4, 5)),
        lax.stop_gradient,
        lax.optimization_barrier,
        lambda w: lax.reduce_precision(w, 5, 7),
        lambda w: jnp.broadcast_to(w, (1, 4, 5))[None].reshape(4, 5),
        lambda w: jax.jit(jax.jit(lambda v: v * 2))(w),
        lambda w: jax.device_put(w, jax.devices()[0]),
        jnp.copy,
        placed,
        resharded,
        jax.checkpoint(doubled),
        custom_jvp_doubled,
        custom_vjp_doubled,
        lambda w: checkpoint_name(w, "weight"),
    ],
)
def test_casts_layouts_and_constant_factors_do_not_change_the_count(change):
    def apply(w, x):
        w = change(w)
        return x.astype(w.dtype) @ w

    assert count_macs(apply, spec(4, 5), spec(1, 4)) == 20


@pytest.mark.parametrize(
    "wrap",
    [
        jax.jit,
        lambda f: jax.jit(lambda w, x: jax.jit(f)(w, x)),
        jax.checkpoint,
        jax.named_call,
    ],
)
def test_counts_do_not_depend_on_the_call_around_them(wrap):
    @jax.custom_jvp
    def square(x):
        return x * x

    square.defjvps(lambda g, y, x: 2 * x * g)

    def apply(params, x):
        return square(x @ params["w"] + params["b"]) @ params["v"]

    params = {"w": spec(3, 4), "b": spec(4), "v": spec(4, 2)}
    macs = count_macs(wrap(apply), params, spec(3))
    assert macs == {"w": 12, "b": 0, "v": 8}
