"""ResNet-56 on CIFAR-10.

    make train CONFIG=cifar10_resnet56

The recipe of He et al., arXiv 1512.03385, section 4.2, as for cifar10_resnet20.
Penalty: not chosen. No machine of ours holds the data: not run.
"""

from experiments.config import Config, Study

CONFIG = Config(
    dataset="cifar10",
    model="resnet56",
    augment="crop_flip",
    validation=5000,
    epochs=164,
    learning_rate=0.1,
    weight_decay=1e-4,
    compute="bfloat16",
    penalty=4e-7,
    mask_learning_rate=1e-4,
    seeds=3,
)
STUDY = Study(
    targets=(0.90, 0.95, 0.98),
    penalties=(2e-7, 4e-7, 7e-7, 1.5e-6, 3e-6),
    learning_rates=(0.05, 0.1),
    seeds=1,
)
