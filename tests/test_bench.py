"""The benchmark: what it prints, and what it writes."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
from tiny import Linear

from experiments import bench, configs
from experiments.models import MODELS
from experiments.network import make_network
from experiments.step_cost import KINDS

IMPORT_SECONDS = bench.import_seconds


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Leave out what takes seconds, and is tested elsewhere."""
    imports = {"jax_optax": 1.0, "jax_optax_scl_jax": 1.25}
    monkeypatch.setattr(bench, "import_seconds", lambda repeats: imports)
    host = dict.fromkeys(("dense_us", "ratio", "budget_ratio"), 1.0)
    host |= {"arrays": [400, 701]}
    monkeypatch.setattr(bench, "dispatch_times", lambda steps: host)


@pytest.fixture
def asked(monkeypatch):
    """Time nothing; return what would have been timed."""
    asked = []

    def compare(config, steps, repeats, methods, kinds):
        asked.append((config, steps, repeats, methods, kinds))
        one = {"us": 1.0, "ratio": 1.0, "spread": [1.0, 1.0]}
        named = {"network": config.model, "batch": 1, "compute": "float32"}
        return {**named, "timed": {"dense": one}, "weights": 1}

    def add_memory(row, config):
        row["timed"]["dense"]["bytes"] = 1e6

    monkeypatch.setattr(bench, "compare", compare)
    monkeypatch.setattr(bench, "add_memory", add_memory)
    return asked


def written(path, *options):
    """Run the benchmark; return what it wrote."""
    short = ["--repeats", "2", "--steps", "300", "--json", str(path)]
    assert bench.main([*short, *options]) == 0
    return json.loads(path.read_text())


def test_experiments_are_timed_with_their_own_settings(asked, tmp_path):
    chosen = ["--experiments", "mnist5k_lenet300", "imagenet_vit_b16"]
    rows = written(tmp_path / "bench.json", *chosen)["steps"]
    assert ["bytes" in row["timed"]["dense"] for row in rows] == [False, False]
    own = [configs.load_config(name) for name in chosen[1:]]
    assert asked == [(config, 300, 2, [], KINDS) for config in own]
    asked.clear()
    more = ["--batch", "8", "--compute", "bfloat16", "--mask-dtype", "bfloat16"]
    more += ["--mask-momentum", "0", "--memory", "--methods", "gmp", "str"]
    more += ["--kinds", "frozen", "scl"]
    rows = written(tmp_path / "bench.json", *chosen, *more)["steps"]
    assert ["bytes" in row["timed"]["dense"] for row in rows] == [True, True]
    changes = {"batch_size": 8, "compute": "bfloat16"}
    changes |= {"mask_dtype": "bfloat16", "mask_momentum": 0.0}
    changed = [dataclasses.replace(config, **changes) for config in own]
    lists = ["gmp", "str"], ["frozen", "scl"]
    assert asked == [(config, 300, 2, *lists) for config in changed]


def test_without_experiments_small_networks_are_timed(asked, tmp_path):
    content = written(tmp_path / "bench.json", "--mask-momentum", "0.5")
    told = [(c.model, c.batch_size, steps) for c, steps, *_ in asked]
    assert told == [
        ("lenet300", 128, 300),
        ("lenet300", 64, 300),
        ("lenet5", 128, 30),
        ("resnet20", 128, 3),
    ]
    assert {c.mask_momentum for c, *_ in asked} == {0.5}
    assert content["arguments"] == "--repeats 2 --steps 300 --mask-momentum 0.5"


def test_numbers_are_printed_and_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "USUAL", (("lenet300", 16, 100),))
    monkeypatch.setitem(MODELS, "lenet300", Linear)
    make_network.cache_clear()
    content = written(tmp_path / "bench.json", "--memory")
    make_network.cache_clear()
    assert content["import_seconds"]["jax_optax"] == 1.0
    assert content["dispatch"]["arrays"] == [400, 701]
    assert content["versions"]["jax"]
    out = capsys.readouterr().out
    (row,) = content["steps"]
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
    assert "400 arrays" in out


def test_what_has_been_timed_is_written_before_the_rest(asked, monkeypatch, tmp_path):
    def add_memory(row, config):
        if len(asked) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(bench, "add_memory", add_memory)
    with pytest.raises(KeyboardInterrupt):
        written(tmp_path / "bench.json", "--memory")
    content = json.loads((tmp_path / "bench.json").read_text())
    assert [row["network"] for row in content["steps"]] == ["lenet300", "lenet300"]
    assert content["versions"]


def test_scaling_is_printed_and_written(monkeypatch, tmp_path, capsys):
    def scaling(config, steps, repeats):
        named = {"network": config.model, "devices": 2, "batch": 256}
        return {**named, "compute": "float32", "dense": 1.96, "scl": 1.9}

    monkeypatch.setattr(bench, "scaling", scaling)
    content = written(tmp_path / "bench.json", "--scaling")
    assert "steps" not in content
    rows = content["scaling"]
    assert [row["network"] for row in rows] == [name for name, *_ in bench.USUAL]
    out = capsys.readouterr().out
    assert "1.96 times one" in out
    assert "1.90 times one" in out


def test_import_is_timed_in_processes_with_and_without_us(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    asked = []

    def run(command, check):
        asked.append(command[-1])
        clock.now += 1.5 if "scl_jax" in command[-1] else 1.0

    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(bench, "subprocess", SimpleNamespace(run=run))
    assert IMPORT_SECONDS(2) == {"jax_optax": 1.0, "jax_optax_scl_jax": 1.5}
    assert asked == ["import jax, optax", "import jax, optax, scl_jax"] * 2


@pytest.mark.parametrize("option", ["--repeats", "--steps"])
@pytest.mark.parametrize("value", ["0", "-1", "many"])
def test_numbers_that_time_nothing_are_refused(option, value, capsys, monkeypatch):
    monkeypatch.setattr(bench, "compare", lambda *args: pytest.fail("it was timed"))
    with pytest.raises(SystemExit) as exit_code:
        bench.main([option, value])
    assert exit_code.value.code not in (0, None)
    assert option in capsys.readouterr().err
