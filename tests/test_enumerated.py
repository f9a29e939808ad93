"""Enumerated problems: the table, the training and what is read off both."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import scl_jax
from experiments import enumerated
from experiments.enumerated import Problems, make_problems

CONNECTIONS = 5


@pytest.fixture(scope="module")
def problems():
    return make_problems(3, 6, connections=CONNECTIONS, examples=20, penalty=0.4)


@pytest.fixture(scope="module")
def losses(problems):
    return enumerated.enumerate_masks(problems)


def loss(problem, mask):
    """Return J of one problem and one mask, in float64."""
    inputs, weights, targets = (np.asarray(x, np.float64) for x in problem)
    errors = sum(mask[i] * weights[i] * inputs[:, i] for i in range(len(mask)))
    return np.mean((errors - targets) ** 2) + 0.4 * sum(mask)


def each(problems):
    return zip(*problems[:3], strict=True)


def spread(problems, seed=0):
    shape = problems.weights.shape
    return jax.random.uniform(jax.random.key(seed), shape, minval=-1, maxval=1)


def test_table_holds_the_loss_of_every_mask(problems, losses):
    assert losses.shape == (6, 2**CONNECTIONS)
    for problem, row in zip(each(problems), losses, strict=True):
        for bits in itertools.product((0, 1), repeat=CONNECTIONS):
            number = sum(bit << i for i, bit in enumerate(bits))
            np.testing.assert_allclose(row[number], loss(problem, bits), rtol=1e-5)


def test_mask_number_finds_the_mask_in_the_table(problems, losses):
    variables = spread(problems)
    numbers = enumerated.mask_numbers(variables)
    for k, problem in enumerate(each(problems)):
        expected = loss(problem, np.asarray(variables[k]) >= 0)
        np.testing.assert_allclose(losses[k, numbers[k]], expected, rtol=1e-5)


def test_columns_have_the_correlation_that_was_asked_for():
    inputs = make_problems(0, 2, connections=4, examples=20_000, correlation=0.6).inputs
    for one in np.asarray(inputs):
        found = np.corrcoef(one.T)
        np.testing.assert_allclose(np.diag(np.cov(one.T)), 1, atol=0.05)
        np.testing.assert_allclose(found[~np.eye(4, dtype=bool)], 0.6, atol=0.03)


def test_another_seed_gives_other_problems():
    first, same, other = (make_problems(seed, 2, connections=3) for seed in (0, 0, 1))
    assert jnp.array_equal(first.inputs, same.inputs)
    assert not jnp.array_equal(first.inputs, other.inputs)


def slope(s):
    """Return the proxy gradient of leaky ReLU with slope 0.25."""
    return np.where(s >= 0, 1.0, 0.25)


@pytest.mark.parametrize(
    ("ste", "proxy"),
    [(scl_jax.identity, np.ones_like), (scl_jax.LeakyReLU(0.25), slope)],
)
@pytest.mark.parametrize(("norm", "decay"), [("rms", 0.9), ("rms", 0.0), ("none", 0.9)])
def test_training_is_the_descent_of_the_method(problems, ste, proxy, norm, decay):
    steps, rate = 12, 0.1
    start = spread(problems)
    options = {"steps": steps, "learning_rate": rate, "norm": norm, "decay": decay}
    found = enumerated.train_masks(problems, ste, start, **options)
    assert found.shape == (6, steps + 1, CONNECTIONS)
    for k, (inputs, weights, targets) in enumerate(each(problems)):
        x, w, y = (np.asarray(a, np.float64) for a in (inputs, weights, targets))
        s = np.asarray(start[k], np.float64)
        square = 0.0  # the running mean of squared norms
        for t in range(steps):
            np.testing.assert_allclose(found[k, t], s, atol=1e-4)
            residual = x @ (w * (s >= 0)) - y
            gradient = (2 * w * (x.T @ residual) / len(y) + 0.4) * proxy(s)
            if norm == "rms":
                square = decay * square + (1 - decay) * np.mean(gradient**2)
                gradient /= np.sqrt(square / (1 - decay ** (t + 1)))
            s = s - rate * (1 + np.cos(np.pi * t / steps)) / 2 * gradient
        np.testing.assert_allclose(found[k, steps], s, atol=1e-4)


def test_relu_never_brings_a_pruned_connection_back(problems):
    path = enumerated.train_masks(problems, scl_jax.ReLU(), spread(problems), steps=60)
    connected = np.asarray(path) >= 0
    assert (np.diff(connected.astype(int), axis=1) <= 0).all()
    assert connected[:, 0].sum() > connected[:, -1].sum() > 0


def test_clipped_rests_in_its_dead_zone(problems):
    start = jnp.full_like(problems.weights, 1.5)
    path = enumerated.train_masks(problems, scl_jax.Clipped(), start, steps=20)
    assert (path == 1.5).all()


def test_gap_is_zero_at_the_best_mask_alone(problems, losses):
    everywhere = np.array(list(itertools.product((-1.0, 1.0), repeat=CONNECTIONS)))
    variables = jnp.tile(everywhere, (6, 1, 1))
    gaps = np.asarray(enumerated.gap_to_optimum(losses, variables))
    assert gaps.shape == (6, 2**CONNECTIONS)
    assert ((gaps == 0).sum(axis=1) == 1).all()
    for k, problem in enumerate(each(problems)):
        values = np.array([loss(problem, bits >= 0) for bits in everywhere])
        best = values.min()
        np.testing.assert_allclose(gaps[k], (values - best) / best, atol=1e-5)


def test_stuck_is_a_better_flip_that_the_proxy_forbids(problems, losses):
    variables = 2 * spread(problems, seed=1)
    found = enumerated.stuck(losses, variables, scl_jax.Clipped())
    expected = np.zeros(found.shape, bool)
    for k, problem in enumerate(each(problems)):
        s = np.asarray(variables[k])
        mask = (s >= 0).astype(int)
        for i in range(CONNECTIONS):
            flipped = mask.copy()
            flipped[i] = 1 - mask[i]
            lower = loss(problem, flipped) < loss(problem, mask)
            expected[k, i] = lower and abs(s[i]) > 1
    assert 0 < expected.sum() < expected.size
    np.testing.assert_array_equal(found, expected)
    assert not enumerated.stuck(losses, variables, scl_jax.identity).any()


@pytest.mark.parametrize(
    "wrong",
    [
        {"connections": 0},
        {"connections": 17},
        {"count": 0},
        {"examples": 0},
        {"correlation": 1.0},
        {"penalty": -0.1},
    ],
)
def test_problem_out_of_range_is_refused(wrong):
    with pytest.raises(ValueError, match=f"make_problems: .*{next(iter(wrong))}"):
        make_problems(0, **{"count": 2, **wrong})


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"start": jnp.ones((6, 4))}, ValueError, r"shape \(6, 5\); got .*\(6, 4\)"),
        ({"steps": 0}, ValueError, "steps=0"),
        ({"learning_rate": 0.0}, ValueError, "learning_rate=0.0"),
        ({"norm": "rsm"}, ValueError, "rsm"),
        ({"ste": scl_jax.ReLU}, TypeError, "hashable callable"),
    ],
)
def test_training_says_what_does_not_fit(problems, changed, error, message):
    arguments = {"ste": scl_jax.identity, "start": spread(problems), "steps": 2}
    with pytest.raises(error, match=message):
        enumerated.train_masks(problems, **{**arguments, **changed})


def test_table_of_other_problems_is_refused(losses):
    variables = jnp.ones((6, 4))
    with pytest.raises(ValueError, match=r"gap_to_optimum: .*\(6, 32\) and \(6, 4\)"):
        enumerated.gap_to_optimum(losses, variables)
    with pytest.raises(ValueError, match=r"stuck: .*\(6, 32\) and \(6, 4\)"):
        enumerated.stuck(losses, variables, scl_jax.identity)


def test_own_proxy_gradient_is_used():
    problem = Problems(jnp.ones((1, 1, 1)), jnp.ones((1, 1)), jnp.zeros((1, 1)), 0.0)
    # The connection does harm: identity cuts it, a negative proxy moves it up.
    for ste, cut in ((scl_jax.identity, True), (lambda s: -jnp.ones_like(s), False)):
        path = enumerated.train_masks(problem, ste, jnp.full((1, 1), 0.1), steps=50)
        assert (path[0, -1, 0] < 0) == cut
