"""WRN-22-2 on Fashion-MNIST.

    make train CONFIG=fashion_mnist_wrn22_2

1,076,624 kernel weights. The recipe of ResNet-20 (fashion_mnist_resnet20); for a GPU.
Penalty and learning rates: not chosen, not run.
"""

from experiments.config import Config, Study

CONFIG = Config(
    dataset="fashion_mnist",
    model="wrn22_2",
    augment="crop_flip",
    validation=5000,
    epochs=30,
    learning_rate=0.1,
    weight_decay=5e-4,
    compute="bfloat16",
    penalty=7e-7,
    mask_learning_rate=1e-4,
)
STUDY = Study(
    targets=(0.90, 0.95, 0.98),
    penalties=(3e-7, 7e-7, 1.5e-6, 3e-6),
    learning_rates=(0.05, 0.1),
    seeds=1,
)
