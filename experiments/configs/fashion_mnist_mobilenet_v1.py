"""MobileNetV1 on Fashion-MNIST.

    make train CONFIG=fashion_mnist_mobilenet_v1

3,194,752 kernel weights; stride 1 in the stem, for images this small. Depthwise kernels
are masked like all others. The recipe of ResNet-20 (fashion_mnist_resnet20); for a GPU.
Learning rates: not chosen, not run.
"""

import dataclasses

from experiments.config import Study
from experiments.configs import fashion_mnist_resnet20

CONFIG = dataclasses.replace(
    fashion_mnist_resnet20.CONFIG, model="mobilenet_v1", seeds=1
)
STUDY = Study(
    targets=(0.90, 0.95, 0.98),
    learning_rates=(0.05, 0.1),
    seeds=1,
)
