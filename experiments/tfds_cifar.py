"""Prepare CIFAR-10 and CIFAR-100 in the TFDS format, without TensorFlow.

As in experiments.tfds_idx: the stock builders need TensorFlow to unpack the archive
and to encode the images. Those here inherit everything that is recorded and replace
the reading alone: the folder is the standard one, with the same records in the same
order, and any tensorflow-datasets reads it.
"""

import gzip
import io
import os
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tensorflow_datasets.image_classification import cifar

from experiments.idx import DataError
from experiments.tfds_prepare import encode_png, fetch

SHAPE = (32, 32, 3)
PIXELS = 32 * 32 * 3  # bytes of an image: red, green, blue, each row by row


class Cifar10(cifar.Cifar10, skip_registration=True):
    """Build `cifar10/3.0.2` from the binary archive."""

    # The stock digests: TFDS would look for a list of them beside this file.
    url_infos = cifar.Cifar10.url_infos

    def _split_generators(self, dl_manager):
        about = self._cifar_info
        by_hand = Path(dl_manager.download_dir) / "manual" / Path(about.url).name
        way = f"download {about.url} elsewhere and put it at {by_hand}"
        ((path, content),) = fetch(self, dl_manager, [about.url], way).values()
        batches = {"train": about.train_files, "test": about.test_files}
        names = [*about.label_files, *about.train_files, *about.test_files]
        files = _unpack(content, path, about.prefix, names)
        # Everything is parsed and checked before the first record is written.
        classes = {
            key: self._name_classes(key, files[name], f"{path}, {name}")
            for key, name in zip(about.label_keys, about.label_files, strict=True)
        }
        splits = {
            split: np.concatenate(
                [_parse(files[name], classes, f"{path}, {name}") for name in names]
            )
            for split, names in batches.items()
        }
        return {
            split: _examples(split, about.label_keys, rows)
            for split, rows in splits.items()
        }

    def _name_classes(self, key: str, content: bytes, source: str) -> int:
        """Record the names of a label's classes, and return their number."""
        features: Any = self.info.features
        feature = features[key]
        names = [name for name in content.decode().split("\n") if name]
        try:
            feature.names = names
        except ValueError as error:
            raise DataError(
                f"{source}: expected the names of {feature.num_classes} classes, one a "
                f"line, but there are {len(set(names))} in {len(names)} lines. Replace "
                "the file by an intact copy."
            ) from error
        return feature.num_classes


class Cifar100(Cifar10, cifar.Cifar100, skip_registration=True):
    """Build `cifar100/3.0.2` from the binary archive."""

    url_infos = cifar.Cifar100.url_infos


BUILDERS = {"cifar10": Cifar10, "cifar100": Cifar100}


def _unpack(
    compressed: bytes, source: str, prefix: str, names: list[str]
) -> dict[str, bytes]:
    """Read files of a folder of a gzipped tar archive."""
    try:
        # All of it, because the checksum that tells damage is at the end.
        files = {}
        with tarfile.open(fileobj=io.BytesIO(gzip.decompress(compressed))) as tar:
            for member in tar:
                if file := tar.extractfile(member):
                    files[os.path.normpath(member.name)] = file.read()
        return {name: files[prefix + name] for name in names}
    except (OSError, EOFError, zlib.error, tarfile.TarError, KeyError) as error:
        raise DataError(
            f"{source}: expected a complete tar.gz archive with the files "
            f"{', '.join(names)} in {prefix}, but reading it failed "
            f"({type(error).__name__}: {error}). Replace the file by an intact copy."
        ) from error


def _parse(content: bytes, classes: dict[str, int], source: str) -> np.ndarray:
    """Parse a batch into rows of the labels and the pixels, and check it."""
    width = len(classes) + PIXELS
    if len(content) % width or not content:
        raise DataError(
            f"{source}: expected records of {width} bytes, but the file has "
            f"{len(content)}. Replace the file by an intact copy."
        )
    rows = np.frombuffer(content, np.uint8).reshape(-1, width)
    for column, (key, number) in enumerate(classes.items()):
        if rows[:, column].max() >= number:
            raise DataError(
                f"{source}: expected each {key} from 0 to {number - 1}, but there is "
                f"{rows[:, column].max()}. Replace the file by an intact copy."
            )
    return rows


def _examples(
    split: str, keys: list[str], rows: np.ndarray
) -> Iterator[tuple[int, dict[str, object]]]:
    for index, row in enumerate(rows):
        image = row[len(keys) :].reshape(3, 32, 32).transpose(1, 2, 0)
        yield (
            index,
            {
                **{key: int(label) for key, label in zip(keys, row, strict=False)},
                "id": f"{split}_{index:05d}",
                "image": encode_png(np.ascontiguousarray(image)),
            },
        )
