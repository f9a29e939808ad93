"""The book is of one config: what may differ from it, and what is refused."""

import dataclasses
import json
import shutil

import pytest
from tiny_book import BUDGET, CONFIG, YOUNG, opened, path_in, read

from experiments import configs
from experiments.book import RESULTS
from experiments.config import Config


@pytest.fixture
def path(tmp_path):
    return path_in(tmp_path)


def test_settings_are_noted(path):
    opened(path)
    assert Config(**read(path)["config"]) == CONFIG


@pytest.mark.parametrize(
    "change",
    [
        *({"epochs": 5}, {"mask_dtype": "bfloat16"}, {"augment": "crop_flip"}),
        *({"schedule": "linear"}, {"schedule_end": 0.5}),
    ],
)
def test_book_with_a_different_field_is_refused_and_untouched(path, change):
    opened(path)
    before = path.read_bytes()
    (name,) = change
    with pytest.raises(ValueError, match=f"another {name};"):
        opened(path, dataclasses.replace(CONFIG, **change))
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "change",
    [
        {"penalty": 0.5, "learning_rate": 0.2, "pixels": "unit"},  # parts of the keys
        BUDGET,
        {"seed": 7, "seeds": 9, "devices": 1, "checkpoint_every": 0.0},
    ],
)
def test_book_may_differ_in_what_the_keys_say_and_in_what_changes_no_run(path, change):
    opened(path)
    opened(path, dataclasses.replace(CONFIG, **change))


def test_field_that_is_younger_than_the_book_counts_as_its_default(path):
    opened(path)
    content = read(path)
    for name in YOUNG:
        del content["config"][name]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="another optimizer;"):
        opened(path, dataclasses.replace(CONFIG, optimizer="adamw"))
    opened(path)
    assert read(path)["config"]["optimizer"] == "sgd"


def finished():
    """Return the names of the committed studies that are finished."""
    names = [name for name in configs.names() if (RESULTS / f"{name}.json").exists()]
    return [name for name in names if "summary" in read(RESULTS / f"{name}.json")]


@pytest.mark.parametrize("name", finished())
def test_committed_study_is_accepted_as_it_is(path, name):
    shutil.copy(RESULTS / f"{name}.json", path)
    before = read(path)
    opened(path, configs.load_config(name))
    after = read(path)
    for entry in ("runs", "summary", "versions", "study"):
        assert after[entry] == before[entry]
