"""A network trained on a mesh: the same as on one device, and no mask is gathered.

Tests of one kernel, and of each transform alone, are in test_sharding.
"""

import re
from collections import Counter
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from scl_jax import (
    apply_masks,
    binary_masks,
    connection_count,
    mask_params,
    normalize_by_feature,
    partition,
)

P = PartitionSpec
EXAMPLES, INPUTS, HIDDEN, CLASSES = 32, 24, 40, 8  # no two kernels or parts alike
STEPS = 20


class Layout(NamedTuple):
    """A mesh, and where the two kernels and the batch lie on it."""

    mesh: tuple[int, int]  # (data, model)
    first: PartitionSpec
    second: PartitionSpec
    batch: PartitionSpec = P("data", None)


LAYOUTS = {
    "data_parallel": Layout((8, 1), P(None, None), P(None, None)),
    # Weights lie in parts on all devices of the batch, and are gathered when used.
    "fsdp": Layout((8, 1), P("data", None), P("data", None)),
    "fsdp_features": Layout((8, 1), P(None, "data"), P(None, "data")),
    # A Dense cut by its outputs, then one cut by its inputs, whose sums are added up.
    "tensor_parallel": Layout((1, 8), P(None, "model"), P("model", None)),
    "both": Layout((2, 4), P("data", "model"), P("model", "data")),
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=[*LAYOUTS])


def made_params():
    random = np.random.default_rng(0)

    def kernel(*shape):
        return (random.normal(size=shape) / np.sqrt(shape[0])).astype("f4")

    first, second = kernel(INPUTS, HIDDEN), kernel(HIDDEN, CLASSES)
    bias = np.zeros(HIDDEN, "f4")
    return {"first": {"kernel": first, "bias": bias}, "second": {"kernel": second}}


def made_batch():
    random = np.random.default_rng(1)
    x = random.normal(size=(EXAMPLES, INPUTS)).astype("f4")
    y = random.normal(size=(EXAMPLES, CLASSES)).astype("f4")
    return x, y


def mesh_of(layout):
    types = (AxisType.Auto,) * 2
    return jax.make_mesh(layout.mesh, ("data", "model"), axis_types=types)


def kernel_shardings(layout):
    mesh = mesh_of(layout)
    return [NamedSharding(mesh, spec) for spec in (layout.first, layout.second)]


def placed(layout):
    """Return the parameters and the batch, each where the layout has it."""
    first, second = kernel_shardings(layout)
    everywhere = NamedSharding(first.mesh, P())
    where = {
        "first": {"kernel": first, "bias": everywhere},
        "second": {"kernel": second},
    }
    batch = jax.device_put(made_batch(), NamedSharding(first.mesh, layout.batch))
    return jax.device_put(made_params(), where), batch


def model(params, x):
    hidden = jnp.tanh(x @ params["first"]["kernel"] + params["first"]["bias"][None, :])
    return hidden @ params["second"]["kernel"]


def error(params, batch):
    x, y = batch
    return jnp.mean(jnp.square(model(params, x) - y))


def optimizer():
    masks_tx = optax.chain(normalize_by_feature(), optax.sgd(0.01, 0.9))
    return partition(optax.sgd(0.1, 0.9), masks_tx)


def step_of(tx, loss):
    def step(params, state, batch):
        updates, state = tx.update(jax.grad(loss)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    return step


def scl_loss(masked, batch):
    return error(apply_masks(masked), batch) + 1e-4 * connection_count(masked)


def trained(params, batch):
    masked, tx = mask_params(params), optimizer()
    state, step = tx.init(masked), jax.jit(step_of(tx, scl_loss))
    for _ in range(STEPS):
        # Eight devices on few cores: steps that run ahead can lock each other out.
        masked, state = jax.block_until_ready(step(masked, state, batch))
    return masked, state


def assert_kernels_lie(tree, shardings):
    """Check every leaf of a kernel's shape."""
    by_shape = dict(zip([(INPUTS, HIDDEN), (HIDDEN, CLASSES)], shardings, strict=True))
    found = [leaf for leaf in jax.tree.leaves(tree) if leaf.shape in by_shape]
    for leaf in found:
        where = by_shape[leaf.shape]
        assert leaf.sharding.is_equivalent_to(where, leaf.ndim), leaf.sharding
    return len(found)


@every_layout
def test_masks_and_momenta_lie_as_their_weights_after_init_and_update(layout):
    params, batch = placed(layout)
    shardings, tx = kernel_shardings(layout), optimizer()
    masked = mask_params(params)
    state = tx.init(masked)
    assert assert_kernels_lie((masked, state), shardings) == 8  # two of each kind
    for _ in range(2):
        masked, state = jax.jit(step_of(tx, scl_loss))(masked, state, batch)
        assert assert_kernels_lie((masked, state), shardings) == 8


@pytest.fixture(scope="module")
def on_one_device():
    return jax.tree.map(np.asarray, trained(made_params(), made_batch()))


def test_the_training_that_is_compared_prunes(on_one_device):
    masks = jax.tree.leaves(binary_masks(on_one_device[0]))
    assert all(0.1 < np.mean(mask) < 0.95 for mask in masks)


@every_layout
def test_twenty_steps_on_eight_devices_are_those_on_one(layout, on_one_device):
    masked, state = jax.tree.map(np.asarray, trained(*placed(layout)))
    chex.assert_trees_all_equal(binary_masks(masked), binary_masks(on_one_device[0]))
    both = zip(
        jax.tree.leaves((masked, state)), jax.tree.leaves(on_one_device), strict=True
    )
    for got, expected in both:
        difference = np.linalg.norm(got - expected) / np.linalg.norm(expected)
        assert difference <= 1e-6


def gathered(function, *args):
    """Count what the collectives other than sums make, by kind, type and shape."""
    text = jax.jit(function).lower(*args).compile().as_text()
    found = Counter()
    for line in text.splitlines():
        kinds = "all-gather|all-to-all|collective-permute"
        made = re.search(rf"= (.*?) ({kinds})(?:-start)?\(", line)
        if made:
            for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", made[1]):
                found[made[2], dtype, tuple(sorted(map(int, shape.split(","))))] += 1
    return found


@every_layout
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_no_more_is_gathered_than_without_masks(layout, dtype):
    params, batch = placed(layout)
    masked, tx, dense = (
        mask_params(params, dtype=dtype),
        optimizer(),
        optax.sgd(0.1, 0.9),
    )
    with_masks = gathered(step_of(tx, scl_loss), masked, tx.init(masked), batch)
    without = gathered(step_of(dense, error), params, dense.init(params), batch)
    assert with_masks == without


def test_a_gathered_mask_would_be_seen():
    params, batch = placed(LAYOUTS["tensor_parallel"])
    everywhere = NamedSharding(mesh_of(LAYOUTS["tensor_parallel"]), P())

    def gathering(masked, batch):
        masks = jax.lax.with_sharding_constraint(masked.masks, everywhere)
        return jax.grad(scl_loss)(masked._replace(masks=masks), batch)

    seen = gathered(gathering, mask_params(params), batch)
    assert ("all-gather", "f32", (CLASSES, HIDDEN)) in seen


KERNELS = {
    "dense": ((16, 6), P("x"), -1),
    "conv": ((3, 3, 16, 6), P(None, None, "x"), -1),
    "attention": ((16, 2, 4), P("x"), (-2, -1)),
    "equinox": ((6, 16), P(None, "x"), 0),
    "both_reduced_axes": ((4, 2, 6), P("x", "y"), -1),
    "stack": ((3, 16, 6), P(None, "x"), (0, -1)),
}


@pytest.mark.parametrize(
    ("shape", "spec", "features"), KERNELS.values(), ids=[*KERNELS]
)
def test_norm_of_a_feature_that_lies_on_several_devices_is_numpys(
    shape, spec, features
):
    sizes = (4, 2) if len(spec) > 1 and spec[0] else (8, 1)
    mesh = jax.make_mesh(sizes, ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    g = np.random.default_rng(0).normal(size=shape) ** 5  # sizes far apart
    axes = {axis % len(shape) for axis in np.atleast_1d(features)}
    others = tuple(axis for axis in range(len(shape)) if axis not in axes)
    expected = g / np.sqrt(np.mean(g**2, others, keepdims=True))
    there = jax.device_put(g.astype("f4"), NamedSharding(mesh, spec))
    # In parts, none of which holds a whole feature.
    parts = there.sharding.shard_shape(shape)
    assert all(parts[axis] == shape[axis] for axis in axes)
    assert np.prod(parts) == np.prod(shape) / 8
    update = jax.jit(normalize_by_feature(features, decay=0).update)
    got, _ = update(there, optax.EmptyState())
    np.testing.assert_allclose(got, expected, rtol=2e-6)
