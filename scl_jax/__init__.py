"""Sparse connectivity learning: networks that become sparse by themselves."""

from scl_jax._budget import BudgetState, meet_budget
from scl_jax._costs import connection_count, macs_per_connection
from scl_jax._guard import keep_connections
from scl_jax._macs import UnknownMacs, count_macs
from scl_jax._masked import (
    MaskedParams,
    apply_masks,
    binary_masks,
    fold_masks,
    mask_params,
)
from scl_jax._normalize import normalize_by_feature
from scl_jax._optimizer import add_connection_penalty, partition
from scl_jax._reestimate import reestimate_statistics
from scl_jax._report import report
from scl_jax._select import exclude, kernels, select
from scl_jax._statistics import MaskStatistics, mask_statistics
from scl_jax._step import (
    Clipped,
    LeakyReLU,
    ReLU,
    Softplus,
    identity,
    nonpositive_intervals,
    unit_step,
)
from scl_jax._table import Report, Row, Totals

__all__ = [
    "BudgetState",
    "Clipped",
    "LeakyReLU",
    "MaskStatistics",
    "MaskedParams",
    "ReLU",
    "Report",
    "Row",
    "Softplus",
    "Totals",
    "UnknownMacs",
    "add_connection_penalty",
    "apply_masks",
    "binary_masks",
    "connection_count",
    "count_macs",
    "exclude",
    "fold_masks",
    "identity",
    "keep_connections",
    "kernels",
    "macs_per_connection",
    "mask_params",
    "mask_statistics",
    "meet_budget",
    "nonpositive_intervals",
    "normalize_by_feature",
    "partition",
    "reestimate_statistics",
    "report",
    "select",
    "unit_step",
]
