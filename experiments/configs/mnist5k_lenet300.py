"""LeNet-300-100 on 5,000 real MNIST digits: the quick start.

placeholder
"""

from experiments.config import Config, Study

CONFIG = Config(
    dataset="mnist5k",
    model="lenet300",
    validation=200,
    epochs=40,
    batch_size=64,
    penalty=1.2e-6,
    seeds=3,
)
STUDY = Study(
    targets=(0.975,),
    penalties=(7e-7, 1e-6, 1.2e-6, 1.5e-6, 2e-6),
    learning_rates=(0.03, 0.05, 0.1),
    seeds=5,
)
