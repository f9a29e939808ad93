"""ViT-S/16 on ImageNet.

    make train CONFIG=imagenet_vit_s16 ARGS="--data-dir FOLDER --out FOLDER"

4,241,218,560 MACs in the kernels. The recipe of Beyer, Zhai, Kolesnikov, arXiv
2205.01580, but for RandAugment and mixup, which are not here: AdamW, batches of 1024,
90 epochs, eight of them warm-up, cosine, Inception crops. No machine of ours holds the
data: not run.
"""

from experiments.config import Config, Study

CONFIG = Config(
    dataset="imagenet2012",
    model="vit_s16",
    validation=10_000,
    epochs=90,
    batch_size=1024,
    optimizer="adamw",
    learning_rate=1e-3,
    warmup_epochs=8,
    weight_decay=0.1,
    compute="bfloat16",
    sparsity=0.9,
    look_every=250,
    checkpoint_every=600,
)
STUDY = Study(
    targets=(0.80, 0.90),
    learning_rates=(1e-3,),
    seeds=1,
)
