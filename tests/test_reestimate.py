"""Re-estimated statistics are the averages over batches, whatever was kept before."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from scl_jax import (
    apply_masks,
    fold_masks,
    mask_params,
    reestimate_statistics,
)

EPSILON = 1e-5


class Network(nn.Module):
    """Two normalized layers: what the second sees, the first has normalized."""

    momentum: float = 0.9

    @nn.compact
    def __call__(self, x, *, train):
        for units in (6, 4):
            x = nn.Dense(units)(x)
            x = nn.BatchNorm(not train, momentum=self.momentum, epsilon=EPSILON)(x)
            x = jnp.tanh(x)
        return nn.Dense(3)(x)


def make_batches(count=5, size=32):
    rng = np.random.default_rng(0)
    return [
        (3 * rng.normal(size=(size, 5)) + 1 + 0.1 * i).astype(np.float32)
        for i in range(count)
    ]


def apply_training(model, params, statistics, x):
    variables = {"params": params, "batch_stats": statistics}
    return model.apply(variables, x, train=True, mutable=["batch_stats"])


def make_update(model, params):
    def update(statistics, x):
        return apply_training(model, params, statistics, x)[1]["batch_stats"]

    return update


def numpy_statistics(params, batches):
    """Mean and variance of each batch at each BatchNorm, averaged; in float64."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    found = {"BatchNorm_0": [], "BatchNorm_1": []}
    for x in batches:
        for i in range(2):
            dense, norm = params[f"Dense_{i}"], params[f"BatchNorm_{i}"]
            x = x @ dense["kernel"] + dense["bias"][None]
            mean, var = x.mean(0), x.var(0)
            found[f"BatchNorm_{i}"].append((mean, var))
            scale = norm["scale"] / np.sqrt(var + EPSILON)
            x = np.tanh((x - mean[None]) * scale[None] + norm["bias"][None])
    averages = {name: np.mean(pairs, axis=0) for name, pairs in found.items()}
    return {n: dict(zip(("mean", "var"), a, strict=True)) for n, a in averages.items()}


def assert_close(got, expected, rtol=2e-5):
    for name, leaves in expected.items():
        for key, x in leaves.items():
            atol = rtol * np.abs(x).max()
            np.testing.assert_allclose(got[name][key], x, rtol=0, atol=atol)


def ema(momentum, value=lambda x: x.mean(0)):
    """A moving average, written by hand."""

    def update(statistics, x):
        old = statistics["average"]
        return {"average": momentum * old + (1 - momentum) * value(x)}

    return update


# Flax


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.99])
def test_linen_statistics_are_the_averages_over_batches(momentum):
    model, batches = Network(momentum), make_batches()
    variables = model.init(jax.random.key(0), batches[0], train=False)
    update = jax.jit(make_update(model, variables["params"]))
    got = reestimate_statistics(update, variables["batch_stats"], batches)
    assert_close(got, numpy_statistics(variables["params"], batches))


def test_nnx_statistics_are_the_averages_over_batches():
    norm = nnx.BatchNorm(5, momentum=0.99, rngs=nnx.Rngs(0))
    graph, params, kept = nnx.split(norm, nnx.Param, nnx.BatchStat)

    @jax.jit
    def update(statistics, x):
        norm = nnx.merge(graph, params, statistics)
        norm(x)
        return nnx.state(norm, nnx.BatchStat)

    nnx.update(norm, reestimate_statistics(update, kept, batches := make_batches()))
    found = {"mean": norm.mean[...], "var": norm.var[...]}
    mean, var = (np.mean([f(x, axis=0) for x in batches], 0) for f in (np.mean, np.var))
    assert_close({"norm": found}, {"norm": {"mean": mean, "var": var}})


# What it is for: a network that lost connections while the averages were kept


def trained_and_pruned(batches):
    """A network whose averages are those from before half of its weights went."""
    model = Network(0.99)
    variables = model.init(jax.random.key(0), batches[0], train=False)
    masked = mask_params(variables["params"])
    tx = optax.adam(1e-2)

    @jax.jit
    def step(masked, statistics, state, x):
        def loss(masked):
            logits, noted = apply_training(model, apply_masks(masked), statistics, x)
            labels = (x[:, 0] > 1).astype(int) + (x[:, 1] > 1)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), noted["batch_stats"]

        (_, statistics), g = jax.value_and_grad(loss, has_aux=True)(masked)
        updates, state = tx.update(g, state)
        return optax.apply_updates(masked, updates), statistics, state

    kept = masked, variables["batch_stats"], tx.init(masked)
    for x in batches * 12:
        kept = step(*kept, x)
    masked, statistics, _ = kept

    def larger_half(path, weight):
        return jnp.abs(weight) - jnp.median(jnp.abs(weight))

    pruned = mask_params(masked.weights, initial=larger_half)
    return model, fold_masks(pruned), statistics


def test_a_pruned_network_gets_the_statistics_of_its_own_activations():
    batches = make_batches()
    model, params, old = trained_and_pruned(batches)
    update = jax.jit(make_update(model, params))
    expected = numpy_statistics(params, batches)
    with pytest.raises(AssertionError):
        assert_close(old, expected, rtol=0.1)
    assert_close(reestimate_statistics(update, old, batches), expected)

    # Over a single batch, evaluation is then what training computes with that batch.
    (x,) = make_batches(1, 256)
    new = reestimate_statistics(update, old, [x])
    logits = {
        name: model.apply({"params": params, "batch_stats": s}, x, train=False)
        for name, s in {"old": old, "new": new}.items()
    }
    normalized_by_batch, _ = apply_training(model, params, old, x)
    np.testing.assert_allclose(logits["new"], normalized_by_batch, atol=1e-4)
    assert np.abs(logits["old"] - normalized_by_batch).max() > 0.1


# Moving averages of any kind

OF_EACH = np.array([0.0, 0.1, 0.5, 0.9, 0.99], np.float32)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.99, OF_EACH], ids=str)
@pytest.mark.parametrize("offset", [0.0, 1e-6, 1e4])
def test_values_are_found_to_3e_6(momentum, offset):
    batches = [offset + (offset or 1) * x for x in make_batches()]
    got = reestimate_statistics(ema(momentum), {"average": jnp.ones(5)}, batches)
    expected = np.mean([x.astype(np.float64).mean(0) for x in batches], axis=0)
    np.testing.assert_allclose(got["average"], expected, rtol=3e-6)


def test_what_was_kept_before_does_not_count():
    batches = make_batches()
    kept = [{"average": jnp.full(5, x)} for x in (0.0, -7.0, 1e3)]
    new = [reestimate_statistics(ema(0.9), x, batches)["average"] for x in kept]
    np.testing.assert_array_equal(new, [new[0]] * 3)


def test_batches_are_streamed_and_each_is_used_once_but_the_first():
    running, seen = ema(0.9), []

    def update(statistics, batch):
        i, x = batch
        seen.append(i)
        return running(statistics, x)

    def stream():
        for i, x in enumerate(make_batches(4)):
            assert sorted({*seen}) == [*range(i)]
            yield i, x

    reestimate_statistics(update, {"average": jnp.ones(5)}, stream())
    assert seen == [0, 0, 0, 0, 1, 2, 3]


def test_a_jitted_update_is_compiled_once():
    update = jax.jit(ema(0.9))
    reestimate_statistics(update, {"average": jnp.ones(5)}, make_batches())
    assert update._cache_size() == 1


def test_what_is_not_floating_is_kept():
    running = ema(0.9)

    def update(statistics, x):
        assert statistics["steps"] == 7
        new = running(statistics, x)
        return {**new, "steps": statistics["steps"] + 1, "first": False, "none": None}

    kept = {
        "steps": jnp.array(7),
        "first": np.array(True),
        "none": None,
        "average": np.ones(5, np.float32),
    }
    got = reestimate_statistics(update, kept, make_batches())
    assert got["steps"] is kept["steps"]
    assert got["first"] is kept["first"]
    assert got["none"] is None
    expected = np.mean([x.mean(0) for x in make_batches()], axis=0)
    np.testing.assert_allclose(got["average"], expected, rtol=1e-5)


@pytest.mark.parametrize(
    "kept", [{}, {"steps": 3}, {"steps": np.int32(3)}, None], ids=str
)
def test_without_statistics_nothing_is_run_or_read(kept):
    def never(*args):
        raise AssertionError("called")

    batches = iter(make_batches(1))
    assert reestimate_statistics(never, kept, batches) is kept
    assert next(batches) is not None


def debiased(statistics, x, momentum=0.9):
    """A moving average from zero on, corrected for that, as Haiku keeps it."""
    steps = statistics["steps"] + 1
    hidden = momentum * statistics["hidden"] + (1 - momentum) * x.mean(0)
    average = hidden / (1 - momentum**steps)
    return {"steps": steps, "hidden": hidden, "average": average}


def debiased_after(steps, batches):
    kept = {"steps": 0, "hidden": jnp.zeros(5), "average": jnp.zeros(5)}
    for i in range(steps):
        kept = debiased(kept, batches[i % len(batches)])
    return kept


@pytest.mark.parametrize("steps", [1, 30, 60])
def test_a_debiased_average_is_refused_while_its_bias_counts(steps):
    batches = make_batches()
    with pytest.raises(ValueError, match=r"moving averages.* at average"):
        reestimate_statistics(debiased, debiased_after(steps, batches), batches)


def test_a_debiased_average_is_found_when_its_bias_is_forgotten():
    batches = make_batches()
    got = reestimate_statistics(debiased, debiased_after(200, batches), batches)
    expected = np.mean([x.mean(0) for x in batches], axis=0)
    assert got.pop("steps") == 200
    for x in got.values():
        np.testing.assert_allclose(x, expected, rtol=1e-5)


# Errors


def normalizing_with_the_average(statistics, x):
    """The second layer sees what the first one's moving average has normalized."""
    first = 0.9 * statistics["first"] + 0.1 * x.std(0)
    second = 0.9 * statistics["second"] + 0.1 * (x / first[None]).var(0)
    return {"first": first, "second": second}


def power_iteration(statistics, x):
    """The largest singular vector, as spectral normalization keeps it."""
    u = x.T @ (x @ statistics["average"])
    return {"average": u / (jnp.linalg.norm(u) + 1e-12)}


M = r"m \* old \+ \(1 - m\) \* value"
NO_AVERAGES = {
    "frozen": (ema(1.0), rf"{M} with m in \[0, 1\).* at average m is 1 to 1$"),
    "sum": (lambda s, x: {"average": s["average"] + x.mean(0)}, "m is 1 to 1"),
    "growing": (ema(1.5), "m is 1.5 to 1.5"),
    "swinging": (ema(-0.5), "m is -0.5 to -0.5"),
    "lost_share": (ema(1 - 2.0**-20), "m is 0.999999 to 0.999999"),
    "curved": (lambda s, x: {"average": jnp.tanh(s["average"])}, "at average it does"),
    "power_iteration": (power_iteration, "at average it does not"),
    "nan": (ema(0.9, lambda x: x.mean(0) * jnp.nan), "finite; those of the first"),
    "shape": (
        lambda s, x: {"average": jnp.ones(4)},
        r"average of \(5,\) became \(4,\)",
    ),
    "missing": (lambda s, x: {}, "differ at average"),
    "more": (lambda s, x: {**s, "other": 1}, "differ at other"),
}


@pytest.mark.parametrize("case", NO_AVERAGES)
def test_what_is_no_moving_average_is_refused_by_path(case):
    update, message = NO_AVERAGES[case]
    kept = {"average": jnp.linspace(0.1, 0.9, 5)}
    with pytest.raises(ValueError, match=message) as raised:
        reestimate_statistics(update, kept, make_batches())
    assert str(raised.value).startswith("reestimate_statistics: ")


def test_statistics_that_depend_on_others_are_refused():
    kept = {"first": jnp.full(5, 2.5), "second": jnp.full(5, 1.5)}
    with pytest.raises(ValueError, match=rf"{M}, in which .*; at second it does not"):
        reestimate_statistics(normalizing_with_the_average, kept, make_batches())


def test_nan_no_batch_and_no_function_are_refused():
    kept, nan = {"average": jnp.ones(5)}, {"average": jnp.full(5, jnp.nan)}
    with pytest.raises(ValueError, match="finite; those given are not at average"):
        reestimate_statistics(ema(0.9), nan, make_batches())
    with pytest.raises(ValueError, match="there must be a batch; batches held none"):
        reestimate_statistics(ema(0.9), kept, iter(()))
    with pytest.raises(TypeError, match=r"update must be a function .* got dict"):
        reestimate_statistics({}, kept, make_batches())  # pyright: ignore


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_refused_since_1_minus_m_is_lost_in_it(dtype):
    kept = {"average": jnp.ones(5, dtype)}
    with pytest.raises(TypeError, match=r"32 bits or more; average is .*float16"):
        reestimate_statistics(ema(0.9), kept, make_batches())

    def narrowing(statistics, x):
        return {"average": ema(0.9)(statistics, x)["average"].astype(dtype)}

    with pytest.raises(TypeError, match=r"average of float32 became .*float16"):
        reestimate_statistics(narrowing, {"average": jnp.ones(5)}, make_batches())
