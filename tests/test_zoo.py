"""The zoo: what was asked of every network, what came, and that it goes on."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from sharing import fill_disk
from tiny import Untouchable, images, register, text

from experiments import zoo
from experiments.data import Dataset
from experiments.models import MODELS

SIZES = {"linear": 7840, "two_layers": 784 * 30 + 300}


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Put tiny networks and made-up examples in place."""
    register(monkeypatch)

    def load(name, *, validation, data_dir):
        assert validation == 0
        kind = text if name == "python_docs" else images
        return Dataset(kind(200), kind(0), kind(30, seed=4))

    monkeypatch.setattr(zoo, "load", load)


class Trainings:
    """Trainings that take no time, and what was asked for."""

    def __init__(self):
        self.asked, self.stop_after = [], None

    def train(self, config, data, method):
        if len(self.asked) == self.stop_after:
            raise KeyboardInterrupt
        self.asked.append((config, data, method))
        masks = {"a": np.array([0.1, -0.1, 0.0, np.nan]), "b": np.array([[-1.0, 2.0]])}
        history = [SimpleNamespace(nnz=nnz, penalty=nnz / 2) for nnz in (5, 3)]
        return [SimpleNamespace(trained=SimpleNamespace(masks=masks), history=history)]


@pytest.fixture
def trainings(monkeypatch):
    made = Trainings()
    monkeypatch.setattr(zoo, "train", made.train)
    return made


@pytest.fixture
def path(tmp_path):
    return tmp_path / "results" / "zoo.json"


def run(path, models=("linear", "two_layers"), remaining=(0.5, 0.02), steps=8):
    zoo.run_zoo(path, models=models, remaining=remaining, steps=steps)
    return read(path)


def read(path):
    return json.loads(path.read_text())


def test_reached_is_what_was_asked_for(path, capsys):
    remaining = (0.1, 0.0031)
    runs = run(path, remaining=remaining)["runs"]
    asked = [(model, fraction) for model in SIZES for fraction in remaining]
    assert [(one["model"], one["remaining"]) for one in runs.values()] == asked
    for one in runs.values():
        size = SIZES[one["model"]]
        assert one["connections"] == size
        assert one["reached"] == math.floor(one["remaining"] * size + 1e-6)
        assert one["nnz_by_epoch"][-1] == one["reached"]
        assert 1 <= one["least_of_a_layer"] <= one["reached"]
        assert (one["least_of_a_layer"] == one["reached"]) == (one["model"] == "linear")
        assert len(one["nnz_by_epoch"]) == zoo.EPOCHS
        assert one["penalty"] > 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 4
    assert "linear 0.0031 of the connections, 8 steps: 24 of 7,840, -1.2" in said[1]


def test_counts_are_those_of_the_mask_variables(path, trainings):
    (one,) = run(path, models=["linear"], remaining=[0.5])["runs"].values()
    assert (one["connections"], one["reached"], one["least_of_a_layer"]) == (6, 3, 1)
    assert (one["nnz_by_epoch"], one["penalty"]) == ([5, 3], 1.5)


def test_networks_differ_in_nothing_but_data_and_budget(path, trainings):
    content = run(path, models=["linear", "tiny_text"])
    same = []
    for config, data, method in trainings.asked:
        # As few examples as an epoch's two steps need; of the others none is there.
        assert (method, len(data.train.labels)) == ("scl", 2 * zoo.BATCH)
        assert config.epochs == zoo.EPOCHS == 4
        assert not len(data.validation.labels)
        assert not len(data.test.labels)
        fields = vars(config).copy()
        asked = [fields.pop(name) for name in ("model", "dataset", "sparsity")]
        same.append(fields)
        expected = "python_docs" if asked[0] == "tiny_text" else "fashion_mnist"
        assert asked[1] == expected
    assert all(fields == same[0] for fields in same)
    kept = [one["config"] for one in content["runs"].values()]
    assert kept == [vars(config) for config, *_ in trainings.asked]
    assert [config["sparsity"] for config in kept] == [0.5, 0.98] * 2


def test_zoo_that_was_killed_goes_on_where_it_was(path, trainings):
    trainings.stop_after = 3
    with pytest.raises(KeyboardInterrupt):
        run(path)
    first = read(path)["runs"]
    assert len(first) == 3
    trainings.stop_after = None
    whole = run(path)
    assert len(trainings.asked) == 4
    assert list(whole["runs"].items())[:3] == list(first.items())
    assert run(path) == whole
    assert len(trainings.asked) == 4


def test_runs_of_other_steps_are_beside_these(path, trainings):
    before = run(path, models=["linear"])["runs"]
    after = run(path, models=["linear"], steps=12)["runs"]
    assert len(trainings.asked) == len(after) == 4
    assert before.items() < after.items()


@pytest.mark.parametrize("failing", ["write", "replace"])
def test_file_is_whole_whenever_the_process_dies(path, trainings, monkeypatch, failing):
    run(path, models=["linear"])
    before = path.read_bytes()

    with monkeypatch.context() as patch:
        fill_disk(patch, failing)
        with pytest.raises(OSError, match="the disk is full"):
            run(path)
    assert path.read_bytes() == before
    assert len(run(path)["runs"]) == 4


@pytest.mark.parametrize("steps", [0, -4, 2, 10])
def test_steps_that_are_no_whole_epochs_are_refused(path, trainings, steps):
    # The key would say a number of steps that were not taken.
    with pytest.raises(
        ValueError, match=rf"steps must be a multiple of 4, got {steps}"
    ):
        run(path, steps=steps)
    assert trainings.asked == []
    assert not path.exists()


def test_test_split_is_not_looked_at(path, monkeypatch):
    load = zoo.load

    def guarded(*args, **kwargs):
        class Labels(Untouchable):
            def __getitem__(self, part):
                assert part == slice(0)
                return np.zeros(0, np.int32)

        split = load(*args, **kwargs)
        return split._replace(test=[Labels(), Labels()])

    monkeypatch.setattr(zoo, "load", guarded)
    run(path, models=["linear"], remaining=[0.1])


def test_command_line_asks_for_every_network_unless_it_is_told(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(
        zoo, "run_zoo", lambda path, **settings: asked.append((path, settings))
    )
    assert zoo.main([]) == 0
    out = tmp_path / "zoo.json"
    arguments = ["--models", "linear", "--steps", "8", "--data-dir", "here"]
    assert zoo.main([*arguments, "--out", str(out)]) == 0
    everything = {"models": list(MODELS), "steps": zoo.STEPS, "data_dir": None}
    few = {"models": ["linear"], "steps": 8, "data_dir": "here"}
    assert asked == [(zoo.RESULTS / "zoo.json", everything), (out, few)]
    with pytest.raises(SystemExit):
        zoo.main(["--models", "nothing"])
