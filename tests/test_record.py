"""Run folders: what is in them, and that none is ever overwritten."""

import dataclasses
import importlib.metadata
import json
import platform
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import scl_jax
from experiments.config import Config
from experiments.record import RunFolder, RunFolderError, versions

CONFIG = Config(dataset="mnist5k", model="lenet300", epochs=3, penalty=2e-6)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_new_folder_holds_config_and_versions(tmp_path):
    path = tmp_path / "runs" / "deep" / "one"
    folder = RunFolder(str(path), "digits", CONFIG)
    assert folder.path == path
    assert sorted(contents(path)) == ["config.json", "versions.json"]
    config = json.loads((path / "config.json").read_text())
    assert config.pop("name") == "digits"
    assert Config(**config) == CONFIG
    assert json.loads((path / "versions.json").read_text()) == versions()


def test_folder_without_a_name_is_made_after_experiment_and_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = (RunFolder(None, "digits", CONFIG).path for _ in range(2))
    assert first != second
    for path in (first, second):
        assert path.parts[:2] == ("runs", "digits")
        assert re.fullmatch(r"\d{8}-\d{6}-\d{6}", path.name)
        assert (tmp_path / path / "config.json").is_file()


@pytest.mark.parametrize("existing", ["full folder", "empty folder", "file"])
def test_what_exists_is_refused_and_untouched(tmp_path, existing):
    path = tmp_path / "one"
    if existing == "file":
        path.write_text("precious")
    else:
        path.mkdir()
    if existing == "full folder":
        (path / "config.json").write_text("precious")
    with pytest.raises(RunFolderError, match=r"exists already.*--out") as raised:
        RunFolder(str(path), "digits", CONFIG)
    assert str(path) in str(raised.value)
    if existing == "file":
        assert path.read_text() == "precious"
    else:
        expected = {"config.json": b"precious"} if existing == "full folder" else {}
        assert contents(path) == expected


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


# Versions


def test_versions_are_those_in_use():
    found = versions()
    for package in ("jax", "jaxlib", "flax", "optax", "numpy"):
        assert found[package] == importlib.metadata.version(package)
    assert found["jax"] == jax.__version__
    assert found["scl_jax"]
    assert found["python"] == platform.python_version()
    assert found["platform"] == platform.platform()
    assert found["device"].startswith(f"{jax.device_count()} x ")
    assert found["device"].endswith(f"({jax.default_backend()})")
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?|unknown", found["commit"])
    assert json.loads(json.dumps(found)) == found


def test_package_that_is_missing_is_said_to_be(monkeypatch):
    def missing(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert versions()["scl_jax"] == "not installed"


def test_commit_is_unknown_without_git(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert versions()["commit"] == "unknown"


def test_commit_is_unknown_outside_a_repository(monkeypatch, tmp_path):
    monkeypatch.setenv("GIT_DIR", str(tmp_path))
    assert versions()["commit"] == "unknown"


def test_every_field_of_the_config_is_recorded(tmp_path):
    folder = RunFolder(str(tmp_path / "one"), "digits", CONFIG)
    recorded = json.loads((folder.path / "config.json").read_text())
    assert set(recorded) == {"name"} | {f.name for f in dataclasses.fields(Config)}
