"""A small vision transformer with patches of 4x4 on Fashion-MNIST.

    make train CONFIG=fashion_mnist_vit_ti4
    python -m experiments.study fashion_mnist_vit_ti4 --compare --jobs 6

2,659,200 kernel weights; 30 epochs in bfloat16, for a GPU. AdamW and warm-up as vision
transformers need them. The features of query, key and value are (head, unit) pairs.
Side by side with other methods, on the test set:
results/compare_fashion_mnist_vit_ti4.json; SCL is 1.2 points below dense with 5 % of
the weights, and 2.0 with 2 %.

The learning rate, 1e-3, was not chosen: no other was tried.
"""

from experiments.config import Config, Study
from experiments.spaces import Comparison, pruning_spaces

CONFIG = Config(
    dataset="fashion_mnist",
    model="vit_ti4",
    augment="crop_flip",
    validation=5000,
    epochs=30,
    optimizer="adamw",
    learning_rate=1e-3,
    warmup_epochs=3,
    weight_decay=0.05,
    compute="bfloat16",
    sparsity=0.9,
)
STUDY = Study(
    targets=(0.90, 0.95, 0.98),
    learning_rates=(5e-4, 1e-3),
    seeds=1,
)
COMPARISON = Comparison(
    targets=(0.95, 0.98),
    spaces=pruning_spaces((1e-3,), (0.05, 0.2), methods=("scl", "gmp", "str", "rigl")),
    seeds=1,
    tested=3,
)
