"""The rows and totals of a report, and how they are shown."""

import dataclasses
import json
from typing import Any

from scl_jax._macs import UnknownMacs

Macs = int | UnknownMacs | None

_WORDS = 2  # the first columns of a table are words, the others numbers


@dataclasses.dataclass(frozen=True)
class Row:
    """The numbers of one masked kernel; counts are exact.

    Attributes:
      path: the "/"-joined path of the leaf.
      shape: its shape.
      weights: its size.
      connections: mask entries equal to 1.
      nnz: nonzeros of W * H(S): connections whose weight is not zero.
      sparsity: the fraction of zeros in W * H(S), in 0..1.
      features: output units.
      features_without_input: features all of whose incoming weights are zero.
      features_without_output: features all of whose weights in the next layer are
        zero; None where `next_layer` does not name it.
      macs: MACs per example of the dense kernel; None where not asked for.
      macs_remaining: MACs per example of the nonzeros.
    """

    path: str
    shape: tuple[int, ...]
    weights: int
    connections: int
    nnz: int
    sparsity: float
    features: int
    features_without_input: int
    features_without_output: int | None
    macs: Macs
    macs_remaining: Macs


@dataclasses.dataclass(frozen=True)
class Totals:
    """The sums over the masked kernels; a sum with an unknown term is unknown.

    Attributes as in `Row`, and
      parameters: the number of all parameters, masked or not.
      sparsity: zeros in the masked kernels / weights in the masked kernels.
      sparsity_over_all_parameters: zeros in the masked kernels / parameters.
      flops, flops_remaining: 2 x macs, 2 x macs_remaining.
    """

    weights: int
    parameters: int
    connections: int
    nnz: int
    sparsity: float
    sparsity_over_all_parameters: float
    features: int
    features_without_input: int
    features_without_output: int | None
    macs: Macs
    macs_remaining: Macs
    flops: Macs
    flops_remaining: Macs


@dataclasses.dataclass(frozen=True)
class Report:
    """What `report` returns: `print` and `to_markdown` show it, `to_dict` saves it.

    Attributes:
      rows: a `Row` per masked kernel, in the order of the parameters.
      totals: the sums.
    """

    rows: tuple[Row, ...]
    totals: Totals

    def to_dict(self) -> dict[str, Any]:
        """Return `{"rows": [...], "totals": {...}}`, ready for `json.dumps`.

        Unknown MACs are `{"unknown": reason}`; what was not asked for is None.
        """

        def plain(value):
            unknown = isinstance(value, UnknownMacs)
            return {"unknown": value.reason} if unknown else vars(value)

        return json.loads(json.dumps(self, default=plain))

    def to_markdown(self) -> str:
        """Return what `print` shows in GitHub's Markdown."""
        header, *rows = self._table()
        rule = [":--"] * _WORDS + ["--:"] * (len(header) - _WORDS)
        lines = [
            "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"
            for cells in (header, rule, *rows)
        ]
        return "\n".join([*lines, "", *(f"- {note}" for note in self._notes())])

    def __str__(self) -> str:
        table = self._table()
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        sides = [str.ljust] * _WORDS + [str.rjust] * (len(widths) - _WORDS)
        header, *rows, totals = (
            "  ".join(map(lambda pad, *cell: pad(*cell), sides, cells, widths)).rstrip()
            for cells in table
        )
        rule = "-" * len(header)
        return "\n".join([header, rule, *rows, rule, totals, rule, *self._notes()])

    def _table(self) -> list[list[str]]:
        """Return the cells: header, rows, totals; no column without an entry."""
        names = [
            field.name
            for field in dataclasses.fields(Row)
            if any(getattr(row, field.name) is not None for row in self.rows)
        ]
        header = [
            name.replace("features_", "").replace("macs", "MACs").replace("_", " ")
            for name in names
        ]
        rows = [[_cell(getattr(row, name)) for name in names] for row in self.rows]
        totals = [_cell(getattr(self.totals, name)) for name in names[_WORDS:]]
        return [header, *rows, ["total", "", *totals]]

    def _notes(self) -> list[str]:
        """Return what the numbers are fractions and counts of."""
        totals = self.totals
        shown = {name: _cell(value) for name, value in vars(totals).items()}
        zeros = _cell(totals.weights - totals.nnz)
        macs, flops = "not counted", ""
        if isinstance(totals.macs, UnknownMacs):
            macs = f"unknown, {totals.macs.reason}"
        elif totals.macs is not None:
            macs = "{macs_remaining} of {macs} remain".format(**shown)
            flops = ": {flops_remaining} of {flops} remain".format(**shown)
        return [
            f"sparsity over the masked kernels: {shown['sparsity']} = "
            f"{zeros} zeros / {shown['weights']} weights in masked kernels",
            f"sparsity over all parameters: {shown['sparsity_over_all_parameters']} = "
            f"{zeros} zeros in masked kernels / {shown['parameters']} parameters",
            f"MACs per example in the masked kernels: {macs}",
            f"FLOPs = 2 x MACs{flops}",
        ]


def _cell(value: Any) -> str:
    """Return a table's spelling of a number, or of what stands for one."""
    if isinstance(value, UnknownMacs):
        return "unknown"
    if isinstance(value, int | float):
        return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
    return "" if value is None else str(value)
