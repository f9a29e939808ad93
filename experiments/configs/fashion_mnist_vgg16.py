"""VGG-16 with BatchNorm on Fashion-MNIST.

make train CONFIG=fashion_mnist_vgg16
"""

from experiments.config import Config, Study

CONFIG = Config(
    dataset="fashion_mnist",
    model="vgg16",
    augment="crop_flip",
    validation=5000,
    epochs=20,
    batch_size=128,
    learning_rate=0.1,
    weight_decay=5e-4,
    compute="bfloat16",
    penalty=1.6e-7,
    mask_learning_rate=1e-4,
    seeds=3,
)
STUDY = Study(
    targets=(0.90, 0.95, 0.98),
    penalties=(3e-8, 7e-8, 1.6e-7, 4e-7),
    learning_rates=(0.05, 0.1),
    seeds=1,
)
