"""The settings of one experiment, and what values they may have."""

import dataclasses
import re
from numbers import Real
from typing import Any, Literal, get_args

import scl_jax


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

    dataset: Literal["mnist5k", "mnist", "fashion_mnist"]
    model: Literal["lenet300", "lenet5"]
    # What the network sees: pixels from 0 to 1, or with mean 0 and deviation 1.
    pixels: Literal["unit", "standardized"] = "standardized"
    # Training examples held out for validation, a multiple of 10 (the classes).
    validation: int = _number(0, 0, 60_000)

    epochs: int = _number(20, 1, 100_000)
    batch_size: int = _number(128, 1, 100_000)  # examples
    learning_rate: float = _number(0.1, 0, 100, "()")  # cosine decay to 0
    momentum: float = _number(0.9, 0, 1)
    weight_decay: float = _number(0.0, 0, 1)  # on kernels, coupled

    penalty: float = _number(1e-6, 0, 1)  # lambda: loss per connection
    ste: str = "identity"  # or leaky_relu(SLOPE), softplus(SHARPNESS), relu, clipped
    norm: Literal["rms", "l2", "max", "none"] = "rms"  # of mask gradients
    mask_learning_rate: float = _number(3e-4, 0, 1000, "()")
    mask_momentum: float = _number(0.9, 0, 1)
    mask_initial: float = _number(0.1, -100, 100)  # start value of mask variables
    # Fraction of the training after which the masks stop moving.
    freeze_at: float = _number(0.75, 0, 1, "(]")

    seed: int = _number(0, 0, 2**31)  # the first seed
    seeds: int = _number(1, 1, 1001)  # how many seeds: seed, seed + 1, ...

    def __post_init__(self):
        for field in dataclasses.fields(self):
            _check(field, getattr(self, field.name))
        if self.validation % 10:
            raise ValueError(
                f"validation must be a multiple of 10, the number of classes; "
                f"got {self.validation}"
            )
        parse_ste(self.ste)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """What `experiments.study` tries on validation before the test set is used.

    Attributes:
      targets: sparsities of the kernels, 0..1, to reach.
      penalties: the penalties that SCL chooses from.
      learning_rates: the learning rates that the dense network chooses from.
      pixels: the scales of the pixels that both choose from.
      seeds: how many seeds choose; the config says how many are tested.
    """

    targets: tuple[float, ...]
    penalties: tuple[float, ...]
    learning_rates: tuple[float, ...]
    pixels: tuple[str, ...] = ("standardized",)
    seeds: int = 2


def _check(field: dataclasses.Field, value: Any) -> None:
    """Raise ValueError where a value is not among those that its field may have."""
    words, allowed = get_args(field.type), field.metadata.get("range")
    if words and value not in words:
        known = ", ".join(words)
        raise ValueError(f"{field.name} must be one of {known}; got {value!r}")
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
