"""DST: a trained threshold per output unit, and how the loss reaches it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pruning
import pytest
from tiny import config as tiny_config
from tiny import dataset, register

import scl_jax
from experiments.baselines.dst import dst, long_tailed
from experiments.outcome import make_report
from experiments.train import train

STEPS = 8
SHAPES = {"a": (3, 2), "b": (3, 2, 5, 6), "query": (4, 3, 2)}
# The last axes of the kernel, with which a threshold of this shape broadcasts.
FEATURES = {"a": (2,), "b": (6,), "query": (3, 2)}


@pytest.fixture(autouse=True)
def _method(monkeypatch):
    register(monkeypatch)


def config(**changes):
    """Return a config of a network whose queries have two feature axes."""
    text = {"dataset": "python_docs", "model": "tiny_text"}
    return tiny_config(**{**text, **changes})


def random_params(seed):
    return pruning.random_params(seed, SHAPES)


def wrapped(way, seed=0):
    """Return what is trained, with other thresholds, and one |w| equal to its t."""
    random = np.random.default_rng(100 + seed)
    trained = way.wrap(random_params(seed))
    thresholds = {}
    for name, leaves in trained["thresholds"].items():
        t = jnp.float32(random.uniform(-0.2, 1.2, leaves["kernel"].shape))
        t = t.at[0].set(abs(trained["weights"][name]["kernel"]).ravel()[0])
        thresholds[name] = {**leaves, "kernel": t}
    return {**trained, "thresholds": thresholds}


def kernels(tree):
    """Return the kernels, or what belongs to them, in double precision."""
    return {name: np.array(leaves["kernel"], float) for name, leaves in tree.items()}


def distances(trained):
    """Return |w| - t by the name of the kernel."""
    weights, thresholds = (kernels(trained[x]) for x in ("weights", "thresholds"))
    return {
        name: abs(w) - thresholds[name].reshape(FEATURES[name])
        for name, w in weights.items()
    }


def estimator(x):
    """Return the long-tailed estimator, equation 3 of the paper, piece by piece."""
    pieces = [abs(x) <= 0.4, (abs(x) > 0.4) & (abs(x) <= 1), abs(x) > 1]
    return np.select(pieces, [2 - 4 * abs(x), np.full_like(x, 0.4), np.zeros_like(x)])


def summed(name, x):
    """Sum over all axes that do not tell features apart; one number a feature."""
    return x.reshape(-1, np.prod(FEATURES[name])).sum(0)


def history(settings, gradient, trained):
    """Return what is trained before, and after each of the steps."""
    way = dst(settings, STEPS)
    state, update = way.tx.init(trained), jax.jit(way.tx.update)
    seen = [trained]
    for step in range(STEPS):
        moves, state = update(gradient(step), state, seen[-1])
        seen.append(optax.apply_updates(seen[-1], moves))
    return seen


# The mask


def test_every_feature_of_a_kernel_has_one_threshold_that_starts_at_zero():
    params = random_params(0)
    trained = dst(config(mask_initial=-5.0), STEPS).wrap(params)
    jax.tree.map(np.testing.assert_array_equal, trained["weights"], params)
    for name, leaves in trained["thresholds"].items():
        assert leaves["bias"] is None
        zeros = np.zeros(np.prod(FEATURES[name]), np.float32)
        np.testing.assert_array_equal(leaves["kernel"], zeros, strict=True)


@pytest.mark.parametrize("seen", ["effective", "fold"])
def test_weights_are_connected_from_their_threshold_on(seen):
    way = dst(config(), STEPS)
    trained = wrapped(way)
    masked = jax.jit(getattr(way, seen))(trained)
    for name, distance in distances(trained).items():
        assert distance.ravel()[0] == 0
        assert 0 < (distance < 0).sum() < distance.size
        weight = np.array(trained["weights"][name]["kernel"])
        kernel = np.array(masked[name]["kernel"])
        np.testing.assert_array_equal(kernel, np.where(distance >= 0, weight, 0))
        if seen == "fold":
            assert not np.signbit(kernel[distance < 0]).any()
        np.testing.assert_array_equal(
            masked[name]["bias"], trained["weights"][name]["bias"]
        )


# Its gradient


def test_derivative_of_the_step_is_the_long_tailed_estimator():
    borders = np.array([0.4, 1.0], np.float32)
    near = [np.nextafter(borders, np.float32(end)) for end in (0, 2)]
    grid = np.concatenate([np.linspace(0, 2, 101), borders, *near]).astype(np.float32)
    x = np.concatenate([-grid, grid])
    got = jax.grad(lambda x: scl_jax.unit_step(x, long_tailed).sum())(jnp.array(x))
    np.testing.assert_allclose(got, estimator(x), atol=1e-6)
    # What is beyond 1 by one bit gets nothing, and 1 itself something.
    ends = long_tailed(jnp.float32([1, np.nextafter(np.float32(1), np.float32(2))]))
    np.testing.assert_allclose(ends, [0.4, 0])


def test_loss_moves_weights_through_product_and_mask_and_thresholds_through_mask():
    way = dst(config(), STEPS)
    trained = wrapped(way)
    of_loss = random_params(1)
    _, pull = jax.vjp(jax.jit(way.effective), trained)
    (gradient,) = pull(of_loss)
    regimes = set()
    for name, x in distances(trained).items():
        w, g = (kernels(tree)[name] for tree in (trained["weights"], of_loss))
        regimes |= set(np.digitize(abs(x), [0.4, 1]).ravel())
        through_mask = g * w * estimator(x)
        np.testing.assert_allclose(
            gradient["weights"][name]["kernel"],
            g * (x >= 0) + through_mask * np.sign(w),
            rtol=1e-4,
            atol=1e-5,
        )
        np.testing.assert_allclose(
            gradient["thresholds"][name]["kernel"],
            -summed(name, through_mask),
            rtol=1e-4,
            atol=1e-5,
        )
        np.testing.assert_array_equal(
            gradient["weights"][name]["bias"], of_loss[name]["bias"]
        )
    assert regimes == {0, 1, 2}


def test_penalty_falls_with_every_threshold_of_every_kernel():
    way = dst(config(penalty=0.03, sparsity=0.5, freeze_at=0.75), STEPS)
    trained = wrapped(way)
    penalty, gradient = jax.value_and_grad(way.penalty)(trained)
    thresholds = kernels(trained["thresholds"])
    terms = np.concatenate([np.exp(-t) for t in thresholds.values()])
    assert terms.shape == (2 + 6 + 6,)
    np.testing.assert_allclose(penalty, 0.03 * terms.sum(), rtol=1e-6)
    for name, t in thresholds.items():
        moved = gradient["thresholds"][name]["kernel"]
        np.testing.assert_allclose(moved, -0.03 * np.exp(-t), rtol=1e-5)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient["weights"]))


# The optimizer


def test_weights_and_thresholds_take_the_same_steps_and_only_weights_decay():
    settings = config(weight_decay=0.1)
    way = dst(settings, STEPS)

    def gradient(step):
        return jax.tree.map(lambda leaf: 0.2 * leaf, wrapped(way, 10 + step))

    seen = history(settings, gradient, wrapped(way))
    for field, decay in (("weights", 0.1), ("thresholds", 0.0)):
        for name, x in kernels(seen[0][field]).items():
            velocity = np.zeros_like(x)
            for step in range(STEPS):
                g = kernels(gradient(step)[field])[name]
                velocity = 0.75 * velocity + g + decay * x
                x = x - 0.1 * (1 + np.cos(np.pi * step / STEPS)) / 2 * velocity
                np.testing.assert_allclose(
                    kernels(seen[step + 1][field])[name], x, rtol=1e-4, atol=1e-5
                )


def test_thresholds_do_not_decay_under_adamw():
    settings = config(optimizer="adamw", weight_decay=0.5)
    before = wrapped(dst(settings, STEPS))
    nothing = jax.tree.map(jnp.zeros_like, before)
    after = history(settings, lambda step: nothing, before)[-1]
    jax.tree.map(
        np.testing.assert_array_equal, after["thresholds"], before["thresholds"]
    )
    for name, weight in kernels(before["weights"]).items():
        assert (abs(kernels(after["weights"])[name]) < abs(weight)).all()


@pytest.mark.parametrize(
    ("shape", "left", "starved"),
    [
        ((20, 25), 0, True),
        ((20, 25), 5, True),
        ((20, 25), 6, False),
        ((3, 33), 0, True),
        ((3, 33), 1, False),
    ],
)
def test_thresholds_of_a_kernel_with_a_hundredth_left_are_zero_again(
    shape, left, starved
):
    settings = config(weight_decay=0.0)
    way = dst(settings, STEPS)
    large = (np.arange(np.prod(shape)) < left).reshape(shape)
    weight = np.where(large, -4, 0.1).astype(np.float32)
    params = {name: {"kernel": jnp.array(weight)} for name in ("first", "second")}
    before = way.wrap(params)
    features = np.linspace(0.05, 0.09, shape[-1], dtype=np.float32)
    before["thresholds"]["first"]["kernel"] = jnp.array(features)

    def gradient(step):
        """Lift the first kernel's thresholds over 0.1, once."""
        nothing = jax.tree.map(jnp.zeros_like, before)
        push = jnp.full(shape[-1], -10.0 * (step == 0))
        nothing["thresholds"]["first"]["kernel"] = push
        return nothing

    _, first, second, *_ = (
        kernels(trained["thresholds"])
        for trained in history(settings, gradient, before)
    )
    rates = [0.1 * (1 + np.cos(np.pi * step / STEPS)) / 2 for step in (0, 1)]
    t = np.zeros_like(features) if starved else features + rates[0] * 10
    np.testing.assert_allclose(first["first"], t, rtol=1e-6, atol=0)
    # They kept their momentum, that lifts them again: to be reset again.
    t = np.zeros_like(features) if starved else t + rates[1] * 0.75 * 10
    np.testing.assert_allclose(second["first"], t, rtol=1e-6, atol=0)
    assert not second["second"].any()


# The whole


@pytest.mark.parametrize("devices", [1, 8])
def test_larger_penalty_trains_to_fewer_connections(devices):
    left = []
    for penalty in (0.001, 0.06):
        settings = tiny_config(
            model="two_layers",
            penalty=penalty,
            batch_size=8,
            devices=devices,
            model_parallel=2 if devices > 1 else 1,
        )
        (trained,) = train(settings, dataset(), "dst")
        nnz = 0
        for name, t in kernels(trained.trained["thresholds"]).items():
            weight = kernels(trained.trained["weights"])[name]
            folded = kernels(trained.folded)[name]
            np.testing.assert_array_equal(folded, np.where(abs(weight) >= t, weight, 0))
            nnz += np.count_nonzero(folded)
        assert trained.history[-1].method == "dst"
        assert trained.history[-1].nnz == nnz
        assert make_report(settings, trained).totals.nnz == nnz
        left.append(nnz / (784 * 30 + 300))
    assert 1 > left[0] > 0.2 + left[1] > 0.25
