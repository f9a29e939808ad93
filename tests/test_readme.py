"""The README: its code runs, its commands exist, its numbers come from the files."""

import json
import re
import tomllib
from pathlib import Path

import pytest

from experiments import configs, main, pareto, study
from experiments.book import RESULTS
from experiments.models import MODELS
from experiments.tables import (
    PAGE,
    between_markers,
    render,
    render_comparisons,
    render_costs,
    render_estimators,
    render_leads,
)

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text("utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def commands():
    lines = "\n".join(blocks("sh")).replace("\\\n", " ").splitlines()
    return [line.partition("#")[0].strip() for line in lines if line.strip()]


def test_python_blocks_run_one_after_the_other(capsys):
    names = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    out = capsys.readouterr().out
    for layer in ("layers_0/kernel", "layers_2/kernel"):
        assert layer in out
    assert "MACs remaining" in out
    assert names["plain_params"]["layers_0"]["kernel"].shape == (784, 300)


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([\w-]+)\s*:(?!=)", makefile, re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z][\w-]*)", "\n".join(commands())))
    named |= set(re.findall(r"`make ([a-z][\w-]*)", TEXT))
    assert {"train", "test"} <= named
    assert named <= targets


def test_experiments_named_in_commands_exist():
    named = re.findall(r"CONFIG=(\w+)", TEXT)
    named += re.findall(r"python -m experiments\.(?:main|study|pareto) (\w+)", TEXT)
    assert named
    assert set(named) <= set(configs.names())


def test_options_named_in_commands_exist(capsys):
    def options_of(program, *arguments):
        with pytest.raises(SystemExit):
            program.main([*arguments, "--help"])
        return set(re.findall(r"--([a-z][\w-]*)", capsys.readouterr().out))

    of_study = options_of(study)
    of_main = options_of(main, configs.names()[0])
    of_pareto = options_of(pareto)
    assert {"jobs"} <= of_study
    assert {"out", "epochs"} <= of_main
    named = 0
    for command in commands():
        known = of_study if "experiments.study" in command else of_main
        known = of_pareto if "experiments.pareto" in command else known
        options = set(re.findall(r"--([a-z][\w-]*)", command))
        assert options <= known, command
        named += len(options)
    assert named


def test_extras_named_in_commands_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = re.findall(r"pip install '\.\[(\w+)\]'", TEXT)
    assert named
    assert set(named) <= set(project["optional-dependencies"])


def test_linked_files_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        if "://" not in target:
            assert (ROOT / target).exists(), target


def test_results_in_readme_come_from_the_committed_files():
    assert render(RESULTS)
    assert between_markers(TEXT) == render(RESULTS)


def test_leads_in_readme_come_from_the_committed_files():
    assert between_markers(TEXT, "leads") == render_leads()


def test_comparisons_in_the_lab_book_come_from_the_committed_files():
    assert between_markers(PAGE.read_text(), "comparisons") == render_comparisons()


def test_costs_in_the_lab_book_come_from_the_committed_files():
    assert between_markers(PAGE.read_text(), "costs") == render_costs()


def test_estimators_in_the_lab_book_come_from_the_committed_files():
    assert between_markers(PAGE.read_text(), "estimators") == render_estimators()


def test_studies_that_are_finished_are_shown_and_no_others():
    books = {name: RESULTS / f"{name}.json" for name in configs.names()}
    shown = 0
    for name, path in books.items():
        finished = path.exists() and "summary" in json.loads(path.read_text())
        assert (f"`python -m experiments.study {name}`" in render(RESULTS)) == finished
        shown += finished
    assert shown >= 2


@pytest.mark.parametrize("name", ["fashion_mnist_lenet300", "mnist5k_lenet300"])
def test_study_that_is_not_finished_is_left_out(tmp_path, name):
    book = json.loads((RESULTS / f"{name}.json").read_text())
    assert book["runs"]
    book.pop("summary", None)
    (tmp_path / f"{name}.json").write_text(json.dumps(book))
    assert render(tmp_path) == ""


def test_text_without_markers_is_refused():
    assert between_markers("a <!-- results -->\n\nx\n\n<!-- /results --> b") == "x"
    for text in ("", "<!-- results -->", "<!-- /results -->"):
        with pytest.raises(ValueError, match="results"):
            between_markers(text)


def test_every_network_is_in_the_table_of_networks():
    table = TEXT.partition("## Networks and data")[2].partition("\n\nData:")[0]
    rows = [line for line in table.splitlines() if line.startswith("| `")][1:]
    named = re.findall(r"`(\w+)`", " ".join(line.split("|")[1] for line in rows))
    assert sorted(named) == sorted(MODELS)
