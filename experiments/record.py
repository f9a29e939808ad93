"""The folder in which a run leaves what it did."""

import dataclasses
import datetime
import importlib.metadata
import json
import math
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from experiments.config import Config

_PACKAGES = ("scl_jax", "jax", "jaxlib", "flax", "optax", "numpy")


class RunFolderError(RuntimeError):
    """A run folder that cannot be made; the message says why and what to do."""


class RunFolder:
    """A new folder with config.json, versions.json, metrics.jsonl and what is added.

    Args:
      path: where to make it; it must not exist. None makes one under `runs`,
        named after the experiment and the time.
      name: the experiment's name.
      config: the experiment's settings.

    Raises:
      RunFolderError: if the folder exists already or cannot be written.
    """

    def __init__(self, path: str | None, name: str, config: Config):
        now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")
        self.path = Path(path) if path else Path("runs") / name / now
        try:
            self.path.mkdir(parents=True)
        except FileExistsError:
            raise RunFolderError(
                f"the run folder {self.path} exists already, and runs are never "
                "overwritten: name another one with --out, or leave --out away"
            ) from None
        except OSError as error:
            raise RunFolderError(
                f"the run folder {self.path} cannot be made: {error}; name one in a "
                "folder you may write to with --out"
            ) from error
        settings = {"name": name, **dataclasses.asdict(config)}
        self.write_json("config.json", settings)
        self.write_json("versions.json", versions())

    def write_json(self, name: str, content: Any) -> None:
        """Write a JSON file."""
        self.write_text(name, json.dumps(content, indent=2) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Write a text file."""
        (self.path / name).write_text(text, encoding="utf-8")

    def append_metrics(self, metrics: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl; closed each time, so that it survives.

        NaN and infinity, which JSON has not, become null.
        """
        metrics = {
            name: None
            if isinstance(value, float) and not math.isfinite(value)
            else value
            for name, value in metrics.items()
        }
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")

    def write_params(self, name: str, params: Any) -> None:
        """Write parameters as a NumPy archive from "/"-joined path to array."""
        arrays = {
            path: np.asarray(x) for path, x in flatten_dict(params, sep="/").items()
        }
        # Pyright takes an array for NumPy's own keyword argument, allow_pickle.
        np.savez_compressed(self.path / name, **arrays)  # pyright: ignore


def versions() -> dict[str, Any]:
    """Return what a result depends on: packages, Python, device, commit."""
    device = jax.devices()[0]
    return {
        **{package: _version(package) for package in _PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
        "commit": _commit(),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"  # run from a checkout


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(
            command,
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
