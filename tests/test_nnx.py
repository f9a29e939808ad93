"""The adapter for NNX: masks beside a model, and the object style against others."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import scl_jax
from scl_jax._paths import leaf_path, leaves_by_path
from scl_jax.nnx import TRAINED, Masked, MaskVariable, partition

X = jnp.asarray(np.random.default_rng(0).normal(size=(16, 6)).astype(np.float32))
Y = jnp.arange(16) % 3


class Network(nnx.Module):
    """A list of layers, statistics and a random stream."""

    def __init__(self, seed=0):
        rngs = nnx.Rngs(seed)
        self.layers = nnx.List([nnx.Linear(6, 6, rngs=rngs) for _ in range(2)])
        self.norm = nnx.BatchNorm(6, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.features(x))

    def features(self, x):
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return self.dropout(self.norm(x))


def start(path, leaf):
    """Return mask variables on both sides of the threshold."""
    random = np.random.default_rng(len(path) + leaf.size)
    return random.uniform(-0.05, 0.1, leaf.shape)


def linear(initial=0.1, **options):
    return Masked(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), initial=initial, **options)


def masks_tx(rate=1e-2):
    return optax.chain(scl_jax.normalize_by_feature(), optax.sgd(rate, 0.9))


def cross_entropy(logits):
    return optax.softmax_cross_entropy_with_integer_labels(logits, Y).mean()


def pure(tree):
    """Return copies as nested dictionaries of NumPy arrays, keys as bits."""

    def copy(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        return np.array(x)

    return jax.tree.map(copy, nnx.to_pure_dict(nnx.state(tree)))


def assert_same(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


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


# Calls


def test_call_has_the_gradients_of_the_method():
    s = np.array([[0.1, -0.1], [-0.2, 0.0], [0.3, -0.3]], np.float32)
    options = {"ste": scl_jax.LeakyReLU(0.5), "pruned_gradient": 0}
    model = linear(lambda path, leaf: s, **options)
    model.model.bias[...] = jnp.array([1.0, 2.0])
    w, x = np.asarray(model.model.kernel[...]), X[:, :3]
    np.testing.assert_allclose(
        model(x), np.asarray(x) @ (w * (s >= 0)) + [1.0, 2.0], rtol=1e-5, atol=1e-6
    )
    argnums = nnx.DiffState(0, TRAINED)
    gradient = nnx.grad(lambda model: model(x).sum(), argnums=argnums)(model)
    g = np.broadcast_to(np.asarray(x).sum(0)[:, None], (3, 2))
    np.testing.assert_allclose(
        gradient["model"]["kernel"][...], g * (s >= 0), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(
        gradient["masks"]["kernel"][...],
        g * w * np.where(s >= 0, 1.0, 0.5),
        rtol=1e-5,
        atol=1e-6,
    )


def test_call_leaves_every_weight_as_it_was_and_where_it_was():
    model = Masked(Network(), initial=-1.0)
    kernel, before = model.model.head.kernel, pure(nnx.state(model, nnx.Param))
    np.testing.assert_array_equal(model(X), np.zeros((16, 3)))
    nnx.jit(lambda model: model(X))(model)
    assert_same(pure(nnx.state(model, nnx.Param)), before)
    assert model.model.head.kernel is kernel


@pytest.mark.parametrize("around", ["eager", "jit", "grad", "tree mode"])
def test_statistics_and_random_streams_of_the_model_move_with_a_call(around):
    model, dense = Masked(Network()), Network()
    calls = {
        "eager": lambda m: m(X).sum(),
        "jit": nnx.jit(lambda m: m(X).sum()),
        "grad": nnx.grad(lambda m: m(X).sum()),
        "tree mode": nnx.jit(lambda m: m(X).sum(), graph=False),
    }
    calls[around](model)
    calls[around](dense)
    kept = nnx.Not(nnx.Param)
    assert_same(pure(nnx.state(model.model, kept)), pure(nnx.state(dense, kept)))
    assert int(model.model.dropout.rngs.count[...]) == 1
    assert np.asarray(model.model.norm.mean[...]).any()


def test_evaluation_mode_reaches_the_model():
    model = Masked(Network())
    model.eval()
    before = pure(model)
    assert_same(model(X), model(X))
    assert_same(pure(model), before)


def test_effective_model_has_the_methods_of_the_model():
    model = Masked(Network(), select=scl_jax.select("layers/.*/kernel"), initial=-1.0)
    model.eval()
    effective = model.effective()
    assert isinstance(effective, Network)
    np.testing.assert_array_equal(effective.features(X), np.zeros((16, 6)))


def test_kernel_that_two_layers_share_has_one_mask():
    class Tied(nnx.Module):
        def __init__(self):
            self.first = nnx.Linear(6, 6, use_bias=False, rngs=nnx.Rngs(0))
            self.second = nnx.Linear(6, 6, use_bias=False, rngs=nnx.Rngs(1))
            self.second.kernel = self.first.kernel

        def __call__(self, x):
            return self.second(self.first(x))

    model = Masked(Tied(), initial=start)
    [(_, mask)] = nnx.to_flat_state(nnx.state(model, MaskVariable))
    kernel = np.asarray(model.model.first.kernel[...]) * (mask[...] >= 0)
    np.testing.assert_allclose(model(X), X @ kernel @ kernel, rtol=1e-4, atol=1e-5)
    effective = model.effective()
    assert effective.first.kernel is effective.second.kernel


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


@pytest.mark.parametrize("part", [0, 0.25])
def test_pruned_weights_get_the_part_of_their_gradient_that_is_asked_for(part):
    dense = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    model = Masked(dense, initial=-1.0, pruned_gradient=part)

    def loss_fn(model):
        return model(jnp.ones((2, 4))).sum()

    gradient = nnx.grad(loss_fn, argnums=nnx.DiffState(0, TRAINED))(model)
    kernel = gradient["model"]["kernel"][...]
    np.testing.assert_allclose(kernel, np.full((4, 3), 2 * part), rtol=1e-6)


def test_part_of_the_gradient_that_is_out_of_range_is_refused():
    dense = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="Masked: pruned_gradient must be from 0 to 1"):
        Masked(dense, pruned_gradient=-1)
