"""Two sides that work in turn: how long each takes, and the table of it."""

import time
from typing import Callable, Sequence

import numpy as np

Turns = dict[str, list[tuple[float, int]]]  # side -> seconds and tokens of every turn


def alternate(sides: dict[str, Callable[[], int]], turns: int, warm_up: int = 1) -> Turns:
    """Runs the sides in turn, so that whatever else the machine does meets all of them; the order
    is turned round every time. Each side returns how many tokens it dealt with, once the device is
    done. `warm_up` turns more come first and do not count."""
    taken: Turns = {name: [] for name in sides}
    for turn in range(warm_up + turns):
        order = list(sides)
        if turn % 2 == 0:
            order.reverse()
        for name in order:
            started = time.perf_counter()
            tokens = sides[name]()
            taken[name].append((time.perf_counter() - started, tokens))
    return without_first(taken, warm_up)


def without_first(taken: Turns, count: int = 1) -> Turns:
    return {name: turns[count:] for name, turns in taken.items()}


def quartiles(values: Sequence[float]) -> str:
    low, median, high = np.percentile(values, [25, 50, 75])
    return f"{median:.3g} [{low:.3g}, {high:.3g}]"


def table(taken: Turns) -> str:
    """Seconds and speed of every side. Sides called "ours ..." also have their ratio to each of the
    others: the other's seconds over ours, turn by turn."""
    # All sides ran in every turn, so a ratio within a turn is free of what the machine did then.
    peers = [name for name in taken if not name.startswith("ours")]
    heads = ["seconds", "tokens per second", *(f"times {peer}" for peer in peers)]
    rows = []
    for name, turns in taken.items():
        seconds, tokens = np.array(turns).T
        row = [name, quartiles(seconds), f"{np.median(tokens / seconds):.0f}"]
        for peer in peers:
            peer_seconds = np.array(taken[peer])[:, 0]
            row.append("" if name in peers else quartiles(peer_seconds / seconds))
        rows.append(row)
    return markdown(heads, rows)


def growth_table(taken: Turns) -> str:
    """Seconds, and time per token, of every amount of work."""
    rows = []
    for name, turns in taken.items():
        seconds, tokens = np.array(turns).T
        rows.append([name, quartiles(seconds), f"{np.median(1e6 * seconds / tokens):.1f}"])
    return markdown(["seconds", "microseconds per token"], rows)


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    """The first column has no head."""
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (1 + len(heads)) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)
