"""MobileNetV1 on ImageNet.

    make train CONFIG=imagenet_mobilenet_v1 ARGS="--data-dir FOLDER --out FOLDER"

4,209,088 kernel weights, 568,740,352 MACs. The recipe of Kusupati et al., arXiv
2002.03231 (STR), which the pruning literature compares with: SGD with momentum, batches
of 256, 100 epochs, five of them warm-up, label smoothing 0.1, cosine, Inception crops.
Several hosts: see the README. No machine of ours holds the data:
not run.
"""

import dataclasses

from experiments.config import Study
from experiments.configs import imagenet_resnet50

CONFIG = dataclasses.replace(imagenet_resnet50.CONFIG, model="mobilenet_v1")
STUDY = Study(
    targets=(0.75, 0.90),
    learning_rates=(0.256,),
    seeds=1,
)
