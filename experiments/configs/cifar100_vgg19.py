"""VGG-19 with BatchNorm on CIFAR-100.

    make train CONFIG=cifar100_vgg19

The recipe of cifar10_vgg16 (Liu et al., arXiv 1708.06519).
No machine of ours holds the data: not run.
"""

import dataclasses

from experiments.config import Study
from experiments.configs import cifar10_vgg16

CONFIG = dataclasses.replace(cifar10_vgg16.CONFIG, dataset="cifar100", model="vgg19")
STUDY = Study(
    targets=(0.90, 0.95, 0.98),
    learning_rates=(0.05, 0.1),
    seeds=1,
)
