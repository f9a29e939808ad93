"""A decoder-only language model on Python's own reference, by character.

    make train CONFIG=python_docs_language_model

798,848 kernel weights. The text is the language reference that every Python carries in
pydoc_data.topics; accuracy is that of the next character, of 97. The text differs
between versions of Python, so that results compare within one.

Two CPU cores, Python 3.11, 14 to 21 s an epoch, one seed, last epoch, test texts: dense
59.1 %, SCL 59.9 % with 43.1 % of the weights and as much of the MACs. Dense overfits
here (training accuracy 69.5 %): what SCL is ahead of is that. A run was taken up twice
after it had been killed.
"""

from experiments.config import Config, Study

CONFIG = Config(
    dataset="python_docs",
    model="language_model",
    validation=200,
    epochs=20,
    batch_size=32,
    optimizer="adamw",
    learning_rate=1e-3,
    warmup_epochs=1,
    weight_decay=0.1,
    penalty=1e-6,
)
STUDY = Study(
    targets=(0.80, 0.90),
    penalties=(3e-7, 1e-6, 3e-6),
    learning_rates=(1e-3, 2e-3),
    seeds=1,
)
