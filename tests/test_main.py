"""The command line: what it promises to leave, and what it says when it cannot."""

import json
import re
import socket
import subprocess

import numpy as np
import pytest
from command_line import NAME, ROOT, RUN, contents, lines, said

from experiments import configs
from experiments import main as entry
from experiments.checkpoint import CheckpointError
from experiments.main import main
from experiments.train import TrainingError

PROMISED = {
    "config.json",
    "folded-dense-seed3.npz",
    "folded-scl-seed3.npz",
    "inputs.png",
    "layers.png",
    "metrics.jsonl",
    "report.md",
    "results.json",
    "training.png",
    "versions.json",
}


# A whole run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Run two epochs of one seed; return the process and its folder."""
    folder = tmp_path_factory.mktemp("main") / "run"
    command = [*RUN, "--epochs", "2", "--seeds", "1", "--seed", "3"]
    command += ["--mask-learning-rate", "1e-2"]
    command += ["--out", str(folder)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return run, folder


def test_run_succeeds_and_leaves_what_it_promises(finished):
    run, folder = finished
    assert run.returncode == 0, run.stderr
    assert set(contents(folder)) == PROMISED
    kept = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert kept == ["dense-seed3", "scl-seed3"]
    for name in ("inputs.png", "layers.png", "training.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert "Traceback" not in run.stderr
    assert "Warning" not in run.stderr


def test_run_says_in_words_what_it_came_to(finished):
    run, folder = finished
    stdout = " ".join(run.stdout.split())
    dense, scl = json.loads((folder / "results.json").read_text())
    pruned = 100 * (1 - scl["nnz"] / scl["weights"])
    points = 100 * (scl["accuracy"] - dense["accuracy"])
    assert f"SCL pruned {pruned:.1f} % of the kernel weights" in stdout
    assert f"classifies {100 * scl['accuracy']:.1f} % of the test examples" in stdout
    side = "more" if points >= 0 else "less"
    assert f"{abs(points):.1f} points {side} than the dense network" in stdout
    assert str(folder) in stdout
    assert "3,800 to train, 200 to validate, 1,000 to test" in stdout
    assert max(map(len, run.stdout.splitlines()[:3])) < 120


def test_run_shows_a_row_per_layer_and_per_method(finished):
    run, folder = finished
    report = (folder / "report.md").read_text("utf-8")
    for text in (run.stdout, report):
        for layer in ("Dense_0/kernel", "Dense_1/kernel", "Dense_2/kernel"):
            assert text.count(layer) == 1
        assert re.search(r"^(\| )?dense ", text, re.MULTILINE)
        assert re.search(r"^(\| )?scl ", text, re.MULTILINE)
    for figure in re.findall(r"!\[.*?\]\((.*?)\)", report):
        assert (folder / figure).is_file()
    assert len(re.findall(r"!\[", report)) == 3


def test_run_records_config_metrics_and_parameters_that_agree(finished):
    _, folder = finished
    config = json.loads((folder / "config.json").read_text())
    assert (config["name"], config["epochs"], config["seed"]) == (NAME, 2, 3)
    metrics = lines(folder / "metrics.jsonl")
    assert [(m["method"], m["seed"], m["epoch"]) for m in metrics] == [
        ("dense", 3, 1),
        ("dense", 3, 2),
        ("scl", 3, 1),
        ("scl", 3, 2),
    ]
    for result in json.loads((folder / "results.json").read_text()):
        with np.load(folder / f"folded-{result['method']}-seed3.npz") as folded:
            kernels = [folded[name] for name in folded if name.endswith("/kernel")]
        nonzeros = sum(np.count_nonzero(kernel) for kernel in kernels)
        last = [m for m in metrics if m["method"] == result["method"]][-1]
        assert nonzeros == result["nnz"] == last["nnz"] == result["macs_remaining"]
        assert sum(kernel.size for kernel in kernels) == result["weights"] == 266_200
        assert result["accuracy"] > 0.8
    assert result["method"] == "scl"
    assert result["nnz"] == 266_200 * 2 // 100  # the config asks for 0.98
    # What the penalty came to is told, of the method that has one.
    assert [bool(m["penalty"]) for m in metrics] == [False, False, True, True]


def test_folder_of_another_run_is_refused_and_untouched(finished, capsys):
    _, folder = finished
    before = contents(folder)
    assert main([NAME, "--out", str(folder)]) == 1
    message = said(capsys)
    assert f"the run folder {folder} is of a run with" in message
    assert "epochs = 2, here 40" in message
    assert contents(folder) == before


# Help


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_help_lists_the_experiments(argv, capsys):
    with pytest.raises(SystemExit) as exit_code:
        main(argv)
    assert exit_code.value.code == 0
    out = capsys.readouterr().out
    assert "python -m experiments.main" in out
    for name in configs.names():
        assert re.search(rf"^ +{name} +\S", out, re.MULTILINE)


def test_help_of_an_experiment_lists_its_settings(capsys):
    with pytest.raises(SystemExit) as exit_code:
        main([NAME, "--help"])
    assert exit_code.value.code == 0
    out = capsys.readouterr().out
    assert configs.summary(NAME) in out
    for option in (
        "--epochs",
        "--penalty",
        "--sparsity",
        "--freeze-at",
        "--out",
        "--data-dir",
    ):
        assert option in out
    assert "0.98" in out  # the experiment's own default, not the class's


# Errors


def test_unknown_experiment_is_refused_with_the_known_ones(capsys):
    assert main(["cifar10_vgg"]) != 0
    paragraph = said(capsys)
    for name in (*configs.names(), "cifar10_vgg"):
        assert name in paragraph


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--no-such-option", "1"], "--no-such-option"),
        (["--epochs", "many"], "--epochs"),
        (["--epochs", "1.5"], "--epochs"),
        (["--norm", "l3"], "'rms', 'l2'"),
        (["stray"], "stray"),
    ],
)
def test_option_that_cannot_be_read_is_refused(arguments, expected, capsys, tmp_path):
    with pytest.raises(SystemExit) as exit_code:
        main([NAME, *arguments, "--out", str(tmp_path / "run")])
    assert exit_code.value.code not in (0, None)
    captured = capsys.readouterr()
    assert expected in captured.err + captured.out
    assert "Traceback" not in captured.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("--penalty", "-1", "penalty must be a number in [0, 1)"),
        ("--penalty", "nan", "penalty must be a number in [0, 1)"),
        ("--epochs", "0", "epochs must be an integer in [1, 100000)"),
        ("--freeze-at", "2", "freeze_at must be a number in (0, 1]"),
        ("--seed", "-1", "seed must be an integer in [0, 2147483648)"),
        ("--validation", "15", "validation must be a multiple of 10"),
        ("--model", "vgg", "model must be one of lenet300, lenet5, vgg16"),
        ("--dataset", "svhn", "dataset must be one of mnist5k, mnist,"),
        ("--image-size", "64", "image_size is for imagenet2012"),
        ("--ste", "tanh", "ste must be one of identity, leaky_relu(SLOPE)"),
    ],
)
def test_value_out_of_range_is_refused_with_the_range(
    option, value, allowed, capsys, tmp_path
):
    assert main([NAME, option, value, "--out", str(tmp_path / "run")]) == 1
    assert allowed in said(capsys)
    assert not (tmp_path / "run").exists()


def test_folder_that_cannot_be_made_is_refused(capsys, tmp_path):
    (tmp_path / "file").write_text("no folder")
    assert main([NAME, "--out", str(tmp_path / "file" / "run")]) == 1
    assert "cannot be made" in said(capsys)


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--validation", "5000", "validation must be a multiple of 10 from 0 to 3990"),
        ("--batch-size", "3801", "batch_size must be at most .* examples, 3800"),
    ],
)
def test_value_that_does_not_fit_the_data_is_refused(
    option, value, expected, capsys, tmp_path
):
    arguments = [NAME, option, value, "--devices", "1", "--out", str(tmp_path / "run")]
    assert main(arguments) == 1
    captured = capsys.readouterr().err
    assert "Traceback" not in captured
    assert re.search(expected, " ".join(captured.split()))


def absent_data(monkeypatch, tmp_path):
    """Return the arguments of a run whose data is neither here nor reachable."""

    def refuse(*args, **kwargs):
        raise socket.gaierror("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    arguments = [NAME, "--dataset", "mnist", "--data-dir", str(tmp_path / "data")]
    return [*arguments, "--out", str(tmp_path / "run")]


def test_absent_data_is_reported_in_a_paragraph(monkeypatch, tmp_path, capsys):
    assert main(absent_data(monkeypatch, tmp_path)) == 1
    paragraph = said(capsys)
    assert paragraph.startswith("Error: mnist")
    assert "internet" in paragraph


def test_run_whose_data_was_absent_can_be_started_again_as_it_was(
    monkeypatch, tmp_path, capsys
):
    # The user does as told, and repeats the command: nothing of a run is there yet.
    arguments = absent_data(monkeypatch, tmp_path)
    assert main(arguments) == 1
    capsys.readouterr()
    assert main(arguments) == 1
    assert said(capsys).startswith("Error: mnist")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ([NAME, "--penalty", "-1", "--debug"], "penalty must be"),
        (["cifar10_vgg", "--debug"], "config must be one of"),
    ],
)
def test_debug_shows_the_traceback(arguments, error):
    with pytest.raises(ValueError, match=error):
        main(arguments)


def test_debug_shows_the_traceback_of_a_run(monkeypatch, tmp_path):
    def fail(*args):
        raise KeyError("a defect of ours")

    monkeypatch.setattr(entry, "run", fail)
    with pytest.raises(KeyError, match="a defect of ours"):
        main([NAME, "--out", str(tmp_path / "run"), "--debug"])


def test_defect_of_ours_is_called_so(monkeypatch, tmp_path, capsys):
    def fail(*args):
        raise KeyError("Dense_9")

    monkeypatch.setattr(entry, "run", fail)
    assert main([NAME, "--out", str(tmp_path / "run")]) == 1
    paragraph = said(capsys)
    for part in ("unexpected KeyError", "Dense_9", "--debug"):
        assert part in paragraph


@pytest.mark.parametrize("kind", [TrainingError, CheckpointError])
def test_run_that_cannot_go_on_says_why(kind, monkeypatch, tmp_path, capsys):
    def fail(*args):
        raise kind("scl, seed 3: numbers are no longer finite at step 7")

    monkeypatch.setattr(entry, "run", fail)
    assert main([NAME, "--out", str(tmp_path / "run")]) == 1
    assert said(capsys).startswith("Error: scl, seed 3: numbers are no longer finite")


def test_paths_in_messages_stay_in_one_piece(tmp_path, capsys):
    folder = tmp_path / "-".join(["a-long-name"] * 12)
    folder.mkdir()
    (folder / "precious").write_text("")
    assert main([NAME, "--out", str(folder)]) == 1
    assert str(folder) in capsys.readouterr().err
