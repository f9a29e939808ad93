"""What the tests of the command line share: processes, messages, tiny data."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from experiments.data import Dataset, Split

ROOT = Path(__file__).parents[1]
NAME = "mnist5k_lenet300"
RUN = [sys.executable, "-m", "experiments.main", NAME]


def compiled_once(folder):
    """Return what makes processes, in their environment, share what they compile."""
    return {
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(folder):
    """Return name -> bytes of the files that a user sees."""
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.is_file() and not path.name.startswith(".")
    }


def said(capsys):
    """Return what was said on the error stream: one paragraph, no traceback."""
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    paragraph = captured.err.strip()
    assert paragraph
    assert "\n\n" not in paragraph
    return " ".join(paragraph.split())


def signal_when_logged(command, number, log, count):
    """Send a signal to a run that has logged so many epochs; wait until it ended.

    Returns:
      Its exit code, what it said on the error stream, and the seconds it took.
    """
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 90
    try:
        while not (log.exists() and log.read_text().count("\n") >= count):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        asked = time.monotonic()
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    return process.returncode, error, time.monotonic() - asked


def split(count):
    random = np.random.RandomState(count)
    images = random.randint(0, 256, (count, 28, 28, 1)).astype(np.uint8)
    return Split(images, np.arange(count, dtype=np.int32) % 10)


TINY = Dataset(train=split(48), validation=split(16), test=split(32))
