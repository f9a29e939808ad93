"""What a step costs: what is timed, and what the numbers are ratios of."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tiny import Linear, images

from experiments import step_cost
from experiments.config import Config
from experiments.models import MODELS
from experiments.network import make_network
from experiments.step import TrainState

CONFIG = Config(
    dataset="fashion_mnist", model="lenet300", epochs=10, batch_size=4, devices=1
)
KERNEL = 7840  # weights of the linear network


@pytest.fixture(autouse=True)
def _linear(monkeypatch):
    monkeypatch.setitem(MODELS, "lenet300", Linear)
    make_network.cache_clear()
    yield
    make_network.cache_clear()


def name_of(config, method, frozen):
    """Return what the settings of a timer stand for."""
    if method != "scl":
        assert not frozen
        return method
    if frozen:
        return "frozen"
    return "budget" if config.sparsity else "scl"


def test_row_holds_medians_and_the_spread_of_the_ratios(monkeypatch):
    seconds = {
        "dense": [1.0, 2.0, 4.0],
        "scl": [2.0, 2.0, 6.0],
        "budget": [3.0, 4.0, 16.0],
        "frozen": [1.0, 2.2, 4.0],
        "gmp": [1.5, 2.5, 8.0],
    }
    turns = []

    def timer(config, method, frozen, split):
        assert split.inputs.shape == (5 * 4, 28, 28, 1)
        name = name_of(config, method, frozen)
        times = iter(seconds[name])

        def epoch():
            turns.append(name)
            return next(times)

        return epoch

    monkeypatch.setattr(step_cost, "epoch_timer", timer)
    row = step_cost.compare(CONFIG, steps=5, repeats=3, methods=["gmp"])
    assert turns == [*seconds] * 3
    timed = row["timed"]
    assert [*timed] == [*seconds]
    assert timed["dense"] == {"us": 2e6 / 5, "ratio": 1.0, "spread": [1.0, 1.0]}
    # 2, 1 and 1.5: the median of the ratios, not the ratio of the medians.
    assert timed["scl"] == {"us": 2e6 / 5, "ratio": 1.5, "spread": [1.0, 2.0]}
    assert timed["budget"] == {"us": 4e6 / 5, "ratio": 3.0, "spread": [2.0, 4.0]}
    assert timed["frozen"]["ratio"] == 1.0
    assert timed["gmp"] == {"us": 2.5e6 / 5, "ratio": 1.5, "spread": [1.25, 2.0]}
    assert (row["network"], row["batch"], row["side"]) == ("lenet300", 4, 28)
    assert (row["weights"], row["repeats"]) == (KERNEL, 3)


def test_kinds_that_are_not_asked_for_are_not_compiled(monkeypatch):
    made = []

    def timer(config, method, frozen, split):
        made.append((method, bool(config.sparsity), frozen))
        return lambda: 1.0

    monkeypatch.setattr(step_cost, "epoch_timer", timer)
    row = step_cost.compare(CONFIG, 1, 1, kinds=["frozen"])
    assert [*row["timed"]] == ["dense", "frozen"]
    assert made == [("dense", False, False), ("scl", True, True)]


@pytest.mark.parametrize(
    ("changes", "masks", "floor"),
    [
        # S and its momentum; S, W, its gradient, and two reads and two writes.
        ({}, 8, 4 + 4 + 4 + 16),
        ({"compute": "bfloat16"}, 8, 4 + 4 + 2 + 16),
        ({"mask_dtype": "bfloat16"}, 4, 2 + 4 + 4 + 8),
        ({"mask_momentum": 0.0}, 4, 4 + 4 + 4 + 8),
        ({"mask_momentum": 0.0, "mask_dtype": "bfloat16"}, 2, 2 + 4 + 4 + 4),
    ],
)
def test_bytes_are_counted_by_hand(changes, masks, floor):
    row = step_cost.compare(dataclasses.replace(CONFIG, **changes), 1, 1)
    assert row["mask_bytes"] == masks * KERNEL
    assert row["floor_bytes"] == floor * KERNEL


def test_memory_of_a_step_is_what_it_takes_and_what_it_makes():
    row = step_cost.compare(CONFIG, 1, 1, ["gmp"])
    assert "bytes" not in row["timed"]["dense"]
    step_cost.add_memory(row, CONFIG)
    assert row["timed"]["gmp"]["bytes"] >= row["timed"]["dense"]["bytes"]
    held = {name: one["bytes"] for name, one in row["timed"].items()}
    weights_and_momentum = 2 * 4 * (KERNEL + 10)
    assert held["dense"] >= weights_and_momentum + 4 * (784 + 4)  # a batch of four
    for name in ("scl", "budget", "frozen"):
        assert held[name] >= held["dense"] + row["mask_bytes"]
        assert held[name] < 3 * held["dense"]


def test_masks_at_rest_are_timed_without_their_gradient(monkeypatch):
    programs = {}

    def make_run(objective, feed, mesh):
        batch = jax.eval_shape(feed.batch, feed.source, (np.zeros(4, int), None))

        def run(state, items):
            grad = jax.jit(objective.step).lower(state, batch).compile()
            programs[objective.method.name, frozen] = grad.cost_analysis()["flops"]
            return state, None

        return run

    monkeypatch.setattr(step_cost, "make_run", make_run)
    for name in ("dense", "scl", "frozen"):
        config, method, frozen = step_cost.setting(CONFIG, name)
        step_cost.epoch_timer(config, method, frozen, images(8))
    scl, frozen = programs["scl", False], programs["scl", True]
    assert programs["dense", False] < frozen < scl
    # Comparisons and selections, and no norm, division or momentum.
    assert frozen - programs["dense", False] < 10 * KERNEL < scl - frozen


@pytest.mark.parametrize(
    ("devices", "model_parallel", "mesh"), [(1, 1, (1, 1)), (8, 2, (4, 2))]
)
def test_timer_spans_an_epoch_and_leaves_compilation_out(
    monkeypatch, devices, model_parallel, mesh
):
    clock = SimpleNamespace(now=0.0)
    spent = iter([100.0, 3.0, 4.0])
    states = []

    def make_run(objective, feed, used):
        assert objective.method.name == "scl"
        assert used.devices.shape == mesh

        def run(state, items):
            assert isinstance(state, TrainState)
            order, _ = items
            assert sorted(np.ravel(order).tolist()) == list(range(8))
            states.append(state)
            clock.now += next(spent)
            return TrainState(*state), None

        return run

    watch = SimpleNamespace(perf_counter=lambda: clock.now)
    monkeypatch.setattr(step_cost, "time", watch)
    monkeypatch.setattr(step_cost, "make_run", make_run)
    config = dataclasses.replace(CONFIG, devices=devices, model_parallel=model_parallel)
    epoch = step_cost.epoch_timer(config, "scl", False, images(8))
    assert [epoch(), epoch()] == [3.0, 4.0]
    # Each epoch goes on from where the one before left off.
    assert len({id(state) for state in states}) == 3


def test_throughput_of_all_devices_is_beside_that_of_one(monkeypatch):
    asked = []
    devices = jax.device_count()

    def timer(config, method, frozen, split):
        asked.append((config.devices, config.batch_size, method, len(split.labels)))
        times = iter([3.0, 1.0, 2.0] if config.devices == 1 else [2.0, 2.0, 2.0])
        return lambda: next(times)

    monkeypatch.setattr(step_cost, "epoch_timer", timer)
    row = step_cost.scaling(CONFIG, steps=5, repeats=3)
    pairs = [(1, 4, 20), (devices, 4 * devices, 20 * devices)]
    expected = [(d, b, m, n) for m in ("dense", "scl") for d, b, n in pairs]
    assert asked == expected
    assert (row["devices"], row["batch"]) == (devices, 4 * devices)
    assert row["dense"] == row["scl"] == devices  # the median of 1.5, 0.5 and 1
