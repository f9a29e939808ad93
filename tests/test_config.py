"""Settings: what values a config may have, and that every shipped config is sound."""

import dataclasses
import importlib
import math
from pathlib import Path

import pytest

import scl_jax
from experiments import configs
from experiments.config import Config, parse_ste
from experiments.study import _key

# Written down again, so that a range that moves is noticed.
INTEGERS = {
    "validation": (0, 60_000),
    "epochs": (1, 100_000),
    "batch_size": (1, 100_000),
    "seed": (0, 2**31),
    "seeds": (1, 1001),
}
NUMBERS = {
    "momentum": (0, 1),
    "weight_decay": (0, 1),
    "penalty": (0, 1),
    "mask_momentum": (0, 1),
    "mask_initial": (-100, 100),
}
ABOVE = {"learning_rate": (0, 100), "mask_learning_rate": (0, 1000)}
OTHERS = {"freeze_at"}  # (0, 1], below

TINIEST, BELOW_ONE = math.ulp(0.0), math.nextafter(1.0, 0.0)


def make(**settings):
    return Config(**{"dataset": "mnist5k", "model": "lenet300", **settings})


def refused(field, value, bounds):
    """Check that a value is refused in words: the field, the range, the value."""
    with pytest.raises(ValueError, match=f"^{field} must be ") as raised:
        make(**{field: value})
    assert bounds in str(raised.value)
    assert repr(value) in str(raised.value)


def test_every_ranged_field_is_in_the_tables_above():
    ranged = {f.name for f in dataclasses.fields(Config) if "range" in f.metadata}
    assert ranged == {*INTEGERS, *NUMBERS, *ABOVE, *OTHERS}


@pytest.mark.parametrize("field", INTEGERS)
def test_integers_end_below_their_upper_bound(field):
    low, high = INTEGERS[field]
    step = 10 if field == "validation" else 1
    for value in (low, high - step):
        assert getattr(make(**{field: value}), field) == value
    for value in (low - 1, high, -1, 10 * high, math.nan, math.inf):
        refused(field, value, f"an integer in [{low}, {high})")


@pytest.mark.parametrize("field", INTEGERS)
@pytest.mark.parametrize("value", [5.0, "5", None, True, [5]])
def test_only_integers_are_integers(field, value):
    low, high = INTEGERS[field]
    refused(field, value, f"an integer in [{low}, {high})")


@pytest.mark.parametrize("field", NUMBERS)
def test_numbers_end_below_their_upper_bound(field):
    low, high = NUMBERS[field]
    for value in (low, float(low), math.nextafter(high, low)):
        assert getattr(make(**{field: value}), field) == value
    below = math.nextafter(low, -math.inf)
    for value in (below, high, 2.0 * high, math.nan, math.inf, -math.inf):
        refused(field, value, f"a number in [{low}, {high})")


@pytest.mark.parametrize("field", ABOVE)
def test_rates_begin_above_zero(field):
    low, high = ABOVE[field]
    for value in (TINIEST, 1, math.nextafter(high, low)):
        assert getattr(make(**{field: value}), field) == value
    for value in (0, 0.0, -TINIEST, high, math.nan, math.inf, -math.inf):
        refused(field, value, f"a number in ({low}, {high})")


@pytest.mark.parametrize("field", [*NUMBERS, *ABOVE, *OTHERS])
@pytest.mark.parametrize("value", ["0.5", None, True, (0.5,), 0.5j])
def test_only_numbers_are_numbers(field, value):
    refused(field, value, "a number in ")


def test_masks_can_be_frozen_at_the_very_end_and_the_message_says_so():
    for value in (TINIEST, 0.5, BELOW_ONE, 1, 1.0):
        assert make(freeze_at=value).freeze_at == value
    for value in (0, 0.0, -0.1, 1.001, 2.0, math.nan, math.inf):
        refused("freeze_at", value, "a number in (0, 1]")


def test_masks_cannot_be_frozen_after_the_end_by_a_hair():
    refused("freeze_at", math.nextafter(1.0, 2.0), "a number in (0, 1]")


def test_validation_takes_as_many_of_each_class():
    assert make(validation=50).validation == 50
    for value in (1, 55, 59_999):
        with pytest.raises(ValueError, match=f"validation .*multiple of 10.*{value}"):
            make(validation=value)


@pytest.mark.parametrize(
    ("field", "known"),
    [
        ("dataset", ("mnist5k", "mnist", "fashion_mnist")),
        ("model", ("lenet300", "lenet5")),
        ("pixels", ("unit", "standardized")),
        ("norm", ("rms", "l2", "max", "none")),
    ],
)
@pytest.mark.parametrize("value", ["nothing_known", None, 3])
def test_words_are_among_the_known_ones(field, known, value):
    for word in known:
        assert getattr(make(**{field: word}), field) == word
    with pytest.raises(ValueError, match=f"^{field} must be one of ") as raised:
        make(**{field: value})
    for word in (*known, repr(value)):
        assert word in str(raised.value)


def test_unknown_and_missing_fields_are_refused_by_name():
    with pytest.raises(TypeError, match="learning_rat'"):
        make(learning_rat=0.1)
    with pytest.raises(TypeError, match="'model'"):
        Config(dataset="mnist5k")


def test_a_config_cannot_be_changed_and_a_changed_copy_is_checked():
    config = make()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.epochs = 3
    with pytest.raises(ValueError, match="epochs must be"):
        dataclasses.replace(config, epochs=0)


# The straight-through estimator


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("identity", scl_jax.identity),
        ("leaky_relu", scl_jax.LeakyReLU()),
        ("leaky_relu(0.25)", scl_jax.LeakyReLU(0.25)),
        ("leaky_relu( 1e-2 )", scl_jax.LeakyReLU(0.01)),
        ("softplus", scl_jax.Softplus()),
        ("softplus(4)", scl_jax.Softplus(4.0)),
        ("relu", scl_jax.ReLU()),
        ("clipped", scl_jax.Clipped()),
    ],
)
def test_estimator_is_the_one_that_the_text_names(text, expected):
    assert parse_ste(text) == expected
    assert make(ste=text).ste == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Identity",
        " identity",
        "identity\n",
        "leaky_relu(0.1",
        "leaky_relu)",
        "leaky_relu(0.1)(0.2)",
        "leaky_relu(0.1) ",
        "scl_jax.identity",
        "gelu",
    ],
)
def test_unknown_estimator_is_refused_with_the_known_ones(text):
    with pytest.raises(ValueError, match=r"^ste must be one of identity, ") as raised:
        make(ste=text)
    for word in ("leaky_relu", "softplus", "relu", "clipped", repr(text)):
        assert word in str(raised.value)


@pytest.mark.parametrize(
    "text",
    [
        "leaky_relu(0)",
        "leaky_relu(-1)",
        "leaky_relu(nan)",
        "leaky_relu(inf)",
        "leaky_relu(x)",
        "leaky_relu(0.1, 0.2)",
        "softplus(0)",
        "softplus(-2)",
        "softplus(nan)",
    ],
)
def test_estimator_with_a_wrong_parameter_is_refused(text):
    with pytest.raises(ValueError, match=r"^ste ") as raised:
        make(ste=text)
    assert repr(text) in str(raised.value)


@pytest.mark.parametrize("text", ["identity(0.1)", "relu(1)"])
def test_estimator_without_a_parameter_is_refused_one_in_words(text):
    with pytest.raises(ValueError, match=r"^ste ") as raised:
        make(ste=text)
    # What Python says of a lambda is not what a user has to know.
    for ours in ("lambda", "__init__", "positional"):
        assert ours not in str(raised.value)


@pytest.mark.parametrize("value", [None, 5, scl_jax.identity])
def test_estimator_that_is_no_text_is_refused_by_name(value):
    with pytest.raises(ValueError, match=r"^ste must be"):
        make(ste=value)


# The shipped experiments


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
    assert name == f"{config.dataset}_{config.model}"


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
    for field, own in (
        ("penalty", study.penalties),
        ("learning_rate", study.learning_rates),
        ("pixels", study.pixels),
    ):
        assert len(own) == len(set(own))
        assert getattr(config, field) in own
        changed = [dataclasses.replace(config, **{field: value}) for value in own]
        # A key that rounds must still tell the runs apart.
        assert len({_key("validation", "scl", c, 0) for c in changed}) == len(own)


@pytest.mark.parametrize("name", configs.names())
def test_seeds_that_choose_are_not_tested(name):
    config, study = configs.load_config(name), configs.load_study(name)
    tested = range(config.seed, config.seed + config.seeds)
    assert not set(tested) & set(range(1000, 1000 + study.seeds))
