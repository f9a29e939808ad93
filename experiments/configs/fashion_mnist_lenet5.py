"""LeNet-5-Caffe on Fashion-MNIST.

placeholder
"""

from experiments.config import Config, Study

CONFIG = Config(
    dataset="fashion_mnist",
    model="lenet5",
    validation=5000,
    epochs=20,
    learning_rate=0.03,
    penalty=1e-6,
)
STUDY = Study(
    targets=(0.95,),
    penalties=(1e-6, 3e-6),
    learning_rates=(0.03,),
)
