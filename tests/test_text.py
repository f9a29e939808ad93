"""The text: what the classes are, and how it is cut."""

import builtins
import hashlib
import os
import string
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments import text
from experiments.idx import DataError

KNOWN = "\n" + "".join(c for c in map(chr, range(128)) if c.isprintable())


# Characters


def test_vocabulary_is_newline_printable_ascii_and_one_other():
    assert text.VOCABULARY[:-1] == KNOWN
    assert len(set(text.VOCABULARY)) == len(text.VOCABULARY) == 97
    assert set(string.printable) - set("\t\r\v\f") < set(text.VOCABULARY)
    assert not text.VOCABULARY[-1].isascii()


@given(st.text(alphabet=KNOWN))
def test_known_characters_come_back(written):
    tokens = text.encode(written)
    assert tokens.dtype == np.uint8
    assert tokens.shape == (len(written),)
    assert text.decode(tokens) == written


@given(st.text())
def test_every_other_character_comes_back_as_the_one_that_stands_for_them(written):
    expected = "".join(c if c in KNOWN else text.OTHER for c in written)
    assert text.decode(text.encode(written)) == expected


@given(st.lists(st.integers(0, 96)))
def test_tokens_come_back(tokens):
    assert text.encode(text.decode(tokens)).tolist() == tokens


@pytest.mark.parametrize("token", [97, -1, 255])
def test_token_that_stands_for_nothing_is_refused(token):
    with pytest.raises(ValueError, match=f"from 0 to 96, not {token}"):
        text.decode([3, token])


# The text


def test_reference_holds_each_paragraph_of_the_topics_once_and_in_order():
    from pydoc_data.topics import topics

    expected = []
    for name in sorted(topics):
        for paragraph in topics[name].removesuffix("\n").split("\n\n"):
            if paragraph not in expected:
                expected.append(paragraph)
    assert text.reference().removesuffix("\n").split("\n\n") == expected


def test_topics_are_sorted_and_what_repeats_is_left_out(monkeypatch):
    topics = {"b": "Two\n\nTwice\n\n three\n", "a": "One\n\nTwice\n"}
    monkeypatch.setattr("pydoc_data.topics.topics", topics)
    assert text.reference() == "One\n\nTwice\n\nTwo\n\n three\n"


def test_text_is_large_and_nearly_all_of_it_is_known():
    tokens = text.encode(text.reference())
    assert 300_000 < len(tokens) < 1_000_000
    assert np.mean(tokens == 96) < 0.005


def test_little_of_the_test_part_can_be_copied_from_what_is_before_it():
    whole = text.reference()
    cut = len(whole) * 9 // 10
    before = {whole[i : i + 64] for i in range(cut - 64)}
    places = range(cut, len(whole) - 64)
    assert np.mean([whole[i : i + 64] in before for i in places]) < 0.01


def test_digest_is_that_of_the_text_in_every_process():
    expected = hashlib.sha256(text.reference().encode()).hexdigest()
    script = "from experiments import text; print(text.digest())"
    run = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
    )
    assert (run.stdout.strip(), run.stderr) == (expected, "")


def test_python_without_the_text_is_reported_with_the_package(monkeypatch):
    original = builtins.__import__

    def blocked(module, *args, **kwargs):
        if module == "pydoc_data.topics":
            raise ModuleNotFoundError(f"No module named {module!r}")
        return original(module, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", blocked)
    with pytest.raises(DataError, match=r"pydoc_data.*libpython3-stdlib") as raised:
        text.load_splits(128, 0)
    assert "\n" not in str(raised.value)


# Windows


@given(st.lists(st.integers(0, 96), min_size=1, max_size=60), st.integers(1, 9))
def test_windows_reconstruct_the_text(tokens, context):
    given_tokens = np.array(tokens, np.uint8)
    inputs, labels = text.windows(given_tokens, context)
    assert (inputs.dtype, labels.dtype) == (np.uint8, np.int32)
    assert inputs.shape == labels.shape
    assert inputs.shape[1:] == (context,)
    used = inputs.size
    assert len(tokens) - 1 - context < used <= len(tokens) - 1
    assert inputs.ravel().tolist() == tokens[:used]
    assert labels.ravel().tolist() == tokens[1 : used + 1]


def test_last_label_of_a_window_is_the_first_input_of_the_next():
    inputs, labels = text.windows(text.encode("abcdefghij"), 3)
    assert [text.decode(row) for row in inputs] == ["abc", "def", "ghi"]
    assert [text.decode(row) for row in labels] == ["bcd", "efg", "hij"]


# Splits


@pytest.mark.parametrize(("context", "validation"), [(128, 200), (31, 0), (1000, 7)])
def test_splits_are_the_text_in_order(context, validation):
    training, held_out, test = text.load_splits(context, validation)
    written = text.reference()
    count = (len(written) - 1) // context
    sizes = [len(split[0]) for split in (training, held_out, test)]
    assert sizes == [count - count // 10 - validation, validation, count // 10]
    place = 0
    for inputs, labels in (training, held_out, test):
        assert (inputs.dtype, labels.dtype) == (np.uint8, np.int32)
        assert inputs.shape == labels.shape == (len(inputs), context)
        for tokens, shift in ((inputs, 0), (labels, 1)):
            part = written[place + shift : place + shift + tokens.size]
            np.testing.assert_array_equal(tokens.ravel(), text.encode(part))
        place += inputs.size
    assert len(written) - 1 - context < place <= len(written) - 1


@pytest.fixture
def short_text(monkeypatch):
    """Make the text 101 characters long: ten windows of ten."""
    monkeypatch.setattr(text, "reference", lambda: "0123456789" * 10 + "!")


def test_largest_validation_leaves_one_window_to_train_on(short_text):
    sizes = [len(inputs) for inputs, _ in text.load_splits(10, 8)]
    assert sizes == [1, 8, 1]


@pytest.mark.parametrize("validation", [-1, 9, 100])
def test_validation_that_does_not_fit_is_refused(short_text, validation):
    with pytest.raises(
        ValueError, match=f"from 0 to 8, .* windows of 10 .*not {validation}$"
    ):
        text.load_splits(10, validation)


@pytest.mark.parametrize("context", [-3, 0, 11, 101])
def test_context_that_leaves_no_test_window_is_refused(short_text, context):
    with pytest.raises(
        ValueError, match=f"context must be from 1 to 10.*not {context}$"
    ):
        text.load_splits(context, 0)


@pytest.mark.parametrize(("context", "validation"), [(10.0, 0), (10, 2.0)])
def test_counts_that_are_no_integers_are_refused(short_text, context, validation):
    with pytest.raises(TypeError, match="float"):
        text.load_splits(context, validation)
