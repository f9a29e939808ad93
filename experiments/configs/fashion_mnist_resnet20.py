"""ResNet-20 on Fashion-MNIST.

    make train CONFIG=fashion_mnist_resnet20
    python -m experiments.study fashion_mnist_resnet20 --jobs 14

268,048 kernel weights, 30,821,248 MACs; 30 epochs in bfloat16, for a GPU (convolutions
in bfloat16 are very slow on a CPU: there, `--compute float32`).
"""

from experiments.config import Config, Study

CONFIG = Config(
    dataset="fashion_mnist",
    model="resnet20",
    augment="crop_flip",
    validation=5000,
    epochs=30,
    learning_rate=0.1,
    weight_decay=5e-4,
    compute="bfloat16",
    sparsity=0.95,
    seeds=3,
)
STUDY = Study(targets=(0.90, 0.95, 0.98), learning_rates=(0.1,))
