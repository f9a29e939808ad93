"""What a record says of the packages, the machine and the commit it was made with."""

import importlib.metadata
import json
import platform
import re

import jax

from experiments.record import versions


def test_versions_are_those_in_use():
    found = versions()
    for package in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"):
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
