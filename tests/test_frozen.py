"""Masks at rest: they and pruned weights do not move; the step is the dense one."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from tiny import config, dataset, host, register

import scl_jax.linen
import scl_jax.nnx
from experiments.methods import METHODS
from experiments.train import train
from scl_jax import (
    MaskedParams,
    apply_masks,
    fold_masks,
    mask_params,
    normalize_by_feature,
    partition,
)

WEIGHTS = {
    "sgd": lambda: optax.sgd(0.1),
    "momentum": lambda: optax.chain(
        optax.add_decayed_weights(0.01), optax.sgd(0.1, 0.9)
    ),
    "adamw": lambda: optax.adamw(0.01, weight_decay=0.1),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1, 0.9)),
}
every_optimizer = pytest.mark.parametrize("make", WEIGHTS.values(), ids=[*WEIGHTS])


def masks_tx():
    return optax.chain(normalize_by_feature(), optax.sgd(0.05, 0.9))


def start():
    random = np.random.default_rng(0)
    params = {
        "kernel": jnp.asarray(random.normal(size=(6, 4)), jnp.float32),
        "bias": jnp.ones(4),
    }
    return mask_params(params, initial=lambda path, leaf: 0.3 * leaf)


INPUTS = np.random.default_rng(1).normal(size=(8, 6)).astype(np.float32)


def loss(params):
    return jnp.mean(jnp.square(INPUTS @ params["kernel"] + params["bias"][None] - 1))


def trained(tx, masked, state, steps, effective=apply_masks):
    """Train; return what it was after each step, and the state."""

    @jax.jit
    def step(masked, state):
        gradient = jax.grad(lambda m: loss(effective(m)))(masked)
        updates, state = tx.update(gradient, state, masked)
        return optax.apply_updates(masked, updates), state

    seen = [masked]
    for _ in range(steps):
        masked, state = step(masked, state)
        seen.append(masked)
    return seen, state


def moving(make):
    """Return an optimizer, what three steps of it came to, and its state."""
    tx = partition(make(), masks_tx())
    seen, state = trained(tx, start(), tx.init(start()), 3)
    pruned = seen[-1].masks["kernel"] < 0
    assert 0.2 < pruned.mean() < 0.8
    # Some have been pruned just now: they still have a momentum.
    assert (pruned & (seen[0].masks["kernel"] >= 0)).any()
    return seen[-1], state, pruned


@every_optimizer
def test_masks_their_state_and_pruned_weights_rest(make):
    masked, state, pruned = moving(make)
    tx = partition(make(), masks_tx(), frozen=True)
    seen, after = trained(tx, masked, state, 4)
    for old, new in itertools.pairwise(seen):
        chex.assert_trees_all_equal(old.masks, new.masks)
        still = old.weights["kernel"] == new.weights["kernel"]
        np.testing.assert_array_equal(still, pruned)
    chex.assert_trees_all_equal_structs(state, after)
    chex.assert_trees_all_equal(
        state.inner_states["masks"], after.inner_states["masks"]
    )


@every_optimizer
def test_connected_weights_train_as_if_the_pruned_were_not_there(make):
    # Of plain parameters, in which zeros are held, and no mask is known.
    masked, state, pruned = moving(make)
    tx, keep = make(), ~pruned
    params = fold_masks(masked)
    own = state.inner_states["weights"].inner_state
    expected = [params]
    for _ in range(4):
        gradient = jax.grad(loss)(params)
        gradient["kernel"] *= keep
        updates, own = tx.update(gradient, own, params)
        updates["kernel"] *= keep
        params = optax.apply_updates(params, updates)
        expected.append(params)
    frozen = partition(make(), masks_tx(), frozen=True)
    rested = masked._replace(weights=fold_masks(masked))
    for given, effective in (
        (rested, apply_masks),
        (rested, lambda m: m.weights),  # the dense step
    ):
        seen, _ = trained(frozen, given, state, 4, effective)
        for got, wanted in zip(seen, expected, strict=True):
            chex.assert_trees_all_close(fold_masks(got), wanted, rtol=1e-5, atol=1e-6)
            chex.assert_trees_all_equal(got.weights, fold_masks(got))


def test_weight_that_is_zero_and_connected_moves():
    masked = MaskedParams({"w": jnp.zeros(2)}, {"w": jnp.array([0.1, -0.1])})
    tx = partition(optax.sgd(1.0), optax.sgd(1.0), frozen=True)
    gradient = MaskedParams({"w": jnp.ones(2)}, {"w": jnp.ones(2)})
    updates, _ = tx.update(gradient, tx.init(masked), masked)
    assert updates.weights["w"].tolist() == [-1.0, 0.0]
    assert updates.masks["w"].tolist() == [0.0, 0.0]


def test_linen_module_rests():
    model = scl_jax.linen.masked(nn.Dense)(4)
    params = model.init(jax.random.key(0), INPUTS)["params"]
    params["kernel_mask"] = 0.3 * params["kernel"]
    moved = scl_jax.linen.partition(optax.sgd(0.1, 0.9), masks_tx())
    frozen = scl_jax.linen.partition(optax.sgd(0.1, 0.9), masks_tx(), frozen=True)
    gradient = jax.grad(
        lambda p: jnp.mean(jnp.square(model.apply({"params": p}, INPUTS) - 1))
    )(params)
    _, state = moved.update(gradient, moved.init(params), params)
    updates, _ = frozen.update(gradient, state, params)
    pruned = params["kernel_mask"] < 0
    assert not updates["kernel_mask"].any()
    np.testing.assert_array_equal(updates["kernel"] == 0, pruned)
    assert updates["bias"].all()


def test_nnx_module_rests_when_its_optimizer_is_given_the_other_transform():
    model = scl_jax.nnx.Masked(nnx.Linear(6, 4, rngs=nnx.Rngs(0)))
    weights, _ = model.masked_params()
    given = mask_params(weights, initial=lambda path, leaf: 0.3 * leaf)
    model.set_masked_params(given)
    pair = [
        scl_jax.nnx.partition(optax.sgd(0.1, 0.9), masks_tx(), frozen=frozen)
        for frozen in (False, True)
    ]
    optimizer = nnx.Optimizer(model, pair[0], wrt=scl_jax.nnx.TRAINED)

    def loss_fn(model):
        return jnp.mean(jnp.square(model(INPUTS) - 1))

    def step():
        argument = nnx.DiffState(0, scl_jax.nnx.TRAINED)
        optimizer.update(model, nnx.grad(loss_fn, argnums=argument)(model))
        return host(model.masked_params())

    before = step()
    optimizer.tx = pair[1]
    after = step()
    pruned = before.masks["kernel"] < 0
    assert 0 < pruned.mean() < 1
    np.testing.assert_array_equal(after.masks["kernel"], before.masks["kernel"])
    still = after.weights["kernel"] == before.weights["kernel"]
    np.testing.assert_array_equal(still, pruned)


@pytest.mark.parametrize("frozen", [1, None, "yes", np.True_])
@pytest.mark.parametrize(
    "make", [partition, scl_jax.linen.partition, scl_jax.nnx.partition]
)
def test_what_is_no_bool_is_refused(make, frozen):
    with pytest.raises(TypeError, match="frozen must be True or False, got"):
        make(optax.sgd(0.1), optax.sgd(0.1), frozen=frozen)


def test_update_without_parameters_is_refused():
    tx = partition(optax.sgd(0.1), optax.sgd(0.1), frozen=True)
    state = tx.init(start())
    with pytest.raises(ValueError, match="frozen reads the mask variables; call upd"):
        tx.update(start(), state)


# In the training loop


@pytest.mark.parametrize("method", ["scl", "autoprune"])
@pytest.mark.parametrize("model", ["linear", "normalized"])  # scanned, dispatched
def test_epochs_of_masks_at_rest_come_to_the_same_network(monkeypatch, method, model):
    register(monkeypatch)
    # Its gradients are not normalized, and tiny.
    faster = {"mask_learning_rate": 1.0} if method == "autoprune" else {}
    settings = config(model=model, epochs=4, penalty=0.01, **faster)
    data = dataset(held_out=10)
    (fast,) = train(settings, data, method)
    make = METHODS[method]
    monkeypatch.setitem(
        METHODS, method, lambda *given: make(*given)._replace(freeze_step=None)
    )
    (slow,) = train(settings, data, method)
    chex.assert_trees_all_equal(fast.trained.masks, slow.trained.masks)
    chex.assert_trees_all_close(fast.folded, slow.folded, rtol=1e-3, atol=1e-5)
    chex.assert_trees_all_close(fast.statistics, slow.statistics, rtol=1e-4, atol=1e-5)
    assert [m.nnz for m in fast.history] == [m.nnz for m in slow.history]
    zero = [(w == 0).mean() for w in jax.tree.leaves(host(fast.trained.weights))]
    assert max(zero) > 0.01  # the pruned weights of the one are zero
    assert not np.array_equal(
        *(jax.tree.leaves(t.trained.weights)[-1] for t in (fast, slow))
    )
