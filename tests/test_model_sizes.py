"""The size of every network, by hand and as published."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from flax.traverse_util import flatten_dict

import scl_jax
from experiments.models import MODELS
from experiments.models.wide_resnet import WideResNet


class Size(NamedTuple):
    """What is known of a network at the image size of the publications."""

    example: tuple[int, ...]  # (H, W, C), or (T,) tokens
    classes: int
    kernels: list[tuple[int, int]]  # (weights, places they are put at), by hand
    others: int  # parameters that are no kernels: biases, normalization, embeddings
    published: dict[str, str]  # what is counted -> millions, rounded as published


def chain(inputs, *outputs):
    """Return the weights of 3x3 convolutions that follow each other."""
    return sum(9 * i * o for i, o in zip((inputs, *outputs), outputs, strict=False))


def vgg(third, fourth, fifth):
    """Return the size of VGG with these numbers of convolutions in its stages."""
    kernels = [
        (chain(3, 64, 64), 32 * 32),
        (chain(64, 128, 128), 16 * 16),
        (chain(128, *[256] * third), 8 * 8),
        (chain(256, *[512] * fourth), 4 * 4),
        (chain(512, *[512] * fifth), 2 * 2),
        (512 * 10, 1),
    ]
    filters = 2 * 64 + 2 * 128 + third * 256 + (fourth + fifth) * 512
    return (32, 32, 3), 10, kernels, 2 * filters + 10


def resnet(blocks):
    """Return the size of the CIFAR ResNet with this number of blocks per width."""
    kernels = [
        (chain(3, 16, *[16] * 2 * blocks), 32 * 32),
        (chain(16, *[32] * 2 * blocks), 16 * 16),
        (chain(32, *[64] * 2 * blocks), 8 * 8),
        (64 * 10, 1),
    ]
    return (32, 32, 3), 10, kernels, 2 * (16 + 2 * blocks * (16 + 32 + 64)) + 10


def wide_resnet(blocks, width):
    """Return the size of a wide ResNet with this number of blocks per width."""
    a, b, c = 16 * width, 32 * width, 64 * width
    kernels = [
        (chain(3, 16, *[a] * 2 * blocks) + 16 * a, 32 * 32),
        (chain(a, *[b] * 2 * blocks) + a * b, 16 * 16),
        (chain(b, *[c] * 2 * blocks) + b * c, 8 * 8),
        (c * 10, 1),
    ]
    # Before each convolution of a block is a normalization, and one is at the end.
    norms = 16 + (2 * blocks - 1) * a + a + (2 * blocks - 1) * b + b
    norms += (2 * blocks - 1) * c + c
    return (32, 32, 3), 10, kernels, 2 * norms + 10


def resnet50():
    """Return the size of ResNet-50, stage by stage."""
    kernels = [(7 * 7 * 3 * 64, 112 * 112), (2048 * 1000, 1)]
    norms, inputs = 64, 64
    for blocks, width, side in [(3, 64, 56), (4, 128, 28), (6, 256, 14), (3, 512, 7)]:
        # The stride is in the 3x3, so the first 1x1 sees the larger image.
        entry = side if inputs == 64 else 2 * side
        inner = (9 * width * width + width * 4 * width) * blocks
        inner += 4 * width * width * (blocks - 1)  # first 1x1 of the other blocks
        kernels += [
            (inputs * width, entry * entry),
            (inner + inputs * 4 * width, side * side),  # with the shortcut
        ]
        norms += blocks * 6 * width + 4 * width
        inputs = 4 * width
    return (224, 224, 3), 1000, kernels, 2 * norms + 1000


def mobilenet():
    """Return the size of MobileNet, by the lines of the paper's table 1."""
    kernels, norms = [(27 * 32, 112 * 112), (1024 * 1000, 1)], 32
    lines = [(32, 64, 112), (64, 128, 56), (128, 128, 56), (128, 256, 28)]
    lines += [(256, 256, 28), (256, 512, 14), *[(512, 512, 14)] * 5]
    lines += [(512, 1024, 7), (1024, 1024, 7)]
    for inputs, outputs, side in lines:
        kernels.append((9 * inputs + inputs * outputs, side * side))
        norms += inputs + outputs
    return (224, 224, 3), 1000, kernels, 2 * norms + 1000


def transformer(width, mlp, blocks, tokens):
    """Return the kernels and the other parameters of all blocks."""
    kernels = (4 * width * width + 2 * width * mlp) * blocks
    norms, biases = 2 * 2 * width, 5 * width + mlp
    return (kernels, tokens), (norms + biases) * blocks


def vit(image, patch, width, blocks, classes):
    """Return the size of a vision transformer."""
    side, channels = image[0] // patch, image[2]
    inner, others = transformer(width, 4 * width, blocks, side * side + 1)
    kernels = [
        (patch * patch * channels * width, side * side),
        inner,
        (width * classes, 1),
    ]
    positions = (side * side + 1) * width
    others += width + width + positions + 2 * width + classes  # patch bias, class token
    return image, classes, kernels, others


def language_model(width, mlp, blocks, context, vocabulary):
    """Return the size of the language model, whose embeddings are no kernels."""
    inner, others = transformer(width, mlp, blocks, context)
    others += vocabulary * width + context * width + 2 * width
    return (context,), vocabulary, [inner, (width * vocabulary, context)], others


def published(kernels=None, parameters=None, macs=None):
    """Return the given figures, in millions."""
    figures = {"kernels": kernels, "parameters": parameters, "macs": macs}
    return {name: figure for name, figure in figures.items() if figure}


SIZES = {
    "lenet300": Size(
        (28, 28, 1),
        10,
        [(784 * 300 + 300 * 100 + 100 * 10, 1)],
        410,
        published(parameters="0.267"),
    ),
    "lenet5": Size(
        (28, 28, 1),
        10,
        [(25 * 20, 24**2), (25 * 20 * 50, 8**2), (800 * 500 + 500 * 10, 1)],
        20 + 50 + 500 + 10,
        published(parameters="0.431", macs="2.293"),
    ),
    # MACs of the CIFAR networks: as the literature on pruned filters has them.
    "vgg16": Size(*vgg(3, 3, 3), published("14.7", macs="313")),
    "vgg19": Size(*vgg(4, 4, 4), published("20.0", "20.04", "398")),
    "resnet20": Size(*resnet(3), published(parameters="0.27", macs="40.6")),
    "resnet32": Size(*resnet(5), published(parameters="0.46", macs="68.9")),
    "resnet56": Size(*resnet(9), published(parameters="0.85", macs="125.49")),
    "resnet110": Size(*resnet(18), published(parameters="1.7", macs="252.89")),
    "wrn22_2": Size(*wide_resnet(3, 2), published(parameters="1.1")),
    "resnet50": Size(*resnet50(), published("25.502912", "25.56", "4089")),
    "mobilenet_v1": Size(*mobilenet(), published(parameters="4.2", macs="569")),
    # The sizes of vit_ti4 and language_model are the zoo's own.
    "vit_ti4": Size(*vit((28, 28, 1), 4, 192, 6, 10), {}),
    "vit_s16": Size(
        *vit((224, 224, 3), 16, 384, 12, 1000), published(parameters="22.05")
    ),
    "vit_b16": Size(
        *vit((224, 224, 3), 16, 768, 12, 1000), published(parameters="86.57")
    ),
    "language_model": Size(*language_model(128, 512, 4, 128, 97), {}),
}


def parameters(model, example):
    """Return the shapes of the parameters by path, and of all variables."""
    dtype = jnp.float32 if len(example) == 3 else jnp.int32
    x = jax.ShapeDtypeStruct((1, *example), dtype)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    return flatten_dict(variables["params"], sep="/"), variables, x


@functools.cache
def counted(name):
    """Return the network's kernel weights, parameters and MACs of the kernels."""
    model = MODELS[name](classes=SIZES[name].classes)
    params, variables, x = parameters(model, SIZES[name].example)
    state = {key: tree for key, tree in variables.items() if key != "params"}
    state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state)
    macs = scl_jax.count_macs(
        lambda p, x: model.apply({"params": p, **state}, x), variables["params"], x
    )
    kernels = [path for path in params if path.endswith("/kernel")]
    macs = flatten_dict(macs, sep="/")
    return {
        "kernels": sum(params[path].size for path in kernels),
        "parameters": sum(leaf.size for leaf in params.values()),
        "macs": sum(macs[path] for path in kernels),
    }


def test_every_network_of_the_zoo_is_here():
    assert set(SIZES) == set(MODELS)


@pytest.mark.parametrize("name", SIZES)
def test_size_is_that_by_hand(name):
    kernels = sum(weights for weights, _ in SIZES[name].kernels)
    assert counted(name) == {
        "kernels": kernels,
        "parameters": kernels + SIZES[name].others,
        "macs": sum(weights * places for weights, places in SIZES[name].kernels),
    }


@pytest.mark.parametrize(
    ("name", "what", "millions"),
    [
        (name, *figure)
        for name, size in SIZES.items()
        for figure in size.published.items()
    ],
)
def test_size_is_the_published_one(name, what, millions):
    digits = len(millions.partition(".")[2])
    assert f"{counted(name)[what] / 1e6:.{digits}f}" == millions


def test_vit_b16_has_the_published_macs_with_the_products_of_attention():
    # q @ k^T and its product with v: 197 x 197 x 768 each in each block, which
    # belong to no parameter.
    attention = 12 * 2 * 197 * 197 * 768
    assert f"{(counted('vit_b16')['macs'] + attention) / 1e9:.2f}" == "17.56"


@pytest.mark.parametrize(
    ("depth", "width", "millions"),
    [
        (40, 1, "0.6"),
        (40, 2, "2.2"),
        (16, 8, "11.0"),
        (22, 8, "17.2"),
        (28, 10, "36.5"),
    ],
)
def test_wide_resnets_have_the_sizes_of_their_paper(depth, width, millions):
    params, _, _ = parameters(WideResNet(depth=depth, width=width), (32, 32, 3))
    assert f"{sum(leaf.size for leaf in params.values()) / 1e6:.1f}" == millions


@pytest.mark.parametrize("name", SIZES)
def test_docstring_has_the_size(name):
    size, doc = counted(name), MODELS[name].__doc__
    of = "parameters" if " parameters and" in doc else "kernels"
    assert f"{size[of]:,}" in doc
    # Those of LeNet-300 equal its number of weights, and its docstring says so.
    assert f"{size['macs']:,}" in doc
