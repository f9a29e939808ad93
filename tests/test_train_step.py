"""The step of experiments/step.py: its loss, its precision, its buffers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from tiny import config, host, images, parts, register, standardized

from experiments import step
from experiments.data import Split
from experiments.mesh import make_mesh
from experiments.methods import METHODS
from experiments.network import make_network
from experiments.step import Objective, make_initial, make_run, slow_in_scan


@pytest.fixture(autouse=True)
def _tiny_networks(monkeypatch):
    register(monkeypatch)


def traced(settings, method="scl"):
    """Return an objective, the shapes of its state, and those of a batch of two."""
    network, way = make_network(settings), METHODS[method](settings, 12)
    objective = Objective(network, way, settings.label_smoothing)
    _, template = make_initial(objective, make_mesh(1))
    shape = network.example.shape[1:]
    labels = (2, *shape) if len(shape) == 1 else (2,)
    batch = Split(
        jax.ShapeDtypeStruct((2, *shape), np.uint8),
        jax.ShapeDtypeStruct(labels, np.int32),
    )
    return objective, template, batch


# The loss


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("method", ["dense", "scl"])
def test_loss_is_that_of_numpy(method, smoothing):
    settings, batch = config(label_smoothing=smoothing, penalty=0.01), images(6)
    objective, template, _ = traced(settings, method)
    random = np.random.default_rng(0)
    trained = jax.tree.map(
        lambda leaf: jnp.float32(random.normal(0, 0.05, leaf.shape)), template.trained
    )
    total, (statistics, seen) = jax.jit(objective.loss)(trained, {}, batch)
    params = trained if method == "dense" else trained.weights
    kernel, bias = (
        np.asarray(params["Dense_0"][name], float) for name in ("kernel", "bias")
    )
    connections = 0
    if method == "scl":
        connected = np.asarray(trained.masks["Dense_0"]["kernel"]) >= 0
        kernel, connections = kernel * connected, connected.sum()
        assert 0.4 < connected.mean() < 0.6
    logits = standardized(batch) @ kernel + bias
    log_odds = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    target = np.full((6, 10), smoothing / 10)
    target[range(6), batch.labels] += 1 - smoothing
    loss = -(target * log_odds).sum() / 6
    assert float(seen.loss) == pytest.approx(loss, rel=1e-4)
    assert float(total) == pytest.approx(loss + 0.01 * connections, rel=1e-5)
    correct = logits.argmax(axis=1) == batch.labels
    assert float(seen.accuracy) == pytest.approx(correct.mean())
    assert statistics == {}


def test_gradient_of_the_smoothed_loss_is_that_of_differences():
    objective, template, _ = traced(config(label_smoothing=0.3), "dense")
    params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.01), template.trained)

    def loss(bias):
        changed = {"Dense_0": {**params["Dense_0"], "bias": bias}}
        return objective.loss(changed, {}, images(4))[0]

    bias = jnp.linspace(-1, 1, 10)
    check_grads(loss, (bias,), order=1, modes=["rev"], rtol=0.05, atol=0.01)


# Precision: traced, because bfloat16 is slow on a CPU


def products(jaxpr):
    """Yield the matrix products and convolutions of a program."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            yield equation
        for parameter in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")
        ):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from products(inner)


@pytest.mark.parametrize(
    ("dataset", "model", "count", "mixed"),
    # Forward, and two each backward but for the gradient of the images. The float32
    # gradient of attention's softmax meets queries and keys.
    [("mnist5k", "normalized", 5, 0), ("python_docs", "tiny_text", 3 * 9, 2)],
)
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_products_are_computed_in_the_precision_asked_for(
    dataset, model, count, mixed, compute
):
    settings = config(dataset=dataset, model=model, compute=compute)
    objective, template, batch = traced(settings)
    program = jax.make_jaxpr(objective.step)(template, batch)
    taken = [
        {str(x.aval.dtype) for x in equation.invars}
        for equation in products(program.jaxpr)
    ]
    assert len(taken) == count
    assert all(compute in dtypes for dtypes in taken)
    expected = mixed if compute == "bfloat16" else 0
    assert sum(len(dtypes) > 1 for dtypes in taken) == expected
    # What is trained is float32, before the step and after it.
    state, seen = jax.eval_shape(objective.step, template, batch)
    for tree in (template, state):
        for leaf in jax.tree.leaves(tree):
            assert leaf.dtype in (jnp.float32, jnp.int32)
    assert {x.dtype for x in seen} == {jnp.dtype("float32")}
    params, statistics = template.trained.weights, template.statistics
    network = objective.network
    logits, new = jax.eval_shape(network.train, params, statistics, batch.inputs)
    assert logits.dtype == jnp.float32
    assert jax.tree.map(lambda x: x.dtype, new) == jax.tree.map(
        lambda x: x.dtype, statistics
    )
    evaluated = jax.eval_shape(network.apply, params, statistics, batch.inputs)
    assert evaluated.dtype == jnp.float32


@pytest.mark.parametrize(
    ("mask_dtype", "mask_momentum", "expected"),
    [
        ("bfloat16", 0.0, 2),
        ("bfloat16", 0.5, 4),
        ("float32", 0.0, 4),
        ("float32", 0.5, 8),
    ],
)
def test_mask_state_takes_so_many_bytes_a_weight(mask_dtype, mask_momentum, expected):
    settings = config(
        mask_dtype=mask_dtype, mask_momentum=mask_momentum, minimum_connections=1
    )
    (_, plain, _), (objective, masked, batch) = (
        traced(settings, method) for method in ("dense", "scl")
    )

    def held(state):
        return [leaf for leaf in jax.tree.leaves(state) if leaf.size > 10]

    new, _ = jax.eval_shape(objective.step, masked, batch)
    for state in (masked, new):
        took, before = (
            sum(leaf.size * leaf.dtype.itemsize for leaf in held(tree))
            for tree in (state, plain)
        )
        assert took - before == expected * 7840
        of_masks = [leaf.dtype for leaf in held(state)]
        if mask_dtype == "bfloat16":
            assert of_masks.count(jnp.bfloat16) == (2 if mask_momentum else 1)
    # Scalars count the steps: nothing else is kept.
    assert {leaf.size for leaf in jax.tree.leaves(masked)} == {7840, 10, 1}


# Many steps in one call


def test_initial_state_is_what_its_template_says():
    made = parts(config(model="normalized"), images(23))
    for leaf, expected in zip(
        *map(jax.tree.leaves, (made.state, made.template)), strict=True
    ):
        assert (leaf.shape, leaf.dtype) == (expected.shape, expected.dtype)
        assert leaf.sharding == expected.sharding


@pytest.mark.parametrize("slow", [False, True])
def test_steps_are_compiled_once_and_take_the_buffers_of_the_state(monkeypatch, slow):
    monkeypatch.setattr(step, "slow_in_scan", lambda network: slow)
    made, calls = parts(config(), images(23)), []

    def counted(trained):
        calls.append(1)
        return made.objective.method.penalty(trained)

    method = made.objective.method._replace(penalty=counted)
    objective = made.objective._replace(method=method)
    run = make_run(objective, made.feed, made.mesh)
    old = jax.tree.leaves(made.state)
    state, seen = run(made.state, made.feed.items(0, made.key, 0, 0, 4))
    assert all(leaf.is_deleted() for leaf in old)
    new = jax.tree.leaves((state, made.feed.source))
    assert not any(leaf.is_deleted() for leaf in new)
    once = len(calls)
    assert once >= 1
    run(state, made.feed.items(0, made.key, 1, 0, 4))
    assert len(calls) == once
    # What was seen is of every step, and on the host.
    for numbers in seen:
        assert isinstance(numbers, np.ndarray)
        assert numbers.shape == (4,)
    assert len(set(seen.loss.tolist())) == 4


def test_interrupt_is_heard_while_the_devices_compute(monkeypatch):
    class Pending:
        asked = 0

        def is_ready(self):
            self.asked += 1
            return self.asked > 3

    def interrupt(seconds):
        assert seconds <= 2e-3  # the grid on which epochs are timed
        raise KeyboardInterrupt

    pending = Pending()
    step.wait_until_ready(pending)
    assert pending.asked == 4
    monkeypatch.setattr(step.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        step.wait_until_ready(Pending())


def test_convolutions_are_not_scanned_on_a_cpu():
    assert not slow_in_scan(make_network(config()))
    assert slow_in_scan(make_network(config(model="lenet5")))
    assert slow_in_scan(make_network(config(model="normalized")))


def test_a_step_moves_the_state_and_leaves_its_argument():
    made = parts(config(), images(5))
    before = host(made.state)
    batch = images(5)
    state, _ = jax.jit(made.objective.step)(made.state, batch)
    jax.tree.map(np.testing.assert_array_equal, host(made.state), before)
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), host(state), before)
    assert all(jax.tree.leaves(moved.trained))
