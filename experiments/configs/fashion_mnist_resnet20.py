"""ResNet-20 on Fashion-MNIST.

make train CONFIG=fashion_mnist_resnet20
"""

from experiments.config import Config, Study

CONFIG = Config(
    dataset="fashion_mnist",
    model="resnet20",
    augment="crop_flip",
    validation=5000,
    epochs=30,
    batch_size=128,
    learning_rate=0.1,
    weight_decay=5e-4,
    compute="bfloat16",
    penalty=2.5e-6,
    mask_learning_rate=1e-4,
    seeds=3,
)
STUDY = Study(
    targets=(0.89, 0.95, 0.98),
    penalties=(1.3e-6, 2.5e-6, 8e-6),
    learning_rates=(0.05, 0.1, 0.2),
    seeds=1,
)
