"""ST-3: what the loss sees of the kernels at every step, and how they are trained."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from pruning import END, FREEZE, STEPS, sparsity_by_hand
from pruning import config as pruning_config
from tiny import dataset, register

import scl_jax
from experiments.baselines.st3 import st3
from experiments.outcome import make_report
from experiments.train import train

SHAPES = {"a": (5, 4), "b": (3, 2, 5, 6), "query": (6, 3, 2)}
# The last axes of a kernel, which tell its features apart.
FEATURES = {"a": 4, "b": 6, "query": 6, "Dense_0": 30, "Dense_1": 10}
TOTAL = 5 * 4 + 3 * 2 * 5 * 6 + 6 * 3 * 2
RATE, DECAY, MOMENTUM = 0.125, 0.25, 0.5


@pytest.fixture(autouse=True)
def _method(monkeypatch):
    register(monkeypatch)


def config(**changes):
    """Return a config of a network whose queries have two feature axes."""
    text = {"dataset": "python_docs", "model": "tiny_text"}
    return pruning_config(**{**text, **changes})


def random_params(seed, scale=None):
    """Return kernels of other sizes each, or of one; and biases."""
    random = np.random.default_rng(seed)
    return {
        name: {
            "kernel": np.float32(random.normal(size=shape) * (scale or 1 + i)),
            "bias": np.float32(random.normal(size=shape[-1])),
        }
        for i, (name, shape) in enumerate(SHAPES.items())
    }


def kernels(tree):
    return {name: np.array(leaves["kernel"]) for name, leaves in tree.items()}


def flat(tree):
    return np.concatenate([kernel.ravel() for kernel in kernels(tree).values()])


def largest(weights, count):
    """Mark the `count` largest magnitudes of all kernels."""
    size = np.abs(flat(weights))
    border = np.sort(size)[-count]
    return {name: np.abs(kernel) >= border for name, kernel in kernels(weights).items()}


def pruned_to(way, params, count):
    """Return what is trained, with the masks of the `count` largest weights."""
    masks = {
        name: {"kernel": np.float32(np.where(connected, 1, -1)), "bias": None}
        for name, connected in largest(params, count).items()
    }
    wrapped = way.wrap(params)
    assert jax.tree.structure(masks) == jax.tree.structure(wrapped.masks)
    return wrapped._replace(masks=masks)


def shrunk_by_hand(weights, marked):
    """Return the kernels that the loss is to see, in double precision."""
    pruned = np.concatenate([~connected.ravel() for connected in marked.values()])
    threshold = np.abs(flat(weights))[pruned].max(initial=0)
    shrunk = {}
    for name, kernel in kernels(weights).items():
        w = kernel.astype(float)
        columns, connected = (x.reshape(-1, FEATURES[name]) for x in (w, marked[name]))
        size = np.abs(columns)
        kept = np.where(connected, size, 0).mean(0) + 1e-6
        scale = 1.01 / (kept / (size.mean(0) + 1e-6) + 0.01)
        soft = np.sign(columns) * np.maximum(size - threshold, 0)
        shrunk[name] = (scale * soft).reshape(w.shape)
    return shrunk


def connections_by_hand(taken, **schedule):
    return round((1 - sparsity_by_hand(taken, **schedule)) * TOTAL)


def trained_by(params=None, **changes):
    """Train on random gradients: return the method, every state, gradients, seen.

    The states are MaskedParams of arrays with a leading axis, STEPS + 1 long.
    """
    params = random_params(0, 1.0) if params is None else params
    defaults = {"learning_rate": RATE, "weight_decay": DECAY, "momentum": MOMENTUM}
    way = st3(config(**{**defaults, **changes}), STEPS)
    start = way.wrap(params)
    random = np.random.default_rng(6)
    given = jax.tree.map(
        lambda leaf: random.normal(size=(STEPS, *leaf.shape)).astype(np.float32), params
    )

    def loss(trained, gradient):
        products = jax.tree.map(jnp.multiply, way.effective(trained), gradient)
        return sum(x.sum() for x in jax.tree.leaves(products)) + way.penalty(trained)

    def step(carry, gradient):
        trained, opt_state = carry
        seen = jax.grad(loss)(trained, gradient)
        updates, opt_state = way.tx.update(seen, opt_state, trained)
        trained = optax.apply_updates(trained, updates)
        return (trained, opt_state), (trained, seen)

    scanned = jax.jit(lambda carry: jax.lax.scan(step, carry, given))
    _, (after, seen) = scanned((start, way.tx.init(start)))
    history = jax.tree.map(lambda x, xs: np.stack([x, *xs]), start, after)
    return way, history, given, seen


def at(history, taken):
    return jax.tree.map(lambda xs: xs[taken], history)


@pytest.mark.parametrize("count", [1, 20, 118, 235])
@pytest.mark.parametrize("seen", ["effective", "fold"])
def test_kernels_are_shrunk_by_one_threshold_and_rescaled_by_feature(seen, count):
    way = st3(config(), STEPS)
    params = random_params(0)
    found = jax.jit(getattr(way, seen))(pruned_to(way, params, count))
    marked = largest(params, count)
    expected = shrunk_by_hand(params, marked)
    for name, kernel in kernels(found).items():
        np.testing.assert_allclose(kernel, expected[name], rtol=2e-4, atol=1e-6)
        pruned = kernel[~marked[name]]
        assert not pruned.any()
        assert not np.signbit(pruned).any()
        np.testing.assert_array_equal(found[name]["bias"], params[name]["bias"])
    assert np.count_nonzero(flat(found)) == count


def test_nothing_pruned_is_the_dense_network():
    way = st3(config(), STEPS)
    params = random_params(0)
    for seen in (way.effective, way.fold):
        found = jax.jit(seen)(way.wrap(params))
        # To a rounding: XLA sums in the order that it likes.
        jax.tree.map(
            lambda x, weight: np.testing.assert_allclose(x, weight, rtol=1e-6),
            *(found, params),
        )


def test_gradient_comes_to_all_weights_as_it_is():
    way = st3(config(), STEPS)
    trained = pruned_to(way, random_params(0), 20)
    of_loss = random_params(1)
    _, pull = jax.vjp(jax.jit(way.effective), trained)
    (gradient,) = pull(of_loss)
    jax.tree.map(np.testing.assert_array_equal, gradient.weights, of_loss)
    for mask in jax.tree.leaves(gradient.masks):
        assert not mask.any()
    assert way.penalty(trained) == 0


def test_training_sees_the_folded_weights():
    way, history, _, _ = trained_by()
    for taken in (0, END // 2, STEPS):
        trained = jax.tree.map(jnp.asarray, at(history, taken))
        jax.tree.map(
            np.testing.assert_array_equal, way.effective(trained), way.fold(trained)
        )


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.85, 0.999])
def test_connected_are_the_largest_weights_at_every_step(sparsity):
    way, history, _, _ = trained_by(sparsity=sparsity)
    fold = jax.jit(way.fold)
    for taken in range(1, STEPS + 1):
        now = at(history, taken)
        count = max(1, connections_by_hand(taken, final=sparsity))
        marked, masks = largest(now.weights, count), kernels(now.masks)
        for name, connected in marked.items():
            np.testing.assert_array_equal(masks[name], np.where(connected, 1, -1))
        folded = fold(now)
        assert np.count_nonzero(flat(folded)) == count
        for name, expected in shrunk_by_hand(now.weights, marked).items():
            np.testing.assert_allclose(
                folded[name]["kernel"], expected, rtol=1e-3, atol=1e-5
            )


def test_pruned_weights_return_and_do_to_the_end():
    _, history, _, _ = trained_by(learning_rate=1.0, sparsity=0.5)
    connected = np.stack([flat(at(history.masks, t)) >= 0 for t in range(STEPS + 1)])
    returned = (connected[1:] & ~connected[:-1]).sum(1)
    assert returned[:END].sum() > 5
    assert returned[FREEZE:].sum() > 0


def test_all_weights_take_the_steps_of_sgd():
    _, history, given, seen = trained_by()
    jax.tree.map(np.testing.assert_array_equal, seen.weights, given)
    for name in SHAPES:
        for leaf, decay in (("kernel", DECAY), ("bias", 0.0)):
            weights = history.weights[name][leaf]
            weight, velocity = weights[0].astype(float), 0.0
            for taken in range(STEPS):
                gradient = given[name][leaf][taken] + decay * weight
                velocity = MOMENTUM * velocity + gradient
                rate = RATE * 0.5 * (1 + np.cos(np.pi * taken / STEPS))
                weight = weight - rate * velocity
                np.testing.assert_allclose(
                    weights[taken + 1], weight, rtol=1e-4, atol=1e-5
                )


@pytest.mark.parametrize("jit", [jax.jit, lambda f: f], ids=["jit", "eager"])
def test_of_equal_weights_none_that_is_connected_vanishes(jit):
    # No gradient reaches the weights, all of one magnitude: the threshold is theirs.
    random = np.random.default_rng(1)
    params = {
        name: {"kernel": np.float32(random.choice([-0.3, 0.3], shape))}
        for name, shape in SHAPES.items()
    }
    way, history, _, _ = trained_by(params, learning_rate=1e-30, weight_decay=0.0)
    last = at(history, STEPS)
    assert (np.abs(flat(last.weights)) == np.float32(0.3)).all()
    for seen in (way.effective, way.fold):
        left = flat(jit(seen)(last))
        assert np.count_nonzero(left) == connections_by_hand(STEPS)
        signs = np.sign(flat(last.weights))
        np.testing.assert_array_equal(np.sign(left)[left != 0], signs[left != 0])
        assert np.abs(left).max() < 1e-5


def test_training_ends_with_the_sparsity():
    settings = pruning_config(model="two_layers", epochs=3, sparsity=0.9)
    [trained] = train(settings, dataset(), "st3")
    assert isinstance(trained.trained, scl_jax.MaskedParams)
    totals = make_report(settings, trained).totals
    count = round((1 - 0.9) * totals.weights)
    assert totals.weights == 784 * 30 + 30 * 10
    assert totals.nnz == count == np.count_nonzero(flat(trained.folded))
    nnz = [metrics.nnz for metrics in trained.history]
    assert nnz[-1] == count < nnz[0]
    masks = kernels(trained.trained.masks)
    marked = {name: mask >= 0 for name, mask in masks.items()}
    for name, expected in shrunk_by_hand(trained.trained.weights, marked).items():
        np.testing.assert_allclose(
            trained.folded[name]["kernel"], expected, rtol=1e-3, atol=1e-5
        )
