"""Run every notebook, and compare each .ipynb with the .py it is paired with.

    make notebooks
    FULL=1 make notebooks  # in their full size, for hours or a GPU
    python -m experiments.notebooks --pictures FOLDER [NAMES...]

The sources are notebooks/*.py (jupytext py:percent). Each has a .ipynb beside it, for
those who read it in a browser: the same cells, committed without outputs.

Names choose notebooks, `budget` for notebooks/budget.py; all are run by default. They
run beside each other, in their full size one after the other. With --pictures the PNG
files that they leave in their working folder are kept.
"""

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import jupytext
import nbclient
import nbformat

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"


class NotebookError(RuntimeError):
    """A notebook that fails or disagrees with its pair; the message says what to do."""


def check_pair(source: Path) -> None:
    """Compare the .ipynb beside a notebook's source with that source.

    Args:
        source: The .py file, in jupytext's py:percent form.

    Raises:
        NotebookError: The .ipynb is missing, has outputs, or has other cells.
    """
    pair = source.with_suffix(".ipynb")
    fix = f"write it again: .venv/bin/python -m jupytext --to ipynb {source}"
    if not pair.is_file():
        raise NotebookError(
            f"{pair}: expected beside {source.name}, but missing; {fix}"
        )
    cells = nbformat.read(pair, as_version=4).cells
    if any(cell.get("outputs") or cell.get("execution_count") for cell in cells):
        raise NotebookError(f"{pair}: expected no outputs, but it has some; {fix}")
    expected = [(cell.cell_type, cell.source) for cell in jupytext.read(source).cells]
    if [(cell.cell_type, cell.source) for cell in cells] != expected:
        raise NotebookError(f"{pair}: its cells differ from {source.name}'s; {fix}")


def execute(source: Path, pictures: Path | None = None) -> list[str]:
    """Execute a notebook's source in an empty temporary folder.

    Args:
        source: The .py file, in jupytext's py:percent form.
        pictures: A folder, to which the PNG files that the notebook leaves in its own
            are copied once it has run to its end; None to copy nothing.

    Returns:
        The names of the files that were copied.

    Raises:
        NotebookError: A cell raises; the message holds the cell and its traceback.
    """
    notebook = jupytext.read(source)
    with tempfile.TemporaryDirectory() as folder:
        client = nbclient.NotebookClient(
            notebook,
            kernel_name="python3",
            # Seconds a cell; the full size takes what it takes.
            timeout=None if os.environ.get("FULL") else 600,
            resources={"metadata": {"path": folder}},
            # Or each kernel warns that its TCP ports are not encrypted; they are local.
            extra_arguments=["--IPKernelApp.log_level=ERROR"],
        )
        try:
            client.execute()
        # A cell's error, a timeout, a kernel that dies: nbclient's have no common base.
        except Exception as error:
            raise NotebookError(f"{source}: {error}") from error
        if pictures is None:
            return []
        left = sorted(Path(folder).glob("*.png"))
        for picture in left:
            shutil.copy(picture, pictures)
        return [picture.name for picture in left]


def main(
    folder: Path = FOLDER, names: Sequence[str] = (), pictures: Path | None = None
) -> None:
    """Check and run notebooks of a folder; exit with a message if one fails.

    Args:
        folder: Where the notebooks are.
        names: Which to run, without suffix; all of the folder if there are none.
        pictures: Where the PNG files that they leave are copied to, made if missing.
    """
    sources = sorted(folder.glob("*.py"))
    failures = [
        f"{pair}: has no .py beside it; write one, or remove it"
        for pair in sorted(folder.glob("*.ipynb"))
        if pair.with_suffix(".py") not in sources
    ]
    if names:
        known = [source.stem for source in sources]
        unknown = sorted(set(names) - set(known))
        if unknown:
            sys.exit(
                f"names must be of notebooks in {folder}, which are "
                f"{', '.join(known) or 'none'}; got {', '.join(unknown)}"
            )
        sources, failures = [s for s in sources if s.stem in names], []
    elif not (sources or failures):
        print(f"There is no notebook in {folder} yet.")
    if pictures is not None:
        # Before minutes are spent on what could not be kept.
        pictures.mkdir(parents=True, exist_ok=True)
    # The full size may be on a GPU, which one of them fills.
    workers = 1 if os.environ.get("FULL") else os.cpu_count()
    # Not forked: who calls this may have threads, as JAX has.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context) as pool:
        runs = [pool.submit(_run, source, pictures) for source in sources]
        try:
            for run in as_completed(runs):
                if isinstance(error := run.exception(), NotebookError):
                    failures.append(str(error))
                else:
                    print(run.result(), flush=True)
        except KeyboardInterrupt:
            # nbclient takes it for itself in each of them, and the next would begin.
            for child in multiprocessing.active_children():
                child.kill()
            raise
    if failures:
        sys.exit("\n".join(sorted(failures)))


def _run(source: Path, pictures: Path | None) -> str:
    """Check and execute a notebook; return what to say of it."""
    # Others may be on the same GPU, of which JAX would take most at once.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    start = time.monotonic()
    check_pair(source)
    kept = execute(source, pictures)
    words = ["ok", f"{time.monotonic() - start:.0f} s", *kept]
    return f"{source.name}: {', '.join(words)}"


def command_line(argv: Sequence[str], folder: Path = FOLDER) -> None:
    """Run the notebooks of a folder as the command line says."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.notebooks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", help="notebooks, without suffix; all")
    parser.add_argument(
        "--pictures", type=Path, metavar="FOLDER", help="copy the PNG files there"
    )
    arguments = parser.parse_args(argv)
    main(folder, arguments.names, arguments.pictures)


if __name__ == "__main__":
    command_line(sys.argv[1:])
