"""Convolutional networks of the zoo: images, precision, errors, start values."""

import collections
import math

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from experiments.models import MODELS
from experiments.models.conv import conv
from experiments.models.resnet import ResNet
from experiments.models.wide_resnet import WideResNet

# name -> entries of next_layer
NEXT = {
    "lenet5": 3,
    "vgg16": 13,
    "vgg19": 16,
    "resnet20": 9,
    "resnet32": 15,
    "resnet56": 27,
    "resnet110": 54,
    "wrn22_2": 9,
    "resnet50": 2 * 16,
    "mobilenet_v1": 13 + 1,
}
# One of a family.
NETWORKS = ["lenet5", "vgg16", "resnet20", "wrn22_2", "resnet50", "mobilenet_v1"]
NORMALIZED = NETWORKS[1:]


def made(name, shape, **attributes):
    """Return the network, the shapes of images and those of its variables."""
    model, images = MODELS[name](**attributes), jax.ShapeDtypeStruct(shape, jnp.float32)
    return model, images, jax.eval_shape(model.init, jax.random.key(0), images)


@pytest.mark.parametrize("shape", [(3, 28, 28, 1), (3, 33, 47, 3)])
@pytest.mark.parametrize("name", NETWORKS)
def test_logits_are_float32_with_one_column_per_class(name, shape):
    model, images, variables = made(name, shape, classes=7)
    logits = jax.eval_shape(model.apply, variables, images)
    assert (logits.shape, logits.dtype) == ((3, 7), jnp.float32)


@pytest.mark.parametrize("name", NORMALIZED)
def test_parameters_do_not_depend_on_the_image_size(name):
    sizes = [(28, 28), (33, 47), (224, 224)]
    first, *others = (made(name, (1, *size, 3))[2] for size in sizes)
    assert all(other == first for other in others)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_bfloat16_is_the_precision_of_products_and_activations(name, train):
    model, images, variables = made(name, (2, 32, 32, 3), dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    program = jax.make_jaxpr(
        lambda v, x: model.apply(v, x, train=train, mutable=["batch_stats"])
    )(variables, images)
    operands = collections.defaultdict(list)
    for equation in program.jaxpr.eqns:
        dtypes = {operand.aval.dtype.name for operand in equation.invars}
        operands[equation.primitive.name].append(dtypes)
    products = operands["conv_general_dilated"] + operands["dot_general"]
    relus = operands["custom_jvp_call"]
    kernels = [p for p in flatten_dict(variables, sep="/") if p.endswith("/kernel")]
    assert products == [{"bfloat16"}] * len(kernels)
    assert relus
    assert relus == [{"bfloat16"}] * len(relus)
    assert {out.dtype for out in program.out_avals} == {jnp.dtype("float32")}


@pytest.mark.parametrize("name", NORMALIZED)
def test_only_training_notes_statistics(name):
    model, images, variables = made(name, (2, 32, 32, 3))
    jax.eval_shape(model.apply, variables, images)
    with pytest.raises(flax.errors.ModifyScopeVariableError, match="batch_stats"):
        jax.eval_shape(lambda v, x: model.apply(v, x, train=True), variables, images)


@pytest.mark.parametrize("name", NEXT)
def test_next_layer_names_kernels_that_fit(name):
    _, _, variables = made(name, (1, 28, 28, 1))
    shapes = {
        path: leaf.shape
        for path, leaf in flatten_dict(variables["params"], sep="/").items()
    }
    next_layer = MODELS[name].next_layer
    assert len(next_layer) == NEXT[name]
    for path, reader in next_layer.items():
        # Flattened channels last, LeNet-5's 4x4 places make 16 inputs of a feature.
        places = 16 if (name, reader) == ("lenet5", "Dense_0/kernel") else 1
        assert shapes[reader][-2] == places * shapes[path][-1], path


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_no_batch_of_images_is_refused(name):
    with pytest.raises(ValueError, match=r"must be \(B, H, W, C\).* \(28, 28, 1\)"):
        made(name, (28, 28, 1))


@pytest.mark.parametrize("shape", [(1, 15, 32, 3), (1, 32, 15, 3)])
@pytest.mark.parametrize("name", ["vgg16", "vgg19"])
def test_vgg_refuses_images_that_its_pools_would_use_up(name, shape):
    with pytest.raises(ValueError, match=r"^VGG1\d: .* at least 16, got shape \(1, "):
        made(name, shape)
    _, _, variables = made(name, (1, 16, 16, 3))
    assert "Dense_0" in variables["params"]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (ResNet(depth=18), r"ResNet: depth must be 8, 14, 20, \.\.\., got 18"),
        (ResNet(depth=2), r"ResNet: depth must be 8, 14, 20, \.\.\., got 2"),
        (WideResNet(depth=20, width=2), r"depth must be 10, 16, 22, \.\.\., got 20"),
    ],
)
def test_depth_that_the_family_has_not_is_refused(model, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))


@pytest.mark.parametrize(("groups", "inputs"), [(1, 9 * 64), (64, 9)])
def test_convolutions_start_as_he_normal(groups, inputs):
    layer = conv(1024, 3, groups=groups, dtype=jnp.float32)
    kernel = layer.init(jax.random.key(0), jnp.zeros((1, 1, 1, 64)))["params"]["kernel"]
    assert kernel.shape == (3, 3, 64 // groups, 1024)
    assert np.std(kernel) == pytest.approx(math.sqrt(2 / inputs), rel=0.03)
