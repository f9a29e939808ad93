"""The adapter for NNX: masks beside a model, and the object style against others."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from nnx_networks import Network, X, assert_same, linear, masks_tx, pure, start

import scl_jax
from scl_jax._paths import leaf_path, leaves_by_path
from scl_jax.nnx import TRAINED, Masked, MaskVariable, partition

Y = jnp.arange(16) % 3


def cross_entropy(logits):
    return optax.softmax_cross_entropy_with_integer_labels(logits, Y).mean()


def train(model, optimizer, steps=6):
    @nnx.jit
    def step(model, optimizer):
        def loss_fn(model):
            count = scl_jax.connection_count(model.masked_params())
            return cross_entropy(model(X)) + 1e-3 * count

        argnums = nnx.DiffState(0, TRAINED)
        optimizer.update(model, nnx.grad(loss_fn, argnums=argnums)(model))

    for _ in range(steps):
        step(model, optimizer)


def train_functional(graph, masked, others, tx, steps=6):
    """Train as plain JAX does; return the parameters and the other variables."""

    @jax.jit
    def step(masked, others, opt_state):
        def loss_fn(masked):
            params = scl_jax.apply_masks(masked)
            network = nnx.merge(graph, params, others, copy=True)
            loss = cross_entropy(network(X)) + 1e-3 * scl_jax.connection_count(masked)
            return loss, nnx.state(network, nnx.Not(nnx.Param))

        gradient, others = jax.grad(loss_fn, has_aux=True)(masked)
        updates, opt_state = tx.update(gradient, opt_state, masked)
        return optax.apply_updates(masked, updates), others, opt_state

    opt_state = tx.init(masked)
    for _ in range(steps):
        masked, others, opt_state = step(masked, others, opt_state)
    return masked, others


# Training


def test_object_style_trains_as_the_functional_style_bit_for_bit():
    def budget():
        return scl_jax.meet_budget(masks_tx(), 0.5, freeze_step=5)

    graph, params, others = nnx.split(Network(), nnx.Param, ...)
    masked = scl_jax.mask_params(params, initial=start)
    tx = scl_jax.partition(optax.adamw(1e-2), budget())
    masked, others = train_functional(graph, masked, others, tx)

    model = Masked(Network(), initial=start)
    moving = nnx.Not(nnx.RngKey)
    before = pure(nnx.state(model, moving))
    tx = partition(optax.adamw(1e-2), budget())
    train(model, nnx.Optimizer(model, tx, wrt=TRAINED))
    found = model.masked_params()
    assert_same(found.weights, nnx.to_pure_dict(nnx.as_pure(masked.weights)))
    assert_same(
        jax.tree.leaves(found.masks), jax.tree.leaves(nnx.as_pure(masked.masks))
    )
    assert_same(pure(model.model), pure(nnx.merge(graph, masked.weights, others)))
    # All of it has moved, statistics and the random stream too; the budget is met.
    after = pure(nnx.state(model, moving))
    moved = jax.tree.map(lambda x, y: bool((x != y).any()), before, after)
    assert all(jax.tree.leaves(moved))
    assert scl_jax.report(found).totals.connections == (36 + 36 + 18) // 2


def test_weight_decay_and_the_weights_optimizer_never_touch_a_mask_variable():
    decayed = optax.chain(
        optax.clip_by_global_norm(0.1), optax.adamw(1e-2, weight_decay=10.0)
    )
    model = Masked(Network())
    before = pure(model.masks)
    tx = partition(decayed, optax.set_to_zero())
    train(model, nnx.Optimizer(model, tx, wrt=TRAINED))
    assert_same(pure(model.masks), before)

    # All masks are 1: the weights train as they do without them.
    dense = Network()
    optimizer = nnx.Optimizer(dense, decayed, wrt=nnx.Param)

    @nnx.jit
    def step(dense, optimizer):
        optimizer.update(dense, nnx.grad(lambda m: cross_entropy(m(X)))(dense))

    for _ in range(6):
        step(dense, optimizer)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, pure(model.model), pure(dense))


def test_transforms_see_the_paths_inside_the_model():
    seen = {}

    def note(name):
        def update(updates, state, params=None):
            leaves, _ = jax.tree_util.tree_flatten_with_path((updates, params))
            seen[name] = [leaf_path(path[1:]) for path, _ in leaves]
            return updates, state

        return optax.GradientTransformation(lambda _: optax.EmptyState(), update)

    model = Masked(Network(), select=scl_jax.select("layers/[01]/kernel"))
    optimizer = nnx.Optimizer(
        model, partition(note("weights"), note("masks")), wrt=TRAINED
    )
    train(model, optimizer, 1)
    weights = sorted(leaves_by_path(nnx.state(Network(), nnx.Param)))
    assert sorted(seen["weights"]) == sorted(2 * weights)
    assert seen["masks"] == 2 * ["layers/0/kernel", "layers/1/kernel"]


def test_labels_from_types_fail_where_partition_does_not():
    def by_type(tree):
        return jax.tree.map(
            lambda x: "masks" if isinstance(x, MaskVariable) else "weights",
            tree,
            is_leaf=lambda x: isinstance(x, nnx.Variable),
        )

    transforms = {"weights": optax.adam(1e-2), "masks": optax.sgd(1e-2, 0.9)}
    model = linear()
    labelled = optax.partition(transforms, by_type)
    optimizer = nnx.Optimizer(model, labelled, wrt=TRAINED)
    gradient = jax.tree.map(jnp.ones_like, nnx.state(model, TRAINED))
    # What is a variable when the state is made is an array when it is updated.
    with pytest.raises((ValueError, TypeError)):
        optimizer.update(model, gradient)
    ours = partition(transforms["weights"], transforms["masks"])
    nnx.Optimizer(model, ours, wrt=TRAINED).update(model, gradient)
    np.testing.assert_allclose(model.masks["kernel"][...], 0.09, rtol=1e-6)


def test_partition_survives_tree_map_params():
    tx = partition(optax.adam(1e-2), optax.sgd(1e-2, 0.9))
    params = nnx.as_pure(nnx.state(linear(), TRAINED))
    ones = optax.tree_map_params(tx, jnp.ones_like, tx.init(params))
    mu, trace = (optax.tree_utils.tree_get(ones, name) for name in ("mu", "trace"))
    np.testing.assert_array_equal(mu["kernel"], np.ones((3, 2)))
    np.testing.assert_array_equal(trace["kernel"], np.ones((3, 2)))


# What is kept


def test_masks_are_a_type_of_their_own_that_filters_find():
    rule = scl_jax.select("layers/1/kernel", "head/bias")
    model = Masked(Network(), select=rule, initial=0.25, dtype=jnp.bfloat16)
    found = nnx.to_flat_state(nnx.state(model, MaskVariable))
    assert [path for path, _ in found] == [
        ("masks", "head", "bias"),
        ("masks", "layers", 1, "kernel"),
    ]
    assert {(v[...].dtype.name, float(v[...].min())) for _, v in found} == {
        ("bfloat16", 0.25)
    }
    assert_same(
        pure(nnx.state(model, nnx.Param))["model"],
        pure(nnx.state(Network(), nnx.Param)),
    )


def test_mask_variable_and_its_momentum_are_sharded_as_the_weight():
    mesh = jax.make_mesh(
        (2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    kernel_init = nnx.with_partitioning(nnx.initializers.ones, (None, "model"))
    expected = NamedSharding(mesh, PartitionSpec(None, "model"))
    with jax.set_mesh(mesh):
        dense = nnx.Linear(6, 8, kernel_init=kernel_init, rngs=nnx.Rngs(0))
        model = Masked(dense)
        mask = model.masks["kernel"]
        tx = partition(optax.sgd(0.1), optax.sgd(0.1, 0.9))
        optimizer = nnx.Optimizer(model, tx, wrt=TRAINED)

        @nnx.jit
        def step(model, optimizer):
            argnums = nnx.DiffState(0, TRAINED)
            gradient = nnx.grad(lambda m: m(X).sum(), argnums=argnums)(model)
            optimizer.update(model, gradient)

        step(model, optimizer)
    trace = optax.tree_utils.tree_get(optimizer.opt_state, "trace")["kernel"]
    assert mask.get_metadata("out_sharding") == dense.kernel.get_metadata(
        "out_sharding"
    )
    for x in (mask[...], trace[...]):
        assert x.sharding.is_equivalent_to(expected, 2)
