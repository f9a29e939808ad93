"""Checkpoints: what a killed run goes on from.

Orbax writes them beside the training, under a temporary name that becomes the step's
number when all is on disk: a checkpoint is whole or absent. What can happen to it
afterwards is checked when it is read: a fingerprint of every array is kept with it,
and a checksum of all else.
"""

import contextlib
import copy
import logging
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from experiments.fingerprint import checksum, fingerprint
from experiments.record import version

PyTree = Any
FORMAT = 1  # of what is in a checkpoint; another one is not read
KEPT = 2  # checkpoints of a run; an older one is deleted when a new one is complete
log = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message says what remains."""


class Checkpoint(NamedTuple):
    """What `Checkpoints.restore` returns."""

    step: int
    state: PyTree
    record: Any  # JSON


class Checkpoints:
    """The checkpoints of one training, in a folder of their own.

    Args:
      folder: where they are; made if absent. All processes share it.
      identity: JSON of what a checkpoint must agree with to be taken up again:
        network, optimizer, data. The versions of the format and of scl_jax are added.

    Raises:
      CheckpointError: if the folder cannot be made or read.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]):
        self.folder = folder
        self._identity = {
            "format": FORMAT,
            "scl_jax": version("scl_jax"),
            **identity,
        }
        options = ocp.CheckpointManagerOptions(
            max_to_keep=KEPT, cleanup_tmp_directories=True, create=True
        )
        self._saving = 0  # the step that is being written, if any is
        try:
            self._manager = ocp.CheckpointManager(folder.absolute(), options=options)
        except OSError as error:
            raise CheckpointError(
                f"{folder} cannot hold checkpoints: {_shortened(error)}"
            ) from error

    def save(self, step: int, state: PyTree, record: Any) -> None:
        """Write a checkpoint in the background; the state may be donated at once.

        Raises:
          CheckpointError: if this one, or the one before it, cannot be written.
        """
        self.wait()  # so that an error is told of the step that it belongs to
        arrays = _by_name(state)
        content = {
            "identity": self._identity,
            "leaves": _described(arrays),
            "fingerprint": fingerprint(arrays),
            # A copy: it is written in the background, and the training appends to it.
            "record": copy.deepcopy(record),
        }
        self._saving = step
        with self._telling():
            saved = self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(arrays),
                    about=ocp.args.JsonSave({**content, "checksum": checksum(content)}),
                ),
            )
            if not saved:
                raise ValueError("there is one of this step, or of a later one")

    def restore(self, template: PyTree) -> Checkpoint | None:
        """Return the newest checkpoint that is whole and fits; None if there is none.

        A newer one that does not is renamed to refused-STEP, and the reason logged.

        Args:
          template: the state as `jax.ShapeDtypeStruct` with shardings.

        Raises:
          CheckpointError: if there are checkpoints, and all are refused.
        """
        self.wait()
        refused: dict[int, str] = {}
        found = None
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                found = self._read(step, template)
            except CheckpointError as error:
                refused[step] = str(error)
            else:
                break
        if refused and found is None:
            reasons = "; ".join(f"step {step}: {why}" for step, why in refused.items())
            raise CheckpointError(
                f"no checkpoint in {self.folder} can be taken up. {reasons}. Nothing "
                "was changed; name another folder, or move this one away to start anew"
            )
        for step, reason in refused.items():
            log.warning(
                "The checkpoint of step %d is refused and put aside: %s", step, reason
            )
            self._put_aside(step)
        return found

    def latest(self) -> int | None:
        """Return the step of the last complete checkpoint."""
        self._manager.reload()
        return max(self._manager.all_steps(), default=None)

    def wait(self) -> None:
        """Wait until all is written.

        Raises:
          CheckpointError: if something cannot be.
        """
        with self._telling():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Finish what is being written, and end the threads.

        Raises:
          CheckpointError: if it cannot be written.
        """
        with self._telling():
            try:
                self._manager.wait_until_finished()
            finally:
                self._manager.close()

    def _read(self, step: int, template: PyTree) -> Checkpoint:
        """Read one checkpoint, in all processes or in none."""
        arrays, reason, about = _by_name(template), None, {}
        try:
            kept: Any = self._manager.restore(
                step, args=ocp.args.Composite(about=ocp.args.JsonRestore())
            )
            about = dict(kept.about)
            if about.pop("checksum", None) != checksum(about):
                raise ValueError("its description was changed")
            reason = _difference(about, self._identity, _described(arrays))
            if reason is None:
                kept = self._manager.restore(
                    step,
                    args=ocp.args.Composite(state=ocp.args.StandardRestore(arrays)),
                )
                arrays = {name: kept.state[name] for name in arrays}
        # What a damaged file raises depends on the file.
        except Exception as error:
            reason = f"it cannot be read ({_shortened(error)})"
        if not np.all(multihost_utils.process_allgather(np.array(reason is None))):
            raise CheckpointError(reason or "another process cannot read it")
        if fingerprint(arrays) != about["fingerprint"]:
            raise CheckpointError("its arrays are not those that were saved")
        state = jax.tree.structure(template).unflatten(arrays.values())
        return Checkpoint(step, state, about["record"])

    def _put_aside(self, step: int) -> None:
        if jax.process_index() == 0:
            folder = self.folder / str(step)
            folder.rename(self.folder / f"refused-{step}-{folder.stat().st_mtime_ns}")
        multihost_utils.sync_global_devices("put aside")
        self._manager.reload()

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """Turn what Orbax raises into an error that says what remains."""
        with _uninterrupted():
            try:
                yield
            except Exception as error:
                last = self.latest()
                remains = "none" if last is None else f"step {last}"
                raise CheckpointError(
                    f"saving step {self._saving} in {self.folder} failed: "
                    f"{_shortened(error)}. Of the checkpoints there, {remains} is "
                    "complete"
                ) from error


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back until the end of the block.

    Of a save that is broken off, Orbax leaves threads that wait for ever, and with
    them the end of the program.
    """
    held: list[int] = []

    def raise_held():
        for number in held:
            signal.raise_signal(number)

    with contextlib.ExitStack() as stack:
        stack.callback(raise_held)  # last, when the handlers are the former ones
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if handler := signal.getsignal(number):
                    stack.callback(signal.signal, number, handler)
                    signal.signal(number, lambda number, frame: held.append(number))
        yield


def _shortened(error: Exception) -> str:
    """Return an error's first line; of a long one the ends, where what and why are."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) <= 300 else f"{line[:150]} ... {line[-150:]}"


def _by_name(tree: PyTree) -> dict[str, Any]:
    """Return the leaves by their path, in their order."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    named = {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in leaves
    }
    if len(named) < len(leaves):
        raise ValueError("two leaves of the state have the same path")
    return named


def _described(arrays: dict[str, Any]) -> dict[str, str]:
    return {name: f"{x.dtype}{list(x.shape)}" for name, x in arrays.items()}


def _difference(
    about: dict[str, Any], identity: dict[str, Any], leaves: dict[str, str]
) -> str | None:
    """Say in what a checkpoint differs from what is asked for, if it does."""
    there, here = _flat(about["identity"]), _flat(identity)
    for name in sorted({*there, *here}, key=list({**here, **there}).index):
        if there.get(name) != here.get(name):
            return f"it has {name} = {there.get(name)!r}, here it is {here.get(name)!r}"
    for name in {**about["leaves"], **leaves}:
        if about["leaves"].get(name) != leaves.get(name):
            return (
                f"it has {name}: {about['leaves'].get(name, 'nothing')}, here it is "
                f"{leaves.get(name, 'nothing')}"
            )
    return None


def _flat(identity: dict[str, Any]) -> dict[str, Any]:
    """Return the entries, those of the dict "config" among the others."""
    rest = {name: value for name, value in identity.items() if name != "config"}
    return {**rest, **identity.get("config", {})}
