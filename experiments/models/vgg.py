"""VGG for small images: convolutions of 3x3, normalized, and one linear layer.

Source: Simonyan, Zisserman, "Very deep convolutional networks for large-scale image
recognition", ICLR 2015, arXiv 1409.1556; in the form of Liu, Li, Shen, Huang, Yan,
Zhang, "Learning efficient convolutional networks through network slimming", ICCV
2017, that the pruning literature uses: BatchNorm, four max-pools, global average.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from experiments.models.base import Model
from experiments.models.conv import check_images, conv, norm


def _next_layer(convolutions: int) -> dict[str, str]:
    paths = [f"Conv_{i}/kernel" for i in range(convolutions)]
    return dict(zip(paths, [*paths[1:], "Dense_0/kernel"], strict=True))


class VGG(Model, kw_only=True):
    """Classify images of 16x16 pixels or more.

    Attributes:
      stages: the number of convolutions in each of the stages, at most five, of 64,
        128, 256, 512 and 512 filters; a max-pool is between two stages.
    """

    stages: tuple[int, ...]

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array, *, train: bool = False) -> jax.Array:
        """Return logits, shape (B, classes)."""
        check_images(self, x_BxHxWxC, smallest=16)
        x = x_BxHxWxC
        for stage, convolutions in enumerate(self.stages):
            if stage > 0:
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
            for _ in range(convolutions):
                x = conv(min(64 * 2**stage, 512), 3, dtype=self.dtype)(x)
                x = nn.relu(norm(train, self.dtype)(x))
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(self.classes, dtype=self.dtype)(x).astype(jnp.float32)


class VGG16(VGG):
    """Classify images with 13 convolutions and a linear layer.

    14,715,584 kernel weights and 313,201,664 MACs per example on 32x32x3 images.
    """

    next_layer: ClassVar[dict[str, str]] = _next_layer(13)
    stages: tuple[int, ...] = (2, 2, 3, 3, 3)


class VGG19(VGG):
    """Classify images with 16 convolutions and a linear layer.

    20,024,000 kernel weights and 398,136,320 MACs per example on 32x32x3 images.
    """

    next_layer: ClassVar[dict[str, str]] = _next_layer(16)
    stages: tuple[int, ...] = (2, 2, 4, 4, 4)
