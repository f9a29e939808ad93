"""JSON of records with a line for each."""

import json
from typing import Any


def as_lines(content: Any, depth: int = 2) -> str:
    """Return JSON in which what lies at a depth has a line each.

    A change to a book of runs then shows the runs that are new, and no others.

    Example:
      >>> print(as_lines({"runs": {"a": {"seed": 0}, "b": {"seed": 1}}}))
      {
      "runs": {
      "a": {"seed": 0},
      "b": {"seed": 1}
      }
      }
    """
    if not (depth and content and isinstance(content, dict | list)):
        return json.dumps(content)
    if isinstance(content, dict):
        begin, end = "{}"
        items = [
            f"{json.dumps(key)}: {as_lines(value, depth - 1)}"
            for key, value in content.items()
        ]
    else:
        begin, end = "[]"
        items = [as_lines(value, depth - 1) for value in content]
    return "\n".join([begin, ",\n".join(items), end])
