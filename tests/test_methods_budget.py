"""SCL to a sparsity: the budget is met in the training, exactly, and then kept."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import by_path, config, dataset, host, images, parts, register

from experiments.methods import scl
from experiments.network import make_network
from experiments.outcome import make_report, make_result
from experiments.train import train

SIZES = {"linear": 7840, "two_layers": 784 * 30 + 300, "normalized": 294 + 60}
PLACES = {"Conv_0/kernel": 16, "Dense_0/kernel": 1}  # MACs of a connection: normalized
MACS = 16 * 294 + 60
tree_get = optax.tree_utils.tree_get


@pytest.fixture(autouse=True)
def _tiny_networks(monkeypatch):
    register(monkeypatch)


def settings(sparsity=0.9, **changes):
    own = {"sparsity": sparsity, "mask_learning_rate": 0.01, "schedule_end": 0.375}
    return config(**{**own, **changes})


def allowed(sparsity, total):
    """Return how many connections may stay: the floor, but for what a float adds."""
    return math.floor((1 - sparsity) * total + 1e-6)


def counts(trained):
    """Return the connections of each kernel."""
    masks = by_path(trained.trained.masks)
    return {p: int((s >= 0).sum()) for p, s in masks.items() if s is not None}


def started(config):
    """Return SCL, parameters with random mask variables, and a random gradient."""
    random = np.random.default_rng(0)
    params, _ = jax.eval_shape(make_network(config).init, jax.random.key(0))
    way = scl(config, 12)
    trained, gradient = (
        jax.tree.map(
            lambda x: jnp.asarray(random.normal(0, 0.8, x.shape), x.dtype),
            jax.eval_shape(way.wrap, params),
        )
        for _ in range(2)
    )
    return way, trained, gradient


# What is met


@pytest.mark.parametrize(
    ("model", "sparsity", "changes"),
    [
        ("linear", 0.9, {}),
        ("two_layers", 0.987, {"schedule": "linear", "mask_dtype": "bfloat16"}),
        ("normalized", 0.8, {"ste": "leaky_relu(0.1)", "freeze_at": 1.0}),
        ("two_layers", 0.973, {"devices": 8, "model_parallel": 2, "batch_size": 8}),
    ],
)
def test_training_ends_with_exactly_the_connections_that_are_allowed(
    model, sparsity, changes
):
    asked = settings(sparsity, model=model, **changes)
    (trained,) = train(asked, dataset(), "scl")
    found = counts(trained)
    assert sum(found.values()) == allowed(sparsity, SIZES[model])
    last = trained.history[-1]
    assert last.nnz == sum(found.values())
    assert last.sparsity == pytest.approx(1 - last.nnz / SIZES[model])
    # What the controller came to is told.
    penalties = [metrics.penalty for metrics in trained.history]
    assert all(type(penalty) is float for penalty in penalties)
    assert all(0 < penalty < math.inf for penalty in penalties)


@pytest.mark.parametrize(("method", "sparsity"), [("dense", 0.9), ("scl", 0.0)])
def test_no_penalty_is_told_where_none_is_found(method, sparsity):
    asked = settings(sparsity, epochs=1)
    (trained,) = train(asked, dataset(), method)
    assert [metrics.penalty for metrics in trained.history] == [None]


@pytest.mark.parametrize(
    ("sparsity", "kept", "connections"), [(0.9999, 0, 2), (0.9995, 5, 11)]
)
def test_one_step_meets_the_budget_with_the_minimum_in_every_kernel(
    sparsity, kept, connections
):
    # 23,520 and 300 mask variables; one is kept at least, also if 0 is the minimum.
    asked = settings(sparsity, model="two_layers", minimum_connections=kept, epochs=1)
    (trained,) = train(asked, dataset(5), "scl")
    first, second = counts(trained).values()
    assert first + second == allowed(sparsity, 23820) == connections
    assert min(first, second) >= max(1, kept)


def test_budget_below_the_minimum_is_refused_before_a_step():
    asked = settings(0.999, model="two_layers", minimum_connections=12)
    with pytest.raises(ValueError, match=r"must pay for the guard's minimum, 24;"):
        next(train(asked, dataset(), "scl"))


def test_budget_of_macs_is_met_in_macs_and_dear_connections_go_first_if_weighed():
    of_dense = []
    for weigh in (True, False):
        asked = settings(0.8, model="normalized", costs="macs", weigh=weigh, epochs=6)
        (trained,) = train(asked, dataset(), "scl")
        found = counts(trained)
        # At most the budget, and less by no more than the dearest connection.
        spent = sum(PLACES[path] * count for path, count in found.items())
        assert 0.2 * MACS - 16 <= spent <= 0.2 * MACS
        result = make_result(asked, trained, images(5))
        assert (result.macs, result.macs_remaining) == (MACS, spent)
        assert make_report(asked, trained).totals.macs_remaining == spent
        of_dense.append(found["Dense_0/kernel"])
    assert of_dense[0] > of_dense[1]


# When


def test_masks_rest_from_the_freeze_on_with_the_budget_met():
    asked = settings(0.9, epochs=4, freeze_at=0.5)
    made = parts(asked, images(23))
    state, key, seen = made.state, made.key, []
    for _ in range(4):
        state, _ = made.epoch(state, key)
        seen.append(host(state))
    masks = [one.trained.masks["Dense_0"]["kernel"] for one in seen]
    kernels = [one.trained.weights["Dense_0"]["kernel"] for one in seen]
    connected = [int((mask >= 0).sum()) for mask in masks]
    assert connected[0] > connected[1] == connected[2] == connected[3] == 784
    assert not np.array_equal(masks[0], masks[1])
    np.testing.assert_array_equal(masks[1], masks[2])
    np.testing.assert_array_equal(masks[1], masks[3])
    assert not np.array_equal(kernels[2], kernels[3])
    # The controller rests as well.
    penalties = [float(tree_get(one.opt_state, "penalty")) for one in seen]
    assert penalties[0] != penalties[1] == penalties[2] == penalties[3] > 0


@pytest.mark.parametrize(
    ("schedule", "end", "fraction"),
    [
        ("cubic", 0.25, lambda part: 0.1 + 0.9 * (1 - part) ** 3),
        ("linear", 0.5, lambda part: 0.1 + 0.9 * (1 - part)),
        ("constant", 0.5, lambda part: 0.1),
    ],
)
def test_schedule_falls_to_the_sparsity_up_to_its_end(schedule, end, fraction):
    asked = settings(0.9, schedule=schedule, schedule_end=end)
    way, trained, gradient = started(asked)
    connected = (np.asarray(trained.masks["Dense_0"]["kernel"]) >= 0).mean()
    _, state = jax.jit(way.tx.update)(gradient, way.tx.init(trained), trained)
    part = 1 / (12 * end)  # of its steps, of which there are 12 in all, after one
    excess = math.log(connected / fraction(part))
    assert float(tree_get(state, "excess")) == pytest.approx(excess, rel=1e-4)


# The penalty


def test_loss_has_no_penalty_where_the_optimizer_has_it():
    way, trained, _ = started(settings(penalty=0.5))
    assert way.penalty(trained) == 0
    for leaf in jax.tree.leaves(jax.grad(way.penalty)(trained)):
        np.testing.assert_array_equal(leaf, np.zeros(leaf.shape))


@pytest.mark.parametrize(
    ("costs", "weigh", "of_conv"),
    [("connections", True, 1), ("macs", True, 16), ("macs", False, 1)],
)
def test_fixed_penalty_is_in_proportion_to_what_is_weighed(costs, weigh, of_conv):
    asked = config(model="normalized", penalty=0.25, costs=costs, weigh=weigh)
    way, trained, _ = started(asked)
    gradient = by_path(jax.grad(way.penalty)(trained).masks)
    for path, each in {"Conv_0/kernel": of_conv, "Dense_0/kernel": 1}.items():
        shape = gradient[path].shape
        np.testing.assert_allclose(gradient[path], np.full(shape, 0.25 * each))
    masks = by_path(trained.masks)
    conv, dense = (int((masks[path] >= 0).sum()) for path in PLACES)
    expected = 0.25 * (of_conv * conv + dense)
    np.testing.assert_allclose(way.penalty(trained), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("costs", "weigh", "of_conv"),
    [("connections", True, 1), ("macs", True, 16), ("macs", False, 1)],
)
def test_penalty_that_is_found_is_in_proportion_to_what_is_weighed(
    costs, weigh, of_conv
):
    plain = {"norm": "none", "mask_momentum": 0.0, "mask_learning_rate": 0.5}
    asked = settings(model="normalized", costs=costs, weigh=weigh, ste="relu", **plain)
    way, trained, gradient = started(asked)
    updates, state = jax.jit(way.tx.update)(gradient, way.tx.init(trained), trained)
    found = float(tree_get(state, "penalty"))
    moved, masks = by_path(updates.masks), by_path(trained.masks)
    own = by_path(gradient.masks)
    for path, each in {"Conv_0/kernel": of_conv, "Dense_0/kernel": 1}.items():
        # A connection that is gone has no proxy gradient by this estimator.
        felt = found * each * (np.asarray(masks[path]) >= 0)
        expected = -0.5 * (np.asarray(own[path]) + felt)
        np.testing.assert_allclose(moved[path], expected, rtol=1e-4, atol=1e-6)
    assert found > 0
