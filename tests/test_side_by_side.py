"""The table and the figure of a comparison, from made-up rows."""

import numpy as np
import pytest

from experiments.methods import METHODS
from experiments.side_by_side import (
    NAMES,
    _figure,
    comparison_cells,
    comparison_tables,
    draw_comparison,
)


def row(method, target, accuracy, left):
    numbers = {
        "accuracy": accuracy,
        "sparsity": 1 - left,
        "nnz": 2000 * left,
        "macs_remaining": 5e6 * left,
        "least_density": left / 2,
    }
    spreads = {f"{name}_std": value / 100 for name, value in numbers.items()}
    return {"method": method, "target": target, "seeds": [0, 1], **numbers, **spreads}


def book(*rows):
    return {
        "name": "tiny",
        "summary": list(rows),
        "runs": {"any": {"weights": 2000, "macs": 5_000_000}},
    }


ROWS = [
    row("gmp", 0.98, 0.81, 0.02),
    row("dense", 0.0, 0.9, 1.0),
    row("gmp", 0.9, 0.85, 0.1),
    row("scl", 0.9, 0.8765, 0.1),
]


def test_cells_have_a_row_per_method_and_a_column_per_sparsity():
    assert comparison_cells(ROWS, "accuracy") == [
        ["method", "90 %", "98 %"],
        ["dense", "90.00 ± 0.90", "90.00 ± 0.90"],
        ["SCL", "87.65 ± 0.88", ""],
        ["magnitude, global", "85.00 ± 0.85", "81.00 ± 0.81"],
    ]


@pytest.mark.parametrize(
    ("field", "cell"),
    [
        ("nnz", "0.20 ± 0.00"),
        ("macs_remaining", "0.50 ± 0.01"),
        ("least_density", "5.00 ± 0.05"),
    ],
)
def test_cells_have_the_unit_of_their_field(field, cell):
    assert comparison_cells(ROWS, field)[2][1] == cell


def test_all_tables_are_there():
    text = comparison_tables(book(*ROWS))
    assert text.count("| SCL |") == 4
    for unit in ("(%), last epoch", "thousands", "millions", "sparsest layer"):
        assert unit in text


def test_every_method_has_a_name():
    assert NAMES.keys() == METHODS.keys()


def test_figure_has_a_line_per_method_at_its_means_with_error_bars():
    figure = _figure(book(*ROWS))
    for axes in figure.axes:
        drawn = {bars.get_label(): bars for bars in axes.containers}
        assert list(drawn) == ["SCL", "magnitude, global"]
        x, y = drawn["magnitude, global"].lines[0].get_data()
        np.testing.assert_allclose(np.array(x, float), [0.02, 0.1])
        np.testing.assert_allclose(np.array(y, float), [81, 85])
        bars = [
            lines.get_segments()[1] for lines in drawn["magnitude, global"].lines[2]
        ]
        np.testing.assert_allclose(bars[0], [[0.099, 85], [0.101, 85]])
        np.testing.assert_allclose(bars[1], [[0.1, 84.15], [0.1, 85.85]])
        assert axes.get_xscale() == "log"
    legend = [text.get_text() for text in figure.axes[1].get_legend().get_texts()]
    assert legend == ["dense", "SCL", "magnitude, global"]


def test_figure_is_written(tmp_path):
    draw_comparison(book(*ROWS), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"


def test_figure_of_nothing_compared_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing of 'tiny' has been compared"):
        draw_comparison(book(ROWS[1]), tmp_path / "figure.png")
