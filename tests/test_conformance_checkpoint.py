"""Training states written and read elsewhere: Orbax, other meshes, other trainers."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from scl_jax import (
    add_connection_penalty,
    apply_masks,
    binary_masks,
    connection_count,
    fold_masks,
    keep_connections,
    mask_params,
    meet_budget,
    normalize_by_feature,
    partition,
)

FREEZE = 6
model = nn.Sequential([nn.Dense(16), nn.tanh, nn.Dense(8)])
random = np.random.default_rng(0)
x = random.normal(size=(32, 8)).astype("f4")
y = np.tanh(x @ random.normal(size=(8, 8)).astype("f4"))


def dense_loss(params):
    return jnp.mean(jnp.square(model.apply({"params": params}, x) - y))


def scl_loss(masked):
    return dense_loss(apply_masks(masked))


def optimizer(feature_axes=None):
    masks_tx = optax.chain(normalize_by_feature(), optax.sgd(0.02, 0.9))
    options = {"freeze_step": FREEZE, "feature_axes": feature_axes}
    return partition(optax.adam(1e-2), meet_budget(masks_tx, 0.5, **options))


def step_of(tx, loss):
    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    return step


def trained(step, params, state, steps):
    for _ in range(steps):
        # Eight devices on few cores: steps that run ahead can lock each other out.
        params, state = jax.block_until_ready(step(params, state))
    return params, state


def made_params():
    return model.init(jax.random.key(0), x)["params"]


def rows_on(sizes):
    """Return where an array lies: kernels by rows on all devices of a mesh."""
    devices = jax.devices()[: int(np.prod(sizes))]
    types = (AxisType.Auto,) * 2
    mesh = jax.make_mesh(sizes, ("data", "model"), axis_types=types, devices=devices)

    def where(leaf):
        kernel = leaf.shape in {(8, 16), (16, 8)}
        spec = PartitionSpec("data", "model") if kernel else PartitionSpec()
        return NamedSharding(mesh, spec)

    return where


def template_of(tree, where):
    """Return shapes with shardings, which is what Orbax restores into."""

    def shape(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where(leaf))

    return jax.tree.map(shape, tree)


def saved(path, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
    return path


def restored(path, template):
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, template)


@pytest.mark.parametrize("feature_axes", [None, -1])
def test_a_state_of_one_mesh_goes_on_on_another(tmp_path, feature_axes):
    tx = optimizer(feature_axes)
    step, on_eight, on_two = step_of(tx, scl_loss), rows_on((4, 2)), rows_on((1, 2))
    params = made_params()
    masked = mask_params(jax.device_put(params, jax.tree.map(on_eight, params)))
    state = trained(step, masked, tx.init(masked), FREEZE - 2)
    path = saved(tmp_path / "state", state)

    template = template_of(jax.eval_shape(lambda: state), on_two)
    again = restored(path, template)
    chex.assert_trees_all_equal_structs(again, state)
    chex.assert_trees_all_equal(again, state)
    for leaf in jax.tree.leaves(again):
        assert leaf.sharding.is_equivalent_to(on_two(leaf), leaf.ndim)
    # To and over the freeze: the budget's own state is what it goes on from.
    on, expected = (trained(step, *s, 4)[0] for s in (again, state))
    chex.assert_trees_all_equal(binary_masks(on), binary_masks(expected))
    chex.assert_trees_all_close(on, expected, rtol=1e-4, atol=1e-6)
    assert float(connection_count(on)) == 128


def test_a_trainer_without_masks_gets_the_folded_network(tmp_path):
    tx = optimizer()
    masked = mask_params(made_params())
    masked, _ = trained(step_of(tx, scl_loss), masked, tx.init(masked), FREEZE)
    path = saved(tmp_path / "masked", masked)

    # It knows the shapes of its own parameters; those of the masks follow.
    shapes = jax.eval_shape(lambda: mask_params(made_params()))
    params = fold_masks(restored(path, template_of(shapes, rows_on((1, 1)))))
    chex.assert_trees_all_equal_structs(params, made_params())
    kernels = [x for x in jax.tree.leaves(params) if x.ndim == 2]
    assert sum(np.count_nonzero(kernel) for kernel in kernels) == 128
    np.testing.assert_allclose(dense_loss(params), scl_loss(masked), rtol=1e-6)
    dense = optax.adam(1e-2)
    after, _ = trained(step_of(dense, dense_loss), params, dense.init(params), 10)
    assert dense_loss(after) < dense_loss(params)


def test_a_dense_checkpoint_becomes_a_masked_network_and_trains_on(tmp_path):
    dense, params = optax.adam(1e-2), made_params()
    step = step_of(dense, dense_loss)
    params, _ = trained(step, params, dense.init(params), 60)
    path = saved(tmp_path / "dense", params)

    where = rows_on((4, 2))
    shapes = template_of(jax.eval_shape(made_params), where)
    pretrained = restored(path, shapes)
    masked, tx = mask_params(pretrained), optimizer()
    for mask in jax.tree.leaves(masked.masks):
        assert mask.sharding.is_equivalent_to(where(mask), 2)
    # Nothing is lost to begin with: all is connected.
    np.testing.assert_allclose(scl_loss(masked), dense_loss(params), rtol=1e-5)
    after, _ = trained(step_of(tx, scl_loss), masked, tx.init(masked), 80)
    assert float(connection_count(after)) == 128
    untrained = dense_loss(made_params())
    assert scl_loss(after) < 0.5 * untrained


PLATFORMS = ("tpu", "cuda", "cpu")
MASKS_TX = {
    "budget": lambda: meet_budget(
        optax.chain(normalize_by_feature(), optax.sgd(0.02, 0.9)),
        0.5,
        freeze_step=FREEZE,
    ),
    "penalty": lambda: optax.chain(
        add_connection_penalty(1e-3),
        normalize_by_feature(),
        optax.sgd(0.02, 0.9),
        keep_connections(2, feature_axes=-1),
    ),
}


@pytest.mark.parametrize("make", MASKS_TX.values(), ids=[*MASKS_TX])
def test_whole_step_of_a_plain_trainer_is_exported_for_every_platform(make):
    tx, masked = partition(optax.adam(1e-2), make()), mask_params(made_params())
    leaves, structure = jax.tree.flatten((masked, tx.init(masked)))
    step = step_of(tx, scl_loss)

    def of_arrays(*leaves):
        return jax.tree.leaves(step(*structure.unflatten(leaves)))

    exported = jax.export.export(jax.jit(of_arrays), platforms=PLATFORMS)(*leaves)
    again = jax.export.deserialize(exported.serialize())
    assert again.platforms == PLATFORMS
    got, expected = leaves, leaves
    for _ in range(FREEZE + 1):
        got, expected = again.call(*got), of_arrays(*expected)
    masks = structure.unflatten(got)[0]
    chex.assert_trees_all_equal(
        binary_masks(masks), binary_masks(structure.unflatten(expected)[0])
    )
    assert 0 < float(connection_count(masks)) < 256
    chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-6)
