"""Prepare MNIST and Fashion-MNIST in the TFDS format, without TensorFlow.

The stock builders of tensorflow-datasets need TensorFlow to parse the IDX files and
to encode the images. Those here inherit everything that is recorded (name, version,
features, keys) and replace the reading alone: the folder is the standard one, with
the same records in the same order, and any tensorflow-datasets reads it.
"""

import contextlib
import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urljoin

import numpy as np
import requests
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core import constants
from tensorflow_datasets.image_classification import mnist

from experiments.idx import DataError, parse

IMAGE_SHAPE = mnist.MNIST_IMAGE_SHAPE
NUM_CLASSES = mnist.MNIST_NUM_CLASSES
FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}
Files = dict[str, tuple[str, bytes]]  # file name -> (path, for messages; content)
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
        files = self._packaged() or self._downloaded(dl_manager)
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

    def _downloaded(self, dl_manager) -> Files:
        urls = self._urls()
        try:
            # Without a network, TFDS tries ten times with growing pauses: 204 s, and a
            # warning for each. One request with a time limit tells it at once.
            with requests.get(next(iter(urls.values())), stream=True, timeout=10) as r:
                r.raise_for_status()
            # One by one: when one of several fails, TFDS leaves the others to threads
            # that go on trying, and that the process cannot exit without.
            paths = {name: dl_manager.download(url) for name, url in urls.items()}
        # TFDS documents no common class for what a download raises.
        except Exception as error:
            raise DataError(
                f"{self.name}: expected a prepared data set or its source files, but "
                "there is neither, and TFDS's download failed. Ways to get the data: "
                "(1) start once on a machine with internet access, and TFDS downloads "
                f"it; (2) {self.second_way}; (3) copy a prepared {self.name}/"
                f"{self.version} folder (array_record) from another machine into "
                f"data_dir or TFDS_DATA_DIR, here {self.data_dir_root}. "
                f"The download's error: {' '.join(str(error).split())}"
            ) from error
        return {name: (str(path), path.read_bytes()) for name, path in paths.items()}


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


def prepare(name: str, data_dir: str | None) -> Path:
    """Prepare a data set unless its folder exists.

    Args:
        name: "fashion_mnist" or "mnist".
        data_dir: Folder of prepared data sets; None for TFDS's default,
            TFDS_DATA_DIR or ~/tensorflow_datasets.

    Returns:
        The folder of the prepared data set. TFDS writes it under a temporary name and
        renames it when complete: it is whole or absent.

    Raises:
        DataError: The source files are absent or damaged.
    """
    root = Path(data_dir or constants.DATA_DIR).expanduser()
    folder = root / name / str(BUILDERS[name].VERSION)
    if folder.exists():
        return folder
    builder = BUILDERS[name](data_dir=root, file_format="array_record")
    config = tfds.download.DownloadConfig(force_checksums_validation=True)
    try:
        # Its notices, which TFDS prints, and its bars would break a study's own output.
        tfds.disable_progress_bar()
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare(download_config=config)
    except OSError:
        # Another process, say another seed of the study, may have been the first to
        # rename: its folder is as good.
        if not folder.exists():
            raise
    return folder


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
    # TFDS stores bytes as they are; it would need TensorFlow to encode an array.
    for key, (image, label) in enumerate(zip(images, labels, strict=True)):
        png = io.BytesIO()
        Image.fromarray(image).save(png, "PNG")
        yield key, {"image": png.getvalue(), "label": int(label)}
