"""The per-layer table as text, Markdown and JSON: the same numbers, and its notes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reports import dense_macs, feature_axes, kernel_report, make

from scl_jax import MaskedParams
from scl_jax._macs import UnknownMacs
from scl_jax._report import report


def parse_text(text):
    """Return cells by column, cut where the header's columns end."""
    lines = text.split("\n")
    rule = lines[1]
    assert rule
    assert set(rule) == {"-"}
    table = [line for line in lines[: lines.index(rule, lines.index(rule, 2) + 1)]]
    table = [line.ljust(len(rule)) for line in table if line != rule]
    gaps = [all(line[i] == " " for line in table) for i in range(len(rule))]
    starts = [
        i
        for i in range(len(rule))
        if not gaps[i] and (i == 0 or (gaps[i - 1] and (i == 1 or gaps[i - 2])))
    ]
    ends = [*starts[1:], len(rule)]
    cells = [
        [line[a:b].strip() for a, b in zip(starts, ends, strict=True)] for line in table
    ]
    return cells, lines[-4:]


def parse_markdown(text):
    table, notes = text.split("\n\n")
    header, rule, *rows = table.split("\n")
    assert set(rule) == set("| :-")
    cells = [
        [cell.strip() for cell in line[1:-1].split(" | ")] for line in (header, *rows)
    ]
    return cells, [note.removeprefix("- ") for note in notes.split("\n")]


@pytest.mark.parametrize("unknown", [False, True])
def test_text_markdown_and_dict_say_the_same(unknown):
    masked, macs = make(seed=5), dense_macs()
    if unknown:
        macs["head"]["kernel"] = UnknownMacs("gather: an embedding")
    next_layer = {"dense/kernel": "head/kernel"}
    result = report(masked, macs, feature_axes=feature_axes, next_layer=next_layer)
    cells, notes = parse_text(str(result))
    assert (cells, notes) == parse_markdown(result.to_markdown())

    def spell(value):
        if isinstance(value, dict):
            return "unknown"
        if isinstance(value, float):
            return f"{value:.4f}"
        if isinstance(value, list):
            return str(tuple(value))
        return "" if value is None else f"{value:,}" if value != str(value) else value

    saved = result.to_dict()
    assert cells[0][-4:] == [
        "without input",
        "without output",
        "MACs",
        "MACs remaining",
    ]
    assert cells[1:-1] == [[*map(spell, row.values())] for row in saved["rows"]]
    columns = list(saved["rows"][0])[2:]
    assert cells[-1] == [
        "total",
        "",
        *(spell(saved["totals"][name]) for name in columns),
    ]


def test_table_is_aligned_and_numbers_are_readable():
    mask = np.full((100, 200), -1.0, np.float32)
    mask[:, :50] = 1.0
    params = {"a": mask, "layer/long_name": mask[:3]}
    result = report(MaskedParams(params, params), {"a": 60_000, "layer/long_name": 600})
    assert str(result).split("\n") == [
        "path             shape       weights  connections    nnz  sparsity  features"
        "  without input    MACs  MACs remaining",
        "-" * 115,
        "a                (100, 200)   20,000        5,000  5,000    0.7500       200"
        "            150  60,000          15,000",
        "layer/long_name  (3, 200)        600          150    150    0.7500       200"
        "            150     600             150",
        "-" * 115,
        "total                         20,600        5,150  5,150    0.7500       400"
        "            300  60,600          15,150",
        "-" * 115,
        "sparsity over the masked kernels: 0.7500 = 15,450 zeros / 20,600 weights in "
        "masked kernels",
        "sparsity over all parameters: 0.7500 = 15,450 zeros in masked kernels / "
        "20,600 parameters",
        "MACs per example in the masked kernels: 15,150 of 60,600 remain",
        "FLOPs = 2 x MACs: 30,300 of 121,200 remain",
    ]


def test_notes_say_why_macs_are_unknown_and_what_flops_are():
    mask = np.ones((2, 2), np.float32)
    assert str(kernel_report(mask)).split("\n")[-2:] == [
        "MACs per example in the masked kernels: not counted",
        "FLOPs = 2 x MACs",
    ]
    unknown = kernel_report(mask, macs={"k": UnknownMacs("gather: embedding")})
    assert str(unknown).split("\n")[-2:] == [
        "MACs per example in the masked kernels: unknown, k: gather: embedding",
        "FLOPs = 2 x MACs",
    ]


def test_a_bar_in_a_path_does_not_break_the_markdown_table():
    mask = np.ones((2, 2), np.float32)
    text = report(MaskedParams({"a|b": mask}, {"a|b": mask})).to_markdown()
    assert r"| a\|b |" in text


@pytest.mark.parametrize("macs", [None, "known", "unknown"])
def test_dict_survives_json(macs):
    tree = None if macs is None else dense_macs()
    if macs == "unknown":
        tree["conv"]["kernel"] = UnknownMacs("while: unknown")
    saved = report(jax.tree.map(jnp.asarray, make()), tree).to_dict()
    assert json.loads(json.dumps(saved, allow_nan=False)) == saved
