"""ResNet-56 on CIFAR-10.

    make train CONFIG=cifar10_resnet56

The recipe of He et al., arXiv 1512.03385, section 4.2, as for cifar10_resnet20.
No machine of ours holds the data: not run.
"""

import dataclasses

from experiments.config import Study
from experiments.configs import cifar10_resnet20

CONFIG = dataclasses.replace(cifar10_resnet20.CONFIG, model="resnet56")
STUDY = Study(
    targets=(0.90, 0.95, 0.98),
    learning_rates=(0.05, 0.1),
    seeds=1,
)
