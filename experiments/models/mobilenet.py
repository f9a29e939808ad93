"""MobileNet, version 1: depthwise convolutions of 3x3, then of 1x1 over channels.

Source: Howard, Zhu, Chen, Kalenichenko, Wang, Weyand, Andreetto, Adam, "MobileNets:
efficient convolutional neural networks for mobile vision applications", 2017,
arXiv 1704.04861, table 1; there the last depthwise convolution is listed with stride
2 and an output as large as its input, which needs stride 1.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from experiments.models.base import Model
from experiments.models.conv import check_images, conv, norm

# The features and the stride of each depthwise convolution and the one after it.
_BLOCKS = (
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    *[(512, 1)] * 5,
    (1024, 2),
    (1024, 1),
)


class MobileNetV1(Model):
    """Classify images with 27 convolutions, 13 of them depthwise, and a linear layer.

    4,209,088 kernel weights and 568,740,352 MACs per example on 224x224x3 images of
    1,000 classes. Where a side is less than 64 pixels, the first convolution has
    stride 1; the parameters are the same.

    A depthwise kernel, (3, 3, 1, C), has one input for all of its features, so that
    `next_layer` leaves out what it reads; what it makes is read by a 1x1 kernel.
    """

    next_layer: ClassVar[dict[str, str]] = {
        **{f"depthwise_{i}/kernel": f"pointwise_{i}/kernel" for i in range(13)},
        "pointwise_12/kernel": "Dense_0/kernel",
    }

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array, *, train: bool = False) -> jax.Array:
        """Return logits, shape (B, classes)."""
        check_images(self, x_BxHxWxC)
        small, dtype = min(x_BxHxWxC.shape[1:3]) < 64, self.dtype
        x = conv(32, 3, stride=1 if small else 2, dtype=dtype)(x_BxHxWxC)
        x = nn.relu(norm(train, dtype)(x))
        for i, (features, stride) in enumerate(_BLOCKS):
            channels = x.shape[-1]
            depthwise = conv(
                channels,
                3,
                stride=stride,
                groups=channels,
                dtype=dtype,
                name=f"depthwise_{i}",
            )
            x = nn.relu(norm(train, dtype)(depthwise(x)))
            x = conv(features, 1, dtype=dtype, name=f"pointwise_{i}")(x)
            x = nn.relu(norm(train, dtype)(x))
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(self.classes, dtype=dtype)(x).astype(jnp.float32)
