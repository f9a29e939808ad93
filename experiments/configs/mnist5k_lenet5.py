"""LeNet-5-Caffe on 5,000 real MNIST digits.

    make train CONFIG=mnist5k_lenet5

430,500 kernel weights, 2,293,000 MACs; 20 epochs, about a minute a run on two CPU
cores. The learning rate 0.1 diverges, dense as well as SCL, where the pixels are not
standardized. With it at 0.03, `--validation 1000 --seeds 3` left in metrics.jsonl, last
epoch, on one H100:

| penalty | remaining | validation accuracy (%) |
|--:|--:|--:|
| dense | 100 % | 96.67 ± 0.26 |
| 1e-6 | 5.13 % | 96.37 ± 0.33 |
| 3e-6 | 2.87 % | 96.90 ± 0.00 |
| 1e-5 | 1.39 % | 96.50 ± 0.08 |

On the test set: not run as a study.
"""

from experiments.config import Config, Study

CONFIG = Config(
    dataset="mnist5k",
    model="lenet5",
    validation=200,
    epochs=20,
    batch_size=64,
    learning_rate=0.03,
    penalty=3e-6,
)
STUDY = Study(
    targets=(0.97,),
    penalties=(3e-6, 5e-6, 1e-5),
    learning_rates=(0.01, 0.03),
)
