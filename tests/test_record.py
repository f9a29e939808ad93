"""Run folders: what is in them, who may write to one, and when it is taken up."""

import dataclasses
import datetime
import itertools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import scl_jax
from experiments.config import Config
from experiments.record import RunFolder, RunFolderError, versions

CONFIG = Config(dataset="mnist5k", model="lenet300", epochs=3, penalty=2e-6)


HOLDER = """
import sys
from experiments.config import Config
from experiments.record import RunFolder
folder = RunFolder(sys.argv[1], "digits", Config(dataset="mnist5k", model="lenet300"))
print("held", flush=True)
sys.stdin.read()
"""


def contents(folder):
    """Return name -> bytes of what a user sees."""
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if not path.name.startswith(".")
    }


def refused(path, config=CONFIG, name="digits"):
    """Return why a folder is refused, and check that it is as before."""
    before = sorted(path.rglob("*")), contents(path)
    with pytest.raises(RunFolderError) as raised:
        RunFolder(str(path), name, config)
    assert (sorted(path.rglob("*")), contents(path)) == before
    assert "\n" not in str(raised.value)
    assert str(path) in str(raised.value)
    return str(raised.value)


def test_new_folder_holds_config_and_versions(tmp_path):
    path = tmp_path / "runs" / "deep" / "one"
    folder = RunFolder(str(path), "digits", CONFIG)
    assert folder.path == path
    assert sorted(contents(path)) == ["config.json", "versions.json"]
    config = json.loads((path / "config.json").read_text())
    assert config.pop("name") == "digits"
    assert Config(**config) == CONFIG
    assert json.loads((path / "versions.json").read_text()) == versions()


def test_every_field_of_the_config_is_recorded(tmp_path):
    folder = RunFolder(str(tmp_path / "one"), "digits", CONFIG)
    recorded = json.loads((folder.path / "config.json").read_text())
    assert set(recorded) == {"name"} | {f.name for f in dataclasses.fields(Config)}


def test_folder_without_a_name_is_made_after_experiment_and_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = (RunFolder(None, "digits", CONFIG).path for _ in range(2))
    assert first != second
    for path in (first, second):
        assert path.parts[:2] == ("runs", "digits")
        assert re.fullmatch(r"\d{8}-\d{6}-\d{6}", path.name)
        assert (tmp_path / path / "config.json").is_file()


def test_several_processes_must_be_told_the_folder_they_share(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(RunFolderError, match=r"one folder.*--out"):
        RunFolder(None, "digits", CONFIG)
    assert not any(tmp_path.iterdir())


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    folder = RunFolder(str(tmp_path / "one"), "digits", CONFIG)
    folder.write_json("results.json", [])
    folder.write_text("report.md", "text")
    folder.append_metrics({"epoch": 1})
    folder.write_params("folded", {"kernel": np.ones(3)})
    assert folder.path == tmp_path / "one"
    assert not any(tmp_path.iterdir())


# What exists


def test_folder_of_the_same_run_is_taken_up(tmp_path):
    path = tmp_path / "one"
    first = RunFolder(str(path), "digits", CONFIG)
    first.append_metrics({"epoch": 1})
    first.write_text("report.md", "text")
    del first
    made_by = b'{"jax": "older"}'
    (path / "versions.json").write_bytes(made_by)
    for times in (1, 2):
        folder = RunFolder(str(path), "digits", CONFIG)
        assert not (path / "metrics.jsonl").exists()
        folder.append_metrics({"epoch": 1})
        resumed = (path / "resumed.jsonl").read_text().splitlines()
        assert len(resumed) == times
        line = json.loads(resumed[-1])
        assert datetime.datetime.fromisoformat(line.pop("time")).year >= 2026
        assert line == versions()
        del folder
    assert contents(path)["versions.json"] == made_by
    assert contents(path)["report.md"] == b"text"


def test_settings_that_change_no_training_may_change(tmp_path):
    RunFolder(str(tmp_path / "one"), "digits", CONFIG)
    other = dataclasses.replace(CONFIG, seeds=5, devices=1, checkpoint_every=0)
    RunFolder(str(tmp_path / "one"), "digits", other)
    recorded = json.loads((tmp_path / "one" / "config.json").read_text())
    assert (recorded["seeds"], recorded["devices"]) == (5, 1)


def test_other_seeds_do_not_take_the_place_of_those_that_are_there(tmp_path):
    path = tmp_path / "one"
    RunFolder(str(path), "digits", CONFIG)
    before = contents(path)
    other = dataclasses.replace(CONFIG, seed=CONFIG.seed + 1)
    assert f"seed = {CONFIG.seed}, here {CONFIG.seed + 1}" in refused(path, other)
    assert contents(path) == before


def test_folder_of_another_run_is_refused_with_the_differing_settings(tmp_path):
    path = tmp_path / "one"
    RunFolder(str(path), "digits", CONFIG)
    other = dataclasses.replace(CONFIG, penalty=3e-6, norm="l2")
    message = refused(path, other)
    for part in ("penalty = 2e-06, here 3e-06", "norm = 'rms', here 'l2'", "--out"):
        assert part in message
    for same in ("epochs", "model", "mask_momentum"):
        assert same not in message
    assert "name = 'digits', here 'letters'" in refused(path, name="letters")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("thesis.tex", "precious"),
        ("config.json", "precious"),
        ("config.json", '["precious"]'),
        ("config.json", '{"precious": 1}'),
        ("metrics.jsonl", "{}"),
    ],
)
def test_folder_that_is_no_run_folder_is_refused(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert "not empty and no run folder" in refused(tmp_path)


def test_file_is_refused(tmp_path):
    (tmp_path / "one").write_text("precious")
    with pytest.raises(RunFolderError, match=r"cannot be made: .*--out"):
        RunFolder(str(tmp_path / "one"), "digits", CONFIG)
    assert (tmp_path / "one").read_text() == "precious"


def test_folder_that_another_process_holds_is_refused_until_it_is_killed(tmp_path):
    path = tmp_path / "one"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)],
        cwd=Path(__file__).parents[1],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    config = Config(dataset="mnist5k", model="lenet300")
    with process:
        assert process.stdout.readline() == "held\n"
        assert "another program is writing to" in refused(path, config)
        process.kill()
    RunFolder(str(path), "digits", config)
    assert (path / "resumed.jsonl").is_file()


def test_folder_is_held_as_long_as_the_object_lives(tmp_path):
    folder = RunFolder(str(tmp_path / "one"), "digits", CONFIG)
    assert "another program is writing to" in refused(tmp_path / "one")
    del folder
    RunFolder(str(tmp_path / "one"), "digits", CONFIG)


class Killed(BaseException):
    """What no code of ours catches."""


def kill_at(monkeypatch, number):
    """Die before the write of this number: of a text, of a replacement, of a line."""
    count = itertools.count()

    def dying(write):
        def call(*args, **kwargs):
            if next(count) == number:
                raise Killed
            return write(*args, **kwargs)

        return call

    monkeypatch.setattr(Path, "write_text", dying(Path.write_text))
    monkeypatch.setattr(Path, "unlink", dying(Path.unlink))
    monkeypatch.setattr(os, "replace", dying(os.replace))
    monkeypatch.setattr(RunFolder, "_append", dying(RunFolder._append))


@pytest.mark.parametrize("again", [False, True])
def test_folder_survives_being_killed_between_any_two_writes(
    tmp_path, monkeypatch, again
):
    died = 0
    for number in itertools.count():
        path = tmp_path / str(number)
        if again:
            RunFolder(str(path), "digits", CONFIG).append_metrics({"epoch": 1})
        with monkeypatch.context() as patch:
            kill_at(patch, number)
            try:
                RunFolder(str(path), "digits", CONFIG)
            except Killed:
                died += 1
            else:
                break
        RunFolder(str(path), "digits", CONFIG)
        found = contents(path)
        assert json.loads(found.pop("versions.json")) == versions()
        assert json.loads(found.pop("config.json"))["penalty"] == CONFIG.penalty
        assert set(found) <= {"resumed.jsonl"}
        assert not again or "resumed.jsonl" in found
    # A new one: two files, each a draft that is renamed. One that is taken up: the
    # metrics go, a line is added, and one file is written.
    assert died == 4


def test_parent_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("no folder")
    for path in (tmp_path / "file" / "one", "/proc/one"):
        with pytest.raises(RunFolderError, match=r"cannot be made: .*--out") as raised:
            RunFolder(str(path), "digits", CONFIG)
        assert str(path) in str(raised.value)
        assert "\n" not in str(raised.value)
    assert (tmp_path / "file").read_text() == "no folder"


def test_metrics_can_be_read_line_by_line_after_each(tmp_path):
    folder = RunFolder(str(tmp_path / "one"), "digits", CONFIG)
    lines = [
        {"epoch": 1, "loss": 0.1 + 0.2, "validation_accuracy": None},
        {"epoch": 2, "loss": 1e-30, "method": "dichtes Netz ± λ\n"},
    ]
    for count, metrics in enumerate(lines, start=1):
        folder.append_metrics(metrics)
        text = (folder.path / "metrics.jsonl").read_text(encoding="utf-8")
        assert text.endswith("\n")
        assert [json.loads(line) for line in text.splitlines()] == lines[:count]


def test_parameters_load_back_with_pruned_weights_exactly_zero(tmp_path):
    random = np.random.default_rng(0)
    params = {
        "Conv_0": {"kernel": jnp.float32(random.normal(size=(3, 3, 1, 4)))},
        "Dense_0": {
            "kernel": -jnp.abs(jnp.float32(random.normal(size=(6, 5)))),
            "bias": jnp.float32(random.normal(size=5)),
        },
    }
    pruned = np.arange(30).reshape(6, 5) % 3 == 0
    masked = scl_jax.mask_params(
        params,
        initial=lambda path, leaf: (
            jnp.where(pruned, -0.1, 0.1) if leaf.ndim == 2 else jnp.ones_like(leaf)
        ),
    )
    folded = scl_jax.fold_masks(masked)
    folder = RunFolder(str(tmp_path / "one"), "digits", CONFIG)
    folder.write_params("folded-scl-seed0", folded)
    with np.load(folder.path / "folded-scl-seed0.npz") as loaded:
        arrays = dict(loaded)
    assert sorted(arrays) == ["Conv_0/kernel", "Dense_0/bias", "Dense_0/kernel"]
    for path, array in arrays.items():
        layer, name = path.split("/")
        np.testing.assert_array_equal(
            array, np.asarray(folded[layer][name]), strict=True
        )
    kernel = arrays["Dense_0/kernel"]
    assert kernel[pruned].tobytes() == bytes(4 * pruned.sum())  # +0, not -0
    np.testing.assert_array_equal(
        kernel[~pruned], np.asarray(params["Dense_0"]["kernel"])[~pruned]
    )


def test_text_and_json_are_written_as_they_are(tmp_path):
    folder = RunFolder(str(tmp_path / "one"), "digits", CONFIG)
    folder.write_text("report.md", "94.63 ± 0.38\n")
    folder.write_json("results.json", [{"accuracy": 0.1}])
    assert (folder.path / "report.md").read_text("utf-8") == "94.63 ± 0.38\n"
    text = (folder.path / "results.json").read_text()
    assert json.loads(text) == [{"accuracy": 0.1}]
    assert text.endswith("]\n")


def test_text_is_replaced_at_once(tmp_path, monkeypatch):
    folder = RunFolder(str(tmp_path / "one"), "digits", CONFIG)
    folder.write_text("report.md", "old")

    def half_written(path, text, **kwargs):
        with path.open("w") as file:
            file.write(text[: len(text) // 2])
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", half_written)
        with pytest.raises(OSError, match="the disk is full"):
            folder.write_text("report.md", "new and longer")
    with (folder.path / "report.md").open() as reader:
        folder.write_text("report.md", "new")
        assert reader.read() == "old"  # whoever reads meanwhile
    assert contents(folder.path)["report.md"] == b"new"


def test_numbers_that_json_has_not_become_null(tmp_path):
    folder = RunFolder(str(tmp_path / "one"), "digits", CONFIG)
    folder.append_metrics({"loss": math.nan, "seconds": math.inf, "epoch": 1})
    line = (folder.path / "metrics.jsonl").read_text()
    assert line == '{"loss": null, "seconds": null, "epoch": 1}\n'
