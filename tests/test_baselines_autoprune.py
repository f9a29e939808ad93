"""AutoPrune: what the network sees, the gradients of w and m, and what moves."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pruning
import pytest
from tiny import config as tiny_config
from tiny import dataset, register

import scl_jax
from experiments.baselines.autoprune import autoprune
from experiments.outcome import make_report
from experiments.train import train

STEPS = 8
SHAPES = {"a": (7, 4), "b": (3, 2, 5, 6)}
PROXIES = {
    "identity": lambda m: np.ones_like(m),
    "leaky_relu(0.25)": lambda m: np.where(m >= 0, 1.0, 0.25),
    "softplus(4)": lambda m: 1 / (1 + np.exp(-4 * m)),
}
each_ste = pytest.mark.parametrize("ste", sorted(PROXIES))


@pytest.fixture(autouse=True)
def _tiny_networks(monkeypatch):
    register(monkeypatch)


def config(**changes):
    return tiny_config(**{"ste": "leaky_relu(0.25)", "penalty": 0.25, **changes})


def random_params(seed):
    return pruning.random_params(seed, SHAPES)


def random_trained():
    """Return random weights, and mask variables on both sides of 0 and on it."""
    masks = {
        name: {"kernel": x["kernel"].at[0, 0].set(0), "bias": None}
        for name, x in random_params(1).items()
    }
    return scl_jax.MaskedParams(random_params(0), masks)


def kernels(tree):
    """Return the kernels, or what stands for them, as float64."""
    return {name: np.array(x["kernel"], float) for name, x in tree.items()}


def gradient_of(way, trained, of_loss):
    """Return the gradient at what is trained, given that at the effective params."""
    _, pull = jax.vjp(jax.jit(way.effective), trained)
    return pull(of_loss)[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_masks_start_where_the_config_says(dtype):
    params = random_params(0)
    way = autoprune(config(mask_initial=0.5, mask_dtype=dtype), STEPS)
    trained = way.wrap(params)
    jax.tree.map(np.testing.assert_array_equal, trained.weights, params)
    for name, shape in SHAPES.items():
        assert trained.masks[name]["bias"] is None
        mask = trained.masks[name]["kernel"]
        assert mask.dtype == dtype
        np.testing.assert_array_equal(mask, np.full(shape, 0.5))


@pytest.mark.parametrize("seen", ["effective", "fold"])
@each_ste
def test_weights_are_connected_where_the_mask_variable_is_not_negative(ste, seen):
    way = autoprune(config(ste=ste), STEPS)
    trained = random_trained()
    masked = jax.jit(getattr(way, seen))(trained)
    for name, mask in kernels(trained.masks).items():
        expected = kernels(trained.weights)[name] * (mask >= 0)
        assert 0 < (mask < 0).sum() < mask.size
        kernel = np.array(masked[name]["kernel"])
        np.testing.assert_array_equal(kernel, expected)
        if seen == "fold":
            assert not np.signbit(kernel[mask < 0]).any()
        np.testing.assert_array_equal(
            masked[name]["bias"], trained.weights[name]["bias"]
        )


# Gradients


@each_ste
def test_gradients_are_those_of_the_formulas(ste):
    way = autoprune(config(ste=ste), STEPS)
    trained, of_loss = random_trained(), random_params(2)
    gradient = gradient_of(way, trained, of_loss)
    for name, g in kernels(of_loss).items():
        w, m = (kernels(tree)[name] for tree in trained)
        np.testing.assert_array_equal(gradient.weights[name]["kernel"], g * (m >= 0))
        np.testing.assert_array_equal(
            gradient.weights[name]["bias"], of_loss[name]["bias"]
        )
        np.testing.assert_allclose(
            gradient.masks[name]["kernel"], g * np.sign(w) * PROXIES[ste](m), rtol=1e-5
        )


def test_gradient_of_a_mask_knows_the_sign_of_its_weight_and_not_the_size():
    way = autoprune(config(), STEPS)
    trained, of_loss = random_trained(), random_params(2)
    random = np.random.default_rng(3)
    gradient = kernels(gradient_of(way, trained, of_loss).masks)
    for sign in (1, -1, 0):
        scaled = jax.tree.map(
            lambda w, sign=sign: (
                w * jnp.float32(sign * random.uniform(0.01, 9, w.shape))
            ),
            trained.weights,
        )
        new = gradient_of(way, trained._replace(weights=scaled), of_loss).masks
        for name, kernel in kernels(new).items():
            np.testing.assert_array_equal(kernel, sign * gradient[name])


@each_ste
def test_regularizer_counts_connections_and_moves_masks_alone(ste):
    trained = random_trained()
    left = sum((m >= 0).sum() for m in kernels(trained.masks).values())
    # Neither a sparsity nor another cost of a connection is asked for.
    changes = {}, {"sparsity": 0.5, "schedule_end": 0.4}, {"costs": "macs"}
    for change in changes:
        way = autoprune(config(ste=ste, **change), STEPS)
        value, gradient = jax.value_and_grad(way.penalty)(trained)
        assert value == 0.25 * left
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient.weights))
        for name, m in kernels(trained.masks).items():
            np.testing.assert_allclose(
                gradient.masks[name]["kernel"], 0.25 * PROXIES[ste](m), rtol=1e-5
            )


# Steps


def history(settings, of_loss):
    """Return what is trained before each step and after the last.

    The loss is linear in the effective parameters, `of_loss(step)` its gradient.
    """
    way = autoprune(settings, STEPS)

    def loss(trained, slopes):
        products = jax.tree.map(jnp.multiply, way.effective(trained), slopes)
        return sum(x.sum() for x in jax.tree.leaves(products)) + way.penalty(trained)

    @jax.jit
    def step(trained, state, slopes):
        gradient = jax.grad(loss)(trained, slopes)
        moves, state = way.tx.update(gradient, state, trained)
        return optax.apply_updates(trained, moves), state

    trained = random_trained()
    state, seen = way.tx.init(trained), [trained]
    for taken in range(STEPS):
        trained, state = step(trained, state, of_loss(taken))
        seen.append(trained)
    return seen


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@each_ste
def test_steps_are_those_of_numpy(ste, momentum):
    settings = config(
        ste=ste,
        mask_learning_rate=0.4,
        mask_momentum=momentum,
        momentum=0.75,
        weight_decay=0.1,
        freeze_at=0.75,
    )

    def of_loss(step):
        return random_params(10 + step)

    seen = history(settings, of_loss)
    for name in SHAPES:
        w, m = (kernels(tree)[name] for tree in seen[0])
        velocity, mask_velocity = np.zeros_like(w), np.zeros_like(m)
        cut = back = 0
        for step in range(STEPS):
            g, h = kernels(of_loss(step))[name], m >= 0
            push = (g * np.sign(w) + 0.25) * PROXIES[ste](m)
            velocity = 0.75 * velocity + g * h + 0.1 * w
            mask_velocity = momentum * mask_velocity + push
            w = w - 0.1 * (1 + np.cos(np.pi * step / STEPS)) / 2 * velocity
            m = m - (0.4 if step < 6 else 0) * mask_velocity
            cut, back = cut + (h & (m < 0)).sum(), back + (~h & (m >= 0)).sum()
            new_w, new_m = (kernels(tree)[name] for tree in seen[step + 1])
            np.testing.assert_allclose(new_w, w, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(new_m, m, rtol=1e-4, atol=1e-5)
        assert cut > 5
        assert back > 0


@pytest.mark.parametrize(
    ("freeze_at", "moving"), [(0.5, 4), (0.3, 2), (1.0, 8), (0.01, 0)]
)
def test_masks_rest_from_the_freeze_on_and_weights_do_not(freeze_at, moving):
    settings = config(freeze_at=freeze_at, mask_momentum=0.9)
    seen = history(settings, lambda step: random_params(10 + step))
    for field, expected in (("masks", moving), ("weights", STEPS)):
        trees = [kernels(getattr(trained, field)) for trained in seen]
        for name in SHAPES:
            moved = [
                not np.array_equal(old[name], new[name])
                for old, new in itertools.pairwise(trees)
            ]
            assert moved == [True] * expected + [False] * (STEPS - expected)


# The whole


@pytest.mark.parametrize("devices", [1, 8])
def test_larger_penalty_trains_to_fewer_connections(devices):
    left = []
    for penalty in (0.01, 0.04):
        settings = config(
            model="two_layers",
            penalty=penalty,
            # A gradient of m is about a gradient of the loss, which is small here.
            mask_learning_rate=1.0,
            epochs=2,
            freeze_at=0.75,
            batch_size=8,
            devices=devices,
            model_parallel=2 if devices > 1 else 1,
        )
        (trained,) = train(settings, dataset(), "autoprune")
        nnz = 0
        for name, mask in kernels(trained.trained.masks).items():
            weight = kernels(trained.trained.weights)[name]
            folded = kernels(trained.folded)[name]
            np.testing.assert_array_equal(folded, np.where(mask >= 0, weight, 0))
            nnz += np.count_nonzero(folded)
        assert trained.history[-1].method == "autoprune"
        assert trained.history[-1].nnz == nnz
        assert make_report(settings, trained).totals.connections == nnz
        left.append(nnz / (784 * 30 + 300))
    assert 1 > left[0] > 0.2 + left[1] > 0.2
