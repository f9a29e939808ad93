"""LeNet-5-Caffe on Fashion-MNIST.

    make train CONFIG=fashion_mnist_lenet5
    python -m experiments.study fashion_mnist_lenet5 --compare --jobs 16

430,500 kernel weights, 2,293,000 MACs; 20 epochs, five to ten minutes a run on two
CPU cores. The learning rate 0.1 diverges, dense as well as SCL. With it at 0.03,
`--seeds 2` left in metrics.jsonl, last epoch, on one H100:

| penalty | remaining | validation accuracy (%) |
|--:|--:|--:|
| dense | 100 % | 91.77 ± 0.55 |
| 1e-6 | 10.97 % | 91.53 ± 0.35 |
| 3e-6 | 4.20 % | 91.61 ± 0.37 |
| 1e-5 | 1.24 % | 90.46 ± 0.08 |

(With norm_decay 0 and pruned_gradient 0, the defaults then.) Side by side with other
methods, on the test set: results/compare_fashion_mnist_lenet5.json; 508 of its runs, 65
more and 77 of ResNet-20 took two H100s 16 minutes, under CUDA's MPS.
"""

from experiments.config import Config, Study
from experiments.spaces import Comparison, pruning_spaces

CONFIG = Config(
    dataset="fashion_mnist",
    model="lenet5",
    pixels="unit",
    validation=5000,
    epochs=20,
    learning_rate=0.03,
    penalty=3e-6,
)
STUDY = Study(
    targets=(0.95, 0.985),
    penalties=(3e-6, 5e-6, 1e-5),
    learning_rates=(0.01, 0.03),
    pixels=("unit",),
)
COMPARISON = Comparison(
    targets=(0.90, 0.95, 0.98, 0.99, 0.995),
    spaces=pruning_spaces(learning_rates=(0.01, 0.03), weight_decays=(1e-4,)),
    tested=5,
)
