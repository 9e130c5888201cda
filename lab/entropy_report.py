"""What lab.analyze found, as tables to print and as a picture (the paper's Figure 2)."""

from pathlib import Path
from typing import Sequence

import numpy as np

from lab.comparison import COLUMNS

NAME_WIDTH = 32
CELL_WIDTH = 28
BAR_WIDTH = 0.38
BAR_SHIFT = 0.2  # of a model's two bars, to the left and to the right


def tables(report: dict) -> str:
    """What the responses of each model do, then a table for each comparison and model."""
    # A column per model.
    behaviour = report["behaviour"]
    names = [name[-24:] for name in behaviour]
    lines = [line("", names)]
    first = next(iter(behaviour.values()))
    for row in first:
        cells = [cell(figures[row]) for figures in behaviour.values()]
        lines.append(line(row, cells))

    # A column per figure.
    for subject, models in report["comparisons"].items():
        for name, record in models.items():
            title = f"{name}: {subject}"[-NAME_WIDTH:]
            lines.append("")
            lines.append(line(title, COLUMNS) + f"{'n':>8}{'others':>8}{'p':>8}")
            for row, found in record.items():
                lines.append(comparison_line(row, found))
    return "\n".join(lines)


def comparison_line(row: str, found: dict | None) -> str:
    if found is None:
        return line(row, ["too few"])
    cells = [cell(found[column]) for column in COLUMNS]
    counts = f"{found['n']:8}{found['n others']:8}"
    return line(row, cells) + counts + f"{found['p']:8.2g}"


def line(name: str, cells: Sequence[str]) -> str:
    columns = [text.rjust(CELL_WIDTH) for text in cells]
    return name.ljust(NAME_WIDTH) + "".join(columns)


def cell(figure: dict) -> str:
    low, high = figure["interval"]
    return f"{figure['mean']:.3f} [{low:.3f}, {high:.3f}]"


def draw_entropy(comparisons: dict[str, dict], file: Path) -> None:
    """A panel per comparison, two bars per model, with 95 % intervals over problems."""
    from matplotlib.figure import Figure  # which only this picture needs

    figure = Figure(figsize=(4 * len(comparisons), 4), layout="constrained")
    panels = figure.subplots(1, len(comparisons))
    for axis, (subject, models) in zip(panels, comparisons.items()):
        names = []
        found = []
        for name, record in models.items():
            if record["all"]:  # not too few
                names.append(Path(name).name[-16:].replace("$", r"\$"))
                found.append(record["all"])
        bars(axis, found, side="mean", label=subject, shift=-BAR_SHIFT, colour="0.5")
        bars(axis, found, side="others", label="others", shift=BAR_SHIFT, colour="0.8")
        axis.margins(y=0.25)  # room for the legend
        axis.set_xticks(range(len(found)), names)
        axis.set(ylabel="mean entropy, nats", title=subject)
        axis.legend(frameon=False, ncols=2, loc="upper center")
    figure.savefig(file, dpi=150)


def bars(axis, found: list[dict], side: str, label: str, shift: float, colour: str) -> None:
    """A bar per model, and its interval as a line."""
    places = np.arange(len(found)) + shift
    means = np.array([comparison[side]["mean"] for comparison in found])
    intervals = np.array([comparison[side]["interval"] for comparison in found])
    low, high = intervals.reshape(-1, 2).T
    axis.bar(places, means, BAR_WIDTH, color=colour, label=label)
    axis.vlines(places, low, high, color="0")
