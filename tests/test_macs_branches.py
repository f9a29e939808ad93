"""MACs of weights in branches: known where the branches agree, else unknown."""

from functools import partial

import jax.numpy as jnp
from counting import assert_unknown, spec
from jax import lax

from scl_jax._macs import count_macs


def test_branches_that_agree_are_counted_once():
    def apply(params, x):
        branches = (lambda h: h @ params["w"], lambda h: jnp.sin(h) @ params["w"])
        y = lax.cond(x[0] > 0, *branches, x)
        return y + params["b"]

    macs = count_macs(apply, {"w": spec(3, 4), "b": spec(4)}, spec(3))
    assert macs == {"w": 12, "b": 0}


def test_branches_that_differ_are_unknown_with_their_counts():
    def apply(params, x):
        w, v = params["w"], params["v"]
        return lax.switch(
            jnp.int32(x[0]),
            [lambda h: h @ w @ v, lambda h: h @ w @ w @ v, lambda h: h @ v],
            x,
        )

    macs = count_macs(apply, {"w": spec(3, 3), "v": spec(3, 2)}, spec(3))
    assert macs["v"] == 6
    assert_unknown(macs["w"], "cond: ")
    assert "[9, 18, 0] MACs" in macs["w"].reason


def test_a_leaf_lost_in_any_branch_is_unknown():
    def apply(w, x):
        return lax.cond(x[0] > 0, lambda: x @ w, lambda: x @ w + jnp.sum(w))

    assert_unknown(count_macs(apply, spec(3, 3), spec(3)), "reduce_sum: ")


def test_a_branch_that_gives_another_weight_is_unknown():
    def apply(flag, params, x):
        w = lax.cond(flag(x), lambda: params["w"], lambda: params["v"])
        return x @ w

    params = {"w": spec(3, 3), "v": spec(3, 3)}
    macs = count_macs(partial(apply, lambda x: jnp.bool_(True)), params, spec(3))
    assert_unknown(macs["w"], "cond: ")
    assert_unknown(macs["v"], "cond: ")

    def same(w, x, flag):
        return x @ lax.cond(flag, lambda: w, lambda: -w)

    assert count_macs(partial(same, flag=jnp.bool_(True)), spec(3, 3), spec(3)) == 9
    chosen = count_macs(same, spec(3, 3), spec(3), spec(dtype=jnp.bool_))
    assert_unknown(chosen, "cond: ")


def test_a_parameter_that_selects_is_unknown():
    def branch(params, x):
        return lax.cond(params["on"], lambda: x @ params["w"], lambda: -x @ params["w"])

    def choose(params, x):
        return jnp.where(params["on"], x @ params["w"], 0.0)

    def choose_weight(params, x):
        return x @ jnp.where(params["on"], params["w"], 0.0)

    params = {"w": spec(3, 3), "on": spec(dtype=jnp.bool_)}
    macs = count_macs(branch, params, spec(3))
    assert macs["w"] == 9
    assert_unknown(macs["on"], "cond: ")
    macs = count_macs(choose, params, spec(3))
    assert macs["w"] == 9
    assert_unknown(macs["on"], "select_n: ")
    assert_unknown(count_macs(choose_weight, params, spec(3))["on"], "select_n: ")
