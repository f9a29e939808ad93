"""What every network of the zoo has in common."""

from typing import Any, ClassVar

import jax.numpy as jnp
from flax import linen as nn


class Model(nn.Module):
    """A network from inputs to logits, called as `model(x, *, train=False)`.

    Inputs x are scaled images (B, H, W, C) or tokens (B, T), integers; the logits are
    float32, (B, classes) or (B, T, classes). With `train`, normalization uses the
    statistics of the batch and notes them in the collection `batch_stats`, which the
    caller makes mutable.

    Parameters are float32; they and what they meet are cast to `dtype`. Kernels are
    called `kernel`, so that `scl_jax.kernels` masks them.

    Attributes:
      classes: the number of logits.
      dtype: the precision of the computation, float32 or bfloat16.
      next_layer: kernel path -> path of the only kernel that reads its features,
        for `scl_jax.report`; what several kernels read, or none, is left out.
      feature_axes: of the kernels, as `scl_jax.normalize_by_feature` takes them.
    """

    next_layer: ClassVar[dict[str, str]] = {}
    feature_axes: ClassVar[Any] = -1
    classes: int = 10
    dtype: Any = jnp.float32
