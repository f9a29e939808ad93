"""The MNIST family: its files, and its preparation with and without a network."""

import gzip
import shutil
from pathlib import Path

import made_up
import numpy as np
import pytest
from made_up import left_over, packed, rows, trust, trust_package

from experiments import data, idx, tfds_idx, tfds_prepare

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
needs_debian = pytest.mark.skipif(
    not DEBIAN.is_dir(), reason="Debian's dataset-fashion-mnist is not installed"
)
IMAGES, LABELS = tfds_idx.FILES["train"]


@pytest.fixture
def package(monkeypatch, tmp_path):
    """Return the folder of a package of tiny files, which the builder trusts."""
    return made_up.mnist_package(monkeypatch, tmp_path / "package")


@pytest.fixture
def data_dir(tmp_path):
    return str(tmp_path / "data")


@pytest.fixture
def no_network(monkeypatch):
    """Return the list of what the network was asked for."""
    return made_up.cut_network(monkeypatch)


@pytest.fixture
def site(package):
    """Serve the tiny files as the download site does."""
    with made_up.serve(package) as server:
        yield server


# IDX files


@pytest.mark.parametrize("shape", [(3,), (2, 4), (5, 28, 28), (0, 28, 28)])
def test_parse_gives_back_the_array(shape):
    array = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    parsed = idx.parse(packed(array), "f.gz")
    np.testing.assert_array_equal(parsed, array, strict=True)


GOOD = packed(np.arange(6, dtype=np.uint8).reshape(3, 2))


@pytest.mark.parametrize(
    ("compressed", "message"),
    [
        pytest.param(GOOD[:-12], "complete gzip", id="truncated gzip"),
        pytest.param(b"not gzip", "complete gzip", id="no gzip"),
        pytest.param(
            GOOD[:14] + bytes([GOOD[14] ^ 255]) + GOOD[15:],
            "complete gzip",
            id="garbled gzip",
        ),
        pytest.param(b"", "starts with nothing", id="empty"),
        pytest.param(
            packed(np.zeros(3, np.uint8), code=9),
            "starts with 00 00 09 01",
            id="signed bytes",
        ),
        pytest.param(
            gzip.compress(b"\0\0\x08"), "starts with 00 00 08,", id="three bytes"
        ),
        pytest.param(
            gzip.compress(gzip.decompress(GOOD)[:-1]),
            "declares 18 bytes.*are 17",
            id="one byte less",
        ),
        pytest.param(
            gzip.compress(gzip.decompress(GOOD) + b"x"),
            "declares 18 bytes.*are 19",
            id="one byte more",
        ),
        pytest.param(
            gzip.compress(gzip.decompress(GOOD)[:7]),
            "declares .* are 7",
            id="truncated header",
        ),
    ],
)
def test_damaged_idx_is_reported_with_its_name(compressed, message):
    with pytest.raises(data.DataError, match=f"folder/f.gz: .*{message}"):
        idx.parse(compressed, "folder/f.gz")


# Preparation


def test_tiny_package_is_prepared_and_loaded(package, data_dir, capfd):
    loaded = data.load("fashion_mnist", validation=10, data_dir=data_dir)
    assert [len(split.labels) for split in loaded] == [10, 10, 10]
    for split in loaded:
        np.testing.assert_array_equal(np.bincount(split.labels), [1] * 10)
    expected = np.frombuffer(
        gzip.decompress((package / IMAGES).read_bytes())[16:], np.uint8
    ).reshape(20, 28, 28)
    got = np.concatenate([loaded.train.inputs, loaded.validation.inputs])[..., 0]
    assert {a.tobytes() for a in got} == {a.tobytes() for a in expected}
    assert capfd.readouterr() == ("", "")


def test_second_load_reads_what_the_first_prepared(package, data_dir, no_network):
    first = data.load("fashion_mnist", validation=0, data_dir=data_dir)
    shutil.rmtree(package)
    second = data.load("fashion_mnist", validation=0, data_dir=data_dir)
    np.testing.assert_array_equal(first.train.inputs, second.train.inputs)


@pytest.mark.parametrize("name", [IMAGES, LABELS])
def test_package_with_a_wrong_digest_is_reported(package, data_dir, name):
    content = bytearray((package / name).read_bytes())
    content[-1] ^= 1
    (package / name).write_bytes(content)
    with pytest.raises(data.DataError, match=f"package/{name}: expected the sha256"):
        data.load("fashion_mnist", validation=0, data_dir=data_dir)
    assert left_over(data_dir) == []


def test_package_with_a_missing_file_is_reported(package, data_dir):
    (package / LABELS).unlink()
    with pytest.raises(data.DataError, match=f"{LABELS}: .*missing"):
        data.load("fashion_mnist", validation=0, data_dir=data_dir)
    assert left_over(data_dir) == []


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        (IMAGES, np.zeros((20, 28, 27), np.uint8), r"\(N, 28, 28\).*\(20, 28, 27\)"),
        (IMAGES, np.zeros(20, np.uint8), r"\(N, 28, 28\).*\(20,\)"),
        (LABELS, np.zeros(19, np.uint8), r"each of the 20 images.*\(19,\)"),
        (LABELS, np.zeros((20, 1), np.uint8), r"each of the 20 images.*\(20, 1\)"),
        (LABELS, np.full(20, 10, np.uint8), "0 to 9.* 10"),
    ],
)
def test_source_of_the_wrong_content_is_reported(
    monkeypatch, package, data_dir, name, array, message
):
    (package / name).write_bytes(packed(array))
    trust_package(monkeypatch, package)
    with pytest.raises(data.DataError, match=f"{name}: .*{message}"):
        data.load("fashion_mnist", validation=0, data_dir=data_dir)
    assert left_over(data_dir) == []


def test_interrupted_preparation_leaves_nothing(monkeypatch, package, data_dir):
    def interrupted(images, labels):
        yield from list(whole(images, labels))[:3]
        raise KeyboardInterrupt

    whole = tfds_idx._png_examples
    monkeypatch.setattr(tfds_idx, "_png_examples", interrupted)
    with pytest.raises(KeyboardInterrupt):
        data.load("fashion_mnist", validation=0, data_dir=data_dir)
    assert left_over(data_dir) == []
    monkeypatch.setattr(tfds_idx, "_png_examples", whole)
    loaded = data.load("fashion_mnist", validation=0, data_dir=data_dir)
    assert len(loaded.train.labels) == 20


def test_two_preparations_at_once_both_succeed(monkeypatch, package, tmp_path):
    def overtaken(images, labels):
        shutil.copytree(
            winner, tmp_path / "second/fashion_mnist/3.0.1", dirs_exist_ok=1
        )
        return whole(images, labels)

    winner = tfds_prepare.prepare(tfds_idx.FashionMNIST, str(tmp_path / "first"))
    whole = tfds_idx._png_examples
    monkeypatch.setattr(tfds_idx, "_png_examples", overtaken)
    second = str(tmp_path / "second")
    loaded = data.load("fashion_mnist", validation=0, data_dir=second)
    assert len(loaded.train.labels) == 20
    assert left_over(second) == [tmp_path / "second/fashion_mnist/3.0.1"]


def test_folder_that_cannot_be_written_is_reported_as_it_is(package, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(NotADirectoryError):
        tfds_prepare.prepare(tfds_idx.FashionMNIST, str(tmp_path / "file"))


@needs_debian
def test_fashion_mnist_equals_the_idx_files(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("fashion_mnist"))
    loaded = data.load("fashion_mnist", validation=5000, data_dir=folder)
    assert [len(split.labels) for split in loaded] == [55_000, 5_000, 10_000]
    # TFDS stores the records in an order of its own.
    for prefix, splits in (("train", loaded[:2]), ("t10k", loaded[2:])):
        with gzip.open(DEBIAN / f"{prefix}-images-idx3-ubyte.gz") as file:
            images = np.frombuffer(file.read(), np.uint8, offset=16)
        with gzip.open(DEBIAN / f"{prefix}-labels-idx1-ubyte.gz") as file:
            labels = np.frombuffer(file.read(), np.uint8, offset=8)
        expected = data.Split(images.reshape(-1, 28, 28, 1), labels)
        assert sorted(row for split in splits for row in rows(split)) == sorted(
            rows(expected)
        )
        for split in splits:
            np.testing.assert_array_equal(
                np.bincount(split.labels), [len(split.labels) // 10] * 10
            )


# Without the data


def test_absent_fashion_mnist_names_the_three_ways(
    monkeypatch, tmp_path, data_dir, no_network
):
    monkeypatch.setattr(tfds_idx.FashionMNIST, "package_dir", tmp_path / "nothing")
    with pytest.raises(data.DataError) as raised:
        data.load("fashion_mnist", validation=0, data_dir=data_dir)
    message = str(raised.value)
    assert "\n" not in message
    for way in (
        "internet",
        "apt-get install dataset-fashion-mnist",
        "copy a prepared fashion_mnist/3.0.1",
        f"TFDS_DATA_DIR, here {data_dir}",
    ):
        assert way in message
    assert left_over(data_dir) == []


def test_absent_mnist_says_that_no_package_carries_it(data_dir, no_network):
    with pytest.raises(
        data.DataError, match=r"no Debian package carries mnist.*mnist/3"
    ):
        data.load("mnist", validation=0, data_dir=data_dir)
    assert left_over(data_dir) == []


def test_without_network_the_error_comes_at_once(data_dir, no_network):
    with pytest.raises(data.DataError):
        data.load("mnist", validation=0, data_dir=data_dir)
    assert len(no_network) == 1


def test_download_is_prepared_and_loaded(monkeypatch, package, site, data_dir, capfd):
    contents = {path.name: path.read_bytes() for path in package.iterdir()}
    trust(monkeypatch, tfds_idx.MNIST, contents, url=site.url)
    loaded = data.load("mnist", validation=0, data_dir=data_dir)
    expected = gzip.decompress(contents[IMAGES])[16:]
    assert sorted(a.tobytes() for a in loaded.train.inputs) == sorted(
        expected[i : i + 784] for i in range(0, len(expected), 784)
    )
    assert capfd.readouterr() == ("", "")


def test_download_with_a_wrong_digest_is_reported(monkeypatch, package, site, data_dir):
    contents = {path.name: path.read_bytes() + b"x" for path in package.iterdir()}
    trust(monkeypatch, tfds_idx.MNIST, contents, url=site.url)
    with pytest.raises(data.DataError, match=rf"{IMAGES}.*has wrong checksum"):
        data.load("mnist", validation=0, data_dir=data_dir)
    assert left_over(data_dir) == []
    # No thread is left that still downloads another file.
    assert set(site.asked) == {IMAGES}


def test_download_from_a_site_out_of_service_is_not_tried_again(
    monkeypatch, package, site, data_dir
):
    monkeypatch.setattr(made_up.Handler, "do_GET", lambda self: self.send_error(503))
    trust(monkeypatch, tfds_idx.MNIST, {}, url=site.url)
    with pytest.raises(data.DataError, match=r"\(1\) .*\(3\) .*503"):
        data.load("mnist", validation=0, data_dir=data_dir)
    assert site.asked == [IMAGES]


def test_download_without_a_known_digest_is_refused(
    monkeypatch, package, site, data_dir
):
    trust(monkeypatch, tfds_idx.MNIST, {}, url=site.url)
    with pytest.raises(data.DataError, match="Missing checksums url"):
        data.load("mnist", validation=0, data_dir=data_dir)
    assert left_over(data_dir) == []
