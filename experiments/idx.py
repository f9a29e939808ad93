"""The IDX format of the MNIST family: gzipped arrays of bytes, read with NumPy."""

import gzip
import math
import zlib

import numpy as np


class DataError(RuntimeError):
    """Report data that is absent or damaged.

    The message is one paragraph: what was expected, what came instead, and what to do.
    """


def parse(compressed: bytes, source: str) -> np.ndarray:
    """Parse a gzipped IDX file of unsigned bytes.

    Args:
        compressed: The whole file.
        source: The file's name, for the messages.

    Returns:
        uint8, of the shape the file's header declares.

    Raises:
        DataError: The gzip stream is damaged, the header is not that of unsigned
            bytes, or the length differs from the one the header declares.

    Source: the format's description on the MNIST home page: two zero bytes, a type
    code (0x08 for unsigned bytes), the number of axes, each axis's size as a
    big-endian uint32, the data.

    Example:
        >>> header = bytes([0, 0, 8, 1, 0, 0, 0, 3])
        >>> parse(gzip.compress(header + bytes([7, 8, 9])), "labels.gz")
        array([7, 8, 9], dtype=uint8)
    """
    try:
        content = gzip.decompress(compressed)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{source}: expected a complete gzip file, but decompressing it failed "
            f"({error}). Replace the file by an intact copy."
        ) from error
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise DataError(
            f"{source}: expected an IDX file of unsigned bytes, which starts with the "
            f"bytes 00 00 08, but it starts with {content[:4].hex(' ') or 'nothing'}, "
            f"and has {len(content)}. Replace the file by an intact copy."
        )
    start = 4 + 4 * content[3]
    shape = tuple(np.frombuffer(content[4:start], ">u4", len(content[4:start]) // 4))
    expected = start + math.prod(int(size) for size in shape)
    if len(content) != expected:
        raise DataError(
            f"{source}: its header declares {expected} bytes when decompressed, but "
            f"there are {len(content)}. Replace the file by an intact copy."
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
