"""What dense and SCL share, and what one step of each does, against NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import config as tiny_config
from tiny import dataset, host, images, parts, register, standardized

import scl_jax
from experiments.feed import Resident
from experiments.methods import dense, scl
from experiments.train import train

EXAMPLES = 20


@pytest.fixture(autouse=True)
def _tiny_networks(monkeypatch):
    register(monkeypatch)


def config(**changes):
    """Return a config of eight steps on the same batch, its order aside."""
    defaults = {
        "epochs": 8,
        "batch_size": EXAMPLES,
        "penalty": 1e-4,
        "momentum": 0.9,
        "mask_momentum": 0.9,
        "mask_learning_rate": 0.01,
        "weight_decay": 0.0,
        "freeze_at": 0.75,
    }
    return tiny_config(**{**defaults, **changes})


# The coupled form divides G * W + lambda, the decoupled one G * W alone.
NORMS = {
    "rms": lambda g: np.sqrt((g**2).mean(axis=0)),
    "l2": lambda g: np.sqrt((g**2).sum(axis=0)),
    "max": lambda g: np.abs(g).max(axis=0),
    "none": lambda g: 1.0,
}
PROXIES = {
    "identity": lambda s: 1.0,
    "leaky_relu(0.25)": lambda s: np.where(s >= 0, 1.0, 0.25),
    "softplus(4)": lambda s: 1 / (1 + np.exp(-4 * s)),
    "relu": lambda s: s >= 0,
    "clipped": lambda s: np.abs(s) <= 1,
}


def start(config, method, seed=0):
    """Return the state before the first step, and the function of an epoch."""
    made = parts(config, images(EXAMPLES), method, seed)
    return made.state, made.epoch


def leaves_of(trained):
    """Return kernel, bias and mask variables as float64."""
    kernel, bias = (
        np.asarray(trained.weights["Dense_0"][name], float)
        for name in ("kernel", "bias")
    )
    return kernel, bias, np.asarray(trained.masks["Dense_0"]["kernel"], float)


def task_gradient(effective, bias):
    """Return the gradient of the mean cross-entropy: kernel, bias."""
    split = images(EXAMPLES)
    x = standardized(split)
    logits = x @ effective + bias
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    difference = odds / odds.sum(axis=1, keepdims=True) - np.eye(10)[split.labels]
    difference /= len(split.labels)
    return x.T @ difference, difference.sum(axis=0)


def random_masks(state, seed=0):
    """Give a state mask variables on both sides of zero, and beyond one."""
    weights, masks = state.trained
    values = np.random.default_rng(seed).normal(0, 0.8, (784, 10))
    masks = {"Dense_0": {**masks["Dense_0"], "kernel": jnp.float32(values)}}
    return state._replace(trained=scl_jax.MaskedParams(weights, masks))


@pytest.mark.parametrize("seed", [0, 5])
def test_methods_start_from_the_same_weights(seed):
    plain, _ = start(config(), "dense", seed)
    masked, _ = start(config(), "scl", seed)
    jax.tree.map(np.testing.assert_array_equal, plain.trained, masked.trained.weights)
    np.testing.assert_array_equal(
        masked.trained.masks["Dense_0"]["kernel"], np.full((784, 10), 0.1, np.float32)
    )
    assert masked.trained.masks["Dense_0"]["bias"] is None


def test_methods_see_the_examples_in_the_same_order(monkeypatch):
    taken = {}
    items = Resident.items

    def noted(feed, seed, key, *where):
        taken.setdefault((method, seed), []).append(np.asarray(key).tolist())
        return items(feed, seed, key, *where)

    monkeypatch.setattr(Resident, "items", noted)
    for method in ("dense", "scl"):
        list(train(config(epochs=2, seeds=2), dataset(20), method))
    assert taken["dense", 7] == taken["scl", 7]
    assert taken["dense", 8] == taken["scl", 8]
    every = [*taken["dense", 7], *taken["dense", 8]]
    assert len({tuple(key) for key in every}) == 4


def test_seeds_start_from_different_weights():
    first, _ = start(config(), "dense", 0)
    second, _ = start(config(), "dense", 1)
    kernels = [np.asarray(s.trained["Dense_0"]["kernel"]) for s in (first, second)]
    assert (kernels[0] != kernels[1]).mean() > 0.9


def test_scl_without_pruning_trains_as_dense_does():
    # Mask variables far from zero: the masks are all 1 and the paths must be one.
    settings = config(penalty=0.0, mask_initial=50.0, batch_size=5)
    (plain, plain_epoch), (masked, masked_epoch) = (
        start(settings, method) for method in ("dense", "scl")
    )
    for _ in range(3):
        plain, plain_seen = plain_epoch(plain)
        masked, masked_seen = masked_epoch(masked)
        np.testing.assert_allclose(masked_seen.loss, plain_seen.loss, rtol=1e-5)
        np.testing.assert_array_equal(masked_seen.accuracy, plain_seen.accuracy)
    np.testing.assert_allclose(
        masked.trained.weights["Dense_0"]["kernel"],
        plain.trained["Dense_0"]["kernel"],
        rtol=1e-4,
        atol=1e-6,
    )


@pytest.mark.parametrize(
    ("ste", "norm"),
    [
        ("identity", "rms"),
        ("identity", "none"),
        ("leaky_relu(0.25)", "l2"),
        ("softplus(4)", "max"),
        ("relu", "rms"),
        ("clipped", "none"),
    ],
)
def test_first_step_is_that_of_numpy(ste, norm):
    settings = config(ste=ste, norm=norm, penalty=1e-3)
    state, epoch = start(settings, "scl")
    state = random_masks(state)
    kernel, bias, mask = leaves_of(host(state.trained))

    connected = mask >= 0
    gradient, bias_gradient = task_gradient(kernel * connected, bias)
    mask_gradient = (gradient * kernel + settings.penalty) * PROXIES[ste](mask)
    step = mask_gradient / NORMS[norm](mask_gradient)

    state, _ = epoch(state)
    new_kernel, new_bias, new_mask = leaves_of(state.trained)
    np.testing.assert_allclose(
        new_kernel,
        kernel - settings.learning_rate * gradient * np.where(connected, 1, 0.1),
        rtol=1e-4,
        atol=1e-6,
    )
    np.testing.assert_allclose(
        new_bias, bias - settings.learning_rate * bias_gradient, rtol=1e-4, atol=1e-6
    )
    moved = (mask - new_mask) / settings.mask_learning_rate
    np.testing.assert_allclose(moved, step, rtol=1e-3, atol=3e-5)
    # Not vacuous: what is left without the penalty is another step.
    without = gradient * kernel * PROXIES[ste](mask)
    without = without / NORMS[norm](without)
    assert np.abs(without - step).max() > 3e-4


def test_penalty_alone_moves_every_mask_down():
    settings = config(penalty=0.5)
    state, _ = start(settings, "scl")
    way = scl(settings, 8)
    gradient = jax.grad(way.penalty)(state.trained)
    jax.tree.map(
        lambda leaf: np.testing.assert_array_equal(leaf, np.zeros(leaf.shape)),
        gradient.weights,
    )
    np.testing.assert_allclose(
        gradient.masks["Dense_0"]["kernel"], np.full((784, 10), 0.5)
    )
    np.testing.assert_allclose(way.penalty(state.trained), 0.5 * 7840)


def test_dense_has_no_penalty():
    state, _ = start(config(), "dense")
    assert dense(config(), 8).penalty(state.trained) == 0


@pytest.mark.parametrize("method", ["dense", "scl"])
def test_weight_decay_touches_kernels_alone(method):
    kept, decayed = (config(weight_decay=decay) for decay in (0.0, 0.25))
    states = []
    for settings in (kept, decayed):
        state, epoch = start(settings, method)
        if method == "scl":
            state = random_masks(state)
        before = host(state.trained)
        states.append(host(epoch(state)[0].trained))
    if method == "scl":
        weights, old = [state.weights for state in states], before.weights
        np.testing.assert_array_equal(*(s.masks["Dense_0"]["kernel"] for s in states))
    else:
        weights, old = states, before
    np.testing.assert_array_equal(*(w["Dense_0"]["bias"] for w in weights))
    kernels = [np.asarray(w["Dense_0"]["kernel"], float) for w in weights]
    np.testing.assert_allclose(
        kernels[1] - kernels[0],
        -config().learning_rate * 0.25 * old["Dense_0"]["kernel"],
        rtol=1e-3,
        atol=1e-6,
    )


@pytest.mark.parametrize(
    ("freeze_at", "moving"), [(0.5, 4), (0.3, 2), (1.0, 8), (0.01, 0)]
)
def test_masks_stop_moving_exactly_where_they_are_frozen(freeze_at, moving):
    settings = config(freeze_at=freeze_at)  # 8 steps
    state, epoch = start(settings, "scl")
    seen = [leaves_of(host(state.trained))]
    for _ in range(8):
        state, _ = epoch(state)
        seen.append(leaves_of(host(state.trained)))
    masks_moved = [
        not np.array_equal(old[2], new[2]) for old, new in itertools.pairwise(seen)
    ]
    weights_moved = [
        not np.array_equal(old[0], new[0]) for old, new in itertools.pairwise(seen)
    ]
    assert masks_moved == [True] * moving + [False] * (8 - moving)
    assert weights_moved == [True] * 8


def test_pruned_weight_keeps_its_value():
    settings = config(momentum=0.0, pruned_gradient=0.0)
    state, epoch = start(settings, "scl")
    state = random_masks(state)
    kernel, _, mask = leaves_of(host(state.trained))
    state, _ = epoch(state)
    new_kernel, _, _ = leaves_of(state.trained)
    np.testing.assert_array_equal(new_kernel[mask < 0], kernel[mask < 0])
    folded = np.asarray(scl(settings, 8).fold(state.trained)["Dense_0"]["kernel"])
    new_mask = np.asarray(state.trained.masks["Dense_0"]["kernel"])
    assert (folded[new_mask < 0] == 0).all()
    assert (folded[new_mask >= 0] != 0).all()


def test_fold_of_dense_changes_nothing():
    state, _ = start(config(), "dense")
    folded = dense(config(), 8).fold(state.trained)
    jax.tree.map(np.testing.assert_array_equal, folded, state.trained)


@pytest.mark.parametrize("method", ["dense", "scl"])
def test_momentum_adds_up_the_steps_before(method):
    # Two steps on the same batch, with and without momentum, by hand.
    settings = config(momentum=0.5, mask_momentum=0.25)
    state, epoch = start(settings, method)
    if method == "scl":
        state = random_masks(state)
        kernel, bias, mask = leaves_of(host(state.trained))
    else:
        kernel, bias = (
            np.array(state.trained["Dense_0"][name], float)
            for name in ("kernel", "bias")
        )
        mask = np.ones_like(kernel)
    velocity, mask_velocity, bias_velocity, squares = 0.0, 0.0, 0.0, 0.0
    for step in range(2):
        connected = mask >= 0
        gradient, bias_gradient = task_gradient(kernel * connected, bias)
        mask_gradient = gradient * kernel + settings.penalty
        squares = 0.9 * squares + 0.1 * (mask_gradient**2).mean(axis=0)
        mask_gradient /= np.sqrt(squares / (1 - 0.9 ** (step + 1)))
        rate = settings.learning_rate * 0.5 * (1 + np.cos(np.pi * step / 8))
        velocity = 0.5 * velocity + gradient * np.where(connected, 1, 0.1)
        bias_velocity = 0.5 * bias_velocity + bias_gradient
        mask_velocity = 0.25 * mask_velocity + mask_gradient
        kernel = kernel - rate * velocity
        bias = bias - rate * bias_velocity
        mask = mask - settings.mask_learning_rate * mask_velocity
        state, _ = epoch(state)
    if method == "scl":
        new_kernel, new_bias, new_mask = leaves_of(state.trained)
        np.testing.assert_allclose(new_mask, mask, rtol=1e-3, atol=1e-5)
    else:
        new_kernel, new_bias = (
            state.trained["Dense_0"][name] for name in ("kernel", "bias")
        )
    np.testing.assert_allclose(new_kernel, kernel, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(new_bias, bias, rtol=1e-3, atol=1e-5)
