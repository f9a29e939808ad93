"""The training loop: against NumPy and Optax step by step, and what is reported."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import (
    by_path,
    config,
    dataset,
    host,
    images,
    parts,
    register,
    standardized,
    text,
)

import scl_jax
from experiments.feed import next_key, shuffle
from experiments.health import kernel_counts
from experiments.network import make_network
from experiments.train import config_seeds, train


@pytest.fixture(autouse=True)
def _tiny_networks(monkeypatch):
    register(monkeypatch)


def in_numpy(config, split, method):
    """Train the linear network in float64, one step after the other.

    Returns kernel, bias, mask variables, and of each epoch (loss, accuracy).
    """
    examples = len(split.labels)
    steps = config.epochs * (examples // config.batch_size)
    start = parts(config, split, method, config.seed)
    trained, key = start.state.trained, start.key
    weights = trained if method == "dense" else trained.weights
    kernel, bias = (
        np.array(weights["Dense_0"][name], float) for name in ("kernel", "bias")
    )
    mask = np.full(kernel.shape, config.mask_initial)
    velocities = [0.0, 0.0, 0.0]
    squares, decay = 0.0, config.norm_decay
    step, history = 0, []
    freeze_step = round(config.freeze_at * steps) if method == "scl" else steps
    for _ in range(config.epochs):
        # In an epoch in which masks rest, pruned weights are zero and rest, too.
        moving, part = 1.0, config.pruned_gradient
        if step >= freeze_step:
            moving, part, kernel = mask >= 0, 0.0, kernel * (mask >= 0)
        order, _ = shuffle(key, examples, config.batch_size)
        key = next_key(key)
        losses, correct = [], []
        for batch in np.asarray(order):
            x, labels = standardized(split)[batch], split.labels[batch]
            connected = mask >= 0
            logits = x @ (kernel * connected) + bias
            odds = np.exp(logits - logits.max(axis=1, keepdims=True))
            odds /= odds.sum(axis=1, keepdims=True)
            smoothed = np.eye(10)[labels] * (1 - config.label_smoothing)
            smoothed += config.label_smoothing / 10
            losses.append(-(smoothed * np.log(odds)).sum(axis=1).mean())
            correct.append((logits.argmax(axis=1) == labels).mean())
            difference = (odds - smoothed) / len(labels)
            gradient = x.T @ difference
            mask_gradient = gradient * kernel + config.penalty
            squares = decay * squares + (1 - decay) * (mask_gradient**2).mean(axis=0)
            mask_gradient /= np.sqrt(squares / (1 - decay ** (step + 1)))
            passed = np.where(connected, 1.0, part)
            gradients = [
                gradient * passed + config.weight_decay * kernel,
                difference.sum(axis=0),
                mask_gradient,
            ]
            momenta = [config.momentum, config.momentum, config.mask_momentum]
            velocities = [
                momentum * velocity + g
                for momentum, velocity, g in zip(
                    momenta, velocities, gradients, strict=True
                )
            ]
            rate = config.learning_rate * 0.5 * (1 + np.cos(np.pi * step / steps))
            kernel = kernel - rate * velocities[0] * moving
            bias = bias - rate * velocities[1]
            if method == "scl" and step < freeze_step:
                mask = mask - config.mask_learning_rate * velocities[2]
            step += 1
        history.append((np.mean(losses), np.mean(correct)))
    return kernel, bias, mask, history


@pytest.mark.parametrize(
    ("method", "smoothing"), [("dense", 0.0), ("scl", 0.0), ("scl", 0.3)]
)
def test_training_equals_numpy_step_by_step(method, smoothing):
    data, settings = dataset(), config(label_smoothing=smoothing)
    (trained,) = train(settings, data, method)
    kernel, bias, mask, history = in_numpy(settings, data.train, method)
    weights = trained.trained if method == "dense" else trained.trained.weights
    np.testing.assert_allclose(
        weights["Dense_0"]["kernel"], kernel, rtol=1e-3, atol=1e-5
    )
    np.testing.assert_allclose(weights["Dense_0"]["bias"], bias, rtol=1e-3, atol=1e-5)
    if method == "scl":
        got = trained.trained.masks["Dense_0"]["kernel"]
        np.testing.assert_allclose(got, mask, rtol=1e-3, atol=1e-4)
        # Not vacuous: some are pruned, some are not.
        assert 0.1 < (mask < 0).mean() < 0.9
    sure = np.abs(mask) > 1e-4  # the others hang on rounding
    assert sure.mean() > 0.99
    np.testing.assert_allclose(
        trained.folded["Dense_0"]["kernel"][sure],
        (kernel * (mask >= 0))[sure],
        rtol=1e-3,
        atol=1e-5,
    )
    for metrics, (loss, accuracy) in zip(trained.history, history, strict=True):
        assert metrics.loss == pytest.approx(loss, rel=1e-4)
        assert metrics.train_accuracy == pytest.approx(accuracy, abs=1e-6)
        assert metrics.seconds > 0
    assert abs(trained.history[-1].nnz - (mask >= 0).sum()) <= (~sure).sum()
    assert [m.epoch for m in trained.history] == [1, 2, 3]
    assert {(m.method, m.seed) for m in trained.history} == {(method, 7)}
    assert {m.validation_accuracy for m in trained.history} == {None}
    assert trained.statistics == {}


def test_two_layers_equal_optax_step_by_step():
    # Kernels of several shapes, with the method written down in place, without scan.
    settings = config(model="two_layers", epochs=2, momentum=0.9, penalty=1e-5)
    split = images(23)
    steps, network = 8, make_network(settings)
    init_key, order_key = jax.random.split(jax.random.key(7))
    order_key = jax.random.key_data(order_key)
    params, _ = jax.jit(network.init)(init_key)
    masks = {
        layer: jnp.full_like(params[layer]["kernel"], settings.mask_initial)
        for layer in params
    }
    tx = optax.sgd(optax.cosine_decay_schedule(settings.learning_rate, steps), 0.9)

    @jax.jit
    def gradients(params, masks, part, inputs, labels):
        used = {
            layer: {
                "kernel": own["kernel"] * (masks[layer] >= 0),
                "bias": own["bias"],
            }
            for layer, own in params.items()
        }

        def loss(used):
            logits = network.apply(used, {}, inputs)
            return optax.softmax_cross_entropy_with_integer_labels(
                logits, labels
            ).mean()

        value, gradient = jax.value_and_grad(loss)(used)
        of_masks = {
            layer: own["kernel"] * params[layer]["kernel"] + settings.penalty
            for layer, own in gradient.items()
        }
        of_params = {
            layer: {
                "kernel": own["kernel"] * jnp.where(masks[layer] >= 0, 1.0, part)
                + settings.weight_decay * params[layer]["kernel"],
                "bias": own["bias"],
            }
            for layer, own in gradient.items()
        }
        return of_params, of_masks, value

    state, velocity, losses = tx.init(params), dict.fromkeys(params, 0.0), []
    squares = dict.fromkeys(params, 0.0)
    for epoch in range(2):
        if epoch:
            for layer, mask in masks.items():
                params[layer]["kernel"] *= mask >= 0
        order, _ = shuffle(order_key, 23, 5)
        order_key = next_key(order_key)
        for step, batch in enumerate(np.asarray(order), start=4 * epoch):
            # The second epoch is the one in which masks rest, and pruned weights.
            part = 0.0 if epoch else 0.1
            of_params, of_masks, loss = gradients(
                params, masks, part, split.inputs[batch], split.labels[batch]
            )
            losses.append(float(loss))
            updates, state = tx.update(of_params, state, params)
            if epoch:
                for layer, mask in masks.items():
                    updates[layer]["kernel"] *= mask >= 0
            params = optax.apply_updates(params, updates)
            for layer, gradient in host(of_masks).items():
                square = (gradient.astype(float) ** 2).mean(axis=0)
                squares[layer] = 0.9 * squares[layer] + 0.1 * square
                size = np.sqrt(squares[layer] / (1 - 0.9 ** (step + 1)))
                divided = gradient / np.where(size == 0, 1, size)
                velocity[layer] = settings.mask_momentum * velocity[layer] + divided
                if step < 4:
                    moved = masks[layer] - settings.mask_learning_rate * velocity[layer]
                    masks[layer] = jnp.float32(moved)

    (trained,) = train(settings, dataset(), "scl")
    np.testing.assert_allclose(
        [m.loss for m in trained.history],
        np.reshape(losses, (2, 4)).mean(axis=1),
        rtol=1e-3,
    )
    for layer, mask in masks.items():
        got = np.asarray(trained.trained.masks[layer]["kernel"])
        assert ((got >= 0) != (np.asarray(mask) >= 0)).mean() < 1e-3
        assert 0.005 < (got < 0).mean() < 0.995
        np.testing.assert_allclose(
            trained.trained.weights[layer]["kernel"],
            params[layer]["kernel"],
            rtol=0.05,
            atol=1e-3,
        )


# What is reported


def test_metrics_are_those_of_the_folded_network():
    # What is held out is not augmented.
    data, seen = dataset(held_out=10), []
    settings = config(augment="crop_flip")
    (trained,) = train(settings, data, "scl", on_epoch=seen.append)
    assert seen == trained.history
    last, folded = trained.history[-1], trained.folded
    kernel = np.asarray(folded["Dense_0"]["kernel"])
    assert last.nnz == (kernel != 0).sum()
    assert last.sparsity == pytest.approx((kernel == 0).mean())
    logits = standardized(data.validation) @ kernel + np.asarray(
        folded["Dense_0"]["bias"]
    )
    correct = (logits.argmax(axis=1) == data.validation.labels).sum()
    assert last.validation_accuracy == correct / 10


def test_counts_are_those_of_the_masks():
    (trained,) = train(config(), dataset(), "scl")
    masks = scl_jax.binary_masks(trained.trained)
    connected = sum(int(m.sum()) for m in by_path(masks).values() if m is not None)
    assert trained.history[-1].nnz == connected
    (layer,) = kernel_counts(trained.folded).values()
    assert (layer.nnz, layer.size) == (connected, 7840)


def test_each_epoch_is_reported_before_the_next():
    order = []
    for trained in train(
        config(seeds=2),
        dataset(),
        "dense",
        on_epoch=lambda metrics: order.append((metrics.seed, metrics.epoch)),
    ):
        order.append(trained.seed)
    assert order == [(7, 1), (7, 2), (7, 3), 7, (8, 1), (8, 2), (8, 3), 8]


def test_seeds_of_a_config_count_from_the_first():
    assert list(config_seeds(config(seeds=3))) == [7, 8, 9]


def test_no_seeds_train_nothing():
    assert list(train(config(), dataset(), "scl", seeds=[])) == []


def test_loss_and_accuracy_of_text_count_characters():
    data = dataset(8, held_out=3, kind=text)
    settings = config(dataset="python_docs", model="tiny_text", epochs=1, batch_size=8)
    (trained,) = train(settings, data, "scl")
    start = parts(settings, data.train)
    apply = jax.jit(start.objective.network.apply)

    def logits(params, split):
        return np.asarray(apply(params, {}, split.inputs), float)

    # One step: what it saw was the network before it.
    first = logits(start.objective.method.fold(start.state.trained), data.train)
    assert first.shape == (8, 128, 97)
    log_odds = first - np.log(np.exp(first).sum(axis=-1, keepdims=True))
    losses = -np.take_along_axis(log_odds, data.train.labels[..., None], axis=-1)
    (seen,) = trained.history
    assert losses.shape == (8, 128, 1)
    assert seen.loss == pytest.approx(losses.mean(), rel=1e-5)
    correct = first.argmax(axis=-1) == data.train.labels
    assert seen.train_accuracy == pytest.approx(correct.mean(), abs=1e-6)
    last = logits(trained.folded, data.validation).argmax(axis=-1)
    correct = (last == data.validation.labels).sum()
    assert seen.validation_accuracy == correct / (3 * 128)
    assert correct > 0
