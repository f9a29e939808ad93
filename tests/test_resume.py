"""A killed training goes on where it was: real processes, killed at random moments.

Run as a script, this file is the training that is killed.
"""

import dataclasses
import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from command_line import compiled_once
from flax import linen as nn
from flax.traverse_util import flatten_dict

from experiments.config import Config
from experiments.data import NO_EXAMPLES, Dataset, Split
from experiments.models import MODELS
from experiments.models.base import Model
from experiments.network import make_network
from experiments.train import train

ROOT = Path(__file__).parents[1]
# 60 examples in batches of 8: looks after 3, 6 and 7 steps of an epoch, 60 in all.
CONFIG = Config(
    dataset="mnist5k",
    model="lenet5",
    augment="crop_flip",
    epochs=10,
    batch_size=8,
    weight_decay=1e-3,
    label_smoothing=0.1,
    penalty=1e-3,
    mask_learning_rate=0.004,
    look_every=3,
    checkpoint_every=0,
    seed=5,
    seeds=2,
)


def wave(key, shape, dtype):
    """Initialize without random numbers, which take seconds to compile."""
    return jnp.sin(jnp.arange(np.prod(shape), dtype=dtype)).reshape(shape) / 5


class Tiny(Model):
    """A convolution, a normalization with statistics, and a dense layer."""

    @nn.compact
    def __call__(self, x_BxHxWxC, *, train=False):
        x = nn.Conv(6, (5, 5), strides=(4, 4), use_bias=False)(x_BxHxWxC)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dense(self.classes)(jnp.mean(x, axis=(1, 2)))


class TinyDense(Model):
    """The same without a convolution: its steps are scanned."""

    @nn.compact
    def __call__(self, x_BxHxWxC, *, train=False):
        x = nn.Dense(12, kernel_init=wave)(x_BxHxWxC.reshape(x_BxHxWxC.shape[0], -1))
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dense(self.classes)(x)


def examples(count, seed):
    random = np.random.default_rng(seed)
    labels = random.integers(0, 10, count).astype(np.int32)
    images = random.integers(0, 128, (count, 28, 28, 1))
    images[np.arange(count), labels] += 127  # a bright row tells the class
    return Split(images.astype(np.uint8), labels)


def dataset(held_out=20):
    return Dataset(examples(60, 0), examples(held_out, 1), NO_EXAMPLES)


def run_as_script(out, folder, changes="{}"):
    """Train all seeds, and write what came of it."""
    config = dataclasses.replace(CONFIG, **json.loads(changes))
    logging.getLogger("experiments").addHandler(logging.StreamHandler())
    logging.getLogger("experiments").setLevel(logging.INFO)
    MODELS["lenet5"] = Tiny
    where = Path(folder) if folder else None
    arrays, epochs = {}, []
    for trained in train(config, dataset(), "scl", folder=where):
        arrays |= as_arrays(trained)
        epochs += without_seconds(trained.history)
    np.savez(out, **arrays, epochs=json.dumps(epochs))


def as_arrays(trained):
    """Return all that a training leaves, as flat arrays."""
    trees = {
        "weights": trained.trained.weights,
        "masks": trained.trained.masks,
        "statistics": trained.statistics,
        "folded": trained.folded,
    }
    return {
        f"{trained.seed}/{path}": np.asarray(leaf)
        for path, leaf in flatten_dict(trees, sep="/").items()
        if leaf is not None
    }


def without_seconds(history):
    return [{**metrics._asdict(), "seconds": None} for metrics in history]


def start(*command, log):
    """Start Python; what starts with the same log compiles a program but once."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        **compiled_once(log.with_name("compiled")),
    }
    with log.open("a") as file:
        return subprocess.Popen(
            [sys.executable, *map(str, command)],
            env=environment,
            cwd=ROOT,
            stdout=file,
            stderr=file,
        )


def drafts(folder):
    """Return the checkpoints that are being written."""
    return {path.name for path in folder.glob("*/*.orbax-checkpoint-tmp*")}


def killed_in_time(process, delay):
    """Kill a process after some seconds; tell whether it was still running."""
    try:
        process.wait(delay)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    return process.returncode == -signal.SIGKILL


def killed_soon(process, folder, delay):
    """Kill a process after some seconds, or earlier where it is quick and saves."""
    seen, end = set(), time.monotonic() + delay
    while process.poll() is None and time.monotonic() < end and len(seen) < 4:
        seen |= drafts(folder)
        time.sleep(0.002)
    return killed_in_time(process, 0)


def killed_in_saving(process, folder, count, delay):
    """Kill a process when it writes a checkpoint, the count-th after its start."""
    seen = set()
    while process.poll() is None:
        seen |= drafts(folder)
        if len(seen) >= count and drafts(folder):
            return killed_in_time(process, delay)
        time.sleep(0.002)
    return False


def test_a_run_killed_at_random_moments_ends_as_if_it_was_not(tmp_path):
    chance, log = random.Random(1), tmp_path / "log"
    folder = tmp_path / "checkpoints"
    never, killed = (tmp_path / f"{name}.npz" for name in ("never", "killed"))
    # How far a run gets before a kill is the machine's: 90 looks are for the quick.
    changes = json.dumps({"seeds": 3})
    run = [__file__, killed, folder, changes]
    assert start(__file__, never, "", changes, log=log).wait(120) == 0
    in_saving = 0
    for kill in range(12):
        process = start(*run, log=log)
        if kill % 3 == 0:
            dead = killed_soon(process, folder, chance.uniform(0, 4))
        else:
            delay = chance.choice([0, 0, 0.02, 0.05, 0.1])
            dead = killed_in_saving(process, folder, chance.randint(1, 4), delay)
        if not dead:
            break
        in_saving += bool(drafts(folder))
    assert start(*run, log=log).wait(120) == 0
    # Not vacuous: kills tore drafts, and runs went on in the middle of an epoch, too.
    assert in_saving >= 3
    resumed = re.findall(r"going on after step (\d+)", log.read_text())
    assert len(set(resumed)) >= 5
    assert any(int(step) % 7 for step in resumed)
    with np.load(never) as expected, np.load(killed) as got:
        assert set(got) == set(expected)
        for name in expected:
            np.testing.assert_array_equal(got[name], expected[name], err_msg=name)


def test_a_run_to_a_budget_killed_in_its_schedule_ends_as_if_it_was_not(tmp_path):
    log, folder = tmp_path / "log", tmp_path / "kept"
    never, killed = (tmp_path / f"{name}.npz" for name in ("never", "killed"))
    # 70 steps: the budget falls up to step 26, and the masks rest from 52 on.
    changes = json.dumps({"sparsity": 0.8, "seeds": 1})
    run = [__file__, killed, folder, changes]
    undisturbed = start(__file__, never, "", changes, log=log)
    process = start(*run, log=log)
    assert killed_in_saving(process, folder, 3, 0), log.read_text()
    assert undisturbed.wait(120) == 0
    assert start(*run, log=log).wait(120) == 0
    resumed = re.findall(r"going on after step (\d+)", log.read_text())
    (step,) = set(resumed)
    assert 0 < int(step) < 26
    with np.load(never) as expected, np.load(killed) as got:
        assert set(got) == set(expected)
        for name in expected:
            np.testing.assert_array_equal(got[name], expected[name], err_msg=name)
        masks = [got[name] for name in got if "/masks/" in name]
        # A fifth of 5 x 5 x 6 and 6 x 10 connections.
        assert sum((mask >= 0).sum() for mask in masks) == (150 + 60) // 5


SMALL = [
    # Long enough for a busy machine to see a checkpoint being written before the end.
    *("-m", "experiments.main", "mnist5k_lenet300", "--epochs", "6", "--seeds", "1"),
    *("--batch-size", "700", "--validation", "500"),
    *("--look-every", "2", "--checkpoint-every", "0", "--out"),
]


def test_sigterm_ends_the_main_job_in_order_and_it_goes_on(tmp_path):
    log = tmp_path / "log"
    undisturbed = start(*SMALL, tmp_path / "never", log=log)
    assert undisturbed.wait(120) == 0
    for wait in (0, 0.1):
        process = start(*SMALL, tmp_path / "ended", log=log)
        while not drafts(tmp_path / "ended" / "checkpoints"):
            assert process.poll() is None, log.read_text()
            time.sleep(0.002)
        time.sleep(wait)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    assert "go on from the last checkpoint" in " ".join(log.read_text().split())
    assert "Traceback" not in log.read_text()
    assert start(*SMALL, tmp_path / "ended", log=log).wait(120) == 0
    for name in ("metrics.jsonl", "results.json"):
        expected, got = (told(tmp_path / run / name) for run in ("never", "ended"))
        assert got == expected
    for method in ("dense", "scl"):
        name = f"folded-{method}-seed0.npz"
        never, ended = (np.load(tmp_path / run / name) for run in ("never", "ended"))
        with never, ended:
            for path in never:
                np.testing.assert_array_equal(ended[path], never[path])


def told(file):
    """Return what a file tells, but for the seconds."""
    return re.sub(r'("\w*seconds\w*": )[\d.]+', r"\1", file.read_text())


class StopError(Exception):
    """Ends a training."""


def stopped(config, folder, epoch):
    """Train up to the end of an epoch; leave the checkpoint in its middle."""

    def on_epoch(metrics):
        if metrics.epoch == epoch:
            raise StopError

    with pytest.raises(StopError):
        list(train(config, dataset(), "scl", on_epoch=on_epoch, folder=folder))
    newest = max((folder / "scl-seed5").iterdir(), key=lambda path: int(path.name))
    shutil.rmtree(newest)


@pytest.fixture(scope="module")
def dense():
    """A training that nothing disturbed, of a network whose steps are scanned."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "lenet5", TinyDense)
        make_network.cache_clear()
        config = dataclasses.replace(CONFIG, epochs=4, seeds=1, devices=1)
        (never,) = train(config, dataset(), "scl")
        yield config, never
    make_network.cache_clear()


def test_scanned_steps_go_on_bit_for_bit(dense, tmp_path):
    config, never = dense
    stopped(config, tmp_path, epoch=3)
    (resumed,) = train(config, dataset(), "scl", folder=tmp_path)
    expected = as_arrays(never)
    for name, array in as_arrays(resumed).items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)
    assert without_seconds(resumed.history) == without_seconds(never.history)
    # A run that has ended is taken up as well, and does nothing.
    (again,) = train(config, dataset(), "scl", folder=tmp_path)
    assert again.history == resumed.history


@pytest.mark.parametrize(
    "change",
    [
        {"look_every": 2},
        {"devices": 4},
        {"devices": 8, "model_parallel": 2},
    ],
    ids=str,
)
def test_other_looks_and_devices_take_a_run_up(dense, tmp_path, change):
    config, never = dense
    stopped(config, tmp_path, epoch=3)
    changed = dataclasses.replace(config, **change)
    (resumed,) = train(changed, dataset(), "scl", folder=tmp_path)
    expected = as_arrays(never)
    for name, array in as_arrays(resumed).items():
        np.testing.assert_allclose(
            array, expected[name], rtol=1e-3, atol=1e-4, err_msg=name
        )
    for got, want in zip(resumed.history, never.history, strict=True):
        assert (got.epoch, got.nnz) == (want.epoch, want.nnz)
        assert got.loss == pytest.approx(want.loss, rel=1e-4)
        assert got.train_accuracy == pytest.approx(want.train_accuracy)


if __name__ == "__main__":
    run_as_script(*sys.argv[1:])
