"""What each method may choose from, written down before the runs."""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """What `experiments.study --compare` tries for each method and sparsity.

    Attributes:
      targets: sparsities of the kernels, 0..1.
      spaces: method -> field of the config -> values: all combinations are tried on
        validation. As many for each method but dense, which is not pruned.
      seeds: how many seeds choose.
      tested: how many seeds, from the config's on, are tested.
    """

    targets: tuple[float, ...]
    spaces: Mapping[str, Mapping[str, tuple[Any, ...]]]
    seeds: int = 2
    tested: int = 3

    def __post_init__(self):
        counts = {m: len(self.trials(m)) for m in self.spaces if m != "dense"}
        if len(set(counts.values())) > 1:
            raise ValueError(f"methods must have as many trials each; got {counts}")

    def trials(self, method: str) -> list[dict[str, Any]]:
        """Return the settings that a method chooses from."""
        space = self.spaces[method]
        return [
            dict(zip(space, values, strict=True))
            for values in itertools.product(*space.values())
        ]


def pruning_spaces(
    learning_rates: tuple[float, ...],
    weight_decays: tuple[float, ...],
    methods: tuple[str, ...] | None = None,
) -> dict[str, dict[str, tuple[Any, ...]]]:
    """Return what each method is tuned over, for a network's rates and decays.

    All methods, or those that are named and dense.
    Two values of what is a method's own are tried with each rate and decay: of those
    that are given a sparsity, the end of the schedule to it. STR, whose decay makes it
    sparse, has more starts of its thresholds instead, and DST, which has nothing of its
    own, a quarter of each rate.
    """
    both = {"learning_rate": learning_rates, "weight_decay": weight_decays}
    gradual = {**both, "schedule_end": (0.5, 0.7)}
    starts = (-5.0, -8.0, -4.0, -6.0)[: 2 * len(weight_decays)]
    quarters = tuple(rate / 4 for rate in learning_rates)
    spaces = {
        "dense": both,
        "scl": gradual,
        "scl_macs": gradual,
        "gmp": gradual,
        "gmp_uniform": gradual,
        "magnitude_ste": gradual,
        "st3": gradual,
        "rigl": {**both, "drop_fraction": (0.3, 0.5)},
        "str": {"learning_rate": learning_rates, "mask_initial": starts},
        "dst": {**both, "learning_rate": (*learning_rates, *quarters)},
        # With an estimator that its source advises.
        "autoprune": {
            **both,
            "ste": ("leaky_relu",),
            "mask_learning_rate": (0.03, 0.3),
        },
    }
    return {m: spaces[m] for m in spaces if not methods or m in ("dense", *methods)}
