"""LeNet-300-100 on 5,000 real MNIST digits: the quick start.

    make train
    python -m experiments.study mnist5k_lenet300

266,200 kernel weights and as many MACs. Dense and SCL with three seeds train in under
a minute on two CPU cores. The study's test: SCL prunes 0.977 of the weights and
classifies 95.0 % of the test digits, dense 94.4 % (the README's table, from
results/mnist5k_lenet300.json).

What to know before quoting that. The digits are few, and how good the dense network
is depends on details. With `--validation 1000 --pixels unit --seeds 8` it reached
94.7 ± 0.2 % on those digits, and SCL at 2.4 % of the weights (`--penalty 5e-6`)
94.5 ± 0.2 %; standardized, with `--learning-rate 0.07 --seeds 10`, dense reached
94.9 ± 0.3 % and SCL at 3.8 % of the weights (`--penalty 1e-6 --mask-learning-rate
1e-3`) 94.6 ± 0.3 %. SCL is on a par with dense here; it is ahead where dense overfits
most.
"""

from experiments.config import Config, Study

CONFIG = Config(
    dataset="mnist5k",
    model="lenet300",
    validation=200,
    epochs=40,
    batch_size=64,
    sparsity=0.98,
    seeds=3,
)
STUDY = Study(
    targets=(0.95, 0.98, 0.99),
    learning_rates=(0.03, 0.05, 0.1),
    seeds=5,
)
