"""A process that shares a tiny study with others: python sharing.py FOLDER [hang].

It says "ready", waits for a line, and then runs the study. With `hang`, it stops for
good after the first checkpoint of its first run, and says "hangs".
"""

import logging
import os
import sys
import time
from pathlib import Path

import numpy as np
from flax import linen as nn

from experiments import book, configs, study, train
from experiments.config import Config, Study
from experiments.data import Dataset, Split
from experiments.models import MODELS, Model

CONFIG = Config(
    dataset="mnist5k",
    model="lenet300",
    validation=10,
    epochs=3,
    batch_size=10,
    penalty=1e-3,
    mask_learning_rate=0.1,
    seeds=2,
    devices=1,
    checkpoint_every=0.0,
)
STUDY = Study(targets=(0.1,), penalties=(1e-3,), learning_rates=(0.1, 1e-4), seeds=1)
RUNS = 3 + 4  # on validation two of dense and one of SCL; two each on the test split


class Linear(Model):
    """One kernel of 7,840 weights."""

    @nn.compact
    def __call__(self, x, *, train=False):
        return nn.Dense(10)(x.reshape(x.shape[0], -1))


class Hanging(train.Checkpoints):
    """Checkpoints whose first one is the last thing that happens."""

    def save(self, step, state, record):
        super().save(step, state, record)
        self.wait()
        print("hangs", flush=True)
        time.sleep(3600)


def split(count):
    """Return made-up images."""
    images = np.random.RandomState(count).randint(0, 256, (count, 28, 28, 1))
    return Split(images.astype(np.uint8), np.arange(count, dtype=np.int32) % 10)


def load(name, *, validation, data_dir=None):
    """Return made-up splits: 40 images to train and validate, 20 to test."""
    return Dataset(split(40 - validation), split(validation), split(20))


def replace(setting):
    """Put the tiny study in the place of the shipped ones, with `setting`."""
    setting(MODELS, "lenet300", Linear)
    setting(vars(configs), "load_config", lambda name: CONFIG)
    setting(vars(configs), "load_study", lambda name: STUDY)
    setting(vars(book), "load", load)
    setting(vars(book), "WAIT", 0.1)


def fill_disk(patch, failing):
    """Let the disk be full in the middle of a "write", or where a file is replaced."""

    def half_written(path, text, **kwargs):
        with path.open("w") as file:
            file.write(text[: len(text) // 2])
        raise OSError("the disk is full")

    def not_replaced(*args):
        raise OSError("the disk is full")

    if failing == "write":
        patch.setattr(Path, "write_text", half_written)
    else:
        patch.setattr(os, "replace", not_replaced)


def main(folder, *hang):
    """Take part in the study."""
    train.log.setLevel(logging.INFO)
    train.log.addHandler(logging.StreamHandler())
    train.log.propagate = False
    replace(lambda names, name, value: names.update({name: value}))
    if hang:
        vars(train)["Checkpoints"] = Hanging
    print("ready", flush=True)
    sys.stdin.readline()
    study.run_study("tiny", folder=Path(folder), scratch=Path(folder) / "scratch")


if __name__ == "__main__":
    main(*sys.argv[1:])
