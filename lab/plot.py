"""Two pictures of runs: `python -m lab.plot runs/a runs/b ...` (needs matplotlib).

    curves.png     over the steps: reward, validation Pass@1, response length, entropy, psi / |A|,
                   clipped tokens
    pass_at_k.png  Pass@K on the validation problems, before and after, with 95 % intervals over
                   problems

Runs whose settings differ only in the seed are drawn together: the mean as a line, the smallest and
largest as a band. A folder given twice counts once. Lines differ in dashes and markers as well as
in shade, for prints without colours.
"""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np

from evaluate import bootstrap, pass_table
from plumbing.checkpoint import read_json
from plumbing.settings import Settings as TrainSettings
from plumbing.settings import flag, parse_flags

# Curve -> label of its axis. At most six are drawn: those that all runs have, in this order.
PANELS = {
    "reward": "mean reward, -1 to 1",
    "validation": "validation Pass@1",
    "length": "response length, tokens",
    "entropy": "entropy, nats per token",
    "shaping": "ψ / |A|, mean over tokens",
    "clipped": "clipped tokens, fraction",
    "shaping_up": "ψ / |A|, tokens of positive A",
    "shaping_down": "ψ / |A|, tokens of negative A",
}
STYLES = [
    dict(color="0.0", linestyle="-", marker="o"),
    dict(color="0.45", linestyle="--", marker="s"),
    dict(color="0.2", linestyle=":", marker="^"),
    dict(color="0.6", linestyle="-.", marker="D"),
    dict(color="0.3", linestyle=(0, (5, 1, 1, 1)), marker="v"),
    dict(color="0.7", linestyle=(0, (1, 3)), marker="x"),
]
BASE_STYLE = dict(color="0.5", linestyle=":", marker=".")

# Settings that say where a run is, and those that change nothing but time and rounding.
PLACE = ("name", "out", "overwrite", "resume")
SPEED = ("slots", "micro_tokens", "chunk", "skip_zero", "graph", "device")


@dataclasses.dataclass
class Settings:
    runs: tuple = flag((), "run folders", nargs="+", type=str)
    out: str = flag("runs/figures", "folder for the two pictures")


def read_run(folder: Path) -> dict:
    """Settings, curves {name: {step: value}} and validation of a run, which may still be running.
    FileNotFoundError or ValueError name what is missing."""
    for name in ("config.json", "log.jsonl"):
        if not (folder / name).exists():
            raise FileNotFoundError(f"{folder} is no run folder: it has no {name}")
    try:
        settings = TrainSettings(**read_json(folder / "config.json"))
        log = read_whole_lines(folder / "log.jsonl")
        validations = read_whole_lines(folder / "validation.jsonl")
        curves = curves_of(log, validations)
    except (TypeError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{folder} was not written by this version of train.py "
            f"({type(error).__name__}: {error})"
        ) from None
    final = folder / "validation.json"
    return {
        "settings": settings,
        "model": settings.model,
        "curves": curves,
        "final": read_json(final) if final.exists() else None,
    }


def read_whole_lines(file: Path) -> list[dict]:
    if not file.exists():
        return []
    lines = file.read_text().split("\n")
    whole = lines[:-1]  # the last has no end: it is empty, or a kill cut it
    return [json.loads(line) for line in whole]


def curves_of(log: list[dict], validations: list[dict]) -> dict[str, dict[int, float | None]]:
    """Curve -> step -> value; None where nothing was measured."""
    curves = {}
    for name in ("reward", "length", "entropy", "shaping"):
        curves[name] = {line["step"]: line[name] for line in log}
    curves["clipped"] = {line["step"]: clipped(line) for line in log}
    curves["validation"] = {line["step"]: pass_at_1(line) for line in validations}
    return curves


def clipped(line: dict) -> float | None:
    if line["clip_low"] is None:
        return None
    return line["clip_low"] + line["clip_high"]


def pass_at_1(validation: dict) -> float:
    solved = validation["solved"]
    return sum(solved) / len(solved) / validation["samples"]


def by_settings(runs: list[dict]) -> dict[str, list[dict]]:
    """Runs that differ in nothing but the seed (and PLACE and SPEED) -> one entry, named by what it
    has of its own."""
    left_out = ("seed", *PLACE, *SPEED)
    fields = [field.name for field in dataclasses.fields(TrainSettings)]
    names = [name for name in fields if name not in left_out]

    # The values of all other settings are the key.
    groups: dict[tuple, list[dict]] = {}
    for run in runs:
        values = tuple(getattr(run["settings"], name) for name in names)
        groups.setdefault(values, []).append(run)

    # A title says what tells its group from the others.
    different = []
    for name in names:
        values = {getattr(run["settings"], name) for run in runs}
        if len(values) > 1 and name != "algo":  # which every title has
            different.append(name)
    return {title(members, different): members for members in groups.values()}


def title(runs: list[dict], names: list[str]) -> str:
    settings = runs[0]["settings"]
    parts = [settings.algo]
    parts += [f"{name} {getattr(settings, name)}" for name in names]
    plural = "s" if len(runs) > 1 else ""
    return f"{', '.join(parts)} ({len(runs)} run{plural})"


def band(curves: list[dict[int, float | None]]) -> np.ndarray:
    """Curves of several seeds -> rows of step, mean, smallest, largest, over the steps that all of
    them have measured."""
    measured = []
    for curve in curves:
        measured.append({step for step, value in curve.items() if value is not None})
    steps = sorted(set.intersection(*measured))
    values = np.array([[curve[step] for curve in curves] for step in steps])
    values = values.reshape(len(steps), len(curves))  # also if there is no step
    return np.column_stack([steps, values.mean(1), values.min(1), values.max(1)])


def pass_curve(runs: list[dict], model: str) -> np.ndarray:
    """Rows of K, mean Pass@K, low, high; over the problems, of each problem's mean over the seeds.
    `model` is "base" or "trained"."""
    counts = [run["final"]["models"][model] for run in runs]
    samples = min(count["samples"] for count in counts)
    ks = [2**i for i in range(samples.bit_length())]
    tables = [pass_table(count["solved"], count["samples"], ks) for count in counts]
    values = np.mean(tables, axis=0)  # [problems, K]
    low, high = bootstrap(values)
    return np.column_stack([ks, values.mean(0), low, high])


def draw(groups: dict[str, list[dict]], out: Path, problems: str = "validation") -> list[Path]:
    """Draws both pictures, the second only if a run has finished -> their files. `problems` says in
    a label what Pass@K was measured on. ValueError without matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("pictures need matplotlib: pip install matplotlib") from None
    out.mkdir(parents=True, exist_ok=True)
    draw_curves(groups, out / "curves.png")
    written = [out / "curves.png"]

    finished = {}
    for name, runs in groups.items():
        done = [run for run in runs if run["final"]]
        if done:
            finished[name] = done
    if finished:
        draw_pass_at_k(finished, out / "pass_at_k.png", problems)
        written.append(out / "pass_at_k.png")
    return written


def draw_curves(groups: dict[str, list[dict]], file: Path) -> None:
    from matplotlib.figure import Figure

    every_run = [run for runs in groups.values() for run in runs]
    drawn = [name for name in PANELS if all(name in run["curves"] for run in every_run)]
    styles = STYLES * len(groups)  # enough for all
    figure = Figure((12, 6.5), layout="constrained")
    for axis, name in zip(figure.subplots(2, 3).flat, drawn):
        for style, (label, runs) in zip(styles, groups.items()):
            curve = band([run["curves"][name] for run in runs])
            markers = max(1, len(curve) // 6)  # one every so many steps
            draw_band(axis, curve, label, style, markevery=markers)
        axis.set(xlabel="step", ylabel=PANELS[name])
        axis.grid(color="0.9")
    lines, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(file, dpi=110)


def draw_pass_at_k(groups: dict[str, list[dict]], file: Path, problems: str) -> None:
    """The models before, each once, then each group of finished runs."""
    from matplotlib.figure import Figure

    # A model that several runs started from is drawn once, as the last of them measured it.
    models = {}
    for runs in groups.values():
        for run in runs:
            models[run["model"]] = run

    curves = {}
    for model, run in models.items():
        curves[Path(model).name] = pass_curve([run], "base")
    for label, runs in groups.items():
        curves[label] = pass_curve(runs, "trained")
    styles = [BASE_STYLE] * len(models) + STYLES * len(curves)

    axis = Figure((7, 5), layout="constrained").subplots()
    for style, (label, curve) in zip(styles, curves.items()):
        draw_band(axis, curve, label, style)
    axis.set_xscale("log", base=2)
    axis.set(
        xlabel="K, answers per problem",
        ylabel=f"Pass@K on {problems}, fraction of problems",
        ylim=(0, 1.02),
    )
    axis.xaxis.set_major_formatter("{x:.0f}")
    axis.grid(color="0.9")
    axis.legend(frameon=False)
    axis.figure.savefig(file, dpi=110)


def draw_band(axis, curve: np.ndarray, label: str, style: dict, **options) -> None:
    """Rows of x, y, low, high: a line, and a band around it."""
    x, y, low, high = curve.T
    axis.plot(x, y, label=label, markersize=4, linewidth=1.2, **style, **options)
    axis.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)


if __name__ == "__main__":
    settings = parse_flags(Settings, __doc__)
    try:
        folders = dict.fromkeys(settings.runs)  # each once
        groups = by_settings([read_run(Path(folder)) for folder in folders])
        for picture in draw(groups, Path(settings.out)):
            print(picture)
    except (ValueError, OSError) as error:
        sys.exit(f"lab.plot: {error}")
