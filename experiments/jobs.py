"""Several processes that do the work of one command together."""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence


def add_jobs(parser: argparse.ArgumentParser) -> None:
    """Add the option --jobs to a command line."""
    parser.add_argument(
        "--jobs", type=_count, default=1, help="processes; 1 if left out"
    )


def _count(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1, got {text!r}")
    return number


def share(module: str, argv: Sequence[str], jobs: int) -> int:
    """Run a module as several processes with the same arguments.

    What each prints at its end is dropped, for the caller to print it once; progress is
    on stderr.

    Returns:
      The worst exit code; that of a process that was killed is negative.
    """
    command = [sys.executable, "-m", module, *argv, "--jobs=1"]
    # Each would take three quarters of the accelerator's memory.
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ}
    running = []
    try:
        for _ in range(jobs):
            running.append(
                subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
            )
        return max((one.wait() for one in running), key=abs)
    finally:
        for one in running:
            one.terminate()  # does nothing to one that has ended
            one.wait()
