"""The whole training step: lowered for TPU, not run; run from an exported artifact.

Only the step's text is made for other devices. That it lowers says that every
operation in it exists there, not that it is fast, fits or was ever run.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from experiments.config import Config
from experiments.data import ABOUT, Split
from experiments.feed import make_feed
from experiments.mesh import by_shape, make_mesh, place, replicated
from experiments.methods import METHODS
from experiments.models import MODELS
from experiments.models.base import Model
from experiments.network import make_network
from experiments.step import Objective, make_initial

PLATFORMS = ("tpu", "cuda", "cpu")
NETWORKS = {
    "lenet300": ("mnist5k", "crop_flip"),
    "resnet20": ("cifar10", "crop_flip"),
    "language_model": ("python_docs", "none"),
}
MESHES = {"one_device": (1, 1), "mesh": (8, 2)}


class Tiny(Model):
    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.Dense(8, dtype=self.dtype)(x.reshape(x.shape[0], -1))
        x = nn.BatchNorm(not train, dtype=self.dtype)(x)
        return nn.Dense(10, dtype=self.dtype)(nn.relu(x)).astype(jnp.float32)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(MODELS, "tiny", Tiny)


def examples(dataset):
    about, random = ABOUT[dataset], np.random.default_rng(0)
    text = not about.mean
    values = about.classes if text else 256
    inputs = random.integers(0, values, (16, *about.shape)).astype(np.uint8)
    labels = random.integers(0, about.classes, inputs.shape if text else 16)
    return Split(inputs, labels.astype(np.int32))


def make_step(model, dataset, augment, devices, model_parallel, **others):
    """Return the whole step; shapes of its arguments, and the arguments themselves."""
    config = Config(
        dataset=dataset,
        model=model,
        augment=augment,
        batch_size=8,
        epochs=2,
        weight_decay=1e-4,
        label_smoothing=0.1,
        minimum_connections=2,
        devices=devices,
        model_parallel=model_parallel,
        **{"compute": "bfloat16", **others},
    )
    mesh = make_mesh(devices, model_parallel)
    feed = make_feed(config, examples(dataset), mesh)
    objective = Objective(
        make_network(config), METHODS["scl"](config, 4), config.label_smoothing
    )
    initial, template = make_initial(objective, mesh)

    def step(state, source, item):
        new, seen = objective.step(state, feed.batch(source, item))
        return jax.lax.with_sharding_constraint(new, by_shape(mesh, new)), seen

    key = np.asarray(jax.random.key_data(jax.random.key(0)))
    rows = feed.items(0, key, 0, 0, 1)
    item = place(jax.tree.map(lambda x: np.asarray(x[0]), rows), replicated(mesh))
    return jax.jit(step), (template, feed.source, item), initial


@pytest.mark.parametrize("mesh", MESHES.values(), ids=[*MESHES])
@pytest.mark.parametrize("model", NETWORKS)
def test_whole_step_lowers_for_tpu_and_gpu(model, mesh):
    step, arguments, _ = make_step(model, *NETWORKS[model], *mesh)
    exported = jax.export.export(step, platforms=PLATFORMS)(*arguments)
    assert exported.platforms == PLATFORMS
    assert exported.nr_devices == mesh[0]
    text = exported.mlir_module()
    # The parts are in it: products in bf16, inputs as bytes, the guard's search.
    assert re.search(r"stablehlo[.](dot_general|convolution).*bf16>", text)
    assert "ui8>" in text
    assert "stablehlo.while" in text
    # A step leads to where the next one can begin.
    state = jax.tree.leaves(arguments[0])
    for before, after in zip(state, exported.out_avals, strict=False):
        assert (before.shape, before.dtype) == (after.shape, after.dtype)
    assert len(exported.out_avals) == len(state) + 2  # loss and accuracy


def flat(step, arguments, initial):
    """Return the step from arrays to arrays, and its arguments, as arrays."""
    _, source, item = arguments
    leaves, structure = jax.tree.flatten((initial(jax.random.key(1)), source, item))

    def of_arrays(*leaves):
        return jax.tree.leaves(step(*structure.unflatten(leaves)))

    return jax.jit(of_arrays), leaves


@pytest.mark.parametrize("mesh", MESHES.values(), ids=[*MESHES])
def test_exported_step_is_the_jitted_step_also_from_bytes(mesh):
    step, leaves = flat(
        *make_step("tiny", "mnist5k", "crop_flip", *mesh, compute="float32")
    )
    exported = jax.export.export(step, platforms=PLATFORMS)(*leaves)
    again = jax.export.deserialize(exported.serialize())
    expected = step(*leaves)
    assert any(np.any(a != b) for a, b in zip(leaves, expected, strict=False))
    for artifact in (exported, again):
        got = jax.jit(artifact.call)(*leaves)
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def collectives(text, kind):
    """Return the shapes that the instructions of a kind make, as (type, numbers)."""
    found = []
    for line in text.splitlines():
        made = re.search(rf"= (.*?) {kind}(?:-start)?\(", line)
        if made:
            shapes = re.findall(r"(\w+)\[([\d,]*)\]", made[1])
            found += [
                (name, tuple(map(int, filter(None, numbers.split(",")))))
                for name, numbers in shapes
            ]
    return found


def test_compiled_step_gathers_no_mask_variable():
    """Compile the step for (4, 2) devices, and read off what its collectives make.

    Mask variables and weights have the same shapes, so what is checked is more: no
    all-gather, all-to-all or collective-permute makes an array with as many elements
    as a kernel or as one device's part of one, whatever it stands for.
    """
    step, (state, *rest), _ = make_step(
        "tiny", "mnist5k", "none", 8, 2, compute="float32"
    )
    text = step.lower(state, *rest).compile().as_text()
    kernels = [x for x in jax.tree.leaves(state.trained.masks)]
    assert [x.shape for x in kernels] == [(784, 8), (8, 10)]
    sizes = {n for x in kernels for n in (x.size, x.size // 2)}
    for x in kernels:
        assert x.sharding.shard_shape(x.shape) == (x.shape[0], x.shape[1] // 2)
    for kind in ("all-gather", "all-to-all", "collective-permute"):
        for _, shape in collectives(text, kind):
            assert np.prod(shape) not in sizes, (kind, shape)
    # The gradients are summed along "data" in parts, as the kernels lie.
    summed = [np.prod(shape) for _, shape in collectives(text, "all-reduce")]
    assert {784 * 4, 8 * 5} <= set(summed)
    assert 784 * 8 not in summed


def test_a_gathered_mask_variable_would_be_seen():
    mesh = make_mesh(8, 2)
    masks = jax.ShapeDtypeStruct((784, 8), jnp.float32)
    masks = jax.ShapeDtypeStruct(
        masks.shape, masks.dtype, sharding=by_shape(mesh, masks)
    )
    gathering = jax.jit(lambda x: 2 * x, out_shardings=replicated(mesh))
    text = gathering.lower(masks).compile().as_text()
    assert ("f32", (784, 8)) in [
        (name, tuple(sorted(shape, reverse=True)))
        for name, shape in collectives(text, "all-gather")
    ]
