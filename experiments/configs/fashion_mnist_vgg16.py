"""VGG-16 with BatchNorm on Fashion-MNIST.

    make train CONFIG=fashion_mnist_vgg16
    python -m experiments.study fashion_mnist_vgg16 --jobs 8

14,714,432 kernel weights; 20 epochs in bfloat16, for a GPU.
"""

import dataclasses

from experiments.config import Study
from experiments.configs import fashion_mnist_resnet20

CONFIG = dataclasses.replace(
    fashion_mnist_resnet20.CONFIG, model="vgg16", epochs=20, learning_rate=0.05
)
STUDY = Study(targets=(0.90, 0.95, 0.98), learning_rates=(0.05,))
