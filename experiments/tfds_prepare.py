"""Prepare TFDS data sets from their source files: what all our builders share."""

import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import requests
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core import constants

from experiments.idx import DataError

Files = dict[str, tuple[str, bytes]]  # file name -> (path, for messages; content)


def prepare(builder_class: Any, data_dir: str | None) -> Path:
    """Prepare a data set unless its folder exists.

    Args:
        builder_class: The TFDS builder.
        data_dir: Folder of prepared data sets; None for TFDS's default,
            TFDS_DATA_DIR or ~/tensorflow_datasets.

    Returns:
        The folder of the prepared data set. TFDS writes it under a temporary name and
        renames it when complete: it is whole or absent.

    Raises:
        DataError: The source files are absent or damaged.
    """
    root = Path(data_dir or constants.DATA_DIR).expanduser()
    folder = root / builder_class.name / str(builder_class.VERSION)
    if folder.exists():
        return folder
    builder = builder_class(data_dir=root, file_format="array_record")
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


def fetch(builder: Any, dl_manager: Any, urls: list[str], second_way: str) -> Files:
    """Read source files from TFDS's folder of manual downloads, or download them.

    Args:
        builder: The TFDS builder; its url_infos hold the digests.
        dl_manager: The download manager that TFDS hands to the builder.
        urls: Of the files.
        second_way: A way to get the data without a download, for the message.

    Returns:
        The files by the last part of their URL.

    Raises:
        DataError: A file cannot be had, or its digest is not the expected one.
    """
    by_hand = Path(dl_manager.download_dir) / "manual"
    absent = [url for url in urls if not (by_hand / Path(url).name).exists()]
    try:
        if absent:
            # Without a network, TFDS tries ten times with growing pauses: 204 s, and
            # a warning for each. One request with a time limit tells it at once.
            with requests.get(absent[0], stream=True, timeout=10) as response:
                response.raise_for_status()
        # One by one: when one of several fails, TFDS leaves the others to threads
        # that go on trying, and that the process cannot exit without.
        paths = {Path(url).name: Path(dl_manager.download(url)) for url in urls}
    # TFDS documents no common class for what a download raises.
    except Exception as error:
        raise DataError(
            f"{builder.name}: expected a prepared data set or its source files, but "
            "there is neither, and TFDS's download failed. Ways to get the data: "
            "(1) start once on a machine with internet access, and TFDS downloads "
            f"it; (2) {second_way}; (3) copy a prepared {builder.name}/"
            f"{builder.version} folder (array_record) from another machine into "
            f"data_dir or TFDS_DATA_DIR, here {builder.data_dir_root}. "
            f"The download's error: {' '.join(str(error).split())}"
        ) from error
    return {name: (str(path), path.read_bytes()) for name, path in paths.items()}


def encode_png(image: np.ndarray) -> bytes:
    """Encode an image, uint8 (H, W) or (H, W, 3), which TFDS stores as it is.

    TFDS would need TensorFlow to encode an array.
    """
    png = io.BytesIO()
    Image.fromarray(image).save(png, "PNG")
    return png.getvalue()
