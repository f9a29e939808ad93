"""Uses of a weight that cannot be followed: its MACs are unknown, with a reason."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from counting import assert_unknown, spec
from jax import lax

from scl_jax._macs import UnknownMacs, count_macs


def until_small(w, x):
    return lax.while_loop(lambda h: jnp.sum(h) > 1, lambda h: h @ w, x)


def called_back(w, x):
    return x @ jax.pure_callback(lambda v: v, spec(3, 3), w)


def on_a_mesh(w, x):
    mesh = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    partitioned = jax.sharding.PartitionSpec()
    return jax.shard_map(
        lambda w, x: x @ w,
        mesh=mesh,
        in_specs=(partitioned, partitioned),
        out_specs=partitioned,
    )(w, x)


@pytest.mark.parametrize(
    ("reason", "apply"),
    [
        ("add: ", lambda w, x: x @ (w + 1)),
        ("add: ", lambda w, x: x @ (w + w)),
        ("sub: ", lambda w, x: x @ (w - jax.random.normal(jax.random.key(0), (3, 3)))),
        ("concatenate: ", lambda w, x: x @ jnp.concatenate([w, w], axis=1)),
        ("cumsum: ", lambda w, x: x @ jnp.cumsum(w, axis=0)),
        ("div: ", lambda w, x: x @ (1 / w)),
        ("div: ", lambda w, x: x[None] / w),
        ("dot_general: ", lambda w, x: x @ (w @ w)),
        ("dot_general: ", lambda w, x: x @ (w @ np.ones((3, 3), np.float32))),
        ("dynamic_slice: ", lambda w, x: lax.dynamic_slice(w, (0, 0), (3, 3)) @ x),
        ("fft: ", lambda w, x: x @ jnp.fft.fft(w).real),
        ("gather: ", lambda w, x: w[jnp.int32(x)]),
        ("gt: ", lambda w, x: x @ jnp.where(w > 0, 1.0, 0.0)),
        ("mul: ", lambda w, x: w * x[None]),
        ("pure_callback: ", called_back),
        ("reduce_sum: ", lambda w, x: x @ w + jnp.sum(w)),
        ("reduce_max: ", lambda w, x: x * jnp.max(w)),
        ("select_n: ", lambda w, x: x @ jnp.where(x > 0, w, 0)),
        ("shard_map: ", on_a_mesh),
        ("sin: ", lambda w, x: x @ jnp.sin(w)),
        ("slice: ", lambda w, x: x @ lax.slice(w, (0, 0), (3, 2))),
        ("sort: ", lambda w, x: x @ jnp.sort(w)),
        ("while: the number of iterations", until_small),
    ],
)
def test_a_use_that_is_not_followed_is_unknown_and_names_its_primitive(reason, apply):
    macs = count_macs(apply, spec(3, 3), spec(3))
    assert macs != 0
    assert_unknown(macs, reason)


def test_unknown_wins_over_a_count_before_and_behind_it():
    def apply(w, x):
        return x @ w @ jnp.sin(w) @ w

    assert_unknown(count_macs(apply, spec(3, 3), spec(3)), "sin: ")
    macs = count_macs(apply, spec(3, 3), spec(3), batch_size=2)
    assert isinstance(macs, UnknownMacs)


def test_the_product_of_two_weights_is_unknown_for_both_and_for_them_only():
    def low_rank(params, x):
        return x @ (params["a"] @ params["b"]) @ params["c"]

    def factored(params, x):
        return x @ params["a"] @ params["b"] @ params["c"]

    params = {"a": spec(5, 2), "b": spec(2, 5), "c": spec(5, 3)}
    macs = count_macs(low_rank, params, spec(1, 5))
    assert_unknown(macs["a"], "dot_general: the product of two parameters")
    assert_unknown(macs["b"], "dot_general: the product of two parameters")
    assert macs["c"] == 15
    assert count_macs(factored, params, spec(1, 5)) == {"a": 10, "b": 10, "c": 15}


def test_a_scale_that_multiplies_a_weight_takes_part_in_its_product():
    def apply(params, x):
        return x @ (params["w"] * params["gain"][None])

    macs = count_macs(apply, {"w": spec(3, 4), "gain": spec(4)}, spec(1, 3))
    assert macs == {"w": 12, "gain": 12}


def test_an_unknown_entry_is_a_leaf_and_no_number():
    entry = UnknownMacs("sin: lost")
    assert jax.tree.leaves({"a": entry, "b": 3}) == [entry, 3]
    with pytest.raises(TypeError):
        sum([3, entry])
