"""WRN-22-2 on CIFAR-10.

    make train CONFIG=cifar10_wrn22_2

The recipe of Evci et al., arXiv 1911.11134, section 4.2: SGD with momentum, batches
of 128, 250 epochs; with a cosine where theirs has steps.
No machine of ours holds the data: not run.
"""

import dataclasses

from experiments.config import Study
from experiments.configs import cifar10_resnet20

CONFIG = dataclasses.replace(
    cifar10_resnet20.CONFIG,
    model="wrn22_2",
    epochs=250,
    weight_decay=5e-4,
)
STUDY = Study(
    targets=(0.90, 0.95, 0.98),
    learning_rates=(0.05, 0.1),
    seeds=1,
)
