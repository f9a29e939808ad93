"""The Makefile: when .venv is made, added to, made anew, and left alone.

A stand-in for Python writes down what it is asked to install; the keys that decide are
computed by the real one.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).parents[1] / "Makefile"
EVERYTHING = "pip .[experiments,notebooks,test,dev]"
pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="needs make")

# Answers -c as Python does (as another Python, if VERSION is set); logs the rest.
STAND_IN = """#!/bin/sh
case "$1 $2" in
  "-c "*) exec {python} -c "import sys; sys.version += '{version}'; $2" ;;
  "-m venv") echo venv >> log; test "$3" = --clear && rm -rf .venv; mkdir -p .venv/bin
             cp "$0" .venv/bin/python ;;
  "-m pip") for last; do :; done; echo "pip $last" >> log; test ! -e offline ;;
  *) echo "$2" >> log ;;
esac
"""


# Set when `make test` runs these tests; the calls here must not see them.
OURS = ("MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MFLAGS", "ARGS", "CONFIG", "PYTHON")


class Checkout:
    """A folder with the Makefile, a pyproject.toml and two stand-ins for Python."""

    def __init__(self, folder):
        self.folder = folder
        shutil.copy(MAKEFILE, folder)
        (folder / "pyproject.toml").write_text("[project]\n")
        for name, version in (("python-a", "a"), ("python-b", "b")):
            script = STAND_IN.format(python=sys.executable, version=version)
            (folder / name).write_text(script)
            (folder / name).chmod(0o755)

    def make(self, *arguments, python="./python-a"):
        """Return the exit code, what was done, and what was said."""
        (self.folder / "log").write_text("")
        run = subprocess.run(
            ["make", *arguments, f"PYTHON={python}"],
            cwd=self.folder,
            env={name: x for name, x in os.environ.items() if name not in OURS},
            capture_output=True,
            text=True,
        )
        log = (self.folder / "log").read_text().splitlines()
        return run.returncode, log, run.stdout + run.stderr


@pytest.fixture
def checkout(tmp_path):
    folder = tmp_path / "a folder"
    folder.mkdir()
    return Checkout(folder)


def done(answer):
    code, log, said = answer
    assert code == 0, said
    return log


def test_first_call_makes_the_environment_and_second_leaves_it_alone(checkout):
    assert done(checkout.make("train")) == [
        "venv",
        "pip .[experiments]",
        "experiments.main",
    ]
    assert done(checkout.make("train")) == ["experiments.main"]


def test_sets_of_extras_add_up(checkout):
    done(checkout.make("train"))
    assert done(checkout.make("lint")) == [EVERYTHING, "ruff", "ruff", "pyright"]
    assert done(checkout.make("train")) == ["experiments.main"]
    assert done(checkout.make("test")) == ["ruff", "ruff", "pyright", "pytest"]


def test_changed_project_is_installed_again_and_touched_one_is_not(checkout):
    pyproject = checkout.folder / "pyproject.toml"
    done(checkout.make("notebooks"))
    pyproject.touch()
    assert done(checkout.make("notebooks")) == ["experiments.notebooks"]
    pyproject.write_text("[project]\nversion = '2'\n")
    assert done(checkout.make("bench")) == ["pip .[experiments]", "experiments.bench"]
    assert done(checkout.make("notebooks")) == [EVERYTHING, "experiments.notebooks"]


def test_another_interpreter_makes_the_environment_anew(checkout):
    done(checkout.make("bench"))
    left = checkout.folder / ".venv" / "left-behind"
    left.touch()
    log = ["venv", "pip .[experiments]", "experiments.bench"]
    assert done(checkout.make("bench", python="./python-b")) == log
    assert not left.exists()
    assert done(checkout.make("bench", python="./python-a")) == log


def test_copied_checkout_makes_its_own_environment(checkout):
    done(checkout.make("bench"))
    copy = Checkout(shutil.copytree(checkout.folder, checkout.folder.parent / "copy"))
    assert done(copy.make("bench")) == [
        "venv",
        "pip .[experiments]",
        "experiments.bench",
    ]


def test_failed_installation_is_repeated(checkout):
    offline = checkout.folder / "offline"
    done(checkout.make("train"))
    offline.touch()
    for _ in range(2):
        code, log, _ = checkout.make("lint")
        assert (code, log) == (2, [EVERYTHING])
    offline.unlink()
    # It may have left anything half done, so that no set counts as installed.
    assert done(checkout.make("train")) == ["pip .[experiments]", "experiments.main"]


@pytest.mark.parametrize("python", ["no-such-python", "./python-2", "./python-3.10"])
def test_missing_or_old_python_is_one_line_of_error(checkout, python):
    old = "#!/bin/sh\nexec {} -c 'import sys; sys.version_info = (3, 10); '\"$2\"\n"
    for name, text in (
        ("python-2", "#!/bin/sh\necho SyntaxError >&2; exit 1\n"),
        ("python-3.10", old.format(sys.executable)),
    ):
        (checkout.folder / name).write_text(text)
        (checkout.folder / name).chmod(0o755)
    code, log, said = checkout.make("train", python=python)
    assert (code, log) == (2, [])
    first, second = said.splitlines()
    assert first.startswith(f"{python}: expected Python >= 3.11")
    assert second.startswith("make: ***")
    assert not (checkout.folder / ".venv").exists()


def test_help_is_the_default_and_names_every_target(checkout):
    _, log, said = checkout.make()
    assert log == []
    phony = next(
        line for line in MAKEFILE.read_text().splitlines() if ".PHONY" in line
    ).split()[2:]
    assert phony == [line.split()[1] for line in said.splitlines() if "make " in line]
