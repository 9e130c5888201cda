"""What measurements leave in lab/results/: JSON, packed by gzip. The same figures give the same bytes,
so that a file that git sees changed has other figures in it."""

import gzip
import json
from pathlib import Path

from plumbing.checkpoint import atomic_write


def save_packed(record: object, file: str | Path, **layout) -> None:
    """Wholly or not at all; `layout` goes to json.dumps."""
    text = json.dumps(record, **layout)
    with atomic_write(Path(file)) as fresh:
        fresh.write_bytes(gzip.compress(text.encode(), mtime=0))  # no time stamp


def read_text(file: str | Path) -> str:
    return gzip.decompress(Path(file).read_bytes()).decode()


def read_packed(file: str | Path):
    return json.loads(read_text(file))
