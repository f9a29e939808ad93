"""What dense and SCL share, and what one step of each does, against NumPy."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import scl_jax
from experiments.config import Config
from experiments.data import PIXELS, Split
from experiments.methods import METHODS, dense, scl
from experiments.models import MODELS
from experiments.train import TrainState, initial_state, make_epoch, make_network

EXAMPLES = 20
CONFIG = Config(
    dataset="mnist5k",
    model="lenet300",
    epochs=8,
    batch_size=EXAMPLES,
    penalty=1e-4,
    mask_learning_rate=0.01,
)
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


class Linear(nn.Module):
    """One kernel of shape (784, 10), so that NumPy's gradient is one line."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(10, bias_init=nn.initializers.normal(0.1))(
            x.reshape(x.shape[0], -1)
        )


@pytest.fixture(autouse=True)
def linear(monkeypatch):
    """Make the network a linear one."""
    monkeypatch.setitem(MODELS, "lenet300", Linear)
    make_network.cache_clear()
    yield
    make_network.cache_clear()


def examples(count=EXAMPLES, seed=3):
    random = np.random.default_rng(seed)
    return Split(
        random.integers(0, 256, (count, 28, 28, 1)).astype(np.uint8),
        random.integers(0, 10, count).astype(np.int32),
    )


def start(config, method, seed=0):
    """Return the state before the first step, and the function of an epoch."""
    split = examples()
    steps = config.epochs * (len(split.labels) // config.batch_size)
    way, network = METHODS[method](config, steps), make_network(config)
    epoch = make_epoch(network, way, config.batch_size)
    device = jax.tree.map(jnp.asarray, split)
    return initial_state(network, way, seed), lambda state: epoch(state, device)


def host(tree):
    """Copy to the host: what stays on the device is donated to the next epoch."""
    return jax.tree.map(lambda leaf: np.array(leaf, copy=True), tree)


def leaves_of(trained):
    """Return kernel, bias and mask variables as float64."""
    kernel, bias = (
        np.asarray(trained.weights["Dense_0"][name], float)
        for name in ("kernel", "bias")
    )
    return kernel, bias, np.asarray(trained.masks["Dense_0"]["kernel"], float)


def task_gradient(effective, bias, split=None):
    """Return the gradient of the mean cross-entropy: kernel, bias."""
    split = examples() if split is None else split
    mean, deviation = PIXELS["mnist5k"]
    x = (split.images.reshape(len(split.labels), -1) / 255 - mean) / deviation
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
def test_methods_start_from_the_same_weights_and_the_same_order(seed):
    plain, _ = start(CONFIG, "dense", seed)
    masked, _ = start(CONFIG, "scl", seed)
    jax.tree.map(np.testing.assert_array_equal, plain.trained, masked.trained.weights)
    np.testing.assert_array_equal(*map(jax.random.key_data, (plain.key, masked.key)))
    np.testing.assert_array_equal(
        masked.trained.masks["Dense_0"]["kernel"],
        np.full((784, 10), CONFIG.mask_initial, np.float32),
    )
    assert masked.trained.masks["Dense_0"]["bias"] is None


def test_seeds_start_from_different_weights_and_orders():
    first, _ = start(CONFIG, "dense", 0)
    second, _ = start(CONFIG, "dense", 1)
    kernels = [np.asarray(s.trained["Dense_0"]["kernel"]) for s in (first, second)]
    assert (kernels[0] != kernels[1]).mean() > 0.9
    keys = [jax.random.key_data(s.key).tolist() for s in (first, second)]
    assert keys[0] != keys[1]


def test_scl_without_pruning_trains_as_dense_does():
    # Mask variables far from zero: the masks are all 1 and the paths must be one.
    config = dataclasses.replace(CONFIG, penalty=0.0, mask_initial=50.0, batch_size=5)
    (plain, plain_epoch), (masked, masked_epoch) = (
        start(config, method) for method in ("dense", "scl")
    )
    for _ in range(3):
        plain, (plain_loss, plain_accuracy) = plain_epoch(plain)
        masked, (masked_loss, masked_accuracy) = masked_epoch(masked)
        np.testing.assert_allclose(masked_loss, plain_loss, rtol=1e-5)
        assert masked_accuracy == plain_accuracy
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
    config = dataclasses.replace(CONFIG, ste=ste, norm=norm, penalty=1e-3)
    state, epoch = start(config, "scl")
    state = random_masks(state)
    kernel, bias, mask = leaves_of(host(state.trained))

    connected = mask >= 0
    gradient, bias_gradient = task_gradient(kernel * connected, bias)
    mask_gradient = (gradient * kernel + config.penalty) * PROXIES[ste](mask)
    step = mask_gradient / NORMS[norm](mask_gradient)

    state, _ = epoch(state)
    new_kernel, new_bias, new_mask = leaves_of(state.trained)
    np.testing.assert_allclose(
        new_kernel,
        kernel - config.learning_rate * gradient * connected,
        rtol=1e-4,
        atol=1e-6,
    )
    np.testing.assert_allclose(
        new_bias, bias - config.learning_rate * bias_gradient, rtol=1e-4, atol=1e-6
    )
    moved = (mask - new_mask) / config.mask_learning_rate
    np.testing.assert_allclose(moved, step, rtol=1e-3, atol=3e-5)
    # Not vacuous: what is left without the penalty is another step.
    without = gradient * kernel * PROXIES[ste](mask)
    without = without / NORMS[norm](without)
    assert np.abs(without - step).max() > 3e-4


def test_penalty_alone_moves_every_mask_down():
    config = dataclasses.replace(CONFIG, penalty=0.5)
    state, _ = start(config, "scl")
    way = scl(config, 8)
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
    state, _ = start(CONFIG, "dense")
    assert dense(CONFIG, 8).penalty(state.trained) == 0


@pytest.mark.parametrize("method", ["dense", "scl"])
def test_weight_decay_touches_kernels_alone(method):
    kept, decayed = (
        dataclasses.replace(CONFIG, weight_decay=decay) for decay in (0.0, 0.25)
    )
    states = []
    for config in (kept, decayed):
        state, epoch = start(config, method)
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
        -CONFIG.learning_rate * 0.25 * old["Dense_0"]["kernel"],
        rtol=1e-3,
        atol=1e-6,
    )


@pytest.mark.parametrize(
    ("freeze_at", "moving"), [(0.5, 4), (0.3, 2), (1.0, 8), (0.01, 0)]
)
def test_masks_stop_moving_exactly_where_they_are_frozen(freeze_at, moving):
    config = dataclasses.replace(CONFIG, freeze_at=freeze_at)  # 8 steps
    state, epoch = start(config, "scl")
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
    config = dataclasses.replace(CONFIG, momentum=0.0)
    state, epoch = start(config, "scl")
    state = random_masks(state)
    kernel, _, mask = leaves_of(host(state.trained))
    state, _ = epoch(state)
    new_kernel, _, _ = leaves_of(state.trained)
    np.testing.assert_array_equal(new_kernel[mask < 0], kernel[mask < 0])
    folded = np.asarray(scl(config, 8).fold(state.trained)["Dense_0"]["kernel"])
    new_mask = np.asarray(state.trained.masks["Dense_0"]["kernel"])
    assert (folded[new_mask < 0] == 0).all()
    assert (folded[new_mask >= 0] != 0).all()


def test_fold_of_dense_changes_nothing():
    state, _ = start(CONFIG, "dense")
    folded = dense(CONFIG, 8).fold(state.trained)
    jax.tree.map(np.testing.assert_array_equal, folded, state.trained)


@pytest.mark.parametrize("method", ["dense", "scl"])
def test_momentum_adds_up_the_steps_before(method):
    # Two steps on the same batch, with and without momentum, by hand.
    config = dataclasses.replace(CONFIG, momentum=0.5, mask_momentum=0.25)
    state, epoch = start(config, method)
    if method == "scl":
        state = random_masks(state)
        kernel, bias, mask = leaves_of(host(state.trained))
    else:
        kernel, bias = (
            np.array(state.trained["Dense_0"][name], float)
            for name in ("kernel", "bias")
        )
        mask = np.ones_like(kernel)
    velocity, mask_velocity, bias_velocity = 0.0, 0.0, 0.0
    for step in range(2):
        connected = mask >= 0
        gradient, bias_gradient = task_gradient(kernel * connected, bias)
        mask_gradient = gradient * kernel + config.penalty
        mask_gradient /= np.sqrt((mask_gradient**2).mean(axis=0))
        rate = config.learning_rate * 0.5 * (1 + np.cos(np.pi * step / 8))
        velocity = 0.5 * velocity + gradient * connected
        bias_velocity = 0.5 * bias_velocity + bias_gradient
        mask_velocity = 0.25 * mask_velocity + mask_gradient
        kernel = kernel - rate * velocity
        bias = bias - rate * bias_velocity
        mask = mask - config.mask_learning_rate * mask_velocity
        state, _ = epoch(TrainState(*state))
    if method == "scl":
        new_kernel, new_bias, new_mask = leaves_of(state.trained)
        np.testing.assert_allclose(new_mask, mask, rtol=1e-3, atol=1e-5)
    else:
        new_kernel, new_bias = (
            state.trained["Dense_0"][name] for name in ("kernel", "bias")
        )
    np.testing.assert_allclose(new_kernel, kernel, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(new_bias, bias, rtol=1e-3, atol=1e-5)
