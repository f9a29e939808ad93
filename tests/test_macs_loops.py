"""MACs of weights in loops: every step counts, and what a carry does to a weight."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from counting import assert_unknown, spec
from jax import lax

from scl_jax._macs import UnknownMacs, count_macs


def test_layers_scanned_by_flax_count_once_each():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.relu(nn.Dense(8)(x)), None

    stack = nn.scan(
        nn.remat(Layer),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=3,
    )()
    x = spec(1, 8)
    params = jax.eval_shape(lambda x: stack.init(jax.random.key(0), x, None), x)
    macs = count_macs(lambda p, x: stack.apply(p, x, None)[0], params, x)
    assert params["params"]["Dense_0"]["kernel"].shape == (3, 8, 8)
    assert macs["params"]["Dense_0"] == {"kernel": 3 * 64, "bias": 0}


def recurrent(params, x):
    """An RNN over x (time, features), whose state starts as a constant."""

    def step(h, row):
        h = jnp.tanh(row @ params["in"] + h @ params["state"] + params["bias"])
        return h, h

    return lax.scan(step, jnp.zeros(4), x)


def test_a_weight_shared_by_the_steps_of_a_scan_counts_every_step():
    params = {"in": spec(3, 4), "state": spec(4, 4), "bias": spec(4)}
    macs = count_macs(recurrent, params, spec(7, 3))
    assert macs == {"in": 7 * 12, "state": 7 * 16, "bias": 0}


def test_nested_scans_multiply():
    def apply(w, x):
        def inner(h, _):
            return h @ w, None

        def outer(h, _):
            return lax.scan(inner, h, None, length=3)

        return lax.scan(outer, x, None, length=5)

    assert count_macs(apply, spec(2, 2), spec(2)) == 15 * 4


def test_fori_loop_with_static_bounds_counts_its_steps():
    def apply(w, x):
        return lax.fori_loop(0, 6, lambda i, h: h @ w, x)

    assert count_macs(apply, spec(2, 2), spec(2)) == 6 * 4


def test_scan_stops_at_what_depends_on_the_example_after_several_steps():
    # The example reaches the product only through a chain of three carries.
    def apply(w, x):
        def step(carry, _):
            a, b, c = carry
            return (x, a, b), c @ w

        start = (jnp.zeros(3),) * 3
        return lax.scan(step, start, None, length=5)

    assert count_macs(apply, spec(3, 2), spec(3)) == 5 * 6


def test_a_weight_in_the_carry_is_followed_while_it_comes_back_unchanged():
    def apply(change, params, x):
        def step(carry, _):
            (w, v), h = carry
            return (change(w, v), h @ w), None

        carry = ((params["w"], params["v"]), x)
        (_, h), _ = lax.scan(step, carry, None, length=3)
        return h @ params["u"]

    params = {"w": spec(2, 2), "v": spec(2, 2), "u": spec(2, 2)}
    kept = count_macs(partial(apply, lambda w, v: (w, v)), params, spec(2))
    assert kept == {"w": 12, "v": 0, "u": 4}
    for change in (lambda w, v: (v, w), lambda w, v: (jnp.zeros_like(w), v + w.sum())):
        macs = count_macs(partial(apply, change), params, spec(2))
        assert isinstance(macs["w"], UnknownMacs)
        assert isinstance(macs["v"], UnknownMacs)
        assert macs["u"] == 4
    swapped = count_macs(partial(apply, lambda w, v: (v, w)), params, spec(2))
    assert_unknown(swapped["w"], "scan: ")


def test_a_weight_that_enters_the_carry_in_the_body_is_unknown():
    def apply(w, x):
        def step(carry, _):
            kept, h = carry
            return (w, h @ kept), None

        return lax.scan(step, (jnp.zeros((2, 2)), x), None, length=3)

    assert_unknown(count_macs(apply, spec(2, 2), spec(2)), "scan: ")


def test_a_learned_initial_state_is_unknown_and_does_not_hide_the_weight():
    def apply(params, x):
        def step(h, row):
            return jnp.tanh(row + h @ params["w"]), None

        return lax.scan(step, params["start"], x)

    macs = count_macs(apply, {"start": spec(4), "w": spec(4, 4)}, spec(7, 4))
    assert_unknown(macs["start"], "scan: ")
    assert macs["w"] == 7 * 16


def test_a_weight_stacked_through_a_scan_is_followed_behind_it():
    def apply(w, x):
        _, doubled = lax.scan(lambda c, layer: (c, 2 * layer), 0.0, w)
        return jnp.einsum("i,lio->lo", x, doubled)

    assert count_macs(apply, spec(3, 4, 5), spec(4)) == 60
