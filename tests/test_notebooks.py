"""What `make notebooks` refuses; the notebooks themselves are not run here."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jupytext
import nbformat
import pytest

from experiments.notebooks import command_line, execute, main

ROOT = Path(__file__).parents[1]
SOURCE = """# %% [markdown]
# # Title

# %%
import os
assert os.listdir() == []
x = 6

# %%
open("result.txt", "w").write(str(7 * x))
"""


def write(folder, source, change=lambda notebook: None, name="one"):
    """Write a notebook and its pair; `change` edits the pair."""
    (folder / f"{name}.py").write_text(source)
    notebook = jupytext.reads(source, fmt="py:percent")
    notebook = nbformat.from_dict(notebook)
    change(notebook)
    nbformat.write(notebook, folder / f"{name}.ipynb")


def refusal(folder):
    with pytest.raises(SystemExit) as refused:
        main(folder)
    assert refused.value.code not in (None, 0)
    return str(refused.value)


def test_notebook_runs_in_an_empty_folder_and_leaves_nothing(tmp_path, capsys):
    write(tmp_path, SOURCE)
    main(tmp_path)
    assert capsys.readouterr().out.startswith("one.py: ok")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.ipynb", "one.py"]


def test_failing_cell_is_shown(tmp_path):
    write(tmp_path, SOURCE + "\n# %%\nx / 0\n")
    message = refusal(tmp_path)
    assert "one.py" in message
    assert "x / 0" in message
    assert "ZeroDivisionError" in message


def test_folder_without_notebooks_is_said_to_be_one(tmp_path, capsys):
    main(tmp_path)
    assert "no notebook" in capsys.readouterr().out


def leave_output(notebook):
    notebook.cells[-1].outputs = [nbformat.v4.new_output("stream", text="1")]


def leave_count(notebook):
    notebook.cells[-1].execution_count = 3


def change_source(notebook):
    notebook.cells[1].source += "\ny = 1"


def change_type(notebook):
    notebook.cells[0] = nbformat.v4.new_code_cell(notebook.cells[0].source)


@pytest.mark.parametrize("change", [leave_output, leave_count])
def test_pair_with_outputs_is_refused(tmp_path, change):
    write(tmp_path, SOURCE, change)
    assert "expected no outputs" in refusal(tmp_path)


@pytest.mark.parametrize("change", [change_source, change_type])
def test_pair_with_other_cells_is_refused(tmp_path, change):
    write(tmp_path, SOURCE, change)
    assert "cells differ from one.py" in refusal(tmp_path)


@pytest.mark.parametrize("missing", ["one.py", "one.ipynb"])
def test_notebook_without_its_other_half_is_refused(tmp_path, missing):
    write(tmp_path, SOURCE)
    (tmp_path / missing).unlink()
    message = refusal(tmp_path)
    assert "one.ipynb" in message
    assert "one.py" in message or "no .py" in message


PICTURE = b"\x89PNG, whatever it shows"
DRAWS = f"""
# %%
open("one.png", "wb").write({PICTURE!r})
open("notes.txt", "w").write("not a picture")
"""


def test_pictures_are_copied_to_a_folder_that_is_made(tmp_path, capsys):
    write(tmp_path, SOURCE + DRAWS)
    pictures = tmp_path / "made" / "here"
    command_line(["--pictures", str(pictures)], tmp_path)
    assert {p.name: p.read_bytes() for p in pictures.iterdir()} == {"one.png": PICTURE}
    assert capsys.readouterr().out.endswith("s, one.png\n")


def test_pictures_of_a_notebook_that_fails_are_not_copied(tmp_path):
    write(tmp_path, SOURCE + DRAWS + "\n# %%\nx / 0\n")
    with pytest.raises(SystemExit, match="ZeroDivisionError"):
        command_line(["--pictures", str(tmp_path / "pictures"), "one"], tmp_path)
    assert not list((tmp_path / "pictures").iterdir())


def test_names_choose_notebooks(tmp_path, capsys):
    write(tmp_path, SOURCE)
    write(tmp_path, SOURCE + "\n# %%\nx / 0\n", name="two")
    command_line(["one"], tmp_path)
    assert capsys.readouterr().out.startswith("one.py: ok")
    with pytest.raises(SystemExit, match="ZeroDivisionError"):
        command_line([], tmp_path)


def test_name_of_no_notebook_is_refused_before_anything_runs(tmp_path, capsys):
    write(tmp_path, SOURCE)
    with pytest.raises(SystemExit, match=r"which are one; got three, two$"):
        command_line(
            ["--pictures", str(tmp_path / "p"), "two", "one", "three"], tmp_path
        )
    assert not capsys.readouterr().out
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(("full", "seconds"), [("", 600), ("1", None)])
def test_cells_have_ten_minutes_but_for_the_full_size(
    tmp_path, monkeypatch, full, seconds
):
    given = []

    class Client:
        def __init__(self, notebook, *, timeout, **options):
            given.append(timeout)

        def execute(self):
            pass

    write(tmp_path, SOURCE)
    monkeypatch.setenv("FULL", full)
    monkeypatch.setattr("experiments.notebooks.nbclient.NotebookClient", Client)
    assert execute(tmp_path / "one.py") == []
    assert given == [seconds]


WAITS = """# %%
import pathlib, time
(pathlib.Path({folder!r}) / {name!r}).touch()
end = time.monotonic() + {seconds}
while not (pathlib.Path({folder!r}) / {other!r}).exists():
    assert time.monotonic() < end, "alone"
    time.sleep(0.01)
"""


def test_notebooks_run_beside_each_other_but_for_the_full_size(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("experiments.notebooks.os.cpu_count", lambda: 2)
    met = tmp_path / "met"
    for seconds, full in ((60, ""), (1, "1")):
        monkeypatch.setenv("FULL", full)
        shutil.rmtree(met, ignore_errors=True)
        met.mkdir()
        for name, other in (("one", "two"), ("two", "one")):
            words = {"folder": str(met), "seconds": seconds}
            write(tmp_path, WAITS.format(**words, name=name, other=other), name=name)
        if full:  # the second finds what the first has left
            with pytest.raises(SystemExit, match="alone"):
                main(tmp_path)
            assert capsys.readouterr().out.startswith("two.py: ok")
        else:
            main(tmp_path)
            told = sorted(capsys.readouterr().out.splitlines())
            assert [line[:10] for line in told] == ["one.py: ok", "two.py: ok"]


def test_ctrl_c_ends_all_and_leaves_no_kernel(tmp_path):
    note = tmp_path / "kernel"
    source = f"""# %%
import os, pathlib, time
pathlib.Path({str(note)!r}).write_text(str(os.getpid()))
time.sleep(300)
"""
    for name in ("one", "two"):  # of which the second waits
        write(tmp_path, source, name=name)
    # Where tests run in the background, SIGINT is ignored from the start.
    hearing = (
        "import pathlib, signal, sys; from experiments.notebooks import main\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "if __name__ == '__main__': main(pathlib.Path(sys.argv[1]))"
    )
    script = tmp_path / "hearing" / "run.py"
    script.parent.mkdir()
    script.write_text(hearing)
    command = [sys.executable, str(script), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FULL": "1"}
    process = subprocess.Popen(
        command, env=environment, start_new_session=True, stderr=subprocess.DEVNULL
    )
    try:
        within(60, lambda: note.exists() and note.read_text())
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(20) != 0
        within(20, lambda: gone(int(note.read_text())))
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def within(seconds, true):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def gone(pid):
    """Tell whether a process has ended; one that nobody waits for has, too."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_every_failure_is_told_in_the_order_of_the_names(tmp_path):
    for name in ("two", "three", "one"):
        write(tmp_path, f"# %%\nprint({name!r})\nx / 0\n", name=name)
    told = refusal(tmp_path)
    places = [told.index(f"{name}.py: ") for name in ("one", "three", "two")]
    assert places == sorted(places)
