"""The benchmark: what is timed, and what the numbers are ratios of."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
from tiny import Linear, images

from experiments import bench
from experiments.config import Config
from experiments.models import MODELS
from experiments.network import make_network
from experiments.step import TrainState

CONFIG = Config(
    dataset="fashion_mnist", model="lenet300", epochs=10, batch_size=4, devices=1
)


@pytest.fixture
def linear(monkeypatch):
    """Make both networks a linear one."""
    for name in ("lenet300", "lenet5"):
        monkeypatch.setitem(MODELS, name, Linear)
    make_network.cache_clear()
    yield
    make_network.cache_clear()


def test_row_holds_medians_and_the_spread_of_the_ratios(linear, monkeypatch):
    seconds = {
        "dense": [1.0, 2.0, 4.0],
        "scl": [2.0, 2.0, 6.0],
        "budget": [3.0, 4.0, 16.0],
        "gmp": [1.5, 2.5, 8.0],
    }
    turns = []

    def timer(config, method, split):
        assert split.inputs.shape == (5 * 4, 28, 28, 1)
        name = "budget" if config.sparsity and method == "scl" else method
        times = iter(seconds[name])

        def epoch():
            turns.append(name)
            return next(times)

        return epoch

    monkeypatch.setattr(bench, "epoch_timer", timer)
    row = bench.compare(CONFIG, steps=5, repeats=3, methods=["gmp"])
    assert turns == ["dense", "scl", "budget", "gmp"] * 3
    assert row["dense_us"] == pytest.approx(2e6 / 5)
    assert row["scl_us"] == pytest.approx(2e6 / 5)
    # 2, 1 and 1.5: the median of the ratios, not the ratio of the medians.
    assert row["ratio"] == 1.5
    assert row["ratio_spread"] == [1.0, 2.0]
    assert row["budget_us"] == pytest.approx(4e6 / 5)
    assert row["budget_ratio"] == 3.0
    assert row["other_ratios"] == {"gmp": 1.5}
    assert (row["network"], row["batch"], row["repeats"]) == ("lenet300", 4, 3)
    assert row["floor_bytes"] == 36 * 7840


@pytest.mark.parametrize(
    ("devices", "model_parallel", "mesh"), [(1, 1, (1, 1)), (8, 2, (4, 2))]
)
def test_timer_spans_an_epoch_and_leaves_compilation_out(
    linear, monkeypatch, devices, model_parallel, mesh
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

    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(bench, "make_run", make_run)
    config = dataclasses.replace(CONFIG, devices=devices, model_parallel=model_parallel)
    epoch = bench.epoch_timer(config, "scl", images(8))
    assert [epoch(), epoch()] == [3.0, 4.0]
    # Each epoch goes on from where the one before left off.
    assert len({id(state) for state in states}) == 3


def test_experiments_are_timed_with_their_own_settings(linear, tmp_path, monkeypatch):
    monkeypatch.setattr(
        bench,
        "import_seconds",
        lambda repeats: dict.fromkeys(("jax_optax", "jax_optax_scl_jax"), 1.0),
    )
    path = tmp_path / "bench.json"
    short = ["--repeats", "1", "--steps", "2", "--json", str(path)]
    chosen = ["--experiments", "mnist5k_lenet300", "fashion_mnist_lenet5"]
    more = ["--batch", "8", "--methods", "gmp", "str"]
    for options, batches in (([], [64, 128]), (more, [8, 8])):
        assert bench.main([*short, *chosen, *options]) == 0
        rows = json.loads(path.read_text())["steps"]
        assert [row["network"] for row in rows] == ["lenet300", "lenet5"]
        assert [row["batch"] for row in rows] == batches
        assert all(set(r["other_ratios"]) == set(options[3:]) for r in rows)


def test_numbers_are_printed_and_written(linear, monkeypatch, tmp_path, capsys):
    imports = {"jax_optax": 1.0, "jax_optax_scl_jax": 1.25}
    monkeypatch.setattr(bench, "import_seconds", lambda repeats: imports)
    path = tmp_path / "bench.json"
    assert bench.main(["--repeats", "3", "--steps", "2", "--json", str(path)]) == 0
    content = json.loads(path.read_text())
    assert content["import_seconds"] == imports
    assert content["versions"]["jax"]
    assert content["arguments"] == "--repeats 3 --steps 2"
    assert [(row["network"], row["batch"]) for row in content["steps"]] == [
        ("lenet300", 128),
        ("lenet300", 64),
        ("lenet5", 128),
    ]
    out = capsys.readouterr().out
    for row in content["steps"]:
        low, high = row["ratio_spread"]
        assert 0 < low <= row["ratio"] <= high
        assert row["dense_us"] > 0
        assert row["scl_us"] > 0
        assert row["repeats"] == 3
        assert f"{row['ratio']:.3f}" in out
        assert f"{low:.3f}-{high:.3f}" in out
    assert "+0.25 s" in out


def test_import_is_timed_in_processes_with_and_without_us(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    asked = []

    def run(command, check):
        asked.append(command[-1])
        clock.now += 1.5 if "scl_jax" in command[-1] else 1.0

    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(bench, "subprocess", SimpleNamespace(run=run))
    assert bench.import_seconds(2) == {"jax_optax": 1.0, "jax_optax_scl_jax": 1.5}
    assert asked == ["import jax, optax", "import jax, optax, scl_jax"] * 2


@pytest.mark.parametrize("option", ["--repeats", "--steps"])
@pytest.mark.parametrize("value", ["0", "-1", "many"])
def test_numbers_that_time_nothing_are_refused(option, value, capsys, monkeypatch):
    monkeypatch.setattr(bench, "compare", lambda *args: pytest.fail("it was timed"))
    with pytest.raises(SystemExit) as exit_code:
        bench.main([option, value])
    assert exit_code.value.code not in (0, None)
    assert option in capsys.readouterr().err
