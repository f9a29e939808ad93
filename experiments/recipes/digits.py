"""What the recipes train on: 4,000 digits as vectors or images, and 1,000 to test."""

import functools
from collections.abc import Callable, Iterator

import jax.numpy as jnp
import numpy as np

from experiments.data import load

Digits = tuple[np.ndarray, np.ndarray]  # (n, 28, 28, 1) float32 in [-1, 1]; int32


def batches(steps: int, size: int = 64, seed: int = 0) -> Iterator[Digits]:
    """Yield random batches of the training digits."""
    images, labels = _digits()[0]
    random = np.random.default_rng(seed)
    for _ in range(steps):
        chosen = random.integers(0, len(labels), size)
        yield images[chosen], labels[chosen]


def accuracy(logits: Callable[[np.ndarray], jnp.ndarray]) -> float:
    """Return the fraction of the test digits that a function classifies, 0..1."""
    images, labels = _digits()[1]
    return float(np.mean(np.argmax(logits(images), -1) == labels))


@functools.cache
def _digits() -> tuple[Digits, Digits]:
    train, _, test = load("mnist5k", validation=0)
    first, second = (
        (split.inputs.astype(np.float32) / 127.5 - 1, split.labels)
        for split in (train, test)
    )
    return first, second
