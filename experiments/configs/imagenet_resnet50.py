"""ResNet-50 on ImageNet.

    make train CONFIG=imagenet_resnet50 ARGS="--data-dir FOLDER --out FOLDER"

25,502,912 kernel weights, 4,089,184,256 MACs. The recipe of Kusupati et al., arXiv
2002.03231 (STR), which the pruning literature compares with: SGD with momentum, batches
of 256, 100 epochs, five of them warm-up, label smoothing 0.1, cosine, Inception crops.
Several hosts: see the README. No machine of ours holds the data:
not run.
"""

from experiments.config import Config, Study

CONFIG = Config(
    dataset="imagenet2012",
    model="resnet50",
    validation=10_000,
    epochs=100,
    batch_size=256,
    learning_rate=0.256,
    warmup_epochs=5,
    momentum=0.875,
    weight_decay=2**-15,
    label_smoothing=0.1,
    compute="bfloat16",
    sparsity=0.9,
    look_every=500,
    checkpoint_every=600,
)
STUDY = Study(
    targets=(0.80, 0.90, 0.95, 0.98),
    learning_rates=(0.256,),
    seeds=1,
)
