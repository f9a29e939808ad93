"""The settings of one experiment, and what values they may have."""

import dataclasses
import re
from numbers import Real
from typing import Any, Literal, get_args

import scl_jax
from experiments.data import ABOUT
from experiments.models import MODELS, LanguageModel


@dataclasses.dataclass(frozen=True)
class _Range:
    """An interval of numbers: "[" and "]" are ends that belong to it."""

    low: float
    high: float
    ends: str

    def __contains__(self, x: float) -> bool:
        above = self.low <= x if self.ends[0] == "[" else self.low < x
        below = x <= self.high if self.ends[1] == "]" else x < self.high
        return above and below

    def __str__(self) -> str:
        return f"{self.ends[0]}{self.low}, {self.high}{self.ends[1]}"


def _number(default: Any, low: float, high: float, ends: str = "[)") -> Any:
    """Return a dataclass field with a range."""
    metadata = {"range": _Range(low, high, ends)}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Describe one experiment: data, network, training, connectivity.

    The defaults of the connectivity are the method's; nothing is set per layer.

    Raises:
      ValueError: where a value is out of its range; the message names the range.
    """

    dataset: str  # a name in experiments.data.ABOUT
    model: str  # a name in experiments.models.MODELS
    # What the network sees: pixels from 0 to 1, or with mean 0 and deviation 1.
    pixels: Literal["unit", "standardized"] = "standardized"
    # Side in pixels of what is cut from the images of imagenet2012; 0: as published.
    image_size: int = _number(0, 0, 4096, "[]")
    # Of training images: random shifts by up to 4 pixels, and mirrors, on the device.
    # The images of imagenet2012 are cut and mirrored before they come there.
    augment: Literal["none", "crop_flip"] = "none"
    # Training examples held out for validation; images: a multiple of the classes.
    validation: int = _number(0, 0, 1_000_000)

    epochs: int = _number(20, 1, 100_000)
    batch_size: int = _number(128, 1, 100_000)  # examples, on all devices together
    optimizer: Literal["sgd", "adamw"] = "sgd"  # of the weights
    learning_rate: float = _number(0.1, 0, 100, "()")  # cosine decay to 0
    warmup_epochs: float = _number(0.0, 0, 1000)  # linear, from 0
    momentum: float = _number(0.9, 0, 1)  # of SGD
    weight_decay: float = _number(0.0, 0, 1)  # on kernels; coupled in SGD
    label_smoothing: float = _number(0.0, 0, 1)  # probability given to all classes

    # What is to be pruned at the end: a fraction of the connections, or of what they
    # cost. The penalty is then found while training; 0: it is fixed.
    sparsity: float = _number(0.0, 0, 1)
    penalty: float = _number(1e-6, 0, 1)  # lambda, if fixed: loss per unit of cost
    # What a connection costs: 1, or its MACs per example.
    costs: Literal["connections", "macs"] = "connections"
    weigh: bool = True  # penalize in proportion to the cost; False: all alike
    schedule: Literal["cubic", "linear", "constant"] = "cubic"  # to the sparsity
    # Fractions of the training at which the schedule leaves everything, and at which it
    # has come to the sparsity.
    schedule_begin: float = _number(0.0, 0, 1)
    schedule_end: float = _number(0.7, 0, 1, "(]")
    # Of baselines that prune and grow at intervals: steps between two, and the fraction
    # that RigL drops and grows at first.
    prune_every: int = _number(100, 1, 1_000_000)
    drop_fraction: float = _number(0.3, 0, 1, "()")
    ste: str = "identity"  # or leaky_relu(SLOPE), softplus(SHARPNESS), relu, clipped
    norm: Literal["rms", "l2", "max", "none"] = "rms"  # of mask gradients
    # Of the running mean of squared norms; 0: each gradient is divided by its own.
    norm_decay: float = _number(0.9, 0, 1)
    # The part of its gradient that a pruned weight gets.
    pruned_gradient: float = _number(0.1, 0, 1, "[]")
    mask_learning_rate: float = _number(3e-4, 0, 1000, "()")
    mask_momentum: float = _number(0.9, 0, 1)
    mask_initial: float = _number(0.1, -100, 100)  # start value of mask variables
    mask_dtype: Literal["float32", "bfloat16"] = "float32"
    # Fraction of the training after which the masks stop moving.
    freeze_at: float = _number(0.75, 0, 1, "(]")
    # Connections that every kernel keeps, however it is pruned; 0: it may lose all,
    # but with a sparsity to meet it keeps one.
    minimum_connections: int = _number(0, 0, 2**31)

    # What kernels and activations are multiplied in; parameters stay in float32.
    compute: Literal["float32", "bfloat16"] = "float32"
    devices: int = _number(0, 0, 100_000)  # of all processes together; 0: all there are
    # Devices that share one copy of the weights; the others split the batch.
    model_parallel: int = _number(1, 1, 100_000)
    # Steps between two looks at the training, where it can stop; 0: an epoch.
    look_every: int = _number(0, 0, 2**31)
    # Seconds between two checkpoints, at least, where a folder is given for them.
    checkpoint_every: float = _number(30.0, 0, 1e6)

    seed: int = _number(0, 0, 2**31)  # the first seed
    seeds: int = _number(1, 1, 1001)  # how many seeds: seed, seed + 1, ...

    def __post_init__(self):
        for field in dataclasses.fields(self):
            _check(field, getattr(self, field.name))
        for field, known in (("dataset", ABOUT), ("model", MODELS)):
            if getattr(self, field) not in known:
                raise ValueError(
                    f"{field} must be one of {', '.join(known)}; "
                    f"got {getattr(self, field)!r}"
                )
        if self.image_size and self.dataset != "imagenet2012":
            raise ValueError(
                f"image_size is for imagenet2012, whose images have no size of their "
                f"own; got {self.image_size} for {self.dataset}"
            )
        text = not ABOUT[self.dataset].mean
        if text != issubclass(MODELS[self.model], LanguageModel):
            raise ValueError(
                f"model must read what the data set is made of; {self.dataset} is "
                f"{'text' if text else 'images'}, got {self.model}"
            )
        if self.augment != "none" and (text or self.dataset == "imagenet2012"):
            raise ValueError(
                f"augment must be none for text, and for imagenet2012, whose images "
                f"are cut and mirrored as they are read; got {self.augment!r} for "
                f"{self.dataset}"
            )
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs must be less than epochs, {self.epochs}; "
                f"got {self.warmup_epochs}"
            )
        if self.sparsity and self.schedule_end > self.freeze_at:
            raise ValueError(
                f"schedule_end must be at most freeze_at, {self.freeze_at}, so that "
                f"the sparsity is met before the masks rest; got {self.schedule_end}"
            )
        if self.schedule_begin >= self.schedule_end:
            raise ValueError(
                f"schedule_begin must be less than schedule_end, {self.schedule_end}; "
                f"got {self.schedule_begin}"
            )
        parse_ste(self.ste)


# Which trainings there are, on what, and what is seen of them: not what they compute.
_FREE = ("seed", "seeds", "devices", "model_parallel", "look_every", "checkpoint_every")


def identity(config: Config) -> dict[str, Any]:
    """Return the fields that decide what the training of a seed comes to."""
    fields = dataclasses.asdict(config)
    return {name: value for name, value in fields.items() if name not in _FREE}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """What `experiments.study` tries on validation before the test set is used.

    Attributes:
      targets: sparsities of the kernels, 0..1, to reach.
      penalties: the penalties that SCL chooses from; if there are none, it is given
        the targets as sparsities, and chooses its learning rate.
      learning_rates: the learning rates to choose from; nothing is tried for one.
      pixels: the scales of the pixels that both choose from.
      seeds: how many seeds choose; the config says how many are tested.
    """

    targets: tuple[float, ...]
    learning_rates: tuple[float, ...]
    penalties: tuple[float, ...] = ()
    pixels: tuple[str, ...] = ("standardized",)
    seeds: int = 2


def _check(field: dataclasses.Field, value: Any) -> None:
    """Raise ValueError where a value is not among those that its field may have."""
    words, allowed = get_args(field.type), field.metadata.get("range")
    if words and value not in words:
        known = ", ".join(words)
        raise ValueError(f"{field.name} must be one of {known}; got {value!r}")
    if field.type is bool and not isinstance(value, bool):
        raise ValueError(f"{field.name} must be True or False, got {value!r}")
    if allowed:
        kind, name = (int, "an integer") if field.type is int else (Real, "a number")
        fits = isinstance(value, kind) and not isinstance(value, bool)
        if not (fits and value in allowed):
            raise ValueError(f"{field.name} must be {name} in {allowed}, got {value!r}")


# name -> estimator, and whether it takes a parameter
_ESTIMATORS: dict[str, tuple[Any, bool]] = {
    "identity": (lambda: scl_jax.identity, False),
    "leaky_relu": (scl_jax.LeakyReLU, True),
    "softplus": (scl_jax.Softplus, True),
    "relu": (scl_jax.ReLU, False),
    "clipped": (scl_jax.Clipped, False),
}


def parse_ste(text: str) -> Any:
    """Return the straight-through estimator that a config names.

    Args:
      text: `identity`, `leaky_relu(SLOPE)`, `softplus(SHARPNESS)`, `relu` or
        `clipped`; a parameter left out has its default.

    Raises:
      ValueError: if the name is unknown or the parameter does not fit.

    Example:
      >>> parse_ste("leaky_relu(0.2)")
      LeakyReLU(negative_slope=0.2)
    """
    match = re.fullmatch(r"(\w+)(?:\(([^()]+)\))?", text) if type(text) is str else None
    make, takes_parameter = _ESTIMATORS.get(match[1] if match else "", (None, False))
    if match is None or make is None or (match[2] and not takes_parameter):
        raise ValueError(
            "ste must be one of identity, leaky_relu(SLOPE), softplus(SHARPNESS), "
            f"relu, clipped; got {text!r}"
        )
    try:
        return make(float(match[2])) if match[2] else make()
    except ValueError as error:
        raise ValueError(f"ste {text!r}: {error}") from error
