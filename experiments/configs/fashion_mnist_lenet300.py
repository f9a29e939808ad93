"""LeNet-300-100 on Fashion-MNIST.

placeholder
"""

from experiments.config import Config, Study

CONFIG = Config(
    dataset="fashion_mnist",
    model="lenet300",
    pixels="unit",
    validation=5000,
    epochs=20,
    penalty=1.7e-6,
    seeds=3,
)
STUDY = Study(
    targets=(0.94, 0.988),
    penalties=(1.7e-6, 2e-6, 1.1e-5, 1.2e-5, 1.3e-5),
    learning_rates=(0.03, 0.05, 0.1),
    pixels=("unit", "standardized"),
    seeds=3,
)
