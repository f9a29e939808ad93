"""What mask_statistics counts and measures, against NumPy; nothing gathers."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from scl_jax import (
    MaskedParams,
    apply_masks,
    mask_params,
    mask_statistics,
    normalize_by_feature,
)

SHAPES = {"conv": (3, 3, 2, 5), "dense": (7, 4), "query": (6, 2, 3)}
FEATURES = {"conv/kernel": (-1,), "dense/kernel": (-1,), "query/kernel": (-2, -1)}


def feature_axes(path, leaf):
    return FEATURES[path]


def make_masked(seed, dtype=None, connected=0.2):
    """Masks of three layers, few of them connected, beside biases without any."""
    rng = np.random.default_rng(seed)
    params = {
        layer: {"kernel": jnp.ones(shape), "bias": jnp.zeros(shape[-1])}
        for layer, shape in SHAPES.items()
    }

    def values(path, leaf):
        return rng.uniform(-1, 1, leaf.shape) - (1 - 2 * connected)

    return mask_params(params, initial=values, dtype=dtype)


def as_numpy(tree):
    """The leaves of the kernels by path, float32; NumPy has no bfloat16."""
    return {
        f"{layer}/kernel": np.asarray(leaves["kernel"].astype(jnp.float32))
        for layer, leaves in tree.items()
    }


def by_feature(path, x, function):
    axes = tuple(a for a in range(x.ndim) if a - x.ndim not in FEATURES[path])
    return function(x, axis=axes)


def make_gradient(seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return {
        layer: {
            "kernel": jnp.asarray(rng.normal(size=shape) * 1e-4, dtype),
            "bias": None,
        }
        for layer, shape in SHAPES.items()
    }


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_counts_are_numpys(transform, dtype):
    now, before = make_masked(1, dtype), make_masked(2, dtype)

    def measure(now, before):
        return mask_statistics(now, before, feature_axes=feature_axes)

    got = transform(measure)(now, before)
    h = {path: s >= 0 for path, s in as_numpy(now.masks).items()}
    h_before = {path: s >= 0 for path, s in as_numpy(before.masks).items()}
    inputs = [by_feature(path, x, np.sum).ravel() for path, x in h.items()]
    inputs = np.concatenate(inputs)
    assert 0 < np.sum(inputs == 0) < inputs.size == 5 + 4 + 6
    assert float(got.connections) == sum(x.sum() for x in h.values())
    assert float(got.flips) == sum((h[p] != h_before[p]).sum() for p in h)
    assert float(got.returned) == sum((h[p] & ~h_before[p]).sum() for p in h)
    np.testing.assert_allclose(
        got.features_without_input, np.mean(inputs == 0), rtol=1e-6
    )
    for x in got[:4]:
        assert x.shape == ()
        assert x.dtype == jnp.float32


def test_nothing_flips_against_itself():
    got = mask_statistics(make_masked(1), make_masked(1), feature_axes=feature_axes)
    assert got.flips == got.returned == 0


def test_the_threshold_is_connected():
    masked = MaskedParams({"w": jnp.ones((2, 1))}, {"w": jnp.array([[0.0], [-1e-30]])})
    assert mask_statistics(masked).connections == 1


def test_what_is_not_given_is_not_measured():
    got = mask_statistics(make_masked(1))
    assert got.flips is got.returned is got.gradient_norm is None


def test_a_layer_is_measured_by_its_subtrees():
    masked = make_masked(1)
    layer = MaskedParams(masked.weights["dense"], masked.masks["dense"])
    expected = np.sum(as_numpy(masked.masks)["dense/kernel"] >= 0)
    assert mask_statistics(layer).connections == expected


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_gradient_norm_is_the_rms_of_each_feature(dtype):
    g = make_gradient(3, dtype)
    got = mask_statistics(make_masked(1), None, g, feature_axes=feature_axes)
    assert {layer: x["bias"] for layer, x in got.gradient_norm.items()} == (
        dict.fromkeys(SHAPES)
    )
    for path, x in as_numpy(g).items():
        norm = got.gradient_norm[path.split("/")[0]]["kernel"]
        assert norm.dtype == jnp.float32
        expected = np.sqrt(by_feature(path, x.astype(np.float64) ** 2, np.mean))
        np.testing.assert_allclose(norm, expected, rtol=1e-5)


def test_gradient_norm_is_what_the_normalization_divides_by():
    g = make_gradient(3)
    norms = mask_statistics(
        make_masked(1), None, g, feature_axes=feature_axes
    ).gradient_norm
    tx = normalize_by_feature(feature_axes)
    updates, _ = tx.update(g, tx.init(g))  # the mean of one gradient's norm
    for layer in SHAPES:
        divided = g[layer]["kernel"] / jnp.expand_dims(
            norms[layer]["kernel"],
            tuple(range(len(SHAPES[layer]) - norms[layer]["kernel"].ndim)),
        )
        np.testing.assert_allclose(updates[layer]["kernel"], divided, rtol=1e-5)


def test_a_masked_gradient_gives_the_norms_of_its_masks():
    masked = make_masked(1)

    def loss(masked):
        return sum(jnp.sum(x**3) for x in jax.tree.leaves(apply_masks(masked)))

    gradient = jax.grad(loss)(masked)
    whole = mask_statistics(masked, None, gradient).gradient_norm
    alone = mask_statistics(masked, None, gradient.masks).gradient_norm
    # W = 1: d/dS of (W H)^3 is 3 where it is connected, 0 elsewhere.
    h = as_numpy(masked.masks)["dense/kernel"] >= 0
    expected = np.sqrt(np.mean(9.0 * h, axis=0))
    np.testing.assert_allclose(whole["dense"]["kernel"], expected, rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, whole, alone)


def spoil(masked):
    """The masked parameters with one mask variable that is NaN."""
    dense = masked.masks["dense"]
    kernel = dense["kernel"].at[2, 1].set(jnp.nan)
    masks = {**masked.masks, "dense": {**dense, "kernel": kernel}}
    return masked._replace(masks=masks)


def test_nan_spoils_the_numbers_that_are_counted_from_it():
    sound, spoiled = make_masked(1), spoil(make_masked(1))
    now = mask_statistics(spoiled, sound)
    assert np.isnan(np.array(now[:4])).all()
    before = mask_statistics(sound, spoiled)
    assert np.isnan([before.flips, before.returned]).all()
    assert np.isfinite([before.connections, before.features_without_input]).all()


def test_nan_in_the_gradient_spoils_the_norm_of_its_feature_alone():
    g = make_gradient(3)
    g["dense"]["kernel"] = g["dense"]["kernel"].at[2, 1].set(jnp.nan)
    got = mask_statistics(make_masked(1), None, g)
    broken = np.isnan(got.gradient_norm["dense"]["kernel"])
    assert broken.tolist() == [False, True, False, False]
    assert np.isfinite(got.connections)


def test_more_than_a_float_counts_singly_are_counted():
    # 2**24 + 1 ones, summed one by one in float32, stay at 2**24.
    masked = mask_params({"kernel": jnp.ones((2**12 + 8, 2**12))})
    assert mask_statistics(masked).connections == (2**12 + 8) * 2**12


def test_a_leaf_may_be_larger_than_int32_but_no_feature():
    def traced(shape):
        leaf = {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}
        return jax.eval_shape(mask_statistics, MaskedParams(leaf, leaf))

    assert traced((2**16, 2**16)).connections.shape == ()
    with pytest.raises(ValueError, match=r"2\*\*31 weights .* kernel has shape"):
        traced((2**31, 2))


# Sharding


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
    "spec", [(None, "model"), ("model", None), ("data", "model")], ids=str
)
def test_sharded_masks_send_counts_and_gather_nothing(spec, axis_type):
    mesh = jax.make_mesh(
        (2, 4), ("data", "model"), axis_types=(axis_type,) * 2, devices=jax.devices()
    )
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    rng = np.random.default_rng(0)
    one = [{"kernel": rng.normal(size=(16, 8)).astype(np.float32)} for _ in range(3)]
    now, before, g = jax.device_put(one, sharding)
    args = MaskedParams(now, now), MaskedParams(before, before), g
    text = jax.jit(mask_statistics).lower(*args).compile().as_text()
    assert "all-reduce" in text
    for name in ("all-gather", "all-to-all", "collective-permute"):
        assert name not in text
    got = jax.jit(mask_statistics)(*args)
    now, before, g = one
    expected = mask_statistics(MaskedParams(now, now), MaskedParams(before, before), g)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


# Errors

W = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
MASKED = MaskedParams(W, {"w": jnp.ones((2, 3)), "b": None})
OTHER = MaskedParams({"v": W["w"]}, {"v": W["w"]})
WIDER = MaskedParams({**W, "w": jnp.ones((2, 4))}, {"w": jnp.ones((2, 4)), "b": None})
BIAS_TOO = MaskedParams(W, W)
UNMASKED = MaskedParams(W, {"w": None, "b": None})
EMPTY = MaskedParams({"w": jnp.ones((0, 3))}, {"w": jnp.ones((0, 3))})
REFUSED = {
    "no_masked": ((W,), {}, TypeError, "needs a MaskedParams"),
    "no_previous": ((MASKED, W), {}, TypeError, "needs a MaskedParams"),
    "nothing_masked": ((UNMASKED,), {}, ValueError, "masked are: none"),
    "empty": ((EMPTY,), {}, ValueError, r"masked are: w (0, 3)"),
    "previous_shape": (
        (MASKED, WIDER),
        {},
        ValueError,
        "previous must have the shapes of the mask variables; at w it has (2, 4)",
    ),
    "previous_structure": ((MASKED, OTHER), {}, ValueError, "differ at v, w"),
    "previous_masks": ((MASKED, BIAS_TOO), {}, ValueError, "differ at b"),
    "gradient_masks": ((MASKED, None, BIAS_TOO), {}, ValueError, "differ at b"),
    "gradient_none": (
        (MASKED, None, {"b": None, "w": None}),
        {},
        ValueError,
        "gradient must have a leaf for each mask variable of masked, and no other; "
        "they differ at w",
    ),
    "gradient_shape": (
        (MASKED, None, {"w": jnp.ones((3, 2)), "b": None}),
        {},
        ValueError,
        "gradient must have the shapes of the mask variables; at w it has (3, 2)",
    ),
    "gradient_dtype": (
        (MASKED, None, {"w": jnp.ones((2, 3), jnp.int32), "b": None}),
        {},
        TypeError,
        "w is int32",
    ),
    "axis": ((MASKED,), {"feature_axes": 2}, ValueError, "out of range for w"),
    "axis_twice": ((MASKED,), {"feature_axes": (1, -1)}, ValueError, "twice"),
    "axis_type": ((MASKED,), {"feature_axes": 0.5}, TypeError, "must be an int"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case):
    args, options, error, message = REFUSED[case]
    with pytest.raises(error, match=re.escape(message)) as raised:
        mask_statistics(*args, **options)
    assert str(raised.value).startswith("mask_statistics: ")
