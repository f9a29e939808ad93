"""The training loop: the same for every method, data set and number of devices."""

import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils

from experiments.checkpoint import CheckpointError, Checkpoints
from experiments.config import Config, identity
from experiments.data import Dataset
from experiments.evaluate import evaluate
from experiments.feed import each, make_feed, next_key
from experiments.health import (
    Layer,
    all_finite,
    collapse,
    kernel_counts,
    make_examination,
)
from experiments.mesh import make_mesh, replicated
from experiments.methods import METHODS
from experiments.network import make_network
from experiments.step import (
    Objective,
    TrainState,
    make_initial,
    make_rest,
    make_training,
)

PyTree = Any
log = logging.getLogger(__name__)


class TrainingError(RuntimeError):
    """A training that cannot go on; the message says where and why."""


class Metrics(NamedTuple):
    """What one epoch came to."""

    method: str
    seed: int
    epoch: int  # from 1
    loss: float  # mean over the epoch, without the penalty, nats
    train_accuracy: float  # running, over the epoch, 0..1
    validation_accuracy: float | None  # None without a validation split
    nnz: int  # nonzero kernel weights after the epoch
    sparsity: float  # of the kernels, 0..1
    seconds: float  # the epoch's training alone
    penalty: float | None = None  # that a budget's controller has come to


class Trained(NamedTuple):
    """What a training leaves, on every device."""

    seed: int
    trained: PyTree
    statistics: PyTree  # of normalization layers
    folded: PyTree  # plain parameters
    history: list[Metrics]


@dataclasses.dataclass
class Progress:
    """Where a training is; what a checkpoint holds."""

    state: TrainState
    key: np.ndarray  # data of the key that orders the examples of the epoch at hand
    step: int  # taken, of the whole training
    history: list[Metrics]
    # Of the epoch at hand: sums over its steps of loss and accuracy, and seconds.
    sums: tuple[float, ...]


def train(
    config: Config,
    data: Dataset,
    method: str,
    *,
    seeds: Iterable[int] | None = None,
    on_epoch: Callable[[Metrics], None] = lambda metrics: None,
    folder: Path | None = None,
) -> Iterator[Trained]:
    """Train a network once per seed, one after the other, with one compilation.

    Two methods with the same seed start from the same weights and see the
    examples in the same order. A seed repeats bit for bit on the same machine,
    also if it was killed and taken up again from its last checkpoint.

    Args:
      config: the experiment.
      data: what `experiments.data.load` gives; the test split is not touched.
      method: a name in `experiments.methods.METHODS`.
      seeds: the seeds; those of the config by default.
      on_epoch: called after each epoch; also for those of a run that is taken up.
      folder: where checkpoints are kept, in METHOD-seedN; nowhere by default.

    Yields:
      A `Trained` per seed, as each is done.

    Raises:
      ValueError: if the training split is smaller than one batch, or the devices do
        not divide a batch, or there are not as many as the config says.
      TrainingError: if numbers are no longer finite.
      CheckpointError: if a checkpoint cannot be written, or none can be taken up.
    """
    training = _Training(config, data, method)
    for seed in config_seeds(config) if seeds is None else seeds:
        if folder is None:
            yield training.run(seed, None, on_epoch)
            continue
        where = folder / f"{method}-seed{seed}"
        checkpoints = Checkpoints(where, training.identity(seed))
        try:
            trained = training.run(seed, checkpoints, on_epoch)
        finally:
            checkpoints.close()  # before it is yielded: nothing is being written then
        yield trained


def config_seeds(config: Config) -> range:
    """Return the seeds of a config."""
    return range(config.seed, config.seed + config.seeds)


class _Training:
    """One method on one data set, compiled once for all seeds."""

    def __init__(self, config: Config, data: Dataset, method: str):
        self.config, self.data = config, data
        self.mesh = make_mesh(config.devices, config.model_parallel)
        self.feed = make_feed(config, data.train, self.mesh)
        self.steps = config.epochs * self.feed.steps
        self.network = make_network(config)
        self.method = METHODS[method](config, self.steps)
        self.objective = Objective(self.network, self.method, config.label_smoothing)
        self.initial, self.template = make_initial(self.objective, self.mesh)
        self.run_steps = make_training(self.objective, self.feed, self.mesh)
        # What the host looks at is gathered, on all devices.
        everywhere = replicated(self.mesh)
        self.fold = jax.jit(self.method.fold, out_shardings=everywhere)
        self.gather = jax.jit(lambda tree: tree, out_shardings=everywhere)
        self.sample = self.feed.sample()

    def identity(self, seed: int) -> dict[str, Any]:
        """Return what a checkpoint must agree with to be taken up."""
        return {
            "method": self.method.name,
            "seed": seed,
            "steps": self.steps,
            "config": identity(self.config),
        }

    def run(
        self,
        seed: int,
        checkpoints: Checkpoints | None,
        on_epoch: Callable[[Metrics], None],
    ) -> Trained:
        """Train one seed from its start, or its last checkpoint, to its end."""
        at = self.start(seed, checkpoints)
        if at.step:
            log.info(
                "%s, seed %d: going on after step %d of %d",
                *(self.method.name, seed, at.step, self.steps),
            )
        for metrics in at.history:
            on_epoch(metrics)
        warned: set[str] = set()
        saved = time.monotonic()
        while at.step < self.steps:
            if not self.advance(seed, at):
                raise TrainingError(self.diagnosis(seed, at.step, checkpoints))
            folded = self.fold(at.state.trained)
            counts = kernel_counts(folded)
            found = collapse(
                self.network, folded, at.state.statistics, self.sample, counts
            )
            for words in sorted({*found} - warned):
                log.warning(
                    "%s, seed %d, step %d: %s", self.method.name, seed, at.step, words
                )
            warned.update(found)
            epoch_ends = at.step % self.feed.steps == 0
            if epoch_ends:
                self.end_epoch(seed, at, folded, counts)
            due = time.monotonic() - saved >= self.config.checkpoint_every
            if checkpoints and (agreed(due) or at.step == self.steps):
                record = {"key": at.key.tolist(), "history": at.history}
                checkpoints.save(at.step, at.state, {**record, "sums": at.sums})
                saved = time.monotonic()
            if epoch_ends:
                on_epoch(at.history[-1])
        trained, statistics = self.gather((at.state.trained, at.state.statistics))
        return Trained(seed, trained, statistics, self.fold(trained), at.history)

    def start(self, seed: int, checkpoints: Checkpoints | None) -> Progress:
        """Return the beginning of a training, or where its last checkpoint is."""
        init_key, order_key = jax.random.split(jax.random.key(seed))
        found = checkpoints and checkpoints.restore(self.template)
        if not found:
            key = np.asarray(jax.random.key_data(order_key))
            return Progress(self.initial(init_key), key, 0, [], (0.0, 0.0, 0.0))
        record = found.record
        return Progress(
            state=found.state,
            key=np.array(record["key"], np.uint32),
            step=found.step,
            history=[Metrics(*metrics) for metrics in record["history"]],
            sums=tuple(record["sums"]),
        )

    def items(self, seed: int, at: Progress) -> tuple[Any, int]:
        """Return the items from here to the next look, and how many they are."""
        epoch, done = divmod(at.step, self.feed.steps)
        stop = min(self.feed.steps, done + (self.config.look_every or self.feed.steps))
        return self.feed.items(seed, at.key, epoch, done, stop), stop - done

    def advance(self, seed: int, at: Progress) -> bool:
        """Take the steps up to the next look; tell whether all is finite."""
        began = time.perf_counter()
        items, count = self.items(seed, at)
        at.state, seen = self.run_steps(at.state, items, at.step)
        finite = np.isfinite(seen.loss).all() and all_finite(at.state)
        at.step += count
        news = (seen.loss.sum(), seen.accuracy.sum(), time.perf_counter() - began)
        at.sums = tuple(float(a + b) for a, b in zip(at.sums, news, strict=True))
        return bool(finite)

    def end_epoch(
        self, seed: int, at: Progress, folded: PyTree, counts: dict[str, Layer]
    ) -> None:
        """Turn the sums of an epoch into its metrics, and turn to the next one."""
        held_out = self.data.validation
        accuracy = evaluate(
            self.network, folded, at.state.statistics, held_out, self.mesh
        )
        nnz = sum(layer.nnz for layer in counts.values())
        loss, train_accuracy, seconds = at.sums
        penalty = optax.tree_utils.tree_get(at.state.opt_state, "penalty")
        penalty = None if penalty is None else float(penalty)
        at.history.append(
            Metrics(
                method=self.method.name,
                seed=seed,
                epoch=at.step // self.feed.steps,
                loss=loss / self.feed.steps,
                train_accuracy=train_accuracy / self.feed.steps,
                validation_accuracy=accuracy,
                nnz=nnz,
                sparsity=1 - nnz / sum(layer.size for layer in counts.values()),
                seconds=seconds,
                penalty=penalty,
            )
        )
        at.key, at.sums = np.asarray(next_key(at.key)), (0.0, 0.0, 0.0)

    def diagnosis(self, seed: int, stop: int, checkpoints: Checkpoints | None) -> str:
        """Repeat the steps up to `stop`, and say where numbers cease to be finite."""
        name = f"{self.method.name}, seed {seed}"
        try:
            at = self.start(seed, checkpoints)
        except CheckpointError as error:
            return (
                f"{name}: numbers are no longer finite at step {stop}, or before it; "
                f"where it began cannot be looked for: {error}"
            )
        last_good = (
            f"the last good checkpoint is step {at.step} in {checkpoints.folder}"
            if checkpoints and at.step
            else "there is no checkpoint before it"
        )
        log.info("%s: not finite; looking for the place from step %d", name, at.step)
        examine, examine_frozen = (
            make_examination(objective, self.feed)
            for objective in (self.objective, self.objective.frozen())
        )
        where = f"step {stop}, but not when repeated one by one"
        while at.step < stop:
            items, _ = self.items(seed, at)
            rests = self.objective.rests(at.step, self.feed.steps)
            if rests:
                at.state = make_rest(self.mesh)(at.state)
            for item in each(items):
                step = examine_frozen if rests else examine
                at.state, place = step(at.state, item)
                at.step += 1
                if place:
                    epoch = (at.step - 1) // self.feed.steps + 1
                    where = f"step {at.step} (epoch {epoch}), beginning with {place}"
                    stop = at.step
                    break
            if at.step % self.feed.steps == 0:
                at.key = np.asarray(next_key(at.key))
        return (
            f"{name}: numbers are no longer finite at {where}; {last_good}. The "
            f"learning rate {self.config.learning_rate:g} or the mask learning rate "
            f"{self.config.mask_learning_rate:g} may be too high"
        )


def agreed(mine: bool) -> bool:
    """Return what the first process says: clocks differ, and all must save or none."""
    return bool(multihost_utils.broadcast_one_to_all(np.array(mine)))
