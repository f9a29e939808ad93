"""LeNet-5-Caffe on 5,000 real MNIST digits.

placeholder
"""

from experiments.config import Config, Study

CONFIG = Config(
    dataset="mnist5k",
    model="lenet5",
    validation=200,
    epochs=20,
    batch_size=64,
    learning_rate=0.03,
    penalty=1e-6,
)
STUDY = Study(
    targets=(0.975,),
    penalties=(1e-6, 2e-6, 5e-6),
    learning_rates=(0.03,),
)
