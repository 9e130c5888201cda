"""What the tests of mathematics share: where the real questions are, files of made ones."""

import json
import os
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHARED = Path(os.environ.get("SHARED_DATA", ROOT.parent / "shared" / "data"))

needs_math_verify = pytest.mark.skipif(
    find_spec("math_verify") is None, reason="pip install math-verify==0.9.0"
)


def write(folder, name, rows):
    """Writes a line for each row -> the path. rows: dicts, or strings to be written as they are."""
    path = folder / name
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)
