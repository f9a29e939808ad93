"""CIFAR-10 and CIFAR-100: preparation from the archive, and what is read back."""

import builtins
import io
import types
from pathlib import Path

import made_up
import numpy as np
import pytest
from made_up import CIFAR_SIZES, cifar_arrays, cifar_files, left_over, rows
from PIL import Image
from tensorflow_datasets.image_classification import cifar

from experiments import data, tfds_cifar

both = pytest.mark.parametrize("name", sorted(CIFAR_SIZES))
HUNDRED = "cifar-100-binary/"


@pytest.fixture
def data_dir(tmp_path):
    return str(tmp_path / "data")


def put(monkeypatch, name, data_dir, files):
    content = made_up.archive(files)
    return made_up.cifar_archive(monkeypatch, name, data_dir, content)


@both
def test_archive_is_prepared_and_loaded(monkeypatch, data_dir, capfd, name):
    asked = made_up.cut_network(monkeypatch)
    put(monkeypatch, name, data_dir, cifar_files(name))
    about = data.ABOUT[name]
    loaded = data.load(name, validation=about.classes, data_dir=data_dir)
    train, test, _ = CIFAR_SIZES[name]
    assert [split.inputs.shape for split in loaded] == [
        (size, 32, 32, 3) for size in (train - about.classes, about.classes, test)
    ]
    for split in loaded:
        assert (split.inputs.dtype, split.labels.dtype) == (np.uint8, np.int32)
    np.testing.assert_array_equal(
        np.bincount(loaded.validation.labels), [1] * about.classes
    )
    # TFDS stores the records in an order of its own.
    for splits, (labels, images) in (
        (loaded[:2], cifar_arrays(name)["train"]),
        (loaded[2:], cifar_arrays(name)["test"]),
    ):
        expected = data.Split(images, labels[:, -1])
        assert sorted(row for split in splits for row in rows(split)) == sorted(
            rows(expected)
        )
    assert capfd.readouterr() == ("", "")
    assert asked == []


@both
def test_records_are_those_of_the_stock_builder(monkeypatch, data_dir, name):
    # Its reading runs with files in place of TensorFlow's; it yields plain arrays.
    archive = put(monkeypatch, name, data_dir, cifar_files(name))
    for path, content in cifar_files(name).items():
        file = Path(data_dir, "extracted", path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    gfile = types.SimpleNamespace(GFile=builtins.open)
    tf = types.SimpleNamespace(io=types.SimpleNamespace(gfile=gfile))
    monkeypatch.setattr(cifar, "tf", tf)
    manager = types.SimpleNamespace(
        download_dir=Path(data_dir, "downloads"),
        download=lambda url: archive,
        download_and_extract=lambda url: str(Path(data_dir, "extracted")),
    )
    ours, stock = (
        builder(data_dir=data_dir, file_format="array_record")
        for builder in (tfds_cifar.BUILDERS[name], made_up.STOCK_CIFAR[name])
    )
    splits = ours._split_generators(manager)
    expected = stock._split_generators(manager)
    assert list(splits) == list(expected) == ["train", "test"]
    for split in splits:
        for one, other in zip(splits[split], expected[split], strict=True):
            (key, example), (stock_key, stock_example) = one, other
            image = np.asarray(Image.open(io.BytesIO(example.pop("image"))))
            np.testing.assert_array_equal(image, stock_example.pop("image"))
            assert (key, example) == (stock_key, stock_example)
    for key in ours.info.features:
        if "label" in key:
            assert ours.info.features[key].names == stock.info.features[key].names
    assert (ours.name, ours.version) == (stock.name, stock.version)
    assert ours.info.features.to_json() == stock.info.features.to_json()


@both
def test_only_the_stock_archive_is_trusted(name):
    builder, stock = tfds_cifar.BUILDERS[name], made_up.STOCK_CIFAR[name]
    (url,) = builder.url_infos
    assert url.startswith("https://www.cs.toronto.edu/~kriz/cifar-10")
    assert url.endswith(made_up.cifar_name(name))
    assert builder.url_infos == stock.url_infos
    assert len(builder.url_infos[url].checksum) == 64


@both
def test_second_load_needs_no_archive(monkeypatch, data_dir, name):
    archive = put(monkeypatch, name, data_dir, cifar_files(name))
    first = data.load(name, validation=0, data_dir=data_dir)
    archive.unlink()
    made_up.cut_network(monkeypatch)
    second = data.load(name, validation=0, data_dir=data_dir)
    np.testing.assert_array_equal(first.train.inputs, second.train.inputs)
    np.testing.assert_array_equal(first.train.labels, second.train.labels)


@both
def test_download_is_prepared_and_loaded(monkeypatch, tmp_path, data_dir, name):
    file = tmp_path / "site" / made_up.cifar_name(name)
    file.parent.mkdir()
    file.write_bytes(made_up.archive(cifar_files(name)))
    with made_up.serve(file.parent) as site:
        made_up.trust_cifar(monkeypatch, name, file.read_bytes(), site.url)
        loaded = data.load(name, validation=0, data_dir=data_dir)
    assert len(loaded.train.labels) == CIFAR_SIZES[name][0]
    assert site.asked == [file.name] * 2  # the early check, the download


def test_download_with_a_wrong_digest_is_reported(monkeypatch, tmp_path, data_dir):
    (tmp_path / "site").mkdir()
    file = tmp_path / "site" / made_up.cifar_name("cifar10")
    file.write_bytes(made_up.archive(cifar_files("cifar10")))
    with made_up.serve(file.parent) as site:
        made_up.trust_cifar(monkeypatch, "cifar10", b"another", site.url)
        with pytest.raises(data.DataError, match="has wrong checksum"):
            data.load("cifar10", validation=0, data_dir=data_dir)
    assert left_over(data_dir) == []


@both
def test_archive_put_there_with_a_wrong_digest_is_reported(monkeypatch, data_dir, name):
    archive = put(monkeypatch, name, data_dir, cifar_files(name))
    archive.write_bytes(archive.read_bytes() + b"x")
    with pytest.raises(data.DataError, match=rf"{archive}, has wrong checksum"):
        data.load(name, validation=0, data_dir=data_dir)
    assert left_over(data_dir) == []


@both
def test_without_network_the_ways_are_named_at_once(monkeypatch, data_dir, name):
    asked = made_up.cut_network(monkeypatch)
    with pytest.raises(data.DataError) as raised:
        data.load(name, validation=0, data_dir=data_dir)
    message, archive = str(raised.value), made_up.cifar_name(name)
    assert "\n" not in message
    for way in (
        "internet",
        f"download https://www.cs.toronto.edu/~kriz/{archive} elsewhere",
        f"put it at {data_dir}/downloads/manual/{archive}",
        f"copy a prepared {name}/3.0.2",
        f"TFDS_DATA_DIR, here {data_dir}",
    ):
        assert way in message
    assert len(asked) == 1
    assert left_over(data_dir) == []


def changed(path, content):
    files = cifar_files("cifar100")
    assert HUNDRED + path in files
    return {**files, HUNDRED + path: content}


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        ("train.bin", b"", "train.bin: expected records of 3074 bytes.* has 0"),
        ("test.bin", bytes(3074 * 2 - 1), "test.bin: .*3074 bytes.* has 6147"),
        ("train.bin", bytes([20, 0]) + bytes(3072), "coarse_label from 0 to 19.* 20"),
        ("train.bin", bytes([0, 100]) + bytes(3072), "each label from 0 to 99.* 100"),
        ("fine_label_names.txt", b"one\ntwo\n", "names of 100.* 2 in 2 lines"),
        ("coarse_label_names.txt", b"one\n" * 20, "names of 20.* 1 in 20 lines"),
    ],
)
def test_archive_of_the_wrong_content_is_reported(
    monkeypatch, data_dir, path, content, message
):
    archive = put(monkeypatch, "cifar100", data_dir, changed(path, content))
    with pytest.raises(data.DataError, match=f"{archive}, .*{message}"):
        data.load("cifar100", validation=0, data_dir=data_dir)
    assert left_over(data_dir) == []


def without_test(content):
    files = cifar_files("cifar100")
    del files[HUNDRED + "test.bin"]
    return made_up.archive(files)


def garbled(content):
    place = len(content) // 2
    return content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_test, "KeyError.*test.bin"),
        (garbled, "expected a complete tar.gz"),
        (lambda content: content[: len(content) // 2], "EOFError"),
        # The checksum at the end is looked at, too.
        (lambda content: content[:-8] + bytes(8), "CRC check failed"),
        (lambda content: b"no archive", "expected a complete tar.gz"),
    ],
)
def test_damaged_archive_is_reported(monkeypatch, data_dir, damage, message):
    content = damage(made_up.archive(cifar_files("cifar100")))
    archive = made_up.cifar_archive(monkeypatch, "cifar100", data_dir, content)
    with pytest.raises(data.DataError, match=rf"{archive}: .*{message}.*Replace"):
        data.load("cifar100", validation=0, data_dir=data_dir)
    assert left_over(data_dir) == []
