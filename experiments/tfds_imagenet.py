"""The records of TFDS's prepared ImageNet, by index, without TensorFlow."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import tensorflow_datasets as tfds
from tensorflow_datasets.core import constants
from tensorflow_datasets.core.utils import version

from experiments.data import ABOUT
from experiments.idx import DataError

NAME = "imagenet2012"


class Record(NamedTuple):
    """An example as it is stored."""

    jpeg: bytes
    label: int  # 0..999
    place: str  # where it is stored, for messages


class Records:
    """The examples of one split of TFDS's prepared `imagenet2012`, by index."""

    def __init__(self, split: str, data_dir: str | None):
        self._folder = _folder(data_dir)
        self._split = split
        with reported(f"{self._folder}, split {split}", "a data set in array_record"):
            # From the folder, whatever its version: the stock builder needs TensorFlow.
            builder: Any = tfds.builder_from_directory(self._folder)
            self._source = builder.as_data_source(
                split,
                decoders={"image": tfds.decode.SkipDecoding()},
                file_format="array_record",
            )

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        place = f"{self._folder}, split {self._split}, record {index}"
        with reported(place, "a readable record"):
            example = self._source[index]
            jpeg, label = example["image"], int(example["label"])
            # -1, which TFDS stores for "no label", would be taken for padding.
            if not 0 <= label < ABOUT[NAME].classes:
                raise ValueError(f"the label {label}, of no class")
        return Record(jpeg, label, place)


def _folder(data_dir: str | None) -> Path:
    """Find the newest version of the prepared data set."""
    root = Path(data_dir or constants.DATA_DIR).expanduser()
    versions = version.list_all_versions(root / NAME)
    if versions:
        return root / NAME / str(versions[-1])
    raise DataError(
        f"{root / NAME}: expected the prepared TFDS data set {NAME} in a folder named "
        "by its version, such as 5.1.0, but there is none. Nothing downloads ImageNet "
        "by itself. Ways to get the data: (1) fetch ILSVRC2012_img_train.tar and "
        "ILSVRC2012_img_val.tar (144 GB) from https://image-net.org/download-images, "
        "which asks for a registration, put them into one folder, and, where "
        f"tensorflow is installed, run `tfds build {NAME} --file_format=array_record "
        f"--manual_dir=<that folder> --data_dir={root}`; (2) copy a prepared "
        f"{NAME}/5.1.0 folder (array_record) from another machine into data_dir or "
        f"TFDS_DATA_DIR, here {root}."
    )


@contextlib.contextmanager
def reported(place: str, expected: str) -> Iterator[None]:
    """Turn what damaged data raises into a DataError that says where they are."""
    try:
        yield
    # Damage shows as RuntimeError, KeyError, ValueError, protobuf's ParseError, PIL's
    # errors..., by what is damaged. A worker's error is pickled, which keeps the text.
    except Exception as error:
        raise DataError(
            f"{place}: expected {expected}, but got: {' '.join(str(error).split())}. "
            "Copy or prepare the folder again; `tfds convert_format` makes "
            "array_record files of another format."
        ) from error
