"""Pruning by magnitude, gradual or straight through, against NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from pruning import END, EVERY, FREEZE, STEPS, config, sparsity_by_hand
from tiny import by_path, dataset, host, parts, register

import scl_jax
from experiments.baselines.magnitude import (
    connections_at,
    gmp,
    gmp_uniform,
    magnitude_ste,
)
from experiments.methods import METHODS
from experiments.outcome import make_report
from experiments.train import train

WAYS = {"gmp": gmp, "gmp_uniform": gmp_uniform, "magnitude_ste": magnitude_ste}
SHAPES = {"Dense_0": (7, 9), "Dense_1": (9, 5)}
TOTAL = 7 * 9 + 9 * 5
DUE = (9, 14, 19, 24, END)
each_way = pytest.mark.parametrize("name", sorted(WAYS))


@pytest.fixture(autouse=True)
def _known_methods(monkeypatch):
    register(monkeypatch)
    for name, way in WAYS.items():
        monkeypatch.setitem(METHODS, name, way)


def connections_by_hand(taken, total, **schedule):
    return max(1, round((1 - sparsity_by_hand(taken, **schedule)) * total))


def top(magnitudes, count):
    """Return where the `count` largest entries are, the first of equals."""
    chosen = np.zeros(magnitudes.size, bool)
    chosen[np.argsort(-magnitudes.ravel(), kind="stable")[:count]] = True
    return chosen.reshape(magnitudes.shape)


def initial_params(shapes=SHAPES):
    random = np.random.default_rng(5)
    return {
        name: {
            "kernel": random.normal(size=shape).astype(np.float32),
            "bias": random.normal(size=shape[1]).astype(np.float32),
        }
        for name, shape in shapes.items()
    }


def random_gradients(params):
    """Return a gradient per step: what the loss is, linear in the weights."""
    random = np.random.default_rng(6)
    return jax.tree.map(
        lambda leaf: random.normal(size=(STEPS, *leaf.shape)).astype(np.float32),
        params,
    )


def make_steps(way):
    """Return the jitted function (trained, opt_state, gradients) -> both, history."""

    def loss(trained, gradient):
        effective = jax.tree.leaves(way.effective(trained))
        pairs = zip(effective, jax.tree.leaves(gradient), strict=True)
        return sum((leaf * g).sum() for leaf, g in pairs) + way.penalty(trained)

    def step(carry, gradient):
        trained, opt_state = carry
        seen = jax.grad(loss)(trained, gradient)
        updates, opt_state = way.tx.update(seen, opt_state, trained)
        trained = optax.apply_updates(trained, updates)
        return (trained, opt_state), (trained, seen)

    return jax.jit(
        lambda trained, opt_state, gradients: jax.lax.scan(
            step, (trained, opt_state), gradients
        )
    )


def trained_by(name, params=None, **changes):
    """Train on random gradients: return the method, every state, and what was seen.

    The states are MaskedParams of arrays with a leading axis, STEPS + 1 long.
    """
    params = initial_params() if params is None else params
    way = WAYS[name](config(**changes), STEPS)
    start = way.wrap(params)
    _, (after, seen) = make_steps(way)(
        start, way.tx.init(start), random_gradients(params)
    )
    history = jax.tree.map(lambda x, xs: np.stack([x, *xs]), start, after)
    return way, history, host(seen)


def kernels_of(tree):
    """Return the kernels, of all states, as (states, entries) of both layers."""
    return [
        np.asarray(tree[name]["kernel"]).reshape(-1, np.prod(shape))
        for name, shape in SHAPES.items()
    ]


def ranked(history, name):
    """Return (|w|, connected) of what is ranked together, a pair per ranking."""
    pairs = zip(kernels_of(history.weights), kernels_of(history.masks), strict=True)
    pairs = [(np.abs(kernel), masks >= 0) for kernel, masks in pairs]
    if name == "gmp_uniform":
        return pairs
    return [tuple(np.concatenate(both, 1) for both in zip(*pairs, strict=True))]


@pytest.mark.parametrize("every", [EVERY, 100])
@pytest.mark.parametrize("name", ["gmp", "gmp_uniform"])
def test_gradual_masks_are_the_largest_of_what_was_left(name, every):
    _, history, _ = trained_by(name, prune_every=every)
    steps = DUE if every == EVERY else (END,)
    for magnitudes, connected in ranked(history, name):
        left = np.ones(magnitudes.shape[1], bool)
        np.testing.assert_array_equal(connected[0], left)
        for taken in range(1, STEPS + 1):
            if taken in steps:
                count = connections_by_hand(taken, left.size)
                left = top(np.where(left, magnitudes[taken], -1), count)
                assert left.sum() == count
            np.testing.assert_array_equal(connected[taken], left)


def test_masks_of_ste_are_the_largest_of_all_at_every_step():
    # Steps as large as the weights, and many weights near the threshold.
    settings = {"sparsity": 0.5, "learning_rate": 10.0, "momentum": 0.0}
    _, history, _ = trained_by("magnitude_ste", **settings)
    [(magnitudes, connected)] = ranked(history, "magnitude_ste")
    for taken in range(1, STEPS + 1):
        count = connections_by_hand(taken, TOTAL, final=0.5)
        expected = top(magnitudes[min(taken, FREEZE)], count)
        np.testing.assert_array_equal(connected[taken], expected)
    # Not vacuous: the largest are others a step before the masks rest, and after.
    for taken in (FREEZE - 1, FREEZE + 1):
        assert (connected[-1] != top(magnitudes[taken], count)).any()


@each_way
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.85, 0.999])
def test_connections_at_the_end_are_exact(name, sparsity):
    way, history, _ = trained_by(name, sparsity=sparsity, prune_every=7)
    last = jax.tree.map(lambda xs: xs[-1], history)
    counts = [(np.asarray(mask) >= 0).sum() for mask in jax.tree.leaves(last.masks)]
    by_layer = [max(1, round((1 - sparsity) * size)) for size in (63, 45)]
    if name == "gmp_uniform":
        assert counts == by_layer
    else:
        assert sum(counts) == max(1, round((1 - sparsity) * TOTAL))
    folded = by_path(way.fold(last))
    weights = by_path(last.weights)
    for layer, count in zip(SHAPES, counts, strict=True):
        kernel = np.asarray(folded[f"{layer}/kernel"])
        mask = np.asarray(last.masks[layer]["kernel"])
        assert np.count_nonzero(kernel) == count
        np.testing.assert_array_equal(
            kernel, np.where(mask >= 0, weights[f"{layer}/kernel"], 0)
        )
        np.testing.assert_array_equal(folded[f"{layer}/bias"], weights[f"{layer}/bias"])
        assert last.masks[layer]["bias"] is None


@pytest.mark.parametrize("total", [20_000_003, 25_502_912])
@pytest.mark.parametrize("sparsity", [0.9, 0.98])
@pytest.mark.parametrize("jit", [jax.jit, lambda f: f], ids=["jit", "eager"])
def test_counts_beyond_float32_end_exactly_and_never_rise(jit, sparsity, total):
    # XLA rounds the products otherwise than NumPy does.
    schedule = {"final": sparsity, "begin": 0, "end": 700}
    settings = config(sparsity=sparsity, schedule_begin=0.0)
    count = connections_at(settings, 1000)
    found = jit(jax.vmap(lambda taken: count(taken, total)))(jnp.arange(1001))
    expected = [connections_by_hand(t, total, **schedule) for t in range(1001)]
    assert found[0] == total
    np.testing.assert_array_equal(found[700:], round((1 - sparsity) * total))
    np.testing.assert_allclose(found, expected, atol=16, rtol=0)
    assert (np.diff(found) <= 0).all()


@pytest.mark.parametrize("name", ["gmp", "gmp_uniform"])
def test_pruned_weight_never_returns_however_large_it_becomes(name):
    way = WAYS[name](config(), STEPS)
    trained = way.wrap(initial_params())
    opt_state = way.tx.init(trained)
    still = jax.tree.map(jnp.zeros_like, trained)
    update = jax.jit(way.tx.update)
    pruned, masks = {}, {}
    for taken in range(1, END + 1):
        updates, opt_state = update(still, opt_state, trained)
        trained = scl_jax.MaskedParams(*map(optax.apply_updates, trained, updates))
        masks = {layer: trained.masks[layer]["kernel"] for layer in SHAPES}
        if taken == DUE[0]:
            pruned = {layer: np.asarray(mask) < 0 for layer, mask in masks.items()}
            grown = {
                layer: {**leaves, "kernel": leaves["kernel"] - 99.0 * pruned[layer]}
                for layer, leaves in trained.weights.items()
            }
            trained = trained._replace(weights=grown)
    left = connections_by_hand(END, TOTAL)
    assert sum((mask >= 0).sum() for mask in masks.values()) == left
    for layer, mask in masks.items():
        assert pruned[layer].sum() > 5
        assert (np.asarray(mask)[pruned[layer]] < 0).all()


def test_pruned_weight_returns_straight_through():
    _, history, _ = trained_by("magnitude_ste")
    [(_, connected)] = ranked(history, "magnitude_ste")
    assert (connected[1:] & ~connected[:-1]).sum() > 5


@each_way
def test_gradient_is_masked_or_straight_through(name):
    params = initial_params()
    _, history, seen = trained_by(name)
    given = random_gradients(params)
    for layer in SHAPES:
        # The gradient of a step is taken with the masks before its update.
        connected = history.masks[layer]["kernel"][:-1] >= 0
        assert not connected[-1].all()
        expected = given[layer]["kernel"]
        if name != "magnitude_ste":
            expected = expected * connected
        np.testing.assert_array_equal(seen.weights[layer]["kernel"], expected)
        np.testing.assert_array_equal(seen.weights[layer]["bias"], given[layer]["bias"])
        assert not seen.masks[layer]["kernel"].any()


@each_way
def test_training_sees_the_folded_weights(name):
    way, history, _ = trained_by(name)
    last = jax.tree.map(lambda xs: xs[-1], history)
    jax.tree.map(np.testing.assert_array_equal, way.effective(last), way.fold(last))


@each_way
def test_weights_take_the_steps_of_sgd_and_masks_are_signs(name):
    settings = {"momentum": 0.75, "weight_decay": 0.01, "learning_rate": 0.1}
    _, history, seen = trained_by(name, **settings)
    for layer, leaf in itertools.product(SHAPES, ("kernel", "bias")):
        weight = history.weights[layer][leaf][0].astype(float)
        velocity = 0.0
        for taken in range(STEPS):
            decay = 0.01 * weight if leaf == "kernel" else 0.0
            velocity = 0.75 * velocity + seen.weights[layer][leaf][taken] + decay
            rate = 0.1 * 0.5 * (1 + np.cos(np.pi * taken / STEPS))
            weight = weight - rate * velocity
            np.testing.assert_allclose(
                history.weights[layer][leaf][taken + 1], weight, rtol=1e-4, atol=1e-5
            )
    for mask in jax.tree.leaves(history.masks):
        np.testing.assert_array_equal(np.abs(mask), np.ones_like(mask))


@each_way
def test_ties_are_exact(name):
    # No gradient reaches the weights, all of one magnitude: ranks are ties alone.
    signs = np.random.default_rng(1)
    params = {
        layer: {"kernel": np.float32(signs.choice([-0.5, 0.5], shape))}
        for layer, shape in SHAPES.items()
    }
    _, history, _ = trained_by(name, params, learning_rate=1e-30, weight_decay=0.0)
    for magnitudes, connected in ranked(history, name):
        assert (magnitudes == 0.5).all()
        count = round((1 - 0.85) * magnitudes.shape[1])
        assert connected[-1].sum() == count


@each_way
def test_steps_compile_once_and_go_on_from_their_state(name):
    params = initial_params()
    way = WAYS[name](config(), STEPS)
    given = random_gradients(params)
    start = jax.tree.map(jnp.asarray, way.wrap(params))
    carry = (start, way.tx.init(start))
    halves = [
        jax.tree.map(lambda xs, part=part: xs[part], given)
        for part in (slice(STEPS // 2), slice(STEPS // 2, None))
    ]
    # What is compiled refuses arguments of any other type.
    steps = make_steps(way).lower(*carry, halves[0]).compile()
    for half in halves:
        carry, _ = steps(*carry, half)
    _, history, _ = trained_by(name)
    jax.tree.map(
        lambda found, xs: np.testing.assert_allclose(found, xs[-1], rtol=1e-5),
        *(carry[0], history),
    )


@each_way
def test_update_needs_the_weights(name):
    way = WAYS[name](config(), STEPS)
    trained = way.wrap(initial_params())
    with pytest.raises(ValueError, match="update needs params"):
        way.tx.update(trained, way.tx.init(trained))


@each_way
def test_training_ends_with_the_sparsity(name):
    settings = config(model="two_layers", epochs=3, sparsity=0.9, prune_every=2)
    seen = []
    [trained] = train(settings, dataset(), name, on_epoch=seen.append)
    totals = make_report(settings, trained).totals
    sizes = (784 * 30, 30 * 10)
    assert totals.weights == sum(sizes)
    assert totals.nnz == round((1 - 0.9) * sum(sizes))
    assert [metrics.method for metrics in seen] == [name] * 3
    assert seen[-1].nnz == totals.nnz < seen[0].nnz
    kernels = [trained.folded[layer]["kernel"] for layer in ("Dense_0", "Dense_1")]
    if name == "gmp_uniform":
        assert [np.count_nonzero(kernel) for kernel in kernels] == [2352, 30]


@each_way
def test_training_on_several_devices_prunes_as_on_one(name):
    settings = {"model": "two_layers", "sparsity": 0.9, "batch_size": 4}
    ends = []
    for devices, model_parallel in ((1, 1), (4, 2)):
        changed = config(**settings, devices=devices, model_parallel=model_parallel)
        made = parts(changed, dataset().train, name)
        state = made.state
        for _ in range(changed.epochs):
            state, _ = made.epoch(state)
        ends.append(host(made.objective.method.fold(state.trained)))
    one, several = (
        np.concatenate([end[layer]["kernel"].ravel() for layer in end]) for end in ends
    )
    assert np.count_nonzero(one) == np.count_nonzero(several)
    # Sums in another order may turn a close ranking round.
    assert np.isclose(one, several, rtol=1e-3, atol=1e-5).mean() > 0.999
