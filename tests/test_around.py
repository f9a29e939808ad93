"""What stands around or beside the optimizer: in the right place, and in the wrong."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.recipes.around.scl import end_on_average
from scl_jax import (
    MaskedParams,
    add_connection_penalty,
    apply_masks,
    mask_params,
    normalize_by_feature,
    partition,
)


def numbers(*shape, seed):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def masked():
    """Return masked parameters: a kernel (4, 3) and a bias."""
    kernel = jnp.asarray(numbers(4, 3, seed=0))
    params = {"kernel": kernel, "bias": jnp.ones(3)}
    variables = jnp.asarray(numbers(4, 3, seed=1))
    return mask_params(params, initial=lambda path, leaf: variables)


def gradient(seed, of_masks=None):
    g_S = numbers(4, 3, seed=seed + 50) if of_masks is None else of_masks
    weights = {"kernel": numbers(4, 3, seed=seed), "bias": numbers(3, seed=seed)}
    return jax.tree.map(
        jnp.asarray, MaskedParams(weights, {"kernel": g_S, "bias": None})
    )


def normalized(g):
    """Divide each column by its root mean square, in NumPy."""
    g = np.asarray(g, np.float64)
    return g / np.sqrt((g**2).mean(0, keepdims=True))


def run(tx, gradients) -> MaskedParams:
    """Take a step for each gradient; return the parameters behind the last one."""
    params: Any = masked()
    state = tx.init(params)
    for g in gradients:
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
    return params


def close(actual, expected):
    return np.allclose(actual, expected, rtol=1e-4, atol=1e-6)


def kernels_of(params):
    return np.asarray(params.weights["kernel"]), np.asarray(params.masks["kernel"])


W, S = kernels_of(masked())


# Gradient accumulation


def test_multi_steps_around_partition_normalizes_the_mean_gradient():
    # The second batch's gradient is ten times the first's, and mostly against it.
    a = numbers(4, 3, seed=60)
    b = 10 * numbers(4, 3, seed=61)
    batches = [gradient(2, a), gradient(3, b)]
    masks_tx = optax.chain(normalize_by_feature(decay=0), optax.sgd(0.1))
    around = optax.MultiSteps(partition(optax.sgd(0.1), masks_tx), 2)
    right = S - 0.1 * normalized((a + b) / 2)
    assert close(run(around, batches).masks["kernel"], right)

    # Wrong: the mean of normalized gradients, to which both batches add alike.
    inner = optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation()
    inside = partition(
        optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation(),
        optax.chain(normalize_by_feature(decay=0), inner),
    )
    wrong = S - 0.1 * (normalized(a) + normalized(b)) / 2
    assert close(run(inside, batches).masks["kernel"], wrong)
    assert not np.array_equal(np.sign(S - wrong), np.sign(S - right))


# Clipping by global norm


def clipped(leaves, most):
    norm = np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in leaves))
    return [x * min(1.0, most / norm) for x in leaves]


def test_clipping_around_partition_lets_mask_gradients_slow_the_weights():
    g = gradient(2, 1e3 * numbers(4, 3, seed=60))
    bias, kernel = g.weights["bias"], g.weights["kernel"]
    masks_tx = optax.chain(normalize_by_feature(decay=0), optax.sgd(0.1))
    clip = optax.clip_by_global_norm(1.0)

    inside = run(partition(optax.chain(clip, optax.sgd(0.1)), masks_tx), [g])
    _, right = clipped([bias, kernel], 1.0)
    assert close(inside.weights["kernel"], W - 0.1 * right)

    # Wrong: mask gradients are a part of the norm, and the weights hardly move.
    around = run(optax.chain(clip, partition(optax.sgd(0.1), masks_tx)), [g])
    _, wrong, _ = clipped([bias, kernel, g.masks["kernel"]], 1.0)
    assert close(around.weights["kernel"], W - 0.1 * wrong)
    assert np.abs(wrong).max() < 1e-2 * np.abs(right).max()
    # The masks do not notice: their gradients are normalized behind it.
    for params in (inside, around):
        assert close(params.masks["kernel"], S - 0.1 * normalized(g.masks["kernel"]))


# Batches that are not finite


def test_apply_if_finite_around_partition_skips_weights_and_masks_together():
    good = gradient(2)
    bad = jax.tree.map(lambda g: g.at[(0,) * g.ndim].set(jnp.nan), gradient(3))
    masks_tx = optax.chain(normalize_by_feature(decay=0), optax.sgd(0.1, 0.9))
    whole = partition(optax.sgd(0.1, 0.9), masks_tx)
    skipped = kernels_of(run(optax.apply_if_finite(whole, 5), [bad, good]))
    # As if there had been only the good batch: the momentum, too, knows no other.
    assert close(skipped[0], W - 0.1 * np.asarray(good.weights["kernel"]))
    assert close(skipped[1], S - 0.1 * normalized(good.masks["kernel"]))

    # Wrong: around the weights' optimizer alone, the masks take what is not finite.
    alone = partition(optax.apply_if_finite(optax.sgd(0.1, 0.9), 5), masks_tx)
    weights, masks = kernels_of(run(alone, [bad, good]))
    assert close(weights, skipped[0])
    assert np.isnan(masks).all(0).tolist() == [True, False, False]
    assert np.isnan(apply_masks(run(alone, [bad]))["kernel"]).any()


# Hyperparameters in the state


@pytest.mark.parametrize("rate", [0.0, 0.25])
def test_learning_rate_of_the_masks_can_be_injected_and_set_alone(rate):
    def masks_tx(mask_rate):
        return optax.chain(normalize_by_feature(decay=0), optax.sgd(mask_rate))

    tx = partition(
        optax.inject_hyperparams(optax.sgd)(learning_rate=0.1),
        optax.inject_hyperparams(masks_tx)(mask_rate=0.1),
    )
    params, g = masked(), gradient(2)
    state = optax.tree.set(tx.init(params), mask_rate=jnp.float32(rate))
    updates, state = tx.update(g, state, params)
    w, s = kernels_of(optax.apply_updates(params, updates))
    assert close(w, W - 0.1 * np.asarray(g.weights["kernel"]))
    assert close(s, S - rate * normalized(g.masks["kernel"]))

    # Wrong: two rates of one name are set together.
    tx = partition(
        optax.inject_hyperparams(optax.sgd)(learning_rate=0.1),
        optax.inject_hyperparams(optax.sgd)(learning_rate=0.1),
    )
    state = optax.tree.set(tx.init(params), learning_rate=jnp.float32(rate))
    updates, _ = tx.update(g, state, params)
    w, s = kernels_of(optax.apply_updates(params, updates))
    assert close(w, W - rate * np.asarray(g.weights["kernel"]))
    assert close(s, S - rate * np.asarray(g.masks["kernel"]))


# The average of the weights


def test_average_of_weights_goes_with_the_masks_in_use():
    # A mask variable that was far above the threshold, and is now just below it.
    before = MaskedParams({"kernel": jnp.array([1.0, 2.0])}, {"kernel": jnp.ones(2)})
    now = MaskedParams(
        {"kernel": jnp.array([3.0, 4.0])}, {"kernel": jnp.array([-0.1, 1.0])}
    )
    average: Any = optax.incremental_update(now, before, 0.5)
    right = apply_masks(average._replace(masks=now.masks))["kernel"]
    assert close(right, [0.0, (2.0 + 4.0) / 2])
    # Wrong: the average of its variables is another mask, and the connection is back.
    wrong = apply_masks(average)["kernel"]
    assert close(wrong, [(1.0 + 3.0) / 2, (2.0 + 4.0) / 2])


def test_average_of_updates_inside_the_weights_optimizer_leaves_masks_alone():
    first, second = gradient(2), gradient(3)
    masks_tx = optax.chain(normalize_by_feature(decay=0), optax.sgd(0.1))
    ema = optax.ema(0.9, debias=False)
    inside = partition(optax.chain(optax.sgd(0.1), ema), masks_tx)
    around = optax.chain(partition(optax.sgd(0.1), masks_tx), ema)
    u = [-0.1 * normalized(g.masks["kernel"]) for g in (first, second)]
    assert close(run(inside, [first, second]).masks["kernel"], S + u[0] + u[1])
    # Wrong: of each update a tenth comes at once, and nine tenths of that a step later.
    wrong = S + 0.1 * u[0] + (0.09 * u[0] + 0.1 * u[1])
    assert close(run(around, [first, second]).masks["kernel"], wrong)


def test_recipe_ends_on_the_exponential_average_of_the_weights_alone():
    gradients = [gradient(seed) for seed in (2, 3, 4)]
    masks_tx = optax.chain(normalize_by_feature(decay=0), optax.sgd(0.1))
    tx = partition(optax.chain(optax.sgd(0.1), end_on_average(0.25)), masks_tx)
    params: Any = masked()
    state = tx.init(params)
    weights = average = W
    for i, g in enumerate(gradients):
        updates, state = tx.update(g, state, params, last=i == 2)
        params = optax.apply_updates(params, updates)
        weights = weights - 0.1 * g.weights["kernel"]
        average = 0.75 * average + 0.25 * weights
        expected = average if i == 2 else weights
        assert close(params.weights["kernel"], expected)
    moves = sum(normalized(g.masks["kernel"]) for g in gradients)
    assert close(params.masks["kernel"], S - 0.1 * moves)


# The penalty in the optimizer


def test_penalty_is_coupled_before_the_normalization_and_decoupled_behind_it():
    # The first feature's gradients are a thousandth of the others'.
    g_S = numbers(4, 3, seed=60) * np.array([1e-3, 1.0, 1.0], np.float32)
    penalty, normalize = add_connection_penalty(0.2), normalize_by_feature(decay=0)
    coupled = optax.chain(penalty, normalize, optax.sgd(0.1))
    decoupled = optax.chain(normalize, penalty, optax.sgd(0.1))
    before, behind = (
        run(partition(optax.sgd(0.1), tx), [gradient(2, g_S)]).masks["kernel"]
        for tx in (coupled, decoupled)
    )
    assert close(before, S - 0.1 * normalized(g_S + np.float32(0.2)))
    assert close(behind, S - 0.1 * (normalized(g_S) + 0.2))
    # Coupled, the penalty decides for the feature that hardly matters to the loss.
    assert (np.asarray(before) < S)[:, 0].all()
    assert not (np.asarray(behind) < S)[:, 0].all()
    # Wrong: behind the optimizer it is an update, and makes connections.
    alone = optax.chain(normalize, optax.sgd(0.1), penalty)
    wrong = run(partition(optax.sgd(0.1), alone), [gradient(2, g_S)]).masks["kernel"]
    assert close(wrong, S - 0.1 * normalized(g_S) + 0.2)
