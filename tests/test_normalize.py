"""Each feature's slice of the mask gradients is divided by its norm."""

import chex
import flax.linen as nn
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st
from norms import gradients, numpy_normalized

import scl_jax
from scl_jax import MaskedParams, mask_params, normalize_by_feature

NORMS = ["rms", "l2", "max", "none"]


def normalized(g, feature_axes=-1, norm="rms"):
    """Normalize one leaf; eagerly."""
    tx = normalize_by_feature(feature_axes, norm=norm)
    return tx.update({"kernel": g}, tx.init({"kernel": g}))[0]["kernel"]


# Feature axes

KERNELS = {
    "dense": ((7, 5), -1),
    "conv1d": ((3, 4, 5), -1),
    "conv2d": ((3, 2, 4, 5), -1),
    "conv3d": ((3, 2, 2, 4, 5), -1),
    "depthwise": ((3, 3, 1, 6), -1),
    "attention_qkv": ((6, 2, 4), (-2, -1)),
    "attention_out": ((2, 4, 6), -1),
    "conv_transpose_transposed": ((3, 3, 5, 4), -2),
    "equinox_linear": ((5, 7), 0),
    "equinox_conv": ((5, 4, 3, 3), 0),
    "stacked_dense": ((3, 7, 5), (0, -1)),
    "stacked_equinox": ((3, 5, 7), (0, 1)),
    "vector": ((5,), -1),
    "every_axis": ((3, 4), (0, 1)),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("shape", "axes"), KERNELS.values(), ids=[*map(str, KERNELS)])
def test_feature_slices_have_norm_one_as_in_numpy(shape, axes, norm):
    g = gradients(*shape)
    got = normalized(g, axes, norm)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, numpy_normalized(g, axes, norm), rtol=1e-5)


@pytest.mark.parametrize(
    ("axes", "same"),
    [((-2, -1), (-1, -2)), ((1, 2), (-2, -1)), (-1, (-1,)), (np.int64(2), -1)],
)
def test_feature_axes_may_be_spelled_in_any_order_and_sign(axes, same):
    g = gradients(6, 2, 4)
    np.testing.assert_array_equal(normalized(g, axes), normalized(g, same))


def test_no_feature_axis_means_one_norm_for_the_whole_leaf():
    g = gradients(3, 4)
    expected = np.asarray(g, np.float64) / np.sqrt(np.mean(np.float64(g) ** 2))
    np.testing.assert_allclose(normalized(g, ()), expected, rtol=1e-5)


def test_feature_axes_may_depend_on_path_and_leaf():
    seen = []

    def feature_axes(path, leaf):
        seen.append((path, leaf.shape))
        if "query" in path:
            return (-2, -1)
        return 0 if path.startswith("layers/") else -1

    tree = {
        "attention": {"query": gradients(6, 2, 4), "out": gradients(2, 4, 6)},
        "layers": [gradients(5, 7, seed=1)],
    }
    tx = normalize_by_feature(feature_axes, decay=0)
    updates, _ = tx.update(tree, optax.EmptyState())
    expected = {
        "attention": {
            "query": numpy_normalized(tree["attention"]["query"], (1, 2), "rms"),
            "out": numpy_normalized(tree["attention"]["out"], 2, "rms"),
        },
        "layers": [numpy_normalized(tree["layers"][0], 0, "rms")],
    }
    chex.assert_trees_all_close(updates, expected, rtol=1e-5)
    assert seen == [
        ("attention/out", (2, 4, 6)),
        ("attention/query", (6, 2, 4)),
        ("layers/0", (5, 7)),
    ]


def test_feature_axes_fit_the_kernels_of_linen_attention():
    attention = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8)
    params = jax.eval_shape(attention.init, jax.random.key(0), jnp.ones((1, 3, 6)))
    shapes = {k: v["kernel"].shape for k, v in params["params"].items()}
    assert shapes == {
        "query": (6, 2, 4),
        "key": (6, 2, 4),
        "value": (6, 2, 4),
        "out": (2, 4, 6),
    }


# Numbers


def test_rms_is_the_default_norm():
    g = gradients(7, 5)
    np.testing.assert_array_equal(normalized(g), normalized(g, -1, "rms"))
    np.testing.assert_allclose(
        np.sqrt(np.mean(np.square(normalized(g)), axis=0)), np.ones(5), rtol=1e-5
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("norm", ["rms", "l2"])
def test_squares_are_summed_in_float32(norm, dtype):
    # A bfloat16 sum of ones stops at 256: the rms of 4096 would be 1/4, not 1.
    # In float16 the square of 300 is infinite already.
    g = jnp.full((4096, 2), 300.0, dtype)
    got = normalized(g, norm=norm)
    assert got.dtype == dtype
    expected = numpy_normalized(g, -1, norm)
    rtol = 2 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(got).astype(np.float64), expected, rtol=rtol)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("norm", NORMS)
def test_update_has_the_dtype_of_its_gradient(norm, dtype):
    g = gradients(6, 4, dtype=dtype)
    got = normalized(g, norm=norm)
    assert got.dtype == dtype
    rtol = 4 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(
        np.asarray(got).astype(np.float64),
        numpy_normalized(g, -1, norm),
        rtol=rtol,
        atol=float(jnp.finfo(dtype).smallest_subnormal),
    )


@pytest.mark.parametrize("norm", NORMS)
def test_feature_without_gradient_stays_zero(norm):
    g = gradients(7, 5).at[:, 2].set(0.0).at[0, 2].set(-0.0)
    got = normalized(g, norm=norm)
    assert got[:, 2].tolist() == [0.0] * 7
    np.testing.assert_allclose(got, numpy_normalized(g, -1, norm), rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("norm", NORMS)
def test_nan_and_infinity_show_in_their_feature_and_no_other(norm, bad):
    g = gradients(7, 5)
    got = np.asarray(normalized(g.at[3, 2].set(bad), norm=norm))
    assert not np.isfinite(got[3, 2])
    others = [0, 1, 3, 4]
    np.testing.assert_array_equal(got[:, others], normalized(g, norm=norm)[:, others])


@pytest.mark.parametrize("norm", ["rms", "l2", "max"])
@pytest.mark.parametrize("size", [1e20, 1e30, 3e38])
def test_gradient_whose_square_overflows_never_becomes_zero_in_silence(size, norm):
    g = jnp.float32([[size, 1.0], [-size, 1.0], [size / 2, 1.0]])
    got = np.asarray(normalized(g, norm=norm))
    expected = numpy_normalized(g, -1, norm)
    shows = np.isnan(got[:, 0]).all()
    assert shows or np.allclose(got[:, 0], expected[:, 0], rtol=1e-5)
    np.testing.assert_allclose(got[:, 1], expected[:, 1], rtol=1e-5)


def test_gradient_whose_square_underflows_is_left_as_it_is():
    g = jnp.float32([[1e-25, 2.0], [-1e-25, 2.0]])
    expected = np.float32([[1e-25, 1], [-1e-25, 1]])
    np.testing.assert_allclose(normalized(g), expected, rtol=1e-6)


@pytest.mark.parametrize("norm", ["rms", "l2", "max"])
def test_scale_of_a_feature_does_not_matter(norm):
    normalize = jax.jit(lambda g: normalized(g, -1, norm))

    @hypothesis.given(
        st.integers(0, 1000),
        st.lists(st.integers(-20, 20), min_size=5, max_size=5),
    )
    def check(seed, powers):
        g = np.random.default_rng(seed).normal(size=(7, 5)).astype(np.float32)
        # Powers of two: no bit of a number changes but its exponent.
        scaled = np.ldexp(g, np.array([powers]))
        np.testing.assert_allclose(normalize(scaled), normalize(g), rtol=1e-6)

    check()


@pytest.mark.parametrize("norm", ["rms", "l2", "max"])
def test_normalizing_twice_changes_nothing_and_signs_are_kept(norm):
    g = gradients(7, 5)
    once = normalized(g, norm=norm)
    np.testing.assert_allclose(normalized(once, norm=norm), once, rtol=1e-5)
    np.testing.assert_array_equal(np.sign(once), np.sign(g))


def test_norm_none_is_the_identity():
    g = gradients(7, 5)
    np.testing.assert_array_equal(normalized(g, norm="none"), g)


def test_every_norm_is_normalized_in_the_public_composition():
    # partition hands normalize_by_feature the bare masks, whatever the norm.
    masked = mask_params({"kernel": jnp.ones((7, 5)), "bias": jnp.ones(5)})
    g = MaskedParams(
        {"kernel": gradients(7, 5), "bias": jnp.ones(5)},
        {"kernel": gradients(7, 5, seed=1), "bias": None},
    )
    for norm in NORMS:
        tx = scl_jax.partition(optax.identity(), normalize_by_feature(norm=norm))
        updates, _ = tx.update(g, tx.init(masked), masked)
        chex.assert_trees_all_equal(updates.weights, g.weights)
        expected = numpy_normalized(g.masks["kernel"], -1, norm)
        np.testing.assert_allclose(updates.masks["kernel"], expected, rtol=1e-5)
