"""What the convolutional networks of the zoo share."""

from typing import Any

import jax
from flax import linen as nn


def conv(
    features: int,
    size: int,
    *,
    stride: int = 1,
    groups: int = 1,
    dtype: Any,
    name: str | None = None,
) -> nn.Conv:
    """Return a convolution without bias, for a BatchNorm to follow.

    size // 2 zeros on every side: an odd `size` makes ceil(H / stride) of H pixels.

    Source: He, Zhang, Ren, Sun, "Delving deep into rectifiers", ICCV 2015,
    arXiv 1502.01852, for the start values (variance 2 / inputs of a feature).
    """
    return nn.Conv(
        features,
        (size, size),
        strides=stride,
        padding=size // 2,
        feature_group_count=groups,
        use_bias=False,
        kernel_init=nn.initializers.he_normal(),
        dtype=dtype,
        name=name,
    )


def norm(train: bool, dtype: Any) -> nn.BatchNorm:
    """Return a batch normalization; `train` as in `Model`."""
    return nn.BatchNorm(use_running_average=not train, momentum=0.9, dtype=dtype)


def check_images(model: nn.Module, x: jax.Array, smallest: int = 1) -> None:
    """Refuse what is no batch of images with sides of at least `smallest` pixels.

    Raises:
      ValueError: if x is not (B, H, W, C) with H, W >= `smallest`.
    """
    if x.ndim != 4 or min(x.shape[1:3]) < smallest:
        raise ValueError(
            f"{type(model).__name__}: images must be (B, H, W, C) with H and W of at "
            f"least {smallest}, got shape {x.shape}"
        )


def next_in_block(block: str, blocks: int, convolutions: int) -> dict[str, str]:
    """Return the `next_layer` of residual blocks `block`_0, `block`_1, ...

    A block's last convolution is left out, as its features are added to the
    shortcut, and so is what comes before a block: it has several readers.
    """
    return {
        f"{block}_{i}/Conv_{j}/kernel": f"{block}_{i}/Conv_{j + 1}/kernel"
        for i in range(blocks)
        for j in range(convolutions - 1)
    }
