"""Run every notebook, and compare each .ipynb with the .py it is paired with.

    make notebooks

The sources are notebooks/*.py (jupytext py:percent). Each has a .ipynb beside it, for
those who read it in a browser: the same cells, committed without outputs.
"""

import sys
import tempfile
import time
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


def execute(source: Path) -> None:
    """Execute a notebook's source in an empty temporary folder.

    Args:
        source: The .py file, in jupytext's py:percent form.

    Raises:
        NotebookError: A cell raises; the message holds the cell and its traceback.
    """
    notebook = jupytext.read(source)
    with tempfile.TemporaryDirectory() as folder:
        client = nbclient.NotebookClient(
            notebook,
            kernel_name="python3",
            timeout=600,  # seconds a cell
            resources={"metadata": {"path": folder}},
            # Or each kernel warns that its TCP ports are not encrypted; they are local.
            extra_arguments=["--IPKernelApp.log_level=ERROR"],
        )
        try:
            client.execute()
        # A cell's error, a timeout, a kernel that dies: nbclient's have no common base.
        except Exception as error:
            raise NotebookError(f"{source}: {error}") from error


def main(folder: Path = FOLDER) -> None:
    """Check and run all notebooks of a folder; exit with a message if one fails."""
    sources = sorted(folder.glob("*.py"))
    failures = [
        f"{pair}: has no .py beside it; write one, or remove it"
        for pair in sorted(folder.glob("*.ipynb"))
        if pair.with_suffix(".py") not in sources
    ]
    if not (sources or failures):
        print(f"There is no notebook in {folder} yet.")
    for source in sources:
        start = time.monotonic()
        try:
            check_pair(source)
            execute(source)
        except NotebookError as error:
            failures.append(str(error))
        else:
            print(f"{source.name}: ok, {time.monotonic() - start:.0f} s", flush=True)
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
