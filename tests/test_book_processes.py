"""A study of a real network: alone, shared by processes, taken over after a kill."""

import contextlib
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sharing

from experiments import study
from experiments.network import make_network


@contextlib.contextmanager
def process(folder, *hang):
    """Start one that is ready to run the study."""
    with subprocess.Popen(
        [sys.executable, sharing.__file__, str(folder), *hang],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    ) as started:
        try:
            assert started.stdout.readline() == "ready\n", started.communicate()
            yield started
        finally:
            started.kill()


def begin(started):
    started.stdin.write("\n")
    started.stdin.flush()


def trained(lines):
    """Yield the keys of what was trained, as they are logged."""
    return (line.partition(":")[0] for line in lines if ": accuracy" in line)


def ended(started):
    """Wait for the end; return the keys of what was trained, and what was logged."""
    _, log = started.communicate(timeout=120)
    assert started.returncode == 0, log
    return list(trained(log.splitlines())), log


def book(folder):
    return json.loads((folder / "tiny.json").read_text())


def computed(content):
    """Return the runs without clocks, and the devices: eight here, one there."""
    left_out = ("seconds", "epoch_seconds", "device")
    return {
        key: {name: x for name, x in record.items() if name not in left_out}
        for key, record in content["runs"].items()
    }


def checkpoints(folder):
    assert any((folder / "scratch").rglob("*.lock"))
    return list((folder / "scratch").rglob("*-seed*"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Run the study in this process; return its book."""
    folder = tmp_path_factory.mktemp("alone")
    make_network.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        sharing.replace(patch.setitem)
        study.run_study("tiny", folder=folder, scratch=folder / "scratch")
    make_network.cache_clear()
    assert not checkpoints(folder)
    return book(folder)


def test_study_of_a_real_network(alone):
    assert len(alone["runs"]) == sharing.RUNS
    dense, scl = alone["summary"]
    assert (dense["nnz"], dense["sparsity"]) == (7840, 0)
    assert 0.1 <= scl["sparsity"] < 1
    assert scl["nnz"] == pytest.approx(7840 * (1 - scl["sparsity"]))
    for record in alone["runs"].values():
        assert len(record["epoch_seconds"]) == sharing.CONFIG.epochs
        if record["stage"] == "test":
            (layer,) = record["layers"]
            nnz = record["nnz"]
            assert layer == {
                **{"path": "Dense_0/kernel", "weights": 7840, "nnz": nnz},
                **{"macs": 7840, "macs_remaining": nnz},
            }


def test_processes_fill_one_book_and_no_run_is_trained_twice(alone, tmp_path):
    with process(tmp_path) as first, process(tmp_path) as second:
        begin(first)
        begin(second)
        each = [ended(one)[0] for one in (first, second)]
    assert sorted(each[0] + each[1]) == sorted(alone["runs"])
    assert all(each)
    content = book(tmp_path)
    assert computed(content) == computed(alone)
    assert len(content["summary"]) == 2
    assert not checkpoints(tmp_path)


def test_run_of_a_killed_process_is_taken_over_from_its_checkpoint(alone, tmp_path):
    with process(tmp_path, "hang") as killed, process(tmp_path) as other:
        begin(killed)
        assert killed.stdout.readline() == "hangs\n"
        (held,) = checkpoints(tmp_path)
        begin(other)
        # The other one does the rest of the stage, and waits.
        rest = [key for key in alone["runs"] if key.startswith("validation")][1:]
        assert list(itertools.islice(trained(other.stderr), len(rest))) == rest
        time.sleep(1)
        assert other.poll() is None
        assert list(book(tmp_path)["runs"]) == rest
        killed.kill()
        killed.wait()
        last, log = ended(other)
    assert len(last) == sharing.RUNS - len(rest)
    assert last[0].startswith("validation dense")
    steps = sharing.CONFIG.epochs * 3
    assert f"dense, seed 1000: going on after step 3 of {steps}" in log
    assert log.count("going on after step") == 1
    assert computed(book(tmp_path)) == computed(alone)
    assert not held.exists()
