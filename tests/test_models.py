"""The LeNets: their sizes, what they compute, and which layer reads which."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import scl_jax
from experiments.models import MODELS

IMAGE_SHAPE = (28, 28, 1)
# By hand: inputs x outputs, and for a convolution times the places it is put at.
MACS = {
    "lenet300": {
        "Dense_0/kernel": 784 * 300,
        "Dense_1/kernel": 300 * 100,
        "Dense_2/kernel": 100 * 10,
    },
    "lenet5": {
        "Conv_0/kernel": 5 * 5 * 1 * 20 * 24 * 24,
        "Conv_1/kernel": 5 * 5 * 20 * 50 * 8 * 8,
        "Dense_0/kernel": 4 * 4 * 50 * 500,
        "Dense_1/kernel": 500 * 10,
    },
}


def made(name):
    """Return a network, and random parameters in the shapes of its own."""
    model, random = MODELS[name](), np.random.default_rng(0)
    images = jax.ShapeDtypeStruct((1, *IMAGE_SHAPE), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    params = jax.tree.map(
        lambda leaf: jnp.asarray(random.normal(0, 0.05, leaf.shape), leaf.dtype), shapes
    )
    return model, params


@pytest.mark.parametrize(
    ("name", "weights", "macs"),
    [("lenet300", 266_200, 266_200), ("lenet5", 430_500, 2_293_000)],
)
def test_network_has_the_published_size(name, weights, macs):
    model, params = made(name)
    example = jax.ShapeDtypeStruct((1, *IMAGE_SHAPE), jnp.float32)
    counted = scl_jax.count_macs(
        lambda p, x: model.apply({"params": p}, x), params, example
    )
    kernels = {
        path: leaf
        for path, leaf in flatten_dict(params, sep="/").items()
        if path.endswith("/kernel")
    }
    assert sum(leaf.size for leaf in kernels.values()) == weights
    by_path = flatten_dict(counted, sep="/")
    assert {path: by_path[path] for path in kernels} == MACS[name]
    assert sum(MACS[name].values()) == macs


@pytest.mark.parametrize("name", MACS)
def test_logits_have_one_column_per_class(name):
    model, params = made(name)
    logits = jax.eval_shape(
        model.apply, {"params": params}, jnp.zeros((3, *IMAGE_SHAPE))
    )
    assert logits.shape == (3, 10)
    assert logits.dtype == jnp.float32


def test_lenet300_is_two_relu_layers_and_a_linear_one():
    model, params = made("lenet300")
    images = np.random.default_rng(0).normal(size=(4, *IMAGE_SHAPE))
    x = images.reshape(4, 784)
    for layer in ("Dense_0", "Dense_1", "Dense_2"):
        kernel, bias = (np.asarray(params[layer][k], float) for k in ("kernel", "bias"))
        x = x @ kernel + bias
        x = np.maximum(x, 0) if layer != "Dense_2" else x
    got = model.apply({"params": params}, jnp.asarray(images, jnp.float32))
    np.testing.assert_allclose(got, x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 15, 28, 1), (1, 28, 15, 1), (28, 28, 1)])
def test_lenet5_refuses_what_its_convolutions_cannot_take(shape):
    with pytest.raises(ValueError, match=rf"LeNet5: .* 16, got shape \({shape[0]}, "):
        jax.eval_shape(MODELS["lenet5"]().init, jax.random.key(0), jnp.zeros(shape))


def test_lenet5_takes_16_pixels():
    logits, _ = jax.eval_shape(
        MODELS["lenet5"]().init_with_output,
        jax.random.key(0),
        jnp.zeros((1, 16, 16, 1)),
    )
    assert logits.shape == (1, 10)


@pytest.mark.parametrize("name", MACS)
def test_each_kernel_is_read_by_the_next(name):
    _, params = made(name)
    kernels = [p for p in flatten_dict(params, sep="/") if p.endswith("/kernel")]
    ordered = sorted(kernels, key=list(MACS[name]).index)
    expected = dict(itertools.pairwise(ordered))
    assert dict(MODELS[name].next_layer) == expected


@pytest.mark.parametrize(
    ("name", "path", "features", "rows"),
    [
        ("lenet300", "Dense_0", 300, lambda f: [f]),
        ("lenet300", "Dense_1", 100, lambda f: [f]),
        # Flattened channels last: every 50th row reads the filter.
        ("lenet5", "Conv_1", 50, lambda f: range(f, 800, 50)),
        ("lenet5", "Dense_0", 500, lambda f: [f]),
    ],
)
def test_feature_that_nothing_reads_is_counted_and_does_nothing(
    name, path, features, rows
):
    model, params = made(name)
    feature, reader = 7, MODELS[name].next_layer[f"{path}/kernel"]
    masked = scl_jax.mask_params(params)
    masks = flatten_dict(masked.masks, sep="/")
    cut = np.full(masks[reader].shape, 0.1, np.float32)
    cut[list(rows(feature))] = -0.1
    masks[reader] = jnp.asarray(cut)
    masked = masked._replace(masks=unflatten_dict(masks, sep="/"))

    report = scl_jax.report(masked, next_layer=MODELS[name].next_layer)
    without = {r.path: r.features_without_output for r in report.rows}
    assert without[f"{path}/kernel"] == 1
    last = list(MACS[name])[-1]
    assert without[last] is None
    assert sum(x for x in without.values() if x) == 1

    def logits(bias_of_feature):
        plain = flatten_dict(scl_jax.fold_masks(masked), sep="/")
        bias = plain[f"{path}/bias"]
        assert bias.shape == (features,)
        plain[f"{path}/bias"] = bias.at[feature].set(bias_of_feature)
        images = jax.random.normal(jax.random.key(1), (2, *IMAGE_SHAPE))
        return model.apply({"params": unflatten_dict(plain, sep="/")}, images)

    np.testing.assert_array_equal(logits(0.0), logits(100.0))


def test_filter_that_nothing_reads_is_counted_across_convolutions():
    _, params = made("lenet5")
    masked = scl_jax.mask_params(params)
    second = masked.masks["Conv_1"]["kernel"]
    masked.masks["Conv_1"]["kernel"] = second.at[:, :, 3, :].set(-0.1)
    report = scl_jax.report(masked, next_layer=MODELS["lenet5"].next_layer)
    without = {row.path: row.features_without_output for row in report.rows}
    assert without == {
        "Conv_0/kernel": 1,
        "Conv_1/kernel": 0,
        "Dense_0/kernel": 0,
        "Dense_1/kernel": None,
    }
