"""Read prepared TFDS image sets into arrays, and check what was read."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from experiments import tfds_cifar, tfds_idx
from experiments.idx import DataError
from experiments.tfds_prepare import prepare

BUILDERS = {**tfds_idx.BUILDERS, **tfds_cifar.BUILDERS}
Arrays = tuple[np.ndarray, np.ndarray]  # images uint8 (N, H, W, C); labels int32 (N,)


def read(
    name: str,
    data_dir: str | None,
    shape: tuple[int, ...],
    classes: int,
    train_size: int,
    test_size: int,
    smallest_class: int,
) -> tuple[Arrays, Arrays]:
    """Read a data set, which is prepared when absent.

    Args:
        name: TFDS's name.
        data_dir: Folder of prepared data sets; None for TFDS's default.
        shape: Of one image, (H, W, C).
        classes: Number of classes.
        train_size: Number of training examples.
        test_size: Number of test examples.
        smallest_class: Number of training examples of the rarest class.

    Returns:
        The training and the test arrays.

    Raises:
        DataError: The data is absent, damaged, or not what the arguments say.
    """
    folder = prepare(BUILDERS[name], data_dir)
    train = _read_split(folder, name, "train", shape, classes, train_size)
    test = _read_split(folder, name, "test", shape, classes, test_size)
    smallest = np.bincount(train[1], minlength=classes).min()
    if smallest != smallest_class:
        raise _damaged(
            folder, f"{smallest_class} examples in the smallest class", str(smallest)
        )
    return train, test


def _read_split(
    folder: Path, name: str, split: str, shape: tuple[int, ...], classes: int, size: int
) -> Arrays:
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
    # What a damaged folder raises, from protobuf's ParseError to PIL's errors, depends
    # on what is damaged.
    except Exception as error:
        raise _damaged(
            folder, f"a readable {split} split", " ".join(str(error).split())
        ) from error
    if len(records) != size:
        raise _damaged(folder, f"{size} {split} examples", str(len(records)))
    # PIL gives images of one channel without an axis for it.
    plain = shape[:2] if shape[2] == 1 else shape
    others = {(i.shape, i.dtype.name) for i in images} - {(plain, "uint8")}
    if others:
        raise _damaged(folder, f"{split} images of shape {plain}, uint8", str(others))
    if labels.min() < 0 or labels.max() >= classes:
        raise _damaged(
            folder,
            f"{split} labels 0..{classes - 1}",
            f"{labels.min()}..{labels.max()}",
        )
    return np.stack(images).reshape(-1, *shape), labels


def _damaged(folder: Path, expected: str, came: str) -> DataError:
    return DataError(
        f"{folder}: expected {expected} in this prepared data set, but got: {came}. "
        "Remove the folder, and the next start prepares it again; or give another "
        "data_dir, where the folder holds another file format than array_record."
    )
