"""Two processes of two devices come to what one process of four comes to.

Run as a script, this file is one of the two processes.
"""

import contextlib
import functools
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import linen as nn

from experiments import main as entry
from experiments.config import Config
from experiments.data import NO_EXAMPLES, Dataset, Split
from experiments.mesh import join_processes
from experiments.models import MODELS
from experiments.models.base import Model
from experiments.train import train

ROOT = Path(__file__).parents[1]
TIMEOUT = 300  # seconds, for what takes twenty on two idle cores


class Linear(Model):
    @nn.compact
    def __call__(self, x, *, train=False):
        init = nn.initializers.lecun_uniform()  # compiles faster than the default
        return nn.Dense(10, kernel_init=init)(x.reshape(x.shape[0], -1))


class Normalized(Model):
    @nn.compact
    def __call__(self, x, *, train=False):
        init = nn.initializers.lecun_uniform()
        x = nn.Dense(8, use_bias=False, kernel_init=init)(x.reshape(x.shape[0], -1))
        return nn.Dense(10, kernel_init=init)(nn.relu(nn.BatchNorm(not train)(x)))


NETWORKS = {"linear": Linear, "normalized": Normalized}


class Rows:
    """A stream of made-up images, of which a process reads its rows of each batch."""

    def __init__(self, part, steps=4, seed=0, ends=False):
        self.part, self.steps, self.seed, self.ends = part, steps, seed, ends

    def reseeded(self, seed):
        return Rows(self.part, self.steps, seed)

    def batches(self, start=0):
        index, count = self.part
        for step in range(start, self.steps) if self.ends else itertools.count(start):
            whole = images(40, (self.seed, step))
            yield Split(*(np.split(x, count)[index] for x in whole))


def images(count, seed):
    random = np.random.default_rng(seed)
    return Split(
        random.integers(0, 256, (count, 28, 28, 1)).astype(np.uint8),
        random.integers(0, 10, count).astype(np.int32),
    )


def resident():
    return Dataset(images(163, 3), images(37, 4), NO_EXAMPLES)


def streamed():
    part = jax.process_index(), jax.process_count()
    return Dataset(Rows(part), Rows(part, steps=2, seed=1, ends=True), NO_EXAMPLES)


# What is trained: network, devices that share a copy of the weights, data.
CASES = {
    "linear": ("linear", 1, resident),
    "normalized": ("normalized", 1, resident),
    "streamed": ("linear", 2, streamed),
}
# With the weights in two parts, and 12 checkpoints: for long enough to be killed.
LONG = ("normalized", 2, resident)
OFTEN = {"epochs": 6, "look_every": 2, "checkpoint_every": 0}


def trained(case, folder=None, **others):
    """Train on four devices; return all numbers that came of it, by name."""
    model, model_parallel, data = case
    settings = {
        "augment": "none" if data is streamed else "crop_flip",
        "epochs": 2,
        **others,
    }
    config = Config(
        dataset="mnist5k",
        model=model,
        batch_size=40,
        penalty=1e-4,
        mask_learning_rate=0.03,
        minimum_connections=3,
        seed=11,
        devices=4,  # all there are in the two processes
        model_parallel=model_parallel,
        **settings,
    )
    [result] = train(config, data(), "scl", folder=folder)
    leaves = jax.tree_util.tree_leaves_with_path(
        (result.trained, result.statistics, result.folded)
    )
    history = [m._replace(method=0, seconds=0, penalty=0) for m in result.history]
    return {
        "history": np.array(history, float),
        **{jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves},
    }


def work(job, folder):
    """Be one of two processes."""
    MODELS.update(NETWORKS)
    if job == "main":
        arguments = json.loads((folder / "arguments.json").read_text())
        entry.load = functools.cache(entry.load)  # reading the digits takes seconds
        without_out = entry.main(arguments)
        entry.join_processes = lambda: None  # once is enough
        print("AGAIN", flush=True)
        sys.exit(
            entry.main([*arguments, "--out", str(folder / "run")]) or not without_out
        )
    join_processes()
    index = jax.process_index()
    if job == "train":
        for name, case in CASES.items():
            np.savez(folder / f"{name}-{index}", **trained(case))
    numbers = trained(LONG, folder / "checkpoints", **OFTEN)
    np.savez(folder / f"long-{index}", **numbers)


@contextlib.contextmanager
def two_processes(job, folder):
    """Start two processes that know of each other; end them, whatever happens."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = []
    try:
        for index in range(2):
            environment = {
                **os.environ,
                "JAX_PLATFORMS": "cpu",
                "JAX_NUM_CPU_DEVICES": "2",
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(index),
                "PYTHONPATH": str(ROOT),
            }
            with (folder / f"{job}-{index}.log").open("w") as log:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, __file__, job, str(folder)],
                        env=environment,
                        cwd=ROOT,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                )
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def wait(processes, folder, until):
    """Wait until something is true; fail if a process fails, or it takes too long."""
    end = time.monotonic() + TIMEOUT
    while not until():
        failed = any(process.poll() for process in processes)
        if failed or time.monotonic() > end:
            logs = [path.read_text()[-3000:] for path in sorted(folder.glob("*.log"))]
            pytest.fail("\n".join(["failed" if failed else "too slow", *logs]))
        time.sleep(0.02)


def finish(processes, folder):
    wait(processes, folder, lambda: all(p.poll() == 0 for p in processes))


def saved_steps(checkpoints):
    """Return the steps of the checkpoints that are complete."""
    names = [path.name for path in checkpoints.glob("scl-seed11/*")]
    return [int(name) for name in names if name.isdecimal()]


@pytest.fixture(scope="module")
def networks():
    with pytest.MonkeyPatch.context() as patch:
        for name, network in NETWORKS.items():
            patch.setitem(MODELS, name, network)
        yield


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Train the cases in two processes, and kill them in the middle of the long one."""
    folder = tmp_path_factory.mktemp("processes")
    with two_processes("train", folder) as processes:
        checkpoints = folder / "checkpoints"
        wait(processes, folder, lambda: max(saved_steps(checkpoints), default=0) >= 6)
        for process in processes:
            process.send_signal(signal.SIGKILL)
        codes = [process.wait() for process in processes]
    assert codes == [-signal.SIGKILL] * 2
    assert 6 <= max(saved_steps(checkpoints)) < 24
    assert not (folder / "long-0.npz").exists()
    shutil.copytree(checkpoints, folder / "as_killed")
    return folder


@pytest.fixture(scope="module")
def long(networks):
    """Train the long case in this process, from beginning to end."""
    return trained(LONG, **OFTEN)


def by_name(file):
    with np.load(file) as arrays:
        return dict(arrays)


def assert_same(got, expected, rtol=0):
    """Compare all numbers, relative to the largest of their array."""
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        atol = rtol * np.max(np.abs(array))
        np.testing.assert_allclose(got[name], array, rtol, atol, err_msg=name)


# Where two devices split the batch, a sum over them has one order. Where four do, the
# four gradients are added in another order between processes than within one.
@pytest.mark.parametrize(
    ("name", "rtol"), [("linear", 1e-6), ("normalized", 1e-5), ("streamed", 0)]
)
def test_two_processes_come_to_what_one_does(killed, networks, name, rtol):
    expected = trained(CASES[name])
    for index in range(2):
        assert_same(by_name(killed / f"{name}-{index}.npz"), expected, rtol)


def test_both_processes_hold_the_same_numbers(killed):
    for name in CASES:
        first, second = (by_name(killed / f"{name}-{i}.npz") for i in range(2))
        assert_same(first, second)


def test_masks_and_statistics_were_trained(long):
    # Else the comparisons say little.
    masks = [x for name, x in long.items() if ".masks" in name]
    assert len(masks) == 2
    for mask in masks:
        assert 3 <= np.sum(mask >= 0) < mask.size
    statistics = [x for name, x in long.items() if "batch_stats" in name]
    assert len(statistics) == 2
    assert all(np.ptp(x) > 0 for x in statistics)


def test_two_killed_processes_go_on_bit_for_bit(killed, long):
    with two_processes("go_on", killed) as processes:
        finish(processes, killed)
    for index in range(2):
        assert_same(by_name(killed / f"long-{index}.npz"), long)
    assert max(saved_steps(killed / "checkpoints")) == 24


def test_one_process_goes_on_bit_for_bit_where_two_were_killed(killed, long, tmp_path):
    shutil.copytree(killed / "as_killed", tmp_path / "checkpoints")
    assert_same(trained(LONG, tmp_path / "checkpoints", **OFTEN), long)


# The command line


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Run the command line in two processes, without --out and with it."""
    folder = tmp_path_factory.mktemp("main")
    arguments = ["mnist5k_lenet300", "--epochs", "2", "--seeds", "1", "--seed", "3"]
    arguments += ["--penalty", "2e-5", "--mask-learning-rate", "1e-3"]
    arguments += ["--model-parallel", "2", "--devices", "4", "--batch-size", "380"]
    (folder / "arguments.json").write_text(json.dumps(arguments))
    with two_processes("main", folder) as processes:
        finish(processes, folder)
    return folder, arguments


def logs(finished):
    """Return what each process said without --out, and then with it."""
    folder, _ = finished
    return [(folder / f"main-{i}.log").read_text().split("AGAIN") for i in range(2)]


def test_processes_without_a_common_folder_are_refused(finished):
    for without, _ in logs(finished):
        assert "must write to one folder" in " ".join(without.split())
        assert "--out" in without
        assert "Traceback" not in without


def test_run_of_two_processes_is_that_of_one(finished, tmp_path):
    folder, arguments = finished
    assert entry.main([*arguments, "--out", str(tmp_path / "one")]) == 0
    one, two = tmp_path / "one", folder / "run"
    assert {p.name for p in two.iterdir()} == {p.name for p in one.iterdir()}

    def records(file):
        text = file.read_text()
        many = (
            json.loads(text)
            if file.suffix == ".json"
            else map(json.loads, text.splitlines())
        )
        return [{**record, "seconds": None} for record in many]

    for name in ("results.json", "metrics.jsonl"):
        assert records(two / name) == records(one / name)
    assert len(records(two / "metrics.jsonl")) == 4  # two methods, two epochs
    for method in ("dense", "scl"):
        name = f"folded-{method}-seed3.npz"
        assert_same(by_name(two / name), by_name(one / name))


def test_the_first_process_alone_reports(finished):
    (_, first), (_, second) = logs(finished)
    assert "SCL layer by layer" in first
    assert "SCL layer by layer" not in second


if __name__ == "__main__":
    work(sys.argv[1], Path(sys.argv[2]))
