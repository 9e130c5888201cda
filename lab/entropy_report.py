"""What lab.analyze found, as tables to print and as a picture (the paper's Figure 2)."""

from pathlib import Path
from typing import Sequence

import numpy as np

from lab.comparison import COLUMNS

from lab.word_controls import ALL, FEWEST
from lab.word_controls import COLUMNS as CONTROL_COLUMNS

NAME_WIDTH = 32
CELL_WIDTH = 28
BAR_WIDTH = 0.38
BAR_SHIFT = 0.2  # of a model's two bars, to the left and to the right
TOO_FEW = "too few"

# The bars of each category in the panel of controls: control, side of it, label, shade.
MATCHED_BARS = [
    ("other words", "mean", "pivotal words", "0.2"),
    ("other tokens", "others", "all other tokens", "0.95"),
    ("as frequent", "others", "other words, as frequent", "0.8"),
    ("as frequent, at the same place", "others", "as frequent, at the same place", "0.6"),
]
# And those of the words that open a sentence.
OPENER_BARS = [
    ("openers", "mean", None, "0.2"),
    ("openers", "others", "other sentence openers", "0.7"),
]
THIN_BAR = 0.21


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

    for subject, models in report["controls"].items():
        for name, controls in models.items():
            title = f"{name}: {subject}, matched"[-NAME_WIDTH:]
            lines.append("")
            lines.append(line(title, CONTROL_COLUMNS) + f"{'n':>8}{'others':>8}{'left out':>10}")
            for control, kinds in controls.items():
                lines.append(control_line(control, kinds[ALL]))
                for kind, found in kinds.items():
                    if found and kind != ALL:
                        lines.append(control_line(f"    {kind}", found))
    for name, words in report["words"].items():
        lines.append("")
        lines.append(line(f"{name}: single words"[-NAME_WIDTH:], CONTROL_COLUMNS))
        for word, found in words.items():
            lines.append(control_line(word, found))
    lines.append("")
    for name, models in report["counts"].items():
        for what, counts in models.items():
            found = ", ".join(f"{kind} {count}" for kind, count in counts.items())
            lines.append(f"{name}: {what}: {found}")
    return "\n".join(lines)


def comparison_line(row: str, found: dict | None) -> str:
    if found is None:
        return line(row, [TOO_FEW])
    cells = [cell(found[column]) for column in COLUMNS]
    counts = f"{found['n']:8}{found['n others']:8}"
    return line(row, cells) + counts + f"{found['p']:8.2g}"


def control_line(row: str, found: dict | None) -> str:
    if found is None:
        return line(row, [TOO_FEW])
    cells = [cell(found[column]) for column in CONTROL_COLUMNS]
    return line(row, cells) + f"{found['n']:8}{found['n others']:8}{found['left out']:10}"


def line(name: str, cells: Sequence[str]) -> str:
    columns = [text.rjust(CELL_WIDTH) for text in cells]
    return name.ljust(NAME_WIDTH) + "".join(columns)


def cell(figure: dict) -> str:
    low, high = figure["interval"]
    return f"{figure['mean']:.3f} [{low:.3f}, {high:.3f}]"


def draw_entropy(report: dict, file: Path) -> None:
    """A panel per comparison, two bars per model, with 95 % intervals over problems; for English
    another one of the first model's pivotal words and their controls."""
    from matplotlib.figure import Figure  # which only these pictures need

    comparisons = report["comparisons"]
    matched = list(report["controls"].get("pivotal tokens", {}).values())[:1]
    widths = [4] * len(comparisons) + [8] * len(matched)
    figure = Figure(figsize=(sum(widths), 4), layout="constrained")
    panels = figure.subplots(1, len(widths), width_ratios=widths)
    for axis, (subject, models) in zip(panels, comparisons.items()):
        draw_comparison(axis, subject, models)
    for axis, controls in zip(panels[len(comparisons) :], matched):
        draw_controls(axis, controls, "pivotal words beside like words")
    figure.savefig(file, dpi=150)


def draw_comparison(axis, subject: str, models: dict[str, dict]) -> None:
    names = []
    found = []
    for name, record in models.items():
        compared = record["all"]
        if compared and min(compared["n"], compared["n others"]) >= FEWEST:
            names.append(Path(name).name[-16:].replace("$", r"\$"))
            found.append(compared)
    axis.set(title=subject)
    if not found:
        say_too_few(axis, TOO_FEW if models else "needs a second model")
        return
    places = np.arange(len(found))
    bars(axis, found, "mean", places - BAR_SHIFT, BAR_WIDTH, label=subject, color="0.5")
    bars(axis, found, "others", places + BAR_SHIFT, BAR_WIDTH, label="others", color="0.8")
    axis.margins(y=0.25)  # room for the legend
    axis.set_xticks(range(len(found)), names)
    axis.set(ylabel="mean entropy, nats")
    axis.legend(frameon=False, ncols=2, loc="upper center")


def say_too_few(axis, words: str) -> None:
    """In place of bars; no axis, which would look like a measurement of nothing."""
    axis.set_axis_off()
    axis.text(0.5, 0.5, words, transform=axis.transAxes, ha="center", va="center")


def draw_controls(axis, controls: dict, title: str) -> None:
    """Pivotal words by category, each group beside its matched words, and sentence openers."""
    axis.set(title=title)
    kinds = list(controls["other words"])
    if controls["other words"][ALL] is None:
        say_too_few(axis, TOO_FEW)
        return

    # A group for each category, with the pivotal words on the left of it.
    places = np.arange(len(kinds)) - 1.5 * THIN_BAR
    for control, side, label, colour in MATCHED_BARS:
        found = [controls[control][kind] for kind in kinds]
        bars(axis, found, side, places, THIN_BAR, color=colour, edgecolor="0.4", label=label)
        places = places + THIN_BAR
    # One more for sentence openers.
    places = np.array([len(kinds) - THIN_BAR / 2])
    for control, side, label, colour in OPENER_BARS:
        found = [controls[control][ALL]]
        bars(axis, found, side, places, THIN_BAR, color=colour, edgecolor="0.4", label=label)
        places = places + THIN_BAR

    shown = [controls["other words"][kind] for kind in kinds] + [controls["openers"][ALL]]
    for place, found in enumerate(shown):
        if found is None:
            axis.text(place, 0, f" {TOO_FEW}", rotation=90, ha="center", va="bottom")
    axis.margins(y=0.3)  # room for the legend
    names = [name.replace(" ", "\n") for name in [*kinds, "sentence openers"]]
    axis.set_xticks(range(len(names)), names)
    axis.set(ylabel="mean entropy, nats", xlim=(-0.6, len(names) - 0.4))
    axis.legend(frameon=False, ncols=3, loc="upper center")


def bars(
    axis, found: Sequence[dict | None], side: str, places: np.ndarray, width: float, **style
) -> None:
    """A bar per comparison that is not None, and its interval as a line."""
    shown = [i for i, comparison in enumerate(found) if comparison is not None]
    if not shown:
        return  # also no square in the legend
    means = np.array([found[i][side]["mean"] for i in shown])
    low, high = np.array([found[i][side]["interval"] for i in shown]).T
    axis.bar(places[shown], means, width, **style)
    axis.vlines(places[shown], low, high, color="0")
