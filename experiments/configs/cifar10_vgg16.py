"""VGG-16 with BatchNorm on CIFAR-10.

    make train CONFIG=cifar10_vgg16

The recipe that is usual in pruning (Liu et al., arXiv 1708.06519): SGD with momentum,
160 epochs, crops and mirrors; batches of 128, with a cosine where theirs has two steps.
Penalty: not chosen. No machine of ours holds the data: not run.
"""

from experiments.config import Config, Study

CONFIG = Config(
    dataset="cifar10",
    model="vgg16",
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
