"""Settings: what values a config may have, alone and together."""

import dataclasses
import math

import pytest

import scl_jax
from experiments.config import Config, identity, parse_ste
from experiments.data import ABOUT
from experiments.models import MODELS

# Written down again, so that a range that moves is noticed.
INTEGERS = {
    "validation": (0, 1_000_000),
    "epochs": (1, 100_000),
    "batch_size": (1, 100_000),
    "minimum_connections": (0, 2**31),
    "devices": (0, 100_000),
    "model_parallel": (1, 100_000),
    "look_every": (0, 2**31),
    "prune_every": (1, 1_000_000),
    "seed": (0, 2**31),
    "seeds": (1, 1001),
}
NUMBERS = {
    "momentum": (0, 1),
    "weight_decay": (0, 1),
    "label_smoothing": (0, 1),
    "sparsity": (0, 1),
    "penalty": (0, 1),
    "mask_momentum": (0, 1),
    "norm_decay": (0, 1),
    "mask_initial": (-100, 100),
    "warmup_epochs": (0, 1000),
    "checkpoint_every": (0, 1e6),
}
ABOVE = {
    "learning_rate": (0, 100),
    "mask_learning_rate": (0, 1000),
    "drop_fraction": (0, 1),
}
PARTS = ("freeze_at", "schedule_end")  # of the training: (0, 1], below
OTHERS = {*PARTS, "schedule_begin", "image_size", "pruned_gradient"}  # below

TINIEST, BELOW_ONE = math.ulp(0.0), math.nextafter(1.0, 0.0)


def make(**settings):
    """Return a config; many epochs, so that there can be as many to warm up."""
    some = {"dataset": "mnist5k", "model": "lenet300", "epochs": 5000}
    return Config(**{**some, **settings})


def refused(field, value, bounds):
    """Check that a value is refused in words: the field, the range, the value."""
    with pytest.raises(ValueError, match=f"^{field} must be ") as raised:
        make(**{field: value})
    assert bounds in str(raised.value)
    assert repr(value) in str(raised.value)


def test_every_ranged_field_is_in_the_tables_above():
    ranged = {f.name for f in dataclasses.fields(Config) if "range" in f.metadata}
    assert ranged == {*INTEGERS, *NUMBERS, *ABOVE, *OTHERS}


def test_pruned_weights_may_get_all_of_their_gradient_or_none():
    for value in (0, 0.0, TINIEST, 0.5, BELOW_ONE, 1, 1.0):
        assert make(pruned_gradient=value).pruned_gradient == value
    for value in (-TINIEST, math.nextafter(1.0, 2.0), math.nan, "0.1"):
        refused("pruned_gradient", value, "a number in [0, 1]")


@pytest.mark.parametrize("field", INTEGERS)
def test_integers_end_below_their_upper_bound(field):
    low, high = INTEGERS[field]
    for value in (low, high - 1):
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
    for value in (TINIEST, 0.5, math.nextafter(high, low)):
        assert getattr(make(**{field: value}), field) == value
    for value in (0, 0.0, -TINIEST, high, math.nan, math.inf, -math.inf):
        refused(field, value, f"a number in ({low}, {high})")


@pytest.mark.parametrize("field", [*NUMBERS, *ABOVE, *PARTS])
@pytest.mark.parametrize("value", ["0.5", None, True, (0.5,), 0.5j])
def test_only_numbers_are_numbers(field, value):
    refused(field, value, "a number in ")


@pytest.mark.parametrize("field", PARTS)
def test_parts_of_the_training_end_at_its_very_end_and_the_message_says_so(field):
    for value in (TINIEST, 0.5, BELOW_ONE, 1, 1.0):
        assert getattr(make(**{field: value}), field) == value
    for value in (0, 0.0, -0.1, 1.001, 2.0, math.nan, math.inf):
        refused(field, value, "a number in (0, 1]")


@pytest.mark.parametrize("field", PARTS)
def test_parts_of_the_training_do_not_end_after_it_by_a_hair(field):
    refused(field, math.nextafter(1.0, 2.0), "a number in (0, 1]")


def test_side_of_the_images_of_imagenet_may_be_any_up_to_a_limit():
    for value in (0, 1, 4096):
        config = make(dataset="imagenet2012", image_size=value)
        assert config.image_size == value
    for value in (-1, 4097, 64.0, True):
        refused("image_size", value, "an integer in [0, 4096]")


@pytest.mark.parametrize(
    ("field", "known"),
    [
        ("pixels", ("unit", "standardized")),
        ("augment", ("none", "crop_flip")),
        ("optimizer", ("sgd", "adamw")),
        ("costs", ("connections", "macs")),
        ("schedule", ("cubic", "linear", "constant")),
        ("norm", ("rms", "l2", "max", "none")),
        ("mask_dtype", ("float32", "bfloat16")),
        ("compute", ("float32", "bfloat16")),
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


@pytest.mark.parametrize(("field", "known"), [("dataset", ABOUT), ("model", MODELS)])
@pytest.mark.parametrize("value", ["nothing_known", "", None, 3])
def test_data_set_and_model_are_among_those_there_are(field, known, value):
    assert len(known) >= 7
    with pytest.raises(ValueError, match=f"^{field} must be one of ") as raised:
        make(**{field: value})
    for word in (*known, repr(value)):
        assert word in str(raised.value)


# Settings that contradict each other


@pytest.mark.parametrize("dataset", ABOUT)
@pytest.mark.parametrize("model", MODELS)
def test_text_is_read_by_the_language_model_and_images_by_the_others(dataset, model):
    if (dataset == "python_docs") == (model == "language_model"):
        config = make(dataset=dataset, model=model)
        assert (config.dataset, config.model) == (dataset, model)
    else:
        with pytest.raises(ValueError, match=f"^model .*{dataset} is .*, got {model}"):
            make(dataset=dataset, model=model)


@pytest.mark.parametrize("dataset", ["mnist5k", "cifar10"])
def test_side_of_images_that_have_their_own_is_refused(dataset):
    with pytest.raises(ValueError, match=f"^image_size .*got 64 for {dataset}"):
        make(dataset=dataset, image_size=64)


@pytest.mark.parametrize(
    ("dataset", "model"),
    [("imagenet2012", "resnet50"), ("python_docs", "language_model")],
)
def test_augmentation_that_would_do_nothing_or_harm_is_refused(dataset, model):
    assert make(dataset="cifar100", augment="crop_flip").augment == "crop_flip"
    with pytest.raises(ValueError, match=f"^augment .*'crop_flip' for {dataset}"):
        make(dataset=dataset, model=model, augment="crop_flip")


def test_warm_up_ends_before_the_training():
    assert make(epochs=3, warmup_epochs=2.5).warmup_epochs == 2.5
    for value in (3, 3.0, 4):
        with pytest.raises(ValueError, match=r"^warmup_epochs must be less than .*3"):
            make(epochs=3, warmup_epochs=value)


@pytest.mark.parametrize(("end", "freeze"), [(0.8, 0.75), (1.0, 0.75), (0.375, 0.3)])
def test_sparsity_that_is_due_after_the_masks_rest_is_refused(end, freeze):
    with pytest.raises(ValueError, match=r"^schedule_end must be at most") as raised:
        make(sparsity=0.9, schedule_end=end, freeze_at=freeze)
    assert f"freeze_at, {freeze}," in str(raised.value)
    assert str(raised.value).endswith(f"got {end}")
    # Nothing is due where the penalty is fixed.
    assert make(schedule_end=end, freeze_at=freeze).schedule_end == end
    # At the moment at which they rest it is not too late.
    assert make(sparsity=0.9, schedule_end=freeze, freeze_at=freeze).sparsity == 0.9


# What a training is known by


def test_identity_leaves_out_what_changes_no_training_and_nothing_else():
    fields = {field.name for field in dataclasses.fields(Config)}
    free = {"seed", "seeds"}
    free |= {"devices", "model_parallel", "look_every", "checkpoint_every"}
    config = make(penalty=3e-6)
    assert identity(config) == {x: getattr(config, x) for x in fields - free}
    other = dict.fromkeys(free, 2)
    assert identity(make(penalty=3e-6, **other)) == identity(config)
    assert identity(make(penalty=4e-6)) != identity(config)


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


@pytest.mark.parametrize("begin", [-0.1, 1.0, math.nan])
def test_schedule_begins_within_the_training(begin):
    refused("schedule_begin", begin, "a number in [0, 1)")


def test_schedule_begins_before_it_ends():
    assert make(schedule_begin=0.5, schedule_end=0.6).schedule_begin == 0.5
    with pytest.raises(ValueError, match=r"schedule_begin must be less .* got 0.6$"):
        make(schedule_begin=0.6, schedule_end=0.6)
