"""A training that fails says where and why; one that is refused, what it wants."""

import logging

import jax.numpy as jnp
import optax
import pytest
from tiny import config, dataset, register

from experiments.checkpoint import CheckpointError, Checkpoints
from experiments.methods import METHODS
from experiments.train import TrainingError, train


@pytest.fixture(autouse=True)
def _tiny_networks(monkeypatch):
    register(monkeypatch)


def broken(monkeypatch, method, at):
    """Make the update of one step NaN; there are four steps an epoch."""
    make = METHODS[method]

    def nan_at_a_step(config, steps):
        way = make(config, steps)
        spoil = optax.scale_by_schedule(lambda t: jnp.where(t == at, jnp.nan, 1.0))
        frozen_tx = way.frozen_tx and optax.chain(way.frozen_tx, spoil)
        return way._replace(tx=optax.chain(way.tx, spoil), frozen_tx=frozen_tx)

    monkeypatch.setitem(METHODS, method, nan_at_a_step)


@pytest.mark.parametrize(
    ("method", "place", "at", "epoch", "look_every"),
    [
        ("dense", "trained/Dense_0/bias", 0, 1, 0),
        ("dense", "trained/Dense_0/bias", 6, 2, 1),
        ("scl", "trained/masks/Dense_0/kernel", 6, 2, 0),
        # No loss is computed after it: only the parameters show it.
        ("scl", "trained/masks/Dense_0/kernel", 11, 3, 3),
        # Where masks rest.
        ("scl", "trained/masks/Dense_0/kernel", 13, 4, 2),
    ],
)
def test_numbers_that_are_not_finite_are_reported_where_they_come_up(
    monkeypatch, method, place, at, epoch, look_every
):
    broken(monkeypatch, method, at)
    settings, seen = config(look_every=look_every, epochs=max(3, epoch)), []
    with pytest.raises(TrainingError) as raised:
        list(train(settings, dataset(), method, seeds=[9], on_epoch=seen.append))
    message = str(raised.value)
    assert message.startswith(f"{method}, seed 9: ")
    assert f"at step {at + 1} (epoch {epoch}), " in message
    assert f"beginning with the update of {place};" in message
    assert "; there is no checkpoint before it" in message
    for rate in ("learning rate 0.1 ", "mask learning rate 0.03 "):
        assert rate in message
    # What came before is reported, and no metrics of numbers that are not.
    assert [metrics.epoch for metrics in seen] == [*range(1, epoch)]


def test_place_that_no_checkpoint_leads_to_is_said_to_be_unknown(monkeypatch, tmp_path):
    broken(monkeypatch, "dense", 6)
    settings = config(look_every=1, checkpoint_every=0)
    restore = Checkpoints.restore

    def refuse(self, template):
        if self.latest():
            raise CheckpointError("none can be taken up")
        return restore(self, template)

    monkeypatch.setattr(Checkpoints, "restore", refuse)
    with pytest.raises(TrainingError, match=r"at step 7.*none can be taken up"):
        list(train(settings, dataset(), "dense", folder=tmp_path))


def test_layer_that_overflows_is_named():
    settings = config(model="overflowing")
    with pytest.raises(TrainingError, match=r"step 1 \(epoch 1\).*output of Dense_1;"):
        list(train(settings, dataset(), "dense"))


def test_lost_layers_are_warned_of_once(caplog):
    settings = config(model="two_layers", penalty=0.5, mask_learning_rate=0.2)
    with caplog.at_level(logging.WARNING):
        (trained,) = train(settings, dataset(), "scl")
    assert [metrics.nnz for metrics in trained.history] == [0, 0, 0]
    assert [record.getMessage() for record in caplog.records] == [
        f"scl, seed 7, step 4: {words}"
        for words in (
            "Dense_0/kernel has lost its last connection",
            "Dense_1/kernel has lost its last connection",
            "the output of the network does not depend on its input",
        )
    ]


def test_sound_training_warns_of_nothing(caplog):
    with caplog.at_level(logging.WARNING):
        list(train(config(), dataset(), "scl"))
    assert not caplog.records


# What is refused


@pytest.mark.parametrize("method", ["dense", "scl"])
def test_batch_larger_than_the_training_split_is_refused(method):
    with pytest.raises(ValueError, match=r"batch_size .*at most .*\b4; got 5"):
        next(train(config(), dataset(4), method))
    (trained,) = train(config(epochs=1), dataset(5), method)
    assert len(trained.history) == 1


@pytest.mark.parametrize(
    ("devices", "model_parallel", "parts"), [(0, 1, 8), (4, 1, 4), (8, 2, 4)]
)
def test_batch_that_the_devices_do_not_divide_is_refused(
    devices, model_parallel, parts
):
    settings = config(batch_size=6, devices=devices, model_parallel=model_parallel)
    with pytest.raises(ValueError, match=rf"a multiple of {parts}, .*; got 6"):
        next(train(settings, dataset(), "scl"))


def test_more_devices_than_there_are_are_refused():
    with pytest.raises(ValueError, match=r"devices must be at most 8, .* got 9"):
        next(train(config(devices=9), dataset(), "scl"))
