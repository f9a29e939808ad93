"""The sweep of budgets: what it trains, what it writes, and that it goes on."""

import dataclasses
import json

import pytest
import sharing
from tiny import register
from trials import BASE, TEST, Trials, experiment

from experiments import configs, pareto
from experiments.study import RESULTS

CONFIG = dataclasses.replace(BASE, learning_rate=0.1, sparsity=0.7, seeds=2)
FILES = {"pareto.json", "pareto.md", "pareto.png", "scratch"}


@pytest.fixture
def settings(monkeypatch):
    monkeypatch.setattr(configs, "summary", lambda name: f"All about {name}.")
    return experiment(monkeypatch, CONFIG)


@pytest.fixture
def trials(monkeypatch, settings):
    """Replace data, training and evaluation."""
    return Trials(
        monkeypatch,
        dense=lambda config: (None, 0.9),
        scl=lambda config: (None, 1 - config.sparsity / 2, config.sparsity),
    )


def run(folder, **changes):
    pareto.run_pareto("tiny", folder, **changes)
    return json.loads((folder / "pareto.json").read_text())


def asked(trials):
    """Return what was asked for of SCL, once a setting."""
    return list(
        dict.fromkeys(
            (config.costs, config.weigh, config.sparsity)
            for method, config, *_ in trials.trained
            if method == "scl"
        )
    )


def test_dense_and_every_budget_are_trained_with_the_settings_of_the_config(
    trials, tmp_path
):
    content = run(tmp_path, sparsities=(0.9, 0.5, 0.9))
    dense = [config for method, config, *_ in trials.trained if method == "dense"]
    assert dense == [dataclasses.replace(CONFIG, validation=0, sparsity=0.0)] * 2
    assert asked(trials) == [("connections", True, s) for s in (0.5, 0.9)]
    for _, config, _, _ in trials.trained:
        changed = dataclasses.replace(CONFIG, validation=0, sparsity=config.sparsity)
        assert config == changed
    rows = content["summary"]
    assert [(row["method"], row["target"]) for row in rows] == [
        *(("dense", None), ("scl", 0.5), ("scl", 0.9)),
    ]
    assert [row["sparsity"] for row in rows] == pytest.approx([0, 0.5, 0.9])


def test_each_run_trains_on_all_but_the_test_set_which_it_sees_once(trials, tmp_path):
    run(tmp_path, sparsities=(0.5, 0.9))
    assert [seed for *_, seed in trials.trained] == [0, 1] * 3
    assert {examples for _, _, examples, _ in trials.trained} == {40}
    assert trials.evaluated == ["test"] * 6
    assert len(TEST.labels) == 20


def test_kinds_are_budgets_of_connections_or_of_macs_penalized_so_or_alike(
    trials, tmp_path
):
    kinds = ["macs", "connections", "macs-alone", "macs"]
    content = run(tmp_path, sparsities=(0.5, 0.9), kinds=kinds)
    settings = [("macs", True), ("connections", True), ("macs", False)]
    expected = [(*kind, s) for kind in settings for s in (0.5, 0.9)]
    assert asked(trials) == expected
    budgets = [row["budget"] for row in content["summary"]][1:]
    assert [(b["costs"], b["weigh"], b["sparsity"]) for b in budgets] == expected
    assert {*pareto.KINDS} == {*kinds}


def test_table_figure_and_numbers_are_written_and_said(trials, tmp_path, capsys):
    content = run(tmp_path, sparsities=(0.5, 0.9), kinds=["connections", "macs"])
    assert {path.name for path in tmp_path.iterdir()} == FILES
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "pareto.md").read_text()
    assert text.startswith("# All about tiny.")
    assert "over 2 seeds" in text
    assert "(pareto.png)" in text
    said = capsys.readouterr().out
    assert str(tmp_path) in said
    for shown in (text, said):
        for cell in ("dense", "0.9 pruned", "0.5 pruned of the MACs", "55.05 ± 0.07"):
            assert cell in shown
    assert text.count("\n| ") == 2 + 1 + 4
    assert content["name"] == "tiny"
    assert len(content["runs"]) == 2 * (1 + 4)


def test_sweep_that_was_killed_goes_on_and_trains_nothing_twice(trials, tmp_path):
    trials.stop_after = 3
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, sparsities=(0.5, 0.9))
    assert len(json.loads((tmp_path / "pareto.json").read_text())["runs"]) == 3
    trials.stop_after = None
    whole = run(tmp_path, sparsities=(0.5, 0.9))
    assert len(trials.trained) == 6
    assert run(tmp_path, sparsities=(0.5, 0.9)) == whole
    assert len(trials.trained) == 6
    # Others are added; those that are not asked for are no rows.
    more = run(tmp_path, sparsities=(0.9, 0.95), kinds=["macs", "connections"])
    assert len(trials.trained) == 6 + 2 * 3
    assert whole["runs"].items() < more["runs"].items()
    assert len(more["summary"]) == 1 + 4


def test_seeds_are_those_of_the_config_or_as_many_as_are_asked_for(trials, tmp_path):
    assert run(tmp_path, sparsities=[0.5])["summary"][1]["seeds"] == [0, 1]
    content = run(tmp_path, sparsities=[0.5], seeds=3)
    assert [row["seeds"] for row in content["summary"]] == [[0, 1, 2]] * 2
    assert [seed for *_, seed in trials.trained] == [0, 1, 0, 1, 2, 2]
    with pytest.raises(ValueError, match="seeds must be"):
        run(tmp_path, sparsities=[0.5], seeds=0)


@pytest.mark.parametrize(
    "sparsities", [(), (0.5, 0.0), (1.0,), (0.5, -0.1), (98,), (float("nan"),)]
)
def test_sparsity_that_is_none_is_refused_before_anything_is_trained(
    trials, tmp_path, sparsities
):
    with pytest.raises(ValueError, match=r"sparsities must be in \(0, 1\), got"):
        run(tmp_path / "new", sparsities=sparsities)
    assert trials.trained == []
    assert not (tmp_path / "new").exists()


def test_folder_with_runs_of_other_settings_is_refused(trials, settings, tmp_path):
    run(tmp_path, sparsities=[0.5])
    settings.config = dataclasses.replace(CONFIG, epochs=3)
    with pytest.raises(ValueError, match="another epochs;"):
        run(tmp_path, sparsities=[0.5])


# Without stand-ins


def test_real_trainings_meet_their_budgets(monkeypatch, settings, tmp_path):
    # 294 weights of a convolution, each at 16 places, and 60 of a dense layer.
    register(monkeypatch)
    monkeypatch.setattr("experiments.book.load", sharing.load)
    settings.config = dataclasses.replace(
        CONFIG, model="normalized", epochs=1, mask_learning_rate=0.05, seeds=1
    )
    content = run(tmp_path, sparsities=[0.75], kinds=["connections", "macs"])
    dense, connections, macs = content["summary"]
    assert (dense["nnz"], dense["macs_remaining"]) == (354, 16 * 294 + 60)
    assert connections["nnz"] == 354 // 4
    assert 0 <= (16 * 294 + 60) / 4 - macs["macs_remaining"] < 16
    assert (tmp_path / "pareto.png").stat().st_size > 10_000


# The command line


@pytest.fixture
def calls(monkeypatch):
    """Note what is run, here and in several processes."""
    noted = []
    monkeypatch.setattr(
        pareto, "run_pareto", lambda *names, **settings: noted.append((names, settings))
    )
    monkeypatch.setattr(pareto, "share", lambda *what: noted.append(what) or 7)
    return noted


def test_command_line_runs_the_sweep(calls, tmp_path):
    options = ["--sparsities", "0.9", "0.99", "--kinds", "macs", "macs-alone"]
    options += ["--seeds", "4", "--out", str(tmp_path), "--data-dir", "here"]
    assert pareto.main(["mnist5k_lenet300", *options]) == 0
    (((name, folder), settings),) = calls
    assert (name, folder) == ("mnist5k_lenet300", tmp_path)
    assert settings == {
        "sparsities": [0.9, 0.99],
        "kinds": ["macs", "macs-alone"],
        "seeds": 4,
        "data_dir": "here",
    }


def test_what_the_command_line_leaves_out_has_its_default(calls):
    assert pareto.main(["mnist5k_lenet300"]) == 0
    (((_, folder), settings),) = calls
    assert folder.parts == ("runs", "pareto", "mnist5k_lenet300")
    assert all(0 < sparsity < 1 for sparsity in settings["sparsities"])
    assert settings["kinds"] == ["connections"]
    assert settings["seeds"] is settings["data_dir"] is None


def test_processes_share_the_sweep_and_their_code_is_returned(calls):
    arguments = ["mnist5k_lenet300", "--sparsities", "0.9", "--jobs", "3"]
    assert pareto.main(arguments) == 7
    assert calls == [("experiments.pareto", arguments, 3)]


@pytest.mark.parametrize(
    "wrong",
    [["nothing"], ["mnist5k_lenet300", "--kinds", "bytes"], ["--sparsities", "0.9"]],
)
def test_what_is_not_known_is_refused(calls, wrong, capsys):
    with pytest.raises(SystemExit) as exit_code:
        pareto.main(wrong)
    assert exit_code.value.code == 2
    assert calls == []
    assert "usage" in capsys.readouterr().err


def test_committed_pages_are_those_of_their_numbers():
    folders = [path.parent for path in (RESULTS / "pareto").glob("*/pareto.json")]
    assert folders
    for folder in folders:
        book = json.loads((folder / "pareto.json").read_text())
        assert (folder / "pareto.md").read_text() == pareto.render(book)
        assert (folder / "pareto.png").exists()
        assert folder.name == book["name"]
