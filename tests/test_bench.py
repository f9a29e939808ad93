"""The benchmark: what it prints, and what it writes."""

import json
from types import SimpleNamespace

import pytest
from tiny import Linear

from experiments import bench
from experiments.models import MODELS
from experiments.network import make_network


@pytest.fixture
def linear(monkeypatch):
    """Make both networks a linear one, and the imports short."""
    for name in ("lenet300", "lenet5"):
        monkeypatch.setitem(MODELS, name, Linear)
    imports = {"jax_optax": 1.0, "jax_optax_scl_jax": 1.25}
    monkeypatch.setattr(bench, "import_seconds", lambda repeats: imports)
    make_network.cache_clear()
    yield
    make_network.cache_clear()


def written(path, *options):
    """Run the benchmark; return what it wrote."""
    short = ["--repeats", "1", "--steps", "2", "--json", str(path)]
    assert bench.main([*short, *options]) == 0
    return json.loads(path.read_text())


def test_experiments_are_timed_with_their_own_settings(linear, tmp_path):
    chosen = ["--experiments", "mnist5k_lenet300", "fashion_mnist_lenet5"]
    more = ["--batch", "8", "--methods", "gmp", "str"]
    for options, batches in (([], [64, 128]), (more, [8, 8])):
        rows = written(tmp_path / "bench.json", *chosen, *options)["steps"]
        assert [row["network"] for row in rows] == ["lenet300", "lenet5"]
        assert [row["batch"] for row in rows] == batches
        usual = ["dense", "scl", "budget", "frozen"]
        assert all([*row["timed"]] == [*usual, *options[3:]] for row in rows)


def test_masks_are_those_of_the_command_line(linear, tmp_path):
    options = ["--mask-dtype", "bfloat16", "--mask-momentum", "0"]
    for row in written(tmp_path / "bench.json", *options)["steps"]:
        assert (row["mask_dtype"], row["mask_momentum"]) == ("bfloat16", 0)
        assert row["mask_bytes"] == 2 * row["weights"]
    options = ["--experiments", "mnist5k_lenet300", "--compute", "bfloat16"]
    (row,) = written(tmp_path / "bench.json", *options)["steps"]
    assert row["compute"] == "bfloat16"


def test_numbers_are_printed_and_written(linear, tmp_path, capsys):
    content = written(tmp_path / "bench.json", "--memory")
    assert content["import_seconds"]["jax_optax"] == 1.0
    assert content["versions"]["jax"]
    assert content["arguments"] == "--repeats 1 --steps 2 --memory"
    assert [(row["network"], row["batch"]) for row in content["steps"]] == [
        ("lenet300", 128),
        ("lenet300", 64),
        ("lenet5", 128),
    ]
    out = capsys.readouterr().out
    for row in content["steps"]:
        for one in row["timed"].values():
            low, high = one["spread"]
            assert 0 < low <= one["ratio"] <= high
            assert one["us"] > 0
            assert f"{one['ratio']:.3f}" in out
            assert f"{low:.3f}-{high:.3f}" in out
            assert f"{one['bytes'] / 1e6:.1f} MB" in out
        most = row["timed"]["dense"]["bytes"] + row["mask_bytes"] + 2 * row["weights"]
        assert f"{most / 1e6:.1f} MB" in out
    assert "+0.25 s" in out


def test_scaling_is_printed_and_written(linear, tmp_path, capsys):
    rows = written(tmp_path / "bench.json", "--scaling")["scaling"]
    assert [row["network"] for row in rows] == ["lenet300", "lenet300", "lenet5"]
    out = capsys.readouterr().out
    for row in rows:
        assert f"{row['dense']:.2f} times one" in out
        assert f"{row['scl']:.2f} times one" in out


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
