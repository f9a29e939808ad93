"""The shipped experiments: each is sound, has its page, and a study that fits it."""

import dataclasses
import importlib
from pathlib import Path

import pytest

from experiments import configs
from experiments.book import Task


def test_names_are_those_of_the_files():
    folder = Path(configs.__file__).parent
    files = sorted(path.stem for path in folder.glob("*.py"))
    assert ["__init__", *configs.names()] == files
    assert "mnist5k_lenet300" in configs.names()


@pytest.mark.parametrize("load", [configs.load_config, configs.load_study])
@pytest.mark.parametrize("name", ["nothing", "", "__init__", "../config"])
def test_unknown_experiment_is_refused_with_the_known_ones(load, name):
    with pytest.raises(ValueError, match="config must be one of ") as raised:
        load(name)
    for known in (*configs.names(), repr(name)):
        assert known in str(raised.value)


@pytest.mark.parametrize("name", configs.names())
def test_config_is_of_the_data_and_the_model_in_its_name(name):
    config = configs.load_config(name)
    assert name == f"{config.dataset.removesuffix('2012')}_{config.model}"


@pytest.mark.parametrize("name", configs.names())
def test_config_has_a_page_in_the_lab_book(name):
    page = importlib.import_module(f"experiments.configs.{name}").__doc__
    first, _, rest = page.partition("\n\n")
    assert first.strip()
    assert configs.summary(name) == first.strip()
    assert "placeholder" not in rest
    # The command, and what it was worth.
    assert name in rest
    assert any(character.isdigit() for character in rest)


@pytest.mark.parametrize("name", configs.names())
def test_study_of_a_config_fits_it(name):
    config, study = configs.load_config(name), configs.load_study(name)
    assert config.validation > 0  # else there is nothing to choose by
    assert study.seeds >= 1
    assert study.targets
    assert all(0 < target < 1 for target in study.targets)
    tried = {"learning_rate": study.learning_rates, "pixels": study.pixels}
    # Without penalties, the targets are what is asked for.
    tried |= (
        {"penalty": study.penalties} if study.penalties else {"sparsity": study.targets}
    )
    for field, own in tried.items():
        assert len(own) == len(set(own))
        assert getattr(config, field) in own
        changed = [dataclasses.replace(config, **{field: value}) for value in own]
        # A key that rounds must still tell the runs apart.
        keys = {Task("validation", "scl", c, [0]).keys()[0] for c in changed}
        assert len(keys) == len(own)


@pytest.mark.parametrize("name", configs.names())
def test_seeds_that_choose_are_not_tested(name):
    config, study = configs.load_config(name), configs.load_study(name)
    tested = range(config.seed, config.seed + config.seeds)
    assert not set(tested) & set(range(1000, 1000 + study.seeds))
