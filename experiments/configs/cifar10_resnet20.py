"""ResNet-20 on CIFAR-10.

    make train CONFIG=cifar10_resnet20

The recipe of He et al., arXiv 1512.03385, section 4.2: SGD with momentum, batches of
128, 64,000 steps, crops and mirrors; with a cosine where theirs has two steps.
No machine of ours holds the data: not run.
"""

from experiments.config import Config, Study

CONFIG = Config(
    dataset="cifar10",
    model="resnet20",
    augment="crop_flip",
    validation=5000,
    epochs=164,
    learning_rate=0.1,
    weight_decay=1e-4,
    compute="bfloat16",
    sparsity=0.9,
    seeds=3,
)
STUDY = Study(
    targets=(0.90, 0.95, 0.98),
    learning_rates=(0.05, 0.1),
    seeds=1,
)
