"""The settings of one experiment, and what values they may have."""

import dataclasses
import re
from typing import Any, Literal

import scl_jax


def _number(default: Any, low: float, high: float, *, above: bool = False) -> Any:
    """Return a field with the range [low, high), or (low, high) if `above`."""
    metadata = {"low": low, "high": high, "above": above}
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
    learning_rate: float = _number(0.1, 0, 100, above=True)  # cosine decay to 0
    momentum: float = _number(0.9, 0, 1)
    weight_decay: float = _number(0.0, 0, 1)  # on kernels, coupled

    penalty: float = _number(1e-6, 0, 1)  # lambda: loss per connection
    ste: str = "identity"  # or leaky_relu(SLOPE), softplus(SHARPNESS), relu, clipped
    norm: Literal["rms", "l2", "max", "none"] = "rms"  # of mask gradients
    mask_learning_rate: float = _number(3e-4, 0, 1000, above=True)
    mask_momentum: float = _number(0.9, 0, 1)
    mask_initial: float = _number(0.1, -100, 100)  # start value of mask variables
    # Fraction of the training after which the masks stop moving.
    freeze_at: float = _number(0.75, 0, 1 + 1e-9, above=True)

    seed: int = _number(0, 0, 2**31)  # the first seed
    seeds: int = _number(1, 1, 1001)  # how many seeds: seed, seed + 1, ...

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if "low" in field.metadata:
                _check_range(field, value)
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
      penalties: the penalties to choose from.
      learning_rates: the learning rates that the dense network chooses from.
      seeds: how many seeds choose; the config says how many are tested.
    """

    targets: tuple[float, ...]
    penalties: tuple[float, ...]
    learning_rates: tuple[float, ...]
    seeds: int = 2


def _check_range(field: dataclasses.Field, value: Any) -> None:
    low, high, above = (field.metadata[key] for key in ("low", "high", "above"))
    whole = field.type is int
    expected = int if whole else int | float
    fits = isinstance(value, expected) and not isinstance(value, bool)
    if fits and low <= value < high and not (above and value == low):
        return
    kind = "an integer" if whole else "a number"
    bounds = f"{'(' if above else '['}{low:g}, {high:g})"
    raise ValueError(f"{field.name} must be {kind} in {bounds}, got {value!r}")


_ESTIMATORS = {
    "identity": lambda: scl_jax.identity,
    "leaky_relu": scl_jax.LeakyReLU,
    "softplus": scl_jax.Softplus,
    "relu": scl_jax.ReLU,
    "clipped": scl_jax.Clipped,
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
    match = re.fullmatch(r"(\w+)(?:\(([^()]*)\))?", text)
    try:
        if match and match[1] in _ESTIMATORS:
            return _ESTIMATORS[match[1]](*([float(match[2])] if match[2] else []))
    except (TypeError, ValueError) as error:
        raise ValueError(f"ste {text!r}: {error}") from error
    raise ValueError(
        "ste must be one of identity, leaky_relu(SLOPE), softplus(SHARPNESS), relu, "
        f"clipped; got {text!r}"
    )
