"""The paper's Section 2 in English: what lab.analyze found of a real model, saved, as tables and as a
picture.

    python -m lab.english runs/a/report.json runs/b/report.json    saves them (a second or two each)
    python -m lab.english                                          draws, and prints the tables

Saved is all but the answers, in lab/results/english.json.gz. From that alone follow the picture,
lab/figures/english.png, and the tables in lab/SMOLLM2.md, which a test compares. A report is
of one model: the first, if there are several.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from lab.entropy_report import TOO_FEW
from lab.saved import read_packed, save_packed
from lab.tables import table
from lab.word_controls import ALL
from plumbing.settings import flag, parse_flags

SAVED = Path("lab/results/english.json.gz")
PICTURE = Path("lab/figures/english.png")
PIVOTAL = "pivotal tokens"
REFLECTIVE = "reflective actions"
WORDS = "other words"
OPENERS = "openers"
SIDES = ("n", "others", "nats", "nats of the others", "difference")
BINS = ("position", "difficulty")  # confounders that are tabulated, by the start of their names
SPREAD = 0.13  # between the points of a category in the picture
POINTS = [
    dict(marker="o", color="1"),
    dict(marker="s", color="0.85"),
    dict(marker="^", color="0.65"),
    dict(marker="D", color="0.45"),
    dict(marker="v", color="0.25"),
    dict(marker="P", color="0"),
    dict(marker="X", color="0.65"),
]  # of the controls, in their order; the last is that of sentence openers


@dataclass
class Settings:
    reports: tuple = flag((), "report.json files of lab.analyze to save", nargs="*", type=str)


def condense(files: tuple) -> dict[str, dict]:
    """Reports by how they were sampled, without the answers. ValueError for one that is of no
    English, or sampled as another was."""
    reports: dict[str, dict] = {}
    for file in files:
        report = json.loads(Path(file).read_text())
        if not report.get("controls", {}).get(PIVOTAL):
            raise ValueError(f"{file} is no report of English responses")
        del report["answers"]
        name = sampling(report["settings"])
        if name in reports:
            raise ValueError(f"two reports have {name}")
        reports[name] = report
    return reports


def sampling(settings: dict) -> str:
    name = f"T = {settings['temperature']:g}"
    if settings["top_p"] < 1:
        name += f", top-p {settings['top_p']:g}"
    return name


def save(reports: dict[str, dict], file: Path) -> None:
    save_packed(reports, file, indent=1)


def read(file: Path) -> dict[str, dict]:
    return read_packed(file)


def of_first_model(models: dict) -> dict:
    return next(iter(models.values()))


def markdown(reports: dict[str, dict]) -> str:
    """Five tables for each way of sampling."""
    parts = []
    for name, report in reports.items():
        parts += [
            pivotal_table(name, report),
            words_table(name, report),
            others_table(name, report),
            bins_table(name, of_first_model(report["comparisons"][PIVOTAL])),
            responses_table(name, report),
        ]
    return "\n\n".join(parts)


def pivotal_table(name: str, report: dict) -> str:
    """A row per category: its entropy, then by how much it exceeds that of each control."""
    controls = of_first_model(report["controls"][PIVOTAL])
    counts = of_first_model(report["counts"])["tokens"]
    matched = [control for control in controls if control != OPENERS]
    categories = [kind for kind in controls[WORDS] if kind != ALL]
    total = sum(counts[kind] for kind in categories)

    rows = []
    for kind, found in controls[WORDS].items():
        row = [kind, f"{counts.get(kind, total):,}"]
        row.append(plain(found["mean"]) if found else "")
        for control in matched:
            row.append(difference(controls[control][kind]))
        rows.append(row)
    minus = [f"minus {control}" for control in matched]
    return table([f"{name}: pivotal words", "n", "nats", *minus], rows)


def words_table(name: str, report: dict) -> str:
    """Single pivotal words beside words as frequent and at the same place."""
    rows = []
    for word, found in of_first_model(report["words"]).items():
        rows.append([f"*{word}*", *both_sides(found)])
    return table([f"{name}: single words", *SIDES], rows)


def others_table(name: str, report: dict) -> str:
    """Sentence openers, and reflective sentences, each beside their controls."""
    openers = of_first_model(report["controls"][PIVOTAL])[OPENERS]
    reflective = of_first_model(report["controls"][REFLECTIVE])
    rows = [["pivotal sentence openers, minus the others", *both_sides(openers[ALL])]]
    for control, kinds in reflective.items():
        rows.append([f"reflective sentences: {control}", *both_sides(kinds[ALL])])
    return table([name, *SIDES], rows)


def bins_table(name: str, record: dict) -> str:
    """Pivotal tokens beside all others, in bins."""
    rows = []
    for title, found in record.items():
        if title.startswith(BINS):
            rows.append([title, *both_sides(found)])
    return table([f"{name}: pivotal tokens", *SIDES], rows)


def responses_table(name: str, report: dict) -> str:
    """What the answers do, and how many sentences reflect."""
    rows = []
    for what, figure in of_first_model(report["behaviour"]).items():
        rows.append([what, plain(figure)])
    for kind, count in of_first_model(report["counts"])["sentences"].items():
        rows.append([f"sentences: {kind}", f"{count:,}"])
    return table([f"{name}: per response, but for shares, entropies and sentences", ""], rows)


def both_sides(found: dict | None) -> list[str]:
    if found is None:
        return [TOO_FEW, "", "", "", ""]
    counts = [f"{found['n']:,}", f"{found['n others']:,}"]
    return [*counts, plain(found["mean"]), plain(found["others"]), difference(found)]


def difference(found: dict | None) -> str:
    if found is None:
        return TOO_FEW
    low, high = found["difference"]["interval"]
    return f"{found['difference']['mean']:+.2f} [{low:+.2f}, {high:+.2f}]"


def plain(figure: dict) -> str:
    if figure["mean"] is None:  # of nothing
        return ""
    low, high = figure["interval"]
    return f"{figure['mean']:.2f} [{low:.2f}, {high:.2f}]"


def draw(reports: dict[str, dict], file: Path) -> None:
    """A panel for each way of sampling."""
    from matplotlib.figure import Figure  # which only this picture needs

    figure = Figure(figsize=(9, 2.9 * len(reports)), layout="constrained")
    panels = figure.subplots(len(reports), 1, squeeze=False, sharey=True)[:, 0]
    for axis, (name, report) in zip(panels, reports.items()):
        axis.set(title=name, ylabel="pivotal minus others, nats")
        draw_differences(axis, of_first_model(report["controls"][PIVOTAL]))
    points, labels = panels[0].get_legend_handles_labels()
    figure.legend(points, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(file, dpi=150)


def draw_differences(axis, controls: dict) -> None:
    """By how much pivotal words are more uncertain than others, with 95 % intervals: a group of
    points for each category, from left to right beside ever more similar words."""
    categories = [*controls[WORDS], OPENERS]
    matched = [control for control in controls if control != OPENERS]
    for i, (control, style) in enumerate(zip([*matched, OPENERS], POINTS)):
        of_control = controls[control]
        # Sentence openers are a group of their own, of one point.
        groups = {OPENERS: of_control[ALL]} if control == OPENERS else of_control
        shift = 0.0 if control == OPENERS else SPREAD * (i - (len(matched) - 1) / 2)
        label = "other " + OPENERS if control == OPENERS else control
        for kind, found in groups.items():
            if found is None:
                continue
            place = categories.index(kind) + shift
            low, high = found["difference"]["interval"]
            axis.vlines(place, low, high, color="0.2", linewidth=1)
            point = found["difference"]["mean"]
            axis.plot(place, point, label=label, markeredgecolor="0", linestyle="", **style)
            label = None  # once in the legend
    axis.axhline(0, color="0", linewidth=0.8)
    names = [kind.replace(" ", "\n") for kind in categories[:-1]] + ["sentence\nopeners"]
    axis.set_xticks(range(len(names)), names)


def main(s: Settings) -> None:
    if s.reports:
        save(condense(s.reports), SAVED)
        print(SAVED)
        return
    if not SAVED.exists():
        raise FileNotFoundError(f"there is no {SAVED}: name the report.json files to save")
    reports = read(SAVED)
    print(markdown(reports))
    draw(reports, PICTURE)
    print(f"\n{PICTURE}", file=sys.stderr)


if __name__ == "__main__":
    try:
        main(parse_flags(Settings, __doc__))
    except ModuleNotFoundError as error:
        sys.exit(f"lab.english: the picture needs matplotlib: pip install matplotlib ({error})")
    except (ValueError, OSError) as error:
        sys.exit(f"lab.english: {error}")
