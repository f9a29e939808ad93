"""RigL: what is connected at first, what is dropped and grown, what never changes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pruning
import pytest
from tiny import config as tiny_config
from tiny import dataset, register

import scl_jax
from experiments.baselines.rigl import erk, rigl
from experiments.methods import METHODS
from experiments.outcome import make_report
from experiments.train import train

STEPS = 14
SHAPES = {"a": (2, 3), "b": (3, 2, 5, 6), "c": (14, 8)}
# 89 connections, 5 : 16 : 22; 10 of 6 are too many, so 83 at 16 : 22.
COUNTS = {"a": 6, "b": 35, "c": 48}


@pytest.fixture(autouse=True)
def _tiny_networks(monkeypatch):
    register(monkeypatch)


def config(**changes):
    """Return a config of RigL, which moves connections in the first 7 of 14 steps."""
    defaults = {
        "sparsity": 0.7,
        "schedule_end": 0.25,
        "prune_every": 1,
        "drop_fraction": 0.37,
    }
    return tiny_config(**{**defaults, **changes})


def random_params(seed, shapes=None):
    return pruning.random_params(seed, shapes or SHAPES)


def gradient_of(trained, seed):
    """Return a random gradient; that of the masks is none."""
    weights = random_params(seed, {n: k.shape for n, k in kernels(trained).items()})
    return scl_jax.MaskedParams(weights, jax.tree.map(jnp.zeros_like, trained.masks))


def kernels(trained):
    return {name: np.array(x["kernel"]) for name, x in trained.weights.items()}


def connected(trained):
    return {name: np.array(x["kernel"]) >= 0 for name, x in trained.masks.items()}


def histories(settings, gradient, shapes=None):
    """Return what is trained before each step and after the last, and the states."""
    way = rigl(settings, STEPS)
    trained = jax.jit(way.wrap)(random_params(0, shapes))
    state = way.tx.init(trained)
    update = jax.jit(way.tx.update)
    seen, states = [trained], [state]
    for step in range(STEPS):
        moves, state = update(gradient(trained, step), state, trained)
        trained = optax.apply_updates(trained, moves)
        seen.append(trained)
        states.append(state)
    return seen, states


# How many connections a layer has


@pytest.mark.parametrize(
    ("shapes", "density", "expected"),
    [
        # 153 connections, 5 : 20 : 19; 17 of 6 are too many, so 147 at 20 : 19.
        (
            {"small": (2, 3), "wide": (10, 10), "conv": (2, 2, 5, 10)},
            0.5,
            {"small": 6, "wide": 75, "conv": 72},
        ),
        # 26 connections, 2 : 4 : 20; 2 of 1 are too many; then 25 * 4 / 24 of 4.
        (
            {"a": (1, 1), "b": (2, 2), "c": (10, 10)},
            26 / 105,
            {"a": 1, "b": 4, "c": 21},
        ),
        ({"a": (2, 3), "b": (3, 7)}, 1.0, {"a": 6, "b": 21}),
        # 2 connections, of which each has one at least.
        ({"a": (1, 2), "b": (20, 10)}, 0.01, {"a": 1, "b": 2}),
        (SHAPES, 0.3, COUNTS),
    ],
    ids=["one_dense", "another_then", "all", "few", "here"],
)
def test_connections_of_layers_worked_out_by_hand(shapes, density, expected):
    assert erk(shapes, density) == expected


def test_connections_add_up_and_grow_with_the_density():
    random = np.random.default_rng(0)
    shapes = {
        str(i): tuple(int(n) for n in random.integers(1, 30, axes))
        for i, axes in enumerate([2, 2, 3, 4, 4, 2])
    }
    sizes = {name: np.prod(shape) for name, shape in shapes.items()}
    before = dict.fromkeys(shapes, 0)
    for density in np.linspace(0.001, 1, 60):
        counts = erk(shapes, density)
        total = round(density * sum(sizes.values()))
        assert abs(sum(counts.values()) - total) <= len(shapes)
        assert all(max(1, before[n]) <= counts[n] <= sizes[n] for n in shapes)
        # Of those that are not dense, density * product / sum is the same.
        free = [n for n in shapes if 1 < counts[n] < sizes[n]]
        low = max(((counts[n] - 0.5) / sum(shapes[n]) for n in free), default=0)
        high = min(((counts[n] + 0.5) / sum(shapes[n]) for n in free), default=0)
        assert low <= high
        before = counts
    assert before == sizes


# The start


def test_training_starts_with_random_connections_and_the_weights_of_the_model():
    params = random_params(3)
    trained = jax.jit(rigl(config(), STEPS).wrap)(params)
    for name, mask in connected(trained).items():
        assert mask.sum() == COUNTS[name]
        assert set(np.unique(trained.masks[name]["kernel"])) <= {-1, 1}
        assert trained.masks[name]["bias"] is None
        expected = np.where(mask, params[name]["kernel"], 0)
        np.testing.assert_array_equal(trained.weights[name]["kernel"], expected)
        np.testing.assert_array_equal(
            trained.weights[name]["bias"], params[name]["bias"]
        )


def test_seeds_and_layers_have_different_connections():
    shapes = {"a": (40, 50), "b": (40, 50)}
    wrap = jax.jit(rigl(config(), STEPS).wrap)
    first, again, second = (
        connected(wrap(random_params(seed, shapes))) for seed in (0, 0, 1)
    )
    jax.tree.map(np.testing.assert_array_equal, first, again)
    for one, other in [
        (first["a"], second["a"]),
        (first["b"], second["b"]),
        (first["a"], first["b"]),
    ]:
        # Independent ones differ at 2 * 0.3 * 0.7 of the places.
        assert (one != other).mean() == pytest.approx(0.42, abs=0.05)
    # Nor does a place decide: 600 of 2000 are spread over the rows.
    assert first["a"].sum(axis=1).min() > 3


# What the loss sees


def test_effective_weights_are_masked_and_their_gradient_is_dense():
    way = rigl(config(), STEPS)
    trained = jax.jit(way.wrap)(random_params(0))
    trained = trained._replace(weights=random_params(1))  # also where pruned
    of_loss = random_params(2)
    effective, pull = jax.vjp(jax.jit(way.effective), trained)
    (gradient,) = pull(of_loss)
    for name, mask in connected(trained).items():
        weight = np.array(trained.weights[name]["kernel"])
        np.testing.assert_array_equal(effective[name]["kernel"], weight * mask)
    jax.tree.map(np.testing.assert_array_equal, gradient.weights, of_loss)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient.masks))
    assert way.penalty(trained) == 0


# What moves


def numpy_move(mask, weight, gradient, fraction):
    """Return the mask after a drop and a growth, one place after the other."""
    mask, weight, gradient = (x.ravel().copy() for x in (mask, weight, gradient))
    exact = fraction * mask.sum()
    assert abs(exact - round(exact)) > 1e-3  # float32 cannot be of another opinion
    places = sorted(np.flatnonzero(mask), key=lambda i: abs(weight[i]))
    for place in places[: int(exact)]:
        mask[place] = False
    places = sorted(np.flatnonzero(~mask), key=lambda i: -abs(gradient[i]))
    for place in places[: int(exact)]:
        mask[place] = True
    return mask


@pytest.mark.parametrize("every", [1, 3])
def test_steps_are_those_of_numpy(every):
    settings = config(prune_every=every, momentum=0.75, weight_decay=0.1)
    seen, _ = histories(settings, gradient_of)
    weights, masks = kernels(seen[0]), connected(seen[0])
    velocity = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    grown = 0
    for step in range(STEPS):
        gradient = kernels(gradient_of(seen[0], step))
        rate = 0.1 * (1 + np.cos(np.pi * step / STEPS)) / 2
        for name, mask in masks.items():
            new = mask
            if step < 7 and step % every == 0:
                fraction = 0.37 / 2 * (1 + np.cos(np.pi * step / 7))
                new = numpy_move(mask, weights[name], gradient[name], fraction)
                new = new.reshape(mask.shape)
            stays = mask & new
            grown += (new & ~mask).sum()
            push = gradient[name] + 0.1 * weights[name]
            velocity[name] = np.where(stays, 0.75 * velocity[name] + push, 0)
            weights[name] = np.where(stays, weights[name] - rate * velocity[name], 0)
            masks[name] = new
        after = seen[step + 1]
        for name, mask in connected(after).items():
            np.testing.assert_array_equal(mask, masks[name])
        for name, weight in kernels(after).items():
            np.testing.assert_allclose(weight, weights[name], rtol=1e-4, atol=1e-6)
    assert grown > 10
    assert masks["a"].all()  # dense: what it drops it grows, and it trains as if not


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_counts_stay_and_pruned_weights_and_their_momentum_are_zero(optimizer):
    settings = config(optimizer=optimizer, weight_decay=0.1)
    seen, states = histories(settings, gradient_of)
    for trained, state in zip(seen, states, strict=True):
        moments = [
            tree
            for name in ("trace", "mu", "nu")
            if (tree := optax.tree_utils.tree_get(state, name)) is not None
        ]
        assert len(moments) == (1 if optimizer == "sgd" else 2)
        for name, mask in connected(trained).items():
            assert mask.sum() == COUNTS[name]
            for tree in (trained.weights, *moments):
                assert (np.array(tree[name]["kernel"])[~mask] == 0).all()
    # What stays has momentum.
    kept = connected(seen[-1])["b"] & connected(seen[-2])["b"]
    assert all((np.array(tree["b"]["kernel"])[kept] != 0).all() for tree in moments)


def elsewhere(trained, step):
    """Return a gradient that grows nothing that was just dropped."""
    del step
    gradient = {
        name: {"kernel": jnp.float32(~mask), "bias": trained.weights[name]["bias"]}
        for name, mask in connected(trained).items()
    }
    return scl_jax.MaskedParams(gradient, jax.tree.map(jnp.zeros_like, trained.masks))


def test_dropped_fraction_is_a_cosine_and_nothing_moves_once_frozen():
    shapes = {"a": (50, 100)}  # 1500 connections
    for every in (1, 2):
        settings = config(prune_every=every, drop_fraction=0.4)
        seen, _ = histories(settings, elsewhere, shapes)
        masks = [connected(trained)["a"] for trained in seen]
        for step in range(STEPS):
            dropped = (masks[step] & ~masks[step + 1]).sum()
            if step < 7 and step % every == 0:
                expected = 0.2 * (1 + np.cos(np.pi * step / 7)) * 1500
                assert expected - 1 - 1e-3 <= dropped <= expected + 1e-3
                assert dropped > 0
            else:
                assert dropped == 0


# The whole


@pytest.mark.parametrize("devices", [1, 8])
def test_seeds_train_to_the_sparsity_under_one_compilation(monkeypatch, devices):
    traced = []

    def noted(settings, steps):
        way = rigl(settings, steps)

        def effective(trained):
            traced.append(1)
            return way.effective(trained)

        return way._replace(effective=effective)

    monkeypatch.setitem(METHODS, "rigl", noted)
    settings = config(
        model="two_layers",
        sparsity=0.9,
        batch_size=8,
        devices=devices,
        model_parallel=2 if devices > 1 else 1,
        seeds=2,
    )
    expected = erk({"Dense_0": (784, 30), "Dense_1": (30, 10)}, 0.1)
    trainings = train(settings, dataset(), "rigl")
    first = next(trainings)
    once = len(traced)
    (second,) = trainings
    assert len(traced) == once > 0
    for trained in (first, second):
        for name, mask in connected(trained.trained).items():
            assert mask.sum() == expected[name]
            folded = np.array(trained.folded[name]["kernel"])
            np.testing.assert_array_equal(
                folded, np.where(mask, trained.trained.weights[name]["kernel"], 0)
            )
        report = make_report(settings, trained)
        assert report.totals.connections == sum(expected.values())
        assert abs(report.totals.connections - 0.1 * (784 * 30 + 300)) <= 2
    masks = [connected(trained.trained)["Dense_0"] for trained in (first, second)]
    assert (masks[0] != masks[1]).mean() > 0.1
