"""VGG-19 with BatchNorm on CIFAR-100.

    make train CONFIG=cifar100_vgg19

The recipe of cifar10_vgg16 (Liu et al., arXiv 1708.06519).
Penalty: not chosen. No machine of ours holds the data: not run.
"""

from experiments.config import Config, Study

CONFIG = Config(
    dataset="cifar100",
    model="vgg19",
    augment="crop_flip",
    validation=5000,
    epochs=160,
    learning_rate=0.1,
    weight_decay=5e-4,
    compute="bfloat16",
    penalty=7e-8,
    mask_learning_rate=1e-4,
    seeds=3,
)
STUDY = Study(
    targets=(0.90, 0.95, 0.98),
    penalties=(3e-8, 7e-8, 1.6e-7, 4e-7),
    learning_rates=(0.05, 0.1),
    seeds=1,
)
