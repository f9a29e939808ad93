"""VGG-16 with BatchNorm on CIFAR-10.

    make train CONFIG=cifar10_vgg16

The recipe that is usual in pruning (Liu et al., arXiv 1708.06519): SGD with momentum,
160 epochs, crops and mirrors; batches of 128, with a cosine where theirs has two steps.
No machine of ours holds the data: not run.
"""

import dataclasses

from experiments.config import Study
from experiments.configs import cifar10_resnet20

CONFIG = dataclasses.replace(
    cifar10_resnet20.CONFIG, model="vgg16", epochs=160, weight_decay=5e-4
)
STUDY = Study(
    targets=(0.90, 0.95, 0.98),
    learning_rates=(0.05, 0.1),
    seeds=1,
)
