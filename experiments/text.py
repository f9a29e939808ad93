"""Text that every Python carries, as characters to train a language model on.

It is the Python language reference, which the standard library keeps for `help()`.
It differs between versions of Python: record its `digest`.
"""

import hashlib
import operator
from collections.abc import Iterable

import numpy as np

from experiments.idx import DataError

# Newline, the printable ASCII characters, and one entry for every other character:
# the same 97 classes with every version of Python.
OTHER = "\N{REPLACEMENT CHARACTER}"
VOCABULARY = "\n" + "".join(map(chr, range(ord(" "), ord("~") + 1))) + OTHER

_TOKENS = {character: token for token, character in enumerate(VOCABULARY)}

Windows = tuple[np.ndarray, np.ndarray]  # inputs uint8 and labels int32, (N, context)


def encode(text: str) -> np.ndarray:
    r"""Return the places of characters in VOCABULARY, uint8, (len(text),).

    Example:
        >>> encode("no\tß")
        array([79, 80, 96, 96], dtype=uint8)
    """
    other = _TOKENS[OTHER]
    return np.fromiter((_TOKENS.get(c, other) for c in text), np.uint8, len(text))


def decode(tokens: Iterable[int]) -> str:
    """Return the characters at these places of VOCABULARY.

    Raises:
        ValueError: A token is not from 0 to 96.

    Example:
        >>> decode([79, 80, 96])
        'no�'
    """
    places = [operator.index(token) for token in tokens]
    wrong = [place for place in places if not 0 <= place < len(VOCABULARY)]
    if wrong:
        raise ValueError(
            f"decode: tokens must be from 0 to {len(VOCABULARY) - 1}, not {wrong[0]}"
        )
    return "".join(VOCABULARY[place] for place in places)


def reference() -> str:
    """Return the language reference, its topics in alphabetical order.

    A paragraph that several topics have in common stands where it comes first, and
    only there. In Python 3.11.7, 0.2 % of the 64-character strings in the last tenth
    occur before it; with the repetitions it would be 8.4 %.

    Raises:
        DataError: This Python lacks the module that holds it.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError(
            "text: expected the module pydoc_data of the standard library, which "
            f"carries the text, but importing it failed ({error}). Use a complete "
            "Python: on Debian and its derivatives, `apt-get install "
            "libpython3-stdlib` completes the system's."
        ) from error
    whole = "\n".join(topics[name] for name in sorted(topics))
    return "\n\n".join(dict.fromkeys(whole.split("\n\n")))


def digest() -> str:
    """Return the sha256 of the text as UTF-8, in hexadecimal."""
    return hashlib.sha256(reference().encode()).hexdigest()


def windows(tokens: np.ndarray, context: int) -> Windows:
    """Cut tokens into windows, and label each token with the one behind it.

    Windows follow each other without overlap: the last label of one is the first input
    of the next. What is left at the end, less than a window, is dropped.

    Args:
        tokens: Integers, (M,), at least one.
        context: Tokens a window, at least 1.

    Returns:
        Inputs of the tokens' dtype and labels int32, both (N, context).

    Example:
        >>> windows(encode("  !!"), 1)[1]
        array([[1],
               [2],
               [2]], dtype=int32)
    """
    count = (len(tokens) - 1) // context
    end = count * context
    inputs, labels = tokens[:end], tokens[1 : end + 1].astype(np.int32)
    return inputs.reshape(count, context), labels.reshape(count, context)


def load_splits(context: int, validation: int) -> tuple[Windows, Windows, Windows]:
    """Load the text, split by place: what is tested comes behind what is trained on.

    Args:
        context: Characters a window.
        validation: Number of windows to validate on; 0 for none.

    Returns:
        Training, validation and test windows: inputs uint8 and labels int32, both
        (N, context), in text order and without overlap. The test windows are the last
        tenth, rounded down; the validation windows those directly before.

    Raises:
        ValueError: The context is not such that a window is left to test on, or the
            validation windows are negative or leave none to train on.
        DataError: This Python lacks the text.

    Example:
        >>> training, validation, test = load_splits(128, 200)
        >>> validation[0].shape, validation[0].dtype, validation[1].dtype
        ((200, 128), dtype('uint8'), dtype('int32'))
    """
    tokens = encode(reference())
    longest = (len(tokens) - 1) // 10
    if not 1 <= operator.index(context) <= longest:
        raise ValueError(
            f"load_splits: context must be from 1 to {longest}, a tenth of the text, "
            f"not {context}"
        )
    inputs, labels = windows(tokens, context)
    rest = len(inputs) - len(inputs) // 10
    if not 0 <= operator.index(validation) < rest:
        raise ValueError(
            f"load_splits: validation must be from 0 to {rest - 1}, one less than the "
            f"windows of {context} characters before the test windows, not {validation}"
        )
    training, held_out, test = (
        (inputs[part], labels[part])
        for part in (
            slice(rest - validation),
            slice(rest - validation, rest),
            slice(rest, None),
        )
    )
    return training, held_out, test
