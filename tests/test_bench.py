"""The benchmark: what is timed, and what the numbers are ratios of."""

import json
from types import SimpleNamespace

import jax.numpy as jnp
import pytest
from flax import linen as nn

from experiments import bench
from experiments.config import Config
from experiments.data import Split
from experiments.models import MODELS
from experiments.train import TrainState, make_network

CONFIG = Config(dataset="fashion_mnist", model="lenet300", epochs=10, batch_size=4)


class Linear(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(x.reshape(x.shape[0], -1))


@pytest.fixture
def linear(monkeypatch):
    """Make both networks a linear one."""
    for name in ("lenet300", "lenet5"):
        monkeypatch.setitem(MODELS, name, Linear)
    make_network.cache_clear()
    yield
    make_network.cache_clear()


def test_row_holds_medians_and_the_spread_of_the_ratios(linear, monkeypatch):
    seconds = {"dense": [1.0, 2.0, 4.0], "scl": [2.0, 2.0, 6.0]}
    turns = []

    def timer(config, method, split):
        assert split.images.shape == (5 * 4, 28, 28, 1)
        times = iter(seconds[method])

        def epoch():
            turns.append(method)
            return next(times)

        return epoch

    monkeypatch.setattr(bench, "epoch_timer", timer)
    row = bench.compare(CONFIG, steps=5, repeats=3)
    assert turns == ["dense", "scl"] * 3
    assert row["dense_us"] == pytest.approx(2e6 / 5)
    assert row["scl_us"] == pytest.approx(2e6 / 5)
    # 2, 1 and 1.5: the median of the ratios, not the ratio of the medians.
    assert row["ratio"] == 1.5
    assert row["ratio_spread"] == [1.0, 2.0]
    assert (row["network"], row["batch"], row["repeats"]) == ("lenet300", 4, 3)
    assert row["floor_bytes"] == 36 * 7840


def test_timer_spans_an_epoch_and_leaves_compilation_out(linear, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    spent = iter([100.0, 3.0, 4.0])
    waited = []

    class Pending:
        """A loss that is ready one second after it was dispatched."""

    def make_epoch(network, way, batch_size):
        def epoch(state, split):
            assert isinstance(state, TrainState)
            clock.now += next(spent)
            return state, (Pending(), None)

        return epoch

    def wait(loss):
        assert isinstance(loss, Pending)
        waited.append(loss)
        clock.now += 1

    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(bench, "make_epoch", make_epoch)
    monkeypatch.setattr(bench, "wait_until_ready", wait)
    split = Split(jnp.zeros((8, 28, 28, 1), jnp.uint8), jnp.zeros(8, jnp.int32))
    epoch = bench.epoch_timer(CONFIG, "scl", split)
    assert [epoch(), epoch()] == [4.0, 5.0]
    assert len(waited) == 3


def test_numbers_are_printed_and_written(linear, monkeypatch, tmp_path, capsys):
    imports = {"jax_optax": 1.0, "jax_optax_scl_jax": 1.25}
    monkeypatch.setattr(bench, "import_seconds", lambda repeats: imports)
    path = tmp_path / "bench.json"
    assert bench.main(["--repeats", "3", "--steps", "2", "--json", str(path)]) == 0
    content = json.loads(path.read_text())
    assert content["import_seconds"] == imports
    assert content["versions"]["jax"]
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
