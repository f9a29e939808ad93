import itertools
import math
import operator
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import scl_jax
from scl_jax._macs import UnknownMacs, count_macs


def spec(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def count_module(module, *args):
    """Return the parameters' shapes and MACs of a Linen module."""
    params = jax.eval_shape(module.init, jax.random.key(0), *args)["params"]

    def apply(p, *a):
        return module.apply({"params": p}, *a)

    return params, count_macs(apply, params, *args)


# Networks whose numbers are known.


class LeNet300(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x.reshape(x.shape[0], -1)
        for features in (300, 100):
            x = nn.relu(nn.Dense(features)(x))
        return nn.Dense(10)(x)


class LeNet5Caffe(nn.Module):
    @nn.compact
    def __call__(self, x):
        for features in (20, 50):
            x = nn.Conv(features, (5, 5), padding="VALID")(x)
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Dense(500)(x.reshape(x.shape[0], -1)))
        return nn.Dense(10)(x)


def test_each_weight_of_lenet_300_100_is_one_mac():
    params, macs = count_module(LeNet300(), spec(1, 28, 28, 1))
    weights = [layer["kernel"] for layer in params.values()]
    assert sum(math.prod(kernel.shape) for kernel in weights) == 266_200
    assert macs == {
        "Dense_0": {"kernel": 235_200, "bias": 0},
        "Dense_1": {"kernel": 30_000, "bias": 0},
        "Dense_2": {"kernel": 1_000, "bias": 0},
    }
    assert sum(jax.tree.leaves(macs)) == 266_200


def test_lenet_5_caffe_has_the_published_macs():
    params, macs = count_module(LeNet5Caffe(), spec(1, 28, 28, 1))
    weights = [layer["kernel"] for layer in params.values()]
    assert sum(math.prod(kernel.shape) for kernel in weights) == 430_500
    assert macs == {
        "Conv_0": {"kernel": 20 * 24 * 24 * 25, "bias": 0},
        "Conv_1": {"kernel": 50 * 8 * 8 * 500, "bias": 0},
        "Dense_0": {"kernel": 400_000, "bias": 0},
        "Dense_1": {"kernel": 5_000, "bias": 0},
    }
    assert sum(jax.tree.leaves(macs)) == 2_293_000


def test_attention_counts_projections_and_not_the_product_of_activations():
    module = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=6)
    params, macs = count_module(module, spec(1, 5, 8))
    assert params["query"]["kernel"].shape == (8, 2, 3)
    for name in ("query", "key", "value", "out"):
        assert macs[name] == {"kernel": 5 * 8 * 6, "bias": 0}


def test_normalization_scale_is_unknown_and_does_not_hide_the_kernel():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.LayerNorm()(nn.Dense(4)(x))
            return nn.Dense(2)(x)

    _, macs = count_module(Block(), spec(1, 3))
    assert macs["Dense_0"] == {"kernel": 12, "bias": 0}
    assert macs["Dense_1"] == {"kernel": 8, "bias": 0}
    assert macs["LayerNorm_0"]["bias"] == 0
    assert macs["LayerNorm_0"]["scale"].reason.startswith("mul: ")


def test_nnx_state_is_counted_in_its_own_structure():
    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model, nnx.Param)
    macs = count_macs(lambda s, x: nnx.merge(graph, s)(x), state, spec(1, 3))
    assert jax.tree.structure(macs) == jax.tree.structure(state)
    assert sorted(jax.tree.leaves(macs)) == [0, 12]


# Convolutions, against loops that multiply and count.


def loop_convolution(x, kernel, strides, dilation, padding, groups=1, batch_groups=1):
    """Convolve N..C with ..IO by loops; return the result and the number of MACs."""
    x = np.pad(x, [(0, 0), *padding, (0, 0)])
    *taps, depth, features = kernel.shape
    n = x.shape[0] // batch_groups
    out = [
        (size - d * (k - 1) - 1) // s + 1
        for size, k, s, d in zip(x.shape[1:-1], taps, strides, dilation, strict=True)
    ]
    y, macs = np.zeros((n, *out, features)), 0
    for index in np.ndindex(*y.shape):
        b, *position, f = index
        first = (f // (features // groups)) * depth
        b += (f // (features // batch_groups)) * n
        for tap in np.ndindex(*taps):
            at = [
                o * s + t * d
                for o, s, t, d in zip(position, strides, tap, dilation, strict=True)
            ]
            for c in range(depth):
                y[index] += x[(b, *at, first + c)] * kernel[(*tap, c, f)]
                macs += 1
    return y, macs


def random(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def layout(rank):
    axes = "DHW"[-rank:]
    return (f"N{axes}C", f"{axes}IO", f"N{axes}C")


@pytest.mark.parametrize(
    ("size", "taps", "features", "strides", "dilation", "padding", "groups"),
    [
        ((7,), (3,), (2, 3), (1,), (1,), ((0, 0),), 1),
        ((8,), (3,), (4, 6), (2,), (2,), ((1, 2),), 2),
        ((5, 6), (3, 2), (2, 3), (1, 1), (1, 1), ((0, 0), (0, 0)), 1),
        ((5, 6), (3, 3), (2, 3), (1, 1), (1, 1), ((1, 1), (1, 1)), 1),
        ((7, 6), (3, 2), (2, 2), (2, 3), (1, 1), ((1, 1), (0, 1)), 1),
        ((7, 7), (2, 3), (2, 2), (1, 1), (2, 3), ((0, 0), (0, 0)), 1),
        ((5, 4), (2, 2), (6, 4), (1, 2), (1, 1), ((0, 0), (1, 0)), 2),
        ((5, 4), (3, 3), (4, 4), (1, 1), (1, 1), ((1, 1), (1, 1)), 4),
        ((5, 4), (3, 3), (3, 6), (2, 1), (1, 1), ((1, 1), (1, 1)), 3),
        ((4, 3, 5), (2, 1, 3), (2, 2), (1, 1, 2), (1, 1, 1), ((0, 0),) * 3, 1),
        ((4, 4, 3), (2, 2, 2), (2, 4), (2, 1, 1), (1, 2, 1), ((1, 0),) * 3, 2),
    ],
)
def test_convolution_counts_the_multiplications_of_its_loops(
    size, taps, features, strides, dilation, padding, groups
):
    x = random(1, *size, features[0])
    kernel = random(*taps, features[0] // groups, features[1])

    def convolve(layout, w, x):
        return lax.conv_general_dilated(
            x,
            w,
            strides,
            padding,
            rhs_dilation=dilation,
            dimension_numbers=layout,
            feature_group_count=groups,
        )

    def channels_first(w, x):
        axes = "DHW"[-len(size) :]
        x, w = jnp.moveaxis(x, -1, 1), jnp.moveaxis(w, (-1, -2), (0, 1))
        return convolve((f"NC{axes}", f"OI{axes}", f"NC{axes}"), w, x)

    apply = partial(convolve, layout(len(size)))

    y, macs = loop_convolution(x, kernel, strides, dilation, padding, groups)
    np.testing.assert_allclose(apply(kernel, x), y, rtol=1e-3, atol=1e-4)
    assert count_macs(apply, kernel, x) == macs
    assert count_macs(channels_first, kernel, x) == macs


def test_batch_groups_count_the_multiplications_of_their_loops():
    x, kernel = random(4, 5, 3), random(2, 3, 6)

    def apply(w, x):
        return lax.conv_general_dilated(
            x, w, (1,), ((0, 0),), dimension_numbers=layout(1), batch_group_count=2
        )

    y, macs = loop_convolution(x, kernel, (1,), (1,), ((0, 0),), batch_groups=2)
    np.testing.assert_allclose(apply(kernel, x), y, rtol=1e-3, atol=1e-4)
    assert count_macs(apply, kernel, x) == macs


def loop_transposed_convolution(x, kernel, strides):
    """Scatter every input position through every tap; kernel ..IO, no padding."""
    *taps, depth, features = kernel.shape
    size = x.shape[1:-1]
    out = [(n - 1) * s + k for n, s, k in zip(size, strides, taps, strict=True)]
    y, macs = np.zeros((x.shape[0], *out, features)), 0
    for position, tap in itertools.product(np.ndindex(*size), np.ndindex(*taps)):
        at = [i * s + t for i, s, t in zip(position, strides, tap, strict=True)]
        for c, f in np.ndindex(depth, features):
            y[(0, *at, f)] += x[(0, *position, c)] * kernel[(*tap, c, f)]
            macs += 1
    return y, macs


@pytest.mark.parametrize("transpose_kernel", [False, True])
@pytest.mark.parametrize(
    ("size", "taps", "strides"),
    [((5,), (3,), (2,)), ((4, 3), (3, 2), (2, 1)), ((2, 3, 2), (2, 3, 3), (2, 2, 3))],
)
def test_transposed_convolution_counts_each_input_position_times_each_tap(
    size, taps, strides, transpose_kernel
):
    module = nn.ConvTranspose(
        3, taps, strides, padding="VALID", transpose_kernel=transpose_kernel
    )
    x = random(1, *size, 2)
    params = module.init(jax.random.key(0), x)["params"]
    kernel = np.asarray(params["kernel"])
    # Flax's kernel is ..IO and slides, so that it scatters flipped; or it is that of
    # the convolution which is transposed, ..OI, and scatters as it is.
    if transpose_kernel:
        kernel = np.swapaxes(kernel, -1, -2)
    else:
        kernel = np.flip(kernel, range(len(taps)))
    y, macs = loop_transposed_convolution(x, kernel, strides)

    def apply(p, x):
        return module.apply({"params": p}, x)

    # An axis of stride 1 is an ordinary convolution over a padded input.
    unit = [i for i, s in enumerate(strides) if s == 1]
    for i in unit:
        macs = macs // size[i] * (size[i] + taps[i] - 1)
    np.testing.assert_allclose(apply(params, x), y, rtol=1e-3, atol=1e-4)
    assert count_macs(apply, params, x) == {"kernel": macs, "bias": 0}


def test_input_dilation_with_strides_is_unknown():
    def apply(w, x):
        return lax.conv_general_dilated(
            x, w, (2,), ((0, 0),), lhs_dilation=(2,), dimension_numbers=layout(1)
        )

    macs = count_macs(apply, spec(3, 2, 2), spec(1, 8, 2))
    assert_unknown(macs, "conv_general_dilated: ")


# Matrix products.


@given(
    roles=st.lists(st.sampled_from("bclr"), min_size=1, max_size=5),
    sizes=st.lists(st.integers(1, 5), min_size=5, max_size=5),
    swap=st.booleans(),
)
def test_matrix_product_counts_the_product_of_all_index_ranges(roles, sizes, swap):
    letters = dict(zip("vwxyz", roles, strict=False))
    size = dict(zip("vwxyz", sizes, strict=True))
    lhs = "".join(i for i, role in letters.items() if role in "bcl")
    rhs = "".join(i for i, role in letters.items() if role in "brc")[::-1]
    out = "".join(i for i, role in letters.items() if role != "c")

    def apply(w, x):
        a, b = (x, w) if swap else (w, x)
        return lax.dot_general(
            a,
            b,
            (
                ([lhs.index(i) for i in out_c], [rhs.index(i) for i in out_c]),
                ([lhs.index(i) for i in out_b], [rhs.index(i) for i in out_b]),
            ),
        )

    out_c = [i for i, role in letters.items() if role == "c"]
    out_b = [i for i in out if letters[i] == "b"]
    operands = [spec(*(size[i] for i in side)) for side in (lhs, rhs)]
    w, x = reversed(operands) if swap else operands
    assert count_macs(apply, w, x) == math.prod(size[i] for i in letters)


def test_counts_are_exact_integers_beyond_floating_point():
    n, k, m = 2**22 + 7, 2**22 + 1, 2**22 + 3
    macs = count_macs(operator.matmul, spec(n, k), spec(k, m))
    assert type(macs) is int
    assert macs == n * k * m
    assert macs > 2**64
    assert float(macs) != macs
    assert count_macs(operator.matmul, spec(2**16, 2**16), spec(2**16)) == 2**32


def test_a_weight_used_twice_counts_twice():
    def tied(params, x):
        w = params["w"]
        return jnp.tanh(x @ w) @ w.T @ params["v"]

    macs = count_macs(tied, {"w": spec(3, 5), "v": spec(3, 2)}, spec(1, 3))
    assert macs == {"w": 2 * 15, "v": 6}


def test_a_weight_that_meets_no_example_counts_zero():
    def apply(params, x):
        return x @ params["used"], params["returned"]

    params = {"used": spec(3, 2), "returned": spec(7, 7), "unused": spec(9)}
    macs = count_macs(apply, params, spec(1, 3))
    assert macs == {"used": 6, "returned": 0, "unused": 0}


def test_example_may_be_a_pytree_of_arrays():
    def apply(w, batch, scale):
        return batch["a"] @ w + scale * (batch["b"] @ w)

    batch = {"a": np.ones((1, 3), np.float32), "b": jnp.ones((1, 3))}
    assert count_macs(apply, jnp.ones((3, 4)), batch, 2.0) == 24


# What a weight may go through on its way to the product.


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


def test_masked_parameters_count_as_plain_ones():
    model, x = LeNet300(), spec(1, 28, 28, 1)
    params, plain = count_module(model, x)

    def apply(masked, x):
        return model.apply({"params": scl_jax.apply_masks(masked)}, x)

    masked = jax.eval_shape(scl_jax.mask_params, params)
    assert count_macs(apply, masked, x) == plain
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), params)
    masked = scl_jax.mask_params(zeros, select=scl_jax.select("Dense_1/kernel"))
    assert count_macs(apply, masked, x) == plain


def test_masks_do_not_make_an_unknown_weight_known():
    masked = scl_jax.MaskedParams({"w": spec(3, 3)}, {"w": spec(3, 3)})

    def apply(masked, x):
        return x @ jnp.sin(scl_jax.apply_masks(masked)["w"])

    assert_unknown(count_macs(apply, masked, spec(1, 3))["w"], "sin: ")


# Batches.


def test_vmap_over_a_batch_counts_per_example():
    def apply(params, x):
        return jax.vmap(lambda row: jnp.tanh(row @ params["w"]) + params["b"])(x)

    params = {"w": spec(3, 5), "b": spec(5)}
    macs = count_macs(apply, params, spec(4, 3), batch_size=4)
    assert macs == {"w": 15, "b": 0}
    assert count_macs(apply, params, spec(4, 3)) == {"w": 60, "b": 0}


def test_batch_size_that_does_not_divide_is_an_error():
    with pytest.raises(ValueError, match=r"batch_size=7 examples; at w the count 60"):
        count_macs(lambda p, x: x @ p["w"], {"w": spec(3, 5)}, spec(4, 3), batch_size=7)


# Loops and branches.


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


# What cannot be followed.


def assert_unknown(entry, reason):
    assert isinstance(entry, UnknownMacs), entry
    assert entry.reason.startswith(reason), entry


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


# Errors.


@pytest.mark.parametrize("batch_size", [0, -1, 1.0, True, "1", None])
def test_batch_size_must_be_a_positive_int(batch_size):
    with pytest.raises(ValueError, match="count_macs: batch_size must be a positive"):
        count_macs(operator.matmul, spec(2, 2), spec(2), batch_size=batch_size)


@pytest.mark.parametrize("args", [(), ({},), (None, [])])
def test_example_args_must_hold_an_array(args):
    with pytest.raises(ValueError, match="count_macs: example_args must hold an array"):
        count_macs(lambda w, *x: w, spec(2, 2), *args)


@pytest.mark.parametrize("params", [{}, None, {"a": None}])
def test_params_must_hold_an_array(params):
    with pytest.raises(ValueError, match="count_macs: params must hold an array"):
        count_macs(lambda p, x: x, params, spec(2))


def test_leaves_that_are_no_arrays_are_named():
    params = {"Dense_0": {"kernel": spec(2, 2), "rate": 0.5}, "name": "net"}
    with pytest.raises(TypeError, match=r"are neither: Dense_0/rate, name$"):
        count_macs(lambda p, x: x, params, spec(2))


def test_apply_fn_must_be_callable():
    with pytest.raises(TypeError, match="apply_fn must be callable, got dict"):
        count_macs({}, {"w": spec(2)}, spec(2))


def test_masks_that_do_not_fit_their_weights_are_an_error():
    masked = scl_jax.MaskedParams({"w": spec(2, 2)}, {"v": spec(2, 2)})
    with pytest.raises(ValueError, match="count_macs: masks must have the structure"):
        count_macs(lambda m, x: x, masked, spec(2))
