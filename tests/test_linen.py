"""Masked Linen modules: their parameters, what they compute, and how they train."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.core import FrozenDict, freeze
from flax.training.train_state import TrainState

import scl_jax
from scl_jax.linen import join, masked, partition, split


class Net(nn.Module):
    width: int = 8
    activation: object = nn.relu
    dtype: object = None

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(self.width, dtype=self.dtype)(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.Dropout(0.5, deterministic=not train)(self.activation(x))
        return nn.Dense(3, dtype=self.dtype)(x)


class Coder(nn.Module):
    def setup(self):
        self.first, self.second = nn.Dense(4), nn.Dense(5)

    def encode(self, x):
        return self.first(x)

    def __call__(self, x):
        return self.second(self.encode(x))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(x.shape[-1])(nn.relu(nn.Dense(7)(x))), None


class Stack(nn.Module):
    block: object

    @nn.compact
    def __call__(self, x):
        stack = nn.scan(
            nn.remat(self.block),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        return nn.Dense(2)(stack()(x, None)[0])


def mixed(path, leaf):
    """Start values of both signs, different for every leaf."""
    rng = np.random.default_rng(len(path) + leaf.size)
    return rng.normal(size=leaf.shape)


def inputs():
    return jax.random.normal(jax.random.key(1), (6, 5))


def close(a, b):
    chex.assert_trees_all_close(a, b, rtol=1e-5, atol=1e-6)


# What init makes


def test_init_adds_mask_variables_beside_the_kernels_and_changes_nothing_else():
    dense = Net().init(jax.random.key(0), inputs())
    variables = masked(Net()).init(jax.random.key(0), inputs())
    weights, params = dict(dense["params"]), variables["params"]
    for layer in ("Dense_0", "Dense_1"):
        mask = jnp.full_like(weights[layer]["kernel"], 0.1)
        weights[layer] = weights[layer] | {"kernel_mask": mask}
    chex.assert_trees_all_equal(params, weights)
    chex.assert_trees_all_equal(variables["batch_stats"], dense["batch_stats"])


def test_weights_survive_init_where_masks_start_pruned():
    model = masked(Coder(), initial=mixed)
    pair = split(model.init(jax.random.key(0), inputs())["params"])
    dense = Coder().init(jax.random.key(0), inputs())["params"]
    chex.assert_trees_all_equal(pair.weights, dense)
    expected = scl_jax.mask_params(dense, initial=mixed)
    chex.assert_trees_all_equal(pair.masks, expected.masks)


def test_select_and_dtype_are_those_of_mask_params():
    rule = scl_jax.exclude("Dense_1/kernel")
    model = masked(Net(), select=rule, dtype=jnp.bfloat16)
    masks = split(model.init(jax.random.key(0), inputs())["params"]).masks
    assert masks["Dense_1"]["kernel"] is None
    assert masks["Dense_0"]["kernel"].dtype == jnp.bfloat16


def test_init_works_on_shapes():
    model = masked(Net())
    shapes = jax.eval_shape(model.init, jax.random.key(0), inputs())
    made = model.init(jax.random.key(0), inputs())
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, made)


def test_mask_variables_have_the_partitioning_of_their_weights():
    kernel_init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
    model = masked(nn.Dense(4, kernel_init=kernel_init))
    variables = model.init(jax.random.key(0), inputs())
    specs = nn.get_partition_spec(variables)["params"]
    in_out = jax.sharding.PartitionSpec("in", "out")
    assert specs["kernel_mask"] == specs["kernel"] == in_out
    for params in (variables["params"], nn.unbox(variables["params"])):
        assert np.any(model.apply({"params": params}, inputs()))
        pruned = jax.tree.map(lambda s: -s, params["kernel_mask"])
        nothing = params | {"kernel_mask": pruned}
        assert not np.any(model.apply({"params": nothing}, inputs()))


# What apply computes: that of the dense module, with W * H(S)


@pytest.mark.parametrize("method", ["__call__", "encode"])
def test_every_method_computes_with_masked_weights(method):
    model = masked(Coder(), initial=mixed)
    params = model.init(jax.random.key(0), inputs())["params"]
    found = model.apply({"params": params}, inputs(), method=method)
    folded = scl_jax.fold_masks(split(params))
    close(found, Coder().apply({"params": folded}, inputs(), method=method))
    dense = split(params).weights
    unmasked = Coder().apply({"params": dense}, inputs(), method=method)
    assert not np.allclose(found, unmasked)


def test_statistics_dropout_and_gradient_are_those_of_apply_masks():
    ste = scl_jax.Softplus(2.0)
    model = masked(Net(), initial=mixed, ste=ste)
    variables = model.init(jax.random.key(0), inputs())
    stats, rngs = variables["batch_stats"], {"dropout": jax.random.key(3)}

    def loss(apply, params):
        variables = {"params": params, "batch_stats": stats}
        y, new = apply(
            variables, inputs(), train=True, mutable=["batch_stats"], rngs=rngs
        )
        return jnp.sum(jnp.sin(y)), new

    @jax.jit
    def by_module(params):
        return jax.value_and_grad(lambda p: loss(model.apply, p), has_aux=True)(params)

    def by_hand(pair):
        return loss(Net().apply, scl_jax.apply_masks(pair, ste=ste))

    found, gradient = by_module(variables["params"])
    pair = split(variables["params"])
    expected, by_pair = jax.value_and_grad(by_hand, has_aux=True)(pair)
    close(found, expected)
    close(gradient, join(by_pair))
    assert np.any(gradient["Dense_0"]["kernel_mask"])


def test_computes_in_bfloat16_and_keeps_float32():
    model = masked(Net(dtype=jnp.bfloat16), initial=mixed)
    variables = model.init(jax.random.key(0), inputs())
    assert model.apply(variables, inputs()).dtype == jnp.bfloat16
    gradient = jax.grad(
        lambda p: model.apply(variables | {"params": p}, inputs()).sum().astype(float)
    )(variables["params"])
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_scanned_and_rematerialized_layers_are_masked(where):
    block = masked(Block, initial=mixed) if where == "inside" else Block
    model = Stack(block)
    model = masked(model, initial=mixed) if where == "outside" else model
    params = jax.jit(model.init)(jax.random.key(0), inputs())["params"]
    pair = split(params)
    dense = Stack(Block).init(jax.random.key(0), inputs())["params"]
    chex.assert_trees_all_equal_shapes(pair.weights, dense)
    [scanned] = {name for name in params if name.startswith("Scan")}
    assert params[scanned]["Dense_0"]["kernel_mask"].shape == (3, 7, 5)
    assert (pair.masks["Dense_0"]["kernel"] is None) == (where == "inside")

    def by_hand(pair):
        folded = scl_jax.apply_masks(pair)
        return jnp.sum(Stack(Block).apply({"params": folded}, inputs()) ** 2)

    def by_module(params):
        return jnp.sum(model.apply({"params": params}, inputs()) ** 2)

    found, expected = jax.grad(by_module)(params), jax.grad(by_hand)(pair)
    close(split(found), expected)


def test_a_class_inside_a_module_keeps_the_names_that_flax_gives():
    class Outer(nn.Module):
        dense: object

        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(self.dense(4)(x))

    params = Outer(masked(nn.Dense)).init(jax.random.key(0), inputs())["params"]
    dense = Outer(nn.Dense).init(jax.random.key(0), inputs())["params"]
    chex.assert_trees_all_equal(split(params).weights, dense)
    assert split(params).masks["Dense_0"] == {"kernel": None, "bias": None}


def test_instances_that_hold_modules_and_names_are_wrapped():
    model = masked(nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(2)], name="net"))
    params = model.init(jax.random.key(0), inputs())["params"]
    assert model.name == "net"
    assert sorted(params) == ["layers_0", "layers_2"]
    assert all("kernel_mask" in layer for layer in params.values())


# split and join


@pytest.mark.parametrize("wrap", [dict, freeze], ids=["dict", "FrozenDict"])
def test_join_puts_together_what_split_took_apart(wrap):
    params = wrap(masked(Net()).init(jax.random.key(0), inputs())["params"])
    pair = split(params)
    assert all(
        isinstance(tree, FrozenDict if wrap is freeze else dict) for tree in pair
    )
    chex.assert_trees_all_equal(join(pair), params)


def test_a_submodule_called_like_a_mask_stays_a_submodule():
    weights = {"token": {"kernel": jnp.ones((2, 2))}, "token_mask": {"kernel": 1.0}}
    params = join(scl_jax.mask_params(weights, select=scl_jax.select("token/kernel")))
    chex.assert_trees_all_equal(split(params).weights, weights)


def test_trained_dense_parameters_start_a_masked_module():
    dense = Coder().init(jax.random.key(0), inputs())
    params = join(scl_jax.mask_params(dense["params"]))
    found = masked(Coder()).apply({"params": params}, inputs())
    close(found, Coder().apply(dense, inputs()))


# The optimizer


def usual_decay(params):
    return jax.tree.map(lambda x: x.ndim > 1, params)


def test_weights_train_as_in_the_dense_network_and_masks_are_not_decayed():
    params = masked(Net(), initial=mixed).init(jax.random.key(0), inputs())["params"]
    seen = []

    def decayed(tree):
        seen.append(jax.tree.structure(tree))
        return usual_decay(tree)

    def make(mask):
        clip = optax.clip_by_global_norm(0.1)
        return optax.chain(clip, optax.adamw(0.1, weight_decay=0.5, mask=mask))

    masks_tx = optax.chain(scl_jax.normalize_by_feature(), optax.sgd(0.1))
    gradient = jax.tree.map(jnp.cos, params)
    tx = partition(make(decayed), masks_tx)
    updates, _ = jax.jit(tx.update)(gradient, tx.init(params), params)
    pair, gradients, found = split(params), split(gradient), split(updates)
    dense_tx = make(usual_decay)
    dense, _ = dense_tx.update(
        gradients.weights, dense_tx.init(pair.weights), pair.weights
    )
    close(found.weights, dense)
    assert set(seen) == {jax.tree.structure(pair.weights)}
    masks, _ = masks_tx.update(gradients.masks, masks_tx.init(pair.masks))
    close(found.masks, masks)


def test_masks_meet_a_budget_under_an_unchanged_train_state():
    model = masked(Coder())
    masks_tx = optax.chain(scl_jax.normalize_by_feature(), optax.sgd(0.05))
    masks_tx = scl_jax.meet_budget(masks_tx, 10, freeze_step=20)
    state = TrainState.create(
        apply_fn=model.apply,
        params=model.init(jax.random.key(0), inputs())["params"],
        tx=partition(optax.adam(1e-2), masks_tx),
    )

    def loss(params):
        return jnp.mean((model.apply({"params": params}, inputs()) - 1.0) ** 2)

    @jax.jit
    def step(state):
        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    before = loss(state.params)
    for _ in range(25):
        state = step(state)
    assert int(scl_jax.connection_count(split(state.params))) == 10
    assert loss(state.params) < before


def test_optimizer_works_inside_multi_steps_and_its_state_can_be_mapped():
    params = masked(Coder()).init(jax.random.key(0), inputs())["params"]
    tx = partition(optax.sgd(0.1, 0.9), optax.sgd(0.1, 0.9))
    ones = optax.tree.map_params(tx, jnp.ones_like, tx.init(params))
    assert {float(x.mean()) for x in jax.tree.leaves(ones)} == {1.0}
    assert len(jax.tree.leaves(ones)) == len(jax.tree.leaves(params))
    gradient = jax.tree.map(jnp.sin, params)
    expected, _ = tx.update(gradient, tx.init(params), params)
    multi = optax.MultiSteps(tx, 2)
    state = multi.init(params)
    for weight in (0.5, 1.5):
        scaled = jax.tree.map(lambda g, w=weight: w * g, gradient)
        updates, state = multi.update(scaled, state, params)
    close(updates, expected)


@pytest.mark.parametrize("part", [0, 0.25])
@pytest.mark.parametrize("wrap", ["instance", "class"])
def test_pruned_weights_get_the_part_of_their_gradient_that_is_asked_for(part, wrap):
    options = {"initial": -1.0, "pruned_gradient": part}
    model = (
        masked(nn.Dense(3), **options)
        if wrap == "instance"
        else masked(nn.Dense, **options)(3)
    )
    x = jnp.ones((2, 4))
    params = model.init(jax.random.key(0), x)["params"]
    gradient = jax.grad(lambda params: model.apply({"params": params}, x).sum())(params)
    np.testing.assert_allclose(gradient["kernel"], np.full((4, 3), 2 * part), rtol=1e-6)


def test_part_of_the_gradient_that_is_out_of_range_is_refused():
    with pytest.raises(ValueError, match="masked: pruned_gradient must be from 0 to 1"):
        masked(nn.Dense(3), pruned_gradient=2)
