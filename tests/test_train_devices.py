"""One device, eight, and eight that cut the kernels in two: the same training."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from tiny import by_path, config, dataset, images, parts, register

from experiments.train import train

MESHES = [
    {"devices": 8, "model_parallel": 1},
    {"devices": 8, "model_parallel": 2},
]


@pytest.fixture(autouse=True)
def _tiny_networks(monkeypatch):
    register(monkeypatch)


@pytest.fixture
def compilations():
    """Note what is compiled."""
    names = []

    def listen(event, duration, **about):
        del duration
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(about.get("fun_name"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


def close(first, second, **tolerances):
    jax.tree.map(
        lambda *both: np.testing.assert_allclose(
            *(np.asarray(x, float) for x in both), **tolerances
        ),
        *(first, second),
    )


@pytest.mark.parametrize(
    ("model", "method", "mask_dtype"),
    [
        ("two_layers", "dense", "float32"),
        ("two_layers", "scl", "float32"),
        ("linear", "scl", "bfloat16"),
        ("normalized", "scl", "float32"),
    ],
)
def test_training_is_the_same_on_any_number_of_devices(model, method, mask_dtype):
    data = dataset(40, held_out=10)
    one = config(model=model, mask_dtype=mask_dtype, batch_size=16, epochs=2)
    (expected,) = train(one, data, method)
    # A mask variable that rounds the other way is one of bfloat16's steps away.
    tolerance = 2**-7 if mask_dtype == "bfloat16" else 1e-4
    for mesh in MESHES:
        (got,) = train(dataclasses.replace(one, **mesh), data, method)
        close(got.trained, expected.trained, rtol=tolerance, atol=tolerance / 10)
        close(got.statistics, expected.statistics, rtol=1e-4, atol=1e-5)
        for old, new in zip(expected.history, got.history, strict=True):
            assert new.loss == pytest.approx(old.loss, rel=1e-4)
            assert new.train_accuracy == pytest.approx(old.train_accuracy)
            assert new.validation_accuracy == old.validation_accuracy
            assert abs(new.nnz - old.nnz) <= (5 if mask_dtype == "bfloat16" else 0)
        # The host looks at all of it: nothing is left cut in pieces.
        leaves = jax.tree.leaves((got.trained, got.statistics, got.folded))
        assert all(leaf.is_fully_replicated for leaf in leaves)
        assert all(len(leaf.devices()) == 8 for leaf in leaves)
    if method == "scl":  # not vacuous
        assert 0 < expected.history[-1].sparsity < 1


@pytest.mark.parametrize("mesh", [{"devices": 1, "model_parallel": 1}, *MESHES])
def test_batch_statistics_are_those_of_the_global_batch(mesh):
    split = images(16)
    made = parts(config(model="normalized", batch_size=16, **mesh), split, "dense")
    kernel = np.asarray(made.state.trained["Conv_0"]["kernel"], float)
    state, _ = made.epoch(made.state)
    # 16 patches of 7 x 7 pixels an image, which the kernel meets one by one.
    scaled = (split.inputs / 255 - 0.1307) / 0.3081
    patches = scaled.reshape(16, 4, 7, 4, 7).transpose(0, 1, 3, 2, 4).reshape(-1, 49)
    outputs = patches @ kernel.reshape(49, 6)
    got = state.statistics["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(
        got["mean"], 0.1 * outputs.mean(axis=0), rtol=1e-3, atol=1e-5
    )
    np.testing.assert_allclose(
        got["var"], 0.9 + 0.1 * outputs.var(axis=0), rtol=1e-3, atol=1e-5
    )
    # Not those of a device's part of the batch, which differ from each other.
    own = outputs.reshape(8, -1, 6).var(axis=1)
    assert (np.abs(own.mean(axis=0) - outputs.var(axis=0)) > 0.01).any()


@pytest.mark.parametrize("model", ["two_layers", "normalized"])  # scanned, dispatched
def test_mask_variables_and_momenta_lie_where_their_weight_lies(compilations, model):
    settings = config(model=model, batch_size=8, **MESHES[1])
    made = parts(settings, images(23))

    def shardings(state):
        return jax.tree.map(lambda leaf: leaf.sharding, state)

    before = shardings(made.state)
    assert before == shardings(made.template)
    state, _ = made.epoch(made.state)
    assert shardings(state) == before
    # Weight, mask variable and both momenta.
    weights = by_path(state.trained.weights)
    shapes = {x.shape for path, x in weights.items() if path.endswith("/kernel")}
    assert len(shapes) == 2
    for *inputs, features in shapes:
        shape = (*inputs, features)
        alike = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == shape]
        assert len(alike) == 4
        for leaf in alike:
            assert leaf.sharding.spec == PartitionSpec(*[None] * len(inputs), "model")
            assert {s.data.shape for s in leaf.addressable_shards} == {
                (*inputs, features // 2)
            }
    assert all(x.is_fully_replicated for x in weights.values() if x.ndim == 1)
    # So the next epoch finds what the first was compiled for.
    compilations.clear()
    made.epoch(state)
    assert compilations == []


def test_seeds_and_epochs_share_one_compilation(compilations):
    settings = config(seeds=3, batch_size=8, devices=8, epochs=2)
    trainings = train(settings, dataset(held_out=10), "scl")
    next(trainings)
    assert "jit(scan)" in compilations
    compilations.clear()
    assert len(list(trainings)) == 2
    assert compilations == []
