"""Write the page of the recipes, README.md beside this file, from the scripts.

python -m experiments.recipes
"""

import ast
import difflib
from pathlib import Path

FOLDER = Path(__file__).parent
PAGE = FOLDER / "README.md"
_HEAD = """\
# SCL in a trainer that is there

Small trainers on 4,000 digits, each without SCL and with it. Below is what changes, in
at most five lines; the whole scripts are linked. The tests count the lines, run every
script, and check that SCL leaves a tenth of the connections. This page is made by
`python -m experiments.recipes`.
"""


def names() -> list[str]:
    """Return the names of the recipes."""
    return sorted(path.parent.name for path in FOLDER.glob("*/scl.py"))


def changes(name: str, context: int = 0) -> list[str]:
    """Return the lines of the difference of a recipe's scripts, without docstrings.

    Args:
      name: a name in `names`.
      context: unchanged lines that are shown around a change.

    Returns:
      Lines that begin with "+", "-", " ", or "@@" between two places.
    """
    dense, scl = (_body(FOLDER / name / f"{script}.py") for script in ("dense", "scl"))
    lines = difflib.unified_diff(dense, scl, n=context, lineterm="")
    return [line for line in lines if not line.startswith(("---", "+++"))]


def render() -> str:
    """Return the page in Markdown."""
    parts = [_HEAD]
    for name in names():
        text = ast.get_docstring(ast.parse((FOLDER / name / "scl.py").read_text()))
        title, _, rest = (text or "").partition("\n")
        diff = ["..." if x.startswith("@@") else x for x in changes(name, 1)][1:]
        parts.append(
            f"## {title.rstrip('.')}\n\n"
            + (f"{rest.strip()}\n\n" if rest.strip() else "")
            + f"[dense.py]({name}/dense.py), [scl.py]({name}/scl.py)\n\n"
            + "```diff\n"
            + "\n".join(diff)
            + "\n```\n"
        )
    return "\n".join(parts)


def _body(script: Path) -> list[str]:
    """Return the lines of a script after its docstring."""
    text = script.read_text()
    end = ast.parse(text).body[0].end_lineno
    return text.splitlines()[end:]


if __name__ == "__main__":
    PAGE.write_text(render())
