"""The folder in which a run leaves what it did."""

import contextlib
import dataclasses
import datetime
import fcntl
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import weakref
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from experiments.config import Config, identity

_PACKAGES = ("scl_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class RunFolderError(RuntimeError):
    """A run folder that cannot be made; the message says why and what to do."""


class RunFolder:
    """A folder with config.json, versions.json, metrics.jsonl and what is added.

    Of several processes the first one writes; for the others, writing does nothing.
    No other program can write to it as long as this object lives.
    It holds the folder until it is closed, or ends.

    Args:
      path: where it is: a new folder, or that of a run with the same settings, which
        is then taken up. None makes one under `runs`, named after the experiment and
        the time.
      name: the experiment's name.
      config: the experiment's settings.

    Attributes:
      path: where it is.

    Raises:
      RunFolderError: if the folder is not that of the same run, another program is
        writing to it, or it cannot be written.
    """

    def __init__(self, path: str | None, name: str, config: Config):
        if path is None and jax.process_count() > 1:
            raise RunFolderError(
                "the processes of a run must write to one folder, on a file system "
                "that they share: name it with --out"
            )
        now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")
        self.path = Path(path) if path else Path("runs") / name / now
        self._writes = jax.process_index() == 0
        if not self._writes:
            return
        # More seeds may follow; others would take the place of those that are there.
        decisive = {"name": name, "seed": config.seed, **identity(config)}
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._has_run(decisive)  # a folder that is refused is left as it was
            lock = (self.path / ".lock").open("w")
            weakref.finalize(self, lock.close)
            # The system gives it back when the process ends, however it ends.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            taken_up = self._has_run(decisive)
        except BlockingIOError:
            raise RunFolderError(
                f"another program is writing to the run folder {self.path}"
            ) from None
        except OSError as error:
            raise RunFolderError(
                f"the run folder {self.path} cannot be made: {error}; name one in a "
                "folder you may write to with --out"
            ) from error
        if taken_up:
            # Written anew from the checkpoints, which may be older than the last line.
            (self.path / "metrics.jsonl").unlink(missing_ok=True)
            start = {"time": datetime.datetime.now().isoformat(), **versions()}
            self._append("resumed.jsonl", start)
        self.write_json("config.json", {"name": name, **dataclasses.asdict(config)})
        # Missing also where a run was killed between the two.
        if not (self.path / "versions.json").exists():
            self.write_json("versions.json", versions())

    def _has_run(self, settings: dict[str, Any]) -> bool:
        """Tell whether a run is here, and refuse any but one with these settings."""
        if all(entry.name.startswith(".") for entry in self.path.iterdir()):
            return False
        there = None
        with contextlib.suppress(FileNotFoundError, ValueError):
            there = json.loads((self.path / "config.json").read_text("utf-8"))
        if not (isinstance(there, dict) and "name" in there):
            raise RunFolderError(
                f"{self.path} is not empty and no run folder, for it has no "
                "config.json of a run: name another one with --out, or leave --out away"
            )
        differing = [k for k in settings if there.get(k) != settings[k]]
        if differing:
            told = ", ".join(
                f"{k} = {there.get(k)!r}, here {settings[k]!r}" for k in differing
            )
            raise RunFolderError(
                f"the run folder {self.path} is of a run with {told}; runs are never "
                "overwritten: name another one with --out, or leave --out away"
            )
        return True

    def write_json(self, name: str, content: Any) -> None:
        """Write a JSON file."""
        self.write_text(name, json.dumps(content, indent=2) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Write a text file: all of it, or what was there remains."""
        if not self._writes:
            return
        replace_text(self.path / name, text)

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
        self._append("metrics.jsonl", metrics)

    def _append(self, name: str, line: dict[str, Any]) -> None:
        if self._writes:
            with (self.path / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def write_params(self, name: str, params: Any) -> None:
        """Write parameters as a NumPy archive from "/"-joined path to array."""
        if not self._writes:
            return
        arrays = {
            path: np.asarray(x) for path, x in flatten_dict(params, sep="/").items()
        }
        # Pyright takes an array for NumPy's own keyword argument, allow_pickle.
        np.savez_compressed(self.path / name, **arrays)  # pyright: ignore


def replace_text(path: Path, text: str) -> None:
    """Write a text file at once: all of it, or what was there remains."""
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)


def versions() -> dict[str, Any]:
    """Return what a result depends on: packages, Python, device, commit."""
    device = jax.devices()[0]
    return {
        **{package: version(package) for package in _PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
        "commit": _commit(),
    }


def version(package: str) -> str:
    """Return the version of an installed package."""
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
