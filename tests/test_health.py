"""A training whose numbers are no longer finite says where that began."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from experiments import train as training
from experiments.checkpoint import Checkpoints
from experiments.config import Config
from experiments.data import NO_EXAMPLES, Dataset, Split
from experiments.feed import make_feed, next_key, shuffle
from experiments.health import all_finite, make_examination
from experiments.mesh import make_mesh
from experiments.methods import METHODS
from experiments.models import MODELS
from experiments.models.base import Model
from experiments.network import make_network
from experiments.step import Objective, make_initial
from experiments.train import TrainingError, train

# 5 steps an epoch; looks after 2, 4 and 5 of them.
CONFIG = Config(
    dataset="mnist5k",
    model="lenet300",
    epochs=4,
    batch_size=4,
    learning_rate=0.01,
    look_every=2,
    checkpoint_every=0,
    devices=1,
)
EXAMPLES, MARKED = 22, 7
# step -> where in the network which fault comes, and what is to be said of it
FAULTS = {
    114: ("inside", "infinity", "the output of Block_0/fuse"),
    115: ("early", "infinity", "the output of fuse_early"),
    116: ("inside", "nan", "the output of Block_0/fuse"),
    117: ("after", "overflow", "the output of fuse_after"),
    118: ("logits", "loss", "the loss, of finite logits"),
    119: ("early", "gradient", "the gradient of .*Dense_0/"),
    120: ("inside", "gradient", "the gradient of .*Block_0/Dense_0/"),
    121: ("after", "gradient", "the gradient of .*Block_0/Dense_1/"),
    122: ("logits", "gradient", "the gradient of .*head/"),
    123: ("after", "update", "the update of opt_state/"),
}


def wave(key, shape, dtype):
    """Initialize without random numbers, which take seconds to compile."""
    return jnp.sin(jnp.arange(np.prod(shape), dtype=dtype)).reshape(shape)


def dense(features, name=None):
    return nn.Dense(features, kernel_init=wave, name=name)


def spoiled(fault, x, now):
    """Return x, but now with a fault, in itself or in its gradient."""
    if fault == "infinity":
        return x + jnp.where(now, jnp.inf, 0)
    if fault == "nan":
        return x / jnp.where(now, jnp.nan, 1)
    if fault == "overflow":
        return x + jnp.where(now, 3e38, 0) * jnp.where(now, 10, 0)
    if fault == "gradient":  # of the square root at zero
        return x + jnp.sqrt(jnp.where(now, 0 * x, 1)) * jnp.where(now, 1, 0)
    if fault == "update":  # a finite gradient, the square of which is not
        large = jnp.where(now, 1e25, 0) * x
        return x + large - jax.lax.stop_gradient(large)
    assert fault == "loss"
    far = jnp.where(jnp.arange(x.shape[-1]) % 2, 3e38, -3e38)
    return x + jnp.where(now, far, 0).reshape(1, -1)


class Fuse(nn.Module):
    """Count the steps, and spoil what comes through at some of them."""

    place: str

    @nn.compact
    def __call__(self, x, marked):
        steps = self.variable("batch_stats", "steps", lambda: jnp.zeros((), jnp.int32))
        if self.is_initializing() or not self.is_mutable_collection("batch_stats"):
            return x
        steps.value += 1
        for step, (place, fault, _) in FAULTS.items():
            if place == self.place:
                x = spoiled(fault, x, steps.value == step)
        return spoiled("nan", x, (steps.value > 10) & marked)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, marked):
        x = Fuse("inside", name="fuse")(dense(6)(x), marked)
        return nn.relu(dense(6)(x))


class Net(Model):
    """Two layers in a block, one before and one after it, and fuses between them."""

    @nn.compact
    def __call__(self, x_BxHxWxC, *, train=False):
        x = x_BxHxWxC.reshape(x_BxHxWxC.shape[0], -1)
        marked = (x[:, 0] > 2).any()
        x = Fuse("early", name="fuse_early")(dense(6)(x), marked)
        x = Fuse("after", name="fuse_after")(Block()(x, marked), marked)
        x = dense(self.classes, name="head")(x)
        return Fuse("logits", name="fuse_logits")(x, marked)


@pytest.fixture(autouse=True)
def faulty(monkeypatch):
    monkeypatch.setitem(MODELS, "lenet300", Net)
    make_network.cache_clear()
    yield
    make_network.cache_clear()


def dataset(marked=False):
    random = np.random.default_rng(0)
    images = random.integers(0, 100, (EXAMPLES, 28, 28, 1)).astype(np.uint8)
    images[MARKED, 0, 0] = 255 if marked else 0
    labels = random.integers(0, 10, EXAMPLES).astype(np.int32)
    return Dataset(Split(images, labels), NO_EXAMPLES, NO_EXAMPLES)


def told(method="dense", folder=None, seed=0, marked=False, **changes):
    """Train, and return what the error says."""
    config = dataclasses.replace(CONFIG, **changes)
    with pytest.raises(TrainingError) as error:
        list(train(config, dataset(marked), method, folder=folder, seeds=[seed]))
    return str(error.value)


@pytest.mark.parametrize("method", METHODS)
def test_the_examination_finds_the_first_place(method):
    config, mesh = dataclasses.replace(CONFIG, optimizer="adamw"), make_mesh(1)
    feed = make_feed(config, dataset().train, mesh)
    network = make_network(config)
    objective = Objective(network, METHODS[method](config, 20), 0.0)
    state = make_initial(objective, mesh)[0](jax.random.key(0))
    examine = make_examination(objective, feed)
    item = tuple(x[0] for x in feed.items(0, np.zeros(2, np.uint32), 0, 0, 1))
    _, place = examine(state, item)
    assert place is None
    for step, (_, _, expected) in FAULTS.items():
        before = jax.tree.map(lambda x, s=step: jnp.int32(s - 1), state.statistics)
        _, place = examine(state._replace(statistics=before), item)
        assert place is not None, expected
        assert re.match(expected, place), (expected, place)


def test_an_examined_step_is_the_step_of_the_training():
    mesh = make_mesh(1)
    feed = make_feed(CONFIG, dataset().train, mesh)
    objective = Objective(make_network(CONFIG), METHODS["scl"](CONFIG, 20), 0.1)
    state = make_initial(objective, mesh)[0](jax.random.key(0))
    item = tuple(x[0] for x in feed.items(0, np.zeros(2, np.uint32), 0, 0, 1))
    examined, _ = make_examination(objective, feed)(state, item)
    stepped, _ = jax.jit(objective.step)(state, feed.batch(feed.source, item))
    for got, expected in zip(*map(jax.tree.leaves, (examined, stepped)), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def marked_step(seed):
    """Return the step, after the tenth, whose batch has the marked example."""
    _, order_key = jax.random.split(jax.random.key(seed))
    key = next_key(next_key(jax.random.key_data(order_key)))
    batches, _ = shuffle(key, EXAMPLES, 4)
    (place,) = np.flatnonzero((np.asarray(batches) == MARKED).any(axis=1))
    return 11 + int(place)


def test_the_error_names_step_layer_and_last_checkpoint_also_after_resuming(
    tmp_path, monkeypatch
):
    saved, save = [], Checkpoints.save

    def noting(self, step, state, record):
        saved.append((step, bool(all_finite(state))))
        save(self, step, state, record)

    monkeypatch.setattr(Checkpoints, "save", noting)
    step = marked_step(seed=6)
    assert step == 14  # the second look of the third epoch
    expected = (
        f"scl, seed 6: numbers are no longer finite at step {step} (epoch 3), "
        "beginning with the output of fuse_early; the last good checkpoint is step 12 "
        f"in {tmp_path / 'scl-seed6'}. The learning rate 0.01 "
    )
    for _ in range(2):
        assert told("scl", tmp_path, seed=6, marked=True).startswith(expected)
    # The second time there are but two steps; and nothing sick is kept.
    assert saved == [(step, True) for step in (2, 4, 5, 7, 9, 10, 12)]


@pytest.mark.parametrize(("seed", "look_every"), [(6, 2), (3, 0)])
def test_the_repeated_steps_see_the_same_examples(seed, look_every):
    message = told(seed=seed, marked=True, look_every=look_every)
    step = marked_step(seed)
    assert f"at step {step} (epoch 3), beginning with the output of fuse" in message
    assert "there is no checkpoint before it" in message


def test_a_fault_that_does_not_repeat_is_said_so(monkeypatch):
    monkeypatch.setattr(training, "all_finite", lambda tree: jnp.array(False))
    assert "at step 2, but not when repeated one by one" in told()


def test_healthy_numbers_of_all_types_are_finite():
    tree = {"a": jnp.ones(3), "b": jnp.int32(3), "c": jnp.array([True]), "d": None}
    assert all_finite(tree)
    assert all_finite({})
    for sick in (jnp.nan, jnp.inf, -jnp.inf):
        assert not all_finite({**tree, "e": jnp.array([1, sick], jnp.bfloat16)})
