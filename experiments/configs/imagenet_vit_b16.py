"""ViT-B/16 on ImageNet.

    make train CONFIG=imagenet_vit_b16 ARGS="--data-dir FOLDER --out FOLDER"

The recipe of imagenet_vit_s16 with the larger network, which the benchmark of the step
times too. No machine of ours holds the data: not run.
"""

import dataclasses

from experiments.config import Study
from experiments.configs import imagenet_vit_s16

CONFIG = dataclasses.replace(imagenet_vit_s16.CONFIG, model="vit_b16")
STUDY = Study(
    targets=(0.80, 0.90),
    learning_rates=(1e-3,),
    seeds=1,
)
