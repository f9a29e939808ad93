"""Convolutional networks: what they compute, compared with NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from experiments.models.conv import next_in_block
from experiments.models.mobilenet import MobileNetV1
from experiments.models.resnet import ResNet, ResNet50, pad_shortcut
from experiments.models.vgg import VGG16
from experiments.models.wide_resnet import WideResNet


class Layers:
    """The layers in float64 NumPy, by the names of their parameters."""

    def __init__(self, variables):
        flat = flatten_dict(variables, sep="/")
        self.values = {path: np.asarray(leaf, float) for path, leaf in flat.items()}

    def conv(self, path, x, stride=1):
        kernel = self.values[f"params/{path}/kernel"]
        size, around = len(kernel), len(kernel) // 2
        height, width = (-(-side // stride) for side in x.shape[1:3])
        x = np.pad(x, ((0, 0), (around, around), (around, around), (0, 0)))
        out = 0.0
        for i in range(size):
            for j in range(size):
                seen = x[:, i::stride, j::stride][:, :height, :width]
                if kernel.shape[2] < x.shape[3]:  # depthwise
                    out = out + seen * kernel[i, j, 0]
                else:
                    out = out + seen @ kernel[i, j]
        return out

    def norm(self, path, x):
        mean, var = (self.values[f"batch_stats/{path}/{s}"] for s in ("mean", "var"))
        scale, bias = (self.values[f"params/{path}/{s}"] for s in ("scale", "bias"))
        return (x - mean) / np.sqrt(var + 1e-5) * scale + bias

    def logits(self, x):
        kernel, bias = (self.values[f"params/Dense_0/{s}"] for s in ("kernel", "bias"))
        return x.mean((1, 2)) @ kernel + bias


def relu(x):
    return np.maximum(x, 0)


def max_pool(x, size, around):
    """Return the maximum of size x size pixels at every second one."""
    edges = ((0, 0), (around, around), (around, around), (0, 0))
    x = np.pad(x, edges, constant_values=-np.inf)
    height, width = ((side - size) // 2 + 1 for side in x.shape[1:3])
    out = np.empty((len(x), height, width, x.shape[3]))
    for i in range(height):
        for j in range(width):
            window = x[:, 2 * i : 2 * i + size, 2 * j : 2 * j + size]
            out[:, i, j] = window.max((1, 2))
    return out


def vgg16(layers, x):
    for i in range(13):
        if i in (2, 4, 7, 10):
            x = max_pool(x, 2, 0)
        x = relu(layers.norm(f"BatchNorm_{i}", layers.conv(f"Conv_{i}", x)))
    return layers.logits(x)


def resnet8(layers, x):
    x = relu(layers.norm("BatchNorm_0", layers.conv("Conv_0", x)))
    for i, stride in enumerate([1, 2, 2]):
        at = f"BasicBlock_{i}"
        y = layers.conv(f"{at}/Conv_0", x, stride)
        y = layers.conv(f"{at}/Conv_1", relu(layers.norm(f"{at}/BatchNorm_0", y)))
        y = layers.norm(f"{at}/BatchNorm_1", y)
        shortcut = np.zeros_like(y)
        shortcut[..., : x.shape[3]] = x[:, ::stride, ::stride]
        x = relu(y + shortcut)
    return layers.logits(x)


def wrn16_2(layers, x):
    x = layers.conv("Conv_0", x)
    for i, stride in enumerate([1, 1, 2, 1, 2, 1]):
        at = f"WideBlock_{i}"
        y = relu(layers.norm(f"{at}/BatchNorm_0", x))
        shortcut = x if i % 2 else layers.conv(f"{at}/shortcut", y, stride)
        y = layers.conv(f"{at}/Conv_0", y, stride)
        y = layers.conv(f"{at}/Conv_1", relu(layers.norm(f"{at}/BatchNorm_1", y)))
        x = y + shortcut
    return layers.logits(relu(layers.norm("BatchNorm_0", x)))


def bottlenecks(layers, x):
    """Two stages of ResNet-50, of two blocks and of one."""
    small = min(x.shape[1:3]) < 64
    x = layers.conv("Conv_0", x, 1 if small else 2)
    x = relu(layers.norm("BatchNorm_0", x))
    x = x if small else max_pool(x, 3, 1)
    for i, stride in enumerate([1, 1, 2]):
        at = f"Bottleneck_{i}"
        y = relu(layers.norm(f"{at}/BatchNorm_0", layers.conv(f"{at}/Conv_0", x)))
        y = layers.conv(f"{at}/Conv_1", y, stride)
        y = layers.conv(f"{at}/Conv_2", relu(layers.norm(f"{at}/BatchNorm_1", y)))
        y = layers.norm(f"{at}/BatchNorm_2", y)
        if i != 1:
            x = layers.conv(f"{at}/shortcut", x, stride)
            x = layers.norm(f"{at}/BatchNorm_3", x)
        x = relu(y + x)
    return layers.logits(x)


def mobilenet(layers, x):
    stride = 1 if min(x.shape[1:3]) < 64 else 2
    x = relu(layers.norm("BatchNorm_0", layers.conv("Conv_0", x, stride)))
    for i in range(13):
        stride = 2 if i in (1, 3, 5, 11) else 1
        y = layers.conv(f"depthwise_{i}", x, stride)
        y = relu(layers.norm(f"BatchNorm_{2 * i + 1}", y))
        x = layers.conv(f"pointwise_{i}", y)
        x = relu(layers.norm(f"BatchNorm_{2 * i + 2}", x))
    return layers.logits(x)


# network, the same in NumPy, image, next_layer
CASES = {
    "vgg16": (VGG16(), vgg16, (19, 16, 1), VGG16.next_layer),
    "resnet8": (ResNet(depth=8), resnet8, (9, 6, 3), next_in_block("BasicBlock", 3, 2)),
    "wrn16_2": (
        WideResNet(depth=16, width=2),
        wrn16_2,
        (9, 6, 3),
        next_in_block("WideBlock", 6, 2),
    ),
    "resnet50, small image": (
        ResNet50(stages=(2, 1)),
        bottlenecks,
        (63, 9, 1),
        next_in_block("Bottleneck", 3, 3),
    ),
    "resnet50": (
        ResNet50(stages=(2, 1)),
        bottlenecks,
        (67, 64, 1),
        next_in_block("Bottleneck", 3, 3),
    ),
    "mobilenet, small image": (
        MobileNetV1(),
        mobilenet,
        (9, 65, 3),
        MobileNetV1.next_layer,
    ),
    "mobilenet": (MobileNetV1(), mobilenet, (64, 65, 1), MobileNetV1.next_layer),
}


@functools.cache
def made(case):
    """Return random variables, images, and the compiled network."""
    model, _, shape, _ = CASES[case]
    random = np.random.default_rng(0)
    images = jnp.asarray(random.normal(size=(2, *shape)), jnp.float32)
    shapes = flatten_dict(
        jax.eval_shape(model.init, jax.random.key(0), images), sep="/"
    )
    values = {}
    for path, leaf in shapes.items():
        if path.endswith("/kernel"):
            value = random.normal(0, np.sqrt(2 / np.prod(leaf.shape[:-1])), leaf.shape)
        elif path.endswith(("/scale", "/var")):
            value = random.uniform(0.5, 1.5, leaf.shape)
        else:
            value = random.normal(0, 0.1, leaf.shape)
        values[path] = jnp.asarray(value, jnp.float32)
    return unflatten_dict(values, sep="/"), images, jax.jit(model.apply)


@pytest.mark.parametrize("case", CASES)
def test_network_computes_what_numpy_does(case):
    variables, images, apply = made(case)
    expected = CASES[case][1](Layers(variables), np.asarray(images, float))
    assert np.std(expected[0] - expected[1]) > 0.01  # it depends on the image
    np.testing.assert_allclose(
        apply(variables, images), expected, rtol=1e-3, atol=1e-3 * np.std(expected)
    )


@pytest.mark.parametrize(
    "case", [c for c in CASES if c not in ("resnet50", "mobilenet")]
)
def test_feature_without_output_does_nothing(case):
    """Cut feature 3 of each kernel from the reader, then change the feature."""
    variables, images, apply = made(case)
    cut = flatten_dict(variables["params"], sep="/")
    changed = dict(cut)
    next_layer = CASES[case][3]
    assert set(next_layer) < set(cut)
    for reader in next_layer.values():
        for params in (cut, changed):
            params[reader] = params[reader].at[..., 3, :].set(0.0)
    for path in next_layer:
        changed[path] = changed[path].at[..., 3].add(1.0)
    logits = [
        apply(variables | {"params": unflatten_dict(params, sep="/")}, images)
        for params in (cut, changed)
    ]
    np.testing.assert_array_equal(*logits)


@pytest.mark.parametrize("case", ["resnet8", "wrn16_2", "resnet50, small image"])
def test_training_notes_the_statistics_of_the_batch_everywhere(case):
    variables, images, _ = made(case)
    train = jax.jit(
        functools.partial(CASES[case][0].apply, train=True, mutable=["batch_stats"])
    )
    _, noted = train(variables, images)
    before = flatten_dict(variables["batch_stats"], sep="/")
    after = flatten_dict(noted["batch_stats"], sep="/")
    assert before.keys() == after.keys()
    for path in before:
        assert not np.any(np.asarray(before[path]) == np.asarray(after[path])), path

    # Of the first normalization, by hand; it sees what the first convolution made.
    first = "WideBlock_0/BatchNorm_0" if case == "wrn16_2" else "BatchNorm_0"
    seen = Layers(variables).conv("Conv_0", np.asarray(images, float))
    for name, now in (("mean", seen.mean((0, 1, 2))), ("var", seen.var((0, 1, 2)))):
        expected = 0.9 * np.asarray(before[f"{first}/{name}"]) + 0.1 * now
        np.testing.assert_allclose(after[f"{first}/{name}"], expected, rtol=1e-3)


@pytest.mark.parametrize(("stride", "features"), [(1, 3), (1, 5), (2, 7)])
def test_shortcut_takes_pixels_and_appends_channels_of_zeros(stride, features):
    x = np.random.default_rng(0).normal(size=(2, 5, 6, 3)).astype(np.float32)
    got = pad_shortcut(jnp.asarray(x), features, stride)
    assert got.shape == (2, -(-5 // stride), 6 // stride, features)
    for i in range(got.shape[1]):
        for j in range(got.shape[2]):
            pixel = np.append(x[:, stride * i, stride * j], np.zeros((2, 4)), axis=1)
            np.testing.assert_array_equal(got[:, i, j], pixel[:, :features])
