"""Networks, one family a file, as Flax modules from images to logits."""

from collections.abc import Callable

from flax import linen as nn

from experiments.models.lenet import LeNet5, LeNet300

MODELS: dict[str, Callable[[], nn.Module]] = {"lenet300": LeNet300, "lenet5": LeNet5}
