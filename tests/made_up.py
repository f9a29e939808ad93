"""Small made-up source files of the data sets, and a site that serves them."""

import contextlib
import functools
import gzip
import hashlib
import http.server
import io
import socket
import tarfile
import threading
from pathlib import Path

import numpy as np
from tensorflow_datasets.core.download.checksums import UrlInfo
from tensorflow_datasets.image_classification import cifar

from experiments import data, tfds_cifar, tfds_idx

MNIST_SIZES = (20, 10, 2)  # training and test examples, of the smallest class
CIFAR_SIZES = {"cifar10": (50, 20, 5), "cifar100": (200, 100, 2)}
STOCK_CIFAR = {"cifar10": cifar.Cifar10, "cifar100": cifar.Cifar100}


def packed(array, code=8):
    """Write an IDX file, independently of the reader: big-endian struct, gzip."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return gzip.compress(
        bytes([0, 0, code, array.ndim]) + sizes + array.tobytes(), mtime=0
    )


def mnist_package(monkeypatch, folder):
    """Write 20 training and 10 test examples; FashionMNIST takes them for Debian's."""
    random = np.random.RandomState(7)
    folder.mkdir()
    for split, size in (("train", 20), ("test", 10)):
        images, labels = tfds_idx.FILES[split]
        pixels = random.randint(0, 256, (size, 28, 28)).astype(np.uint8)
        (folder / images).write_bytes(packed(pixels))
        (folder / labels).write_bytes(packed(np.arange(size, dtype=np.uint8) % 10))
    trust_package(monkeypatch, folder)
    for name in ("fashion_mnist", "mnist"):
        monkeypatch.setitem(data._SIZES, name, MNIST_SIZES)
    return folder


def trust_package(monkeypatch, folder):
    """Make a folder of tiny files the verified package of Fashion-MNIST."""
    contents = {p.name: tfds_idx._official_bytes(p) for p in folder.iterdir()}
    trust(monkeypatch, tfds_idx.FashionMNIST, contents)
    monkeypatch.setattr(tfds_idx.FashionMNIST, "package_dir", folder)


def trust(monkeypatch, builder, contents, url=None):
    """Make the builder expect these contents: name to bytes."""
    if url is not None:
        monkeypatch.setattr(builder, "URL", url, raising=False)
    infos = {
        builder.URL + name: UrlInfo(
            size=len(content),
            checksum=hashlib.sha256(content).hexdigest(),
            filename=name,
        )
        for name, content in contents.items()
    }
    monkeypatch.setattr(builder, "url_infos", infos)


def cifar_arrays(name):
    """Return {split: (labels (N, 1 or 2), images (N, 32, 32, 3))}."""
    random = np.random.RandomState(8)
    train, test, _ = CIFAR_SIZES[name]
    arrays = {}
    for split, size in (("train", train), ("test", test)):
        fine = np.arange(size) % data.ABOUT[name].classes
        labels = [fine] if name == "cifar10" else [fine // 5, fine]
        images = random.randint(0, 256, (size, 32, 32, 3)).astype(np.uint8)
        arrays[split] = np.stack(labels, 1).astype(np.uint8), images
    return arrays


def cifar_files(name):
    """Return the files of the official archive: path to bytes."""
    splits = {
        split: b"".join(
            label.tobytes() + image.transpose(2, 0, 1).tobytes()
            for label, image in zip(*arrays, strict=True)
        )
        for split, arrays in cifar_arrays(name).items()
    }
    if name == "cifar100":
        return {
            "cifar-100-binary/coarse_label_names.txt": lines("group", 20),
            "cifar-100-binary/fine_label_names.txt": lines("thing", 100),
            "cifar-100-binary/train.bin": splits["train"],
            "cifar-100-binary/test.bin": splits["test"],
        }
    train, fifth = splits["train"], len(splits["train"]) // 5
    return {
        "cifar-10-batches-bin/batches.meta.txt": lines("thing", 10) + b"\n",
        **{
            f"cifar-10-batches-bin/data_batch_{i + 1}.bin": train[i * fifth :][:fifth]
            for i in range(5)
        },
        "cifar-10-batches-bin/test_batch.bin": splits["test"],
    }


def lines(word, number):
    return "".join(f"{word}{i}\n" for i in range(number)).encode()


def archive(files):
    """Write a tar.gz archive of {path: bytes}, its folder first."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz", compresslevel=1) as tar:
        folder = tarfile.TarInfo(next(iter(files)).split("/")[0])
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for path, file in files.items():
            info = tarfile.TarInfo(path)
            info.size = len(file)
            tar.addfile(info, io.BytesIO(file))
    return content.getvalue()


def cifar_archive(monkeypatch, name, data_dir, content):
    """Put an archive into TFDS's folder of manual downloads; the builder trusts it."""
    file = Path(data_dir, "downloads/manual", cifar_name(name))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    trust_cifar(monkeypatch, name, content)
    return file


def trust_cifar(monkeypatch, name, content, url="http://127.0.0.1:1/"):
    """Make a CIFAR builder expect this archive, at this site, of these sizes."""
    builder = tfds_cifar.BUILDERS[name]
    trust(monkeypatch, builder, {cifar_name(name): content}, url=url)
    stock = STOCK_CIFAR[name]._cifar_info
    monkeypatch.setattr(
        builder,
        "_cifar_info",
        property(lambda self: stock.fget(self)._replace(url=url + cifar_name(name))),
    )
    monkeypatch.setitem(data._SIZES, name, CIFAR_SIZES[name])


def cifar_name(name):
    return {
        "cifar10": "cifar-10-binary.tar.gz",
        "cifar100": "cifar-100-binary.tar.gz",
    }[name]


def left_over(data_dir):
    """Return what a failed preparation left that a later start could take for data."""
    return [p for p in Path(data_dir).rglob("*") if "3.0." in p.name]


def rows(split):
    """Return one bytes per example, label last, to compare splits as sets."""
    return [
        image.tobytes() + bytes([label])
        for image, label in zip(split.inputs, split.labels, strict=True)
    ]


def cut_network(monkeypatch):
    """Let no name be found; return the list of those that were asked for."""
    asked = []

    def refuse(*args, **kwargs):
        asked.append(args)
        raise socket.gaierror("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return asked


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serve files, and note what was asked for instead of printing it."""

    def log_request(self, *args):
        self.server.asked.append(self.path.removeprefix("/"))

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def serve(folder):
    """Serve the files of a folder as the download site does."""
    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.url = f"http://127.0.0.1:{server.server_port}/"
        server.asked = []
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()
