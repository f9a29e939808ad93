"""VGG-16 with BatchNorm on Fashion-MNIST.

    make train CONFIG=fashion_mnist_vgg16
    python -m experiments.study fashion_mnist_vgg16 --compare --jobs 8

14,714,432 kernel weights; 20 epochs in bfloat16, for a GPU. Side by side with other
methods, on the test set: results/compare_fashion_mnist_vgg16.json; SCL is 0.2 points
below dense with 5 % of the weights, and 0.1 with 2 %.

With fixed penalties, one seed (1000) each on validation, last epoch (`--sparsity 0
--penalty ... --learning-rate 0.1 --mask-learning-rate 1e-4`):

| penalty | remaining | validation accuracy (%) |
|--:|--:|--:|
| dense, learning rate 0.05 / 0.1 | 100 % | 94.6 / 94.5 |
| 1e-8 | 54.8 % | 94.7 |
| 3e-8 | 18.7 % | 94.7 |
| 7e-8 | 8.0 % | 94.5 |
| 1.6e-7 | 3.3 % | 94.2 |
| 4e-7 | 1.1 % | 94.1 |
| 1e-6 | 0.3 % | 93.3 |
"""

import dataclasses

from experiments.config import Study
from experiments.configs import fashion_mnist_resnet20
from experiments.spaces import Comparison, pruning_spaces

CONFIG = dataclasses.replace(
    fashion_mnist_resnet20.CONFIG, model="vgg16", epochs=20, learning_rate=0.05
)
STUDY = Study(targets=(0.90, 0.95, 0.98), learning_rates=(0.05,))
COMPARISON = Comparison(
    targets=(0.95, 0.98),
    spaces=pruning_spaces(
        (0.05,), (2e-4, 5e-4), methods=("scl", "scl_macs", "gmp", "str", "rigl")
    ),
    seeds=1,
    tested=3,
)
