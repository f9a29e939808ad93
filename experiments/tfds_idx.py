"""Prepare MNIST and Fashion-MNIST in the TFDS format, without TensorFlow.

The stock builders of tensorflow-datasets need TensorFlow to parse the IDX files and
to encode the images. Those here inherit everything that is recorded (name, version,
features, keys) and replace the reading alone: the folder is the standard one, with
the same records in the same order, and any tensorflow-datasets reads it.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urljoin

import numpy as np
from tensorflow_datasets.image_classification import mnist

from experiments.idx import DataError, parse
from experiments.tfds_prepare import Files, encode_png, fetch

IMAGE_SHAPE = mnist.MNIST_IMAGE_SHAPE
NUM_CLASSES = mnist.MNIST_NUM_CLASSES
FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}
FIX = (
    "`apt-get install --reinstall dataset-fashion-mnist` puts intact files there; "
    "`apt-get remove dataset-fashion-mnist` makes TFDS download them instead."
)


class MNIST(mnist.MNIST, skip_registration=True):
    """Build `mnist/3.0.1` from TFDS's download."""

    # The stock digests: TFDS would look for a list of them beside this file.
    url_infos = mnist.MNIST.url_infos
    second_way = (
        "no Debian package carries mnist (fashion_mnist has one), and mnist5k needs no "
        "download"
    )

    def _split_generators(self, dl_manager):
        files = self._packaged() or fetch(
            self, dl_manager, list(self._urls().values()), self.second_way
        )
        # Everything is parsed and checked before the first record is written.
        splits = {split: _parse_split(files, split) for split in FILES}
        return {split: _png_examples(*arrays) for split, arrays in splits.items()}

    def _packaged(self) -> Files | None:
        """Read the files that a package of the operating system installed, if any."""
        return None

    def _urls(self) -> dict[str, str]:
        return {
            name: urljoin(self.URL, name) for names in FILES.values() for name in names
        }


class FashionMNIST(MNIST, mnist.FashionMNIST, skip_registration=True):
    """Build `fashion_mnist/3.0.1` from Debian's package or TFDS's download."""

    url_infos = mnist.FashionMNIST.url_infos
    package_dir = Path("/usr/share/datasets/fashion-mnist")
    second_way = "`apt-get install dataset-fashion-mnist` on Debian and its derivatives"

    def _packaged(self) -> Files | None:
        # Before the network: the same digests verify them, and it saves the download.
        if not self.package_dir.is_dir():
            return None
        files = {}
        known = self.url_infos or {}  # TFDS's type; the stock lists are never None
        for name, url in self._urls().items():
            path = self.package_dir / name
            if not path.is_file():
                raise DataError(f"{path}: expected this file, but it is missing. {FIX}")
            content = _official_bytes(path)
            digest = hashlib.sha256(content).hexdigest()
            expected = known[url].checksum
            if digest != expected:
                raise DataError(
                    f"{path}: expected the sha256 {expected} once the official gzip "
                    f"header is restored, but it is {digest}. {FIX}"
                )
            files[name] = (str(path), content)
        return files


BUILDERS = {"fashion_mnist": FashionMNIST, "mnist": MNIST}


def _official_bytes(path: Path) -> bytes:
    """Restore the gzip header that Debian's repacking normalized."""
    # Debian drops the name and sets its own time; the compressed stream is untouched.
    # With the original name and time the file is the official one, bit for bit.
    time = 1504176606 if path.name.startswith("train") else 1504176627
    header = b"\x1f\x8b\x08\x08" + time.to_bytes(4, "little") + b"\x00\x03"
    return header + path.stem.encode() + b"\x00" + path.read_bytes()[10:]


def _parse_split(files: Files, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Parse the images (N, 28, 28) and the labels (N,) of a split, and check them."""
    (image_path, image_bytes), (label_path, label_bytes) = (
        files[name] for name in FILES[split]
    )
    images = parse(image_bytes, image_path)
    labels = parse(label_bytes, label_path)
    if images.shape[1:] != IMAGE_SHAPE[:2]:
        raise DataError(
            f"{image_path}: expected images of shape (N, 28, 28), but the shape is "
            f"{images.shape}. Replace the file by an intact copy."
        )
    if labels.shape != images.shape[:1]:
        raise DataError(
            f"{label_path}: expected one label for each of the {len(images)} images, "
            f"but the shape is {labels.shape}. Replace the file by an intact copy."
        )
    if labels.max(initial=0) >= NUM_CLASSES:
        raise DataError(
            f"{label_path}: expected labels from 0 to 9, but there is "
            f"{labels.max()}. Replace the file by an intact copy."
        )
    return images, labels


def _png_examples(
    images: np.ndarray, labels: np.ndarray
) -> Iterator[tuple[int, dict[str, object]]]:
    for key, (image, label) in enumerate(zip(images, labels, strict=True)):
        yield key, {"image": encode_png(image), "label": int(label)}
