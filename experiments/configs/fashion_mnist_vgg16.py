"""VGG-16 with BatchNorm on Fashion-MNIST.

    make train CONFIG=fashion_mnist_vgg16
    python -m experiments.study fashion_mnist_vgg16 --jobs 8

14,714,432 kernel weights; 20 epochs in bfloat16, for a GPU. One seed (1000) each on
validation, last epoch, one H100, from results/fashion_mnist_vgg16.json:

| penalty | remaining | validation accuracy (%) |
|--:|--:|--:|
| dense, learning rate 0.05 / 0.1 | 100 % | 94.6 / 94.5 |
| 1e-8 | 54.8 % | 94.7 |
| 3e-8 | 18.7 % | 94.7 |
| 7e-8 | 8.0 % | 94.5 |
| 1.6e-7 | 3.3 % | 94.2 |
| 4e-7 | 1.1 % | 94.1 |
| 1e-6 | 0.3 % | 93.3 |

On the test set: not run yet.
"""

import dataclasses

from experiments.config import Study
from experiments.configs import fashion_mnist_resnet20

CONFIG = dataclasses.replace(
    fashion_mnist_resnet20.CONFIG, model="vgg16", epochs=20, penalty=1.6e-7
)
STUDY = Study(
    targets=(0.90, 0.95, 0.98),
    penalties=(3e-8, 7e-8, 1.6e-7, 4e-7),
    learning_rates=(0.05, 0.1),
    seeds=1,
)
