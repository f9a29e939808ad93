"""JSON with a line for each record: the same content, and changes that can be read."""

import json

from hypothesis import given
from hypothesis import strategies as st

from experiments.json_lines import as_lines

VALUES = st.recursive(
    st.none() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(VALUES, st.integers(0, 3))
def test_lines_are_json_of_the_same_content(content, depth):
    assert json.loads(as_lines(content, depth)) == content


def test_a_record_more_is_a_line_more_and_all_others_stay():
    runs = {"a": {"seed": 0, "layers": [1, 2]}, "b": {"seed": 1, "layers": []}}
    rows = [{"method": "scl", "seeds": [0, 1]}]
    before = as_lines({"runs": runs, "summary": rows}).splitlines()
    more = {**runs, "c": {"seed": 2, "layers": [3]}}
    after = as_lines({"runs": more, "summary": rows}).splitlines()
    assert len(after) == len(before) + 1
    assert '"a": {"seed": 0, "layers": [1, 2]},' in before
    assert '{"method": "scl", "seeds": [0, 1]}' in before
    assert set(after) - set(before) == {
        '"b": {"seed": 1, "layers": []},',
        '"c": {"seed": 2, "layers": [3]}',
    }
