"""Two pictures of runs: `python -m lab.plot runs/a runs/b ...` (needs matplotlib).

    curves.png     over the steps: reward, validation Pass@1, response length, entropy, psi / |A|, clipped tokens
    pass_at_k.png  Pass@K on the validation problems, before and after, with 95 % intervals over problems

Runs whose settings differ only in the seed are drawn together: the mean as a line, the smallest and largest as a band.
A folder given twice counts once. Lines differ in dashes and markers as well as in shade, for prints without colours.
"""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np

from checkpoint import read_json
from evaluate import bootstrap, flag, parse_flags, pass_table
from train import Settings as TrainSettings

PANELS = (("reward", "mean reward, -1 to 1"), ("validation", "validation Pass@1"), ("length", "response length, tokens"),
          ("entropy", "entropy, nats per token"), ("shaping", "ψ / |A|, mean over tokens"), ("clipped", "clipped tokens, fraction"),
          ("shaping_up", "ψ / |A|, tokens of positive A"), ("shaping_down", "ψ / |A|, tokens of negative A"))
STYLES = [dict(color=c, linestyle=l, marker=m) for c, l, m in (
          ("0.0", "-", "o"), ("0.45", "--", "s"), ("0.2", ":", "^"), ("0.6", "-.", "D"), ("0.3", (0, (5, 1, 1, 1)), "v"), ("0.7", (0, (1, 3)), "x"))]
SPEED = ("slots", "micro_tokens", "chunk", "skip_zero", "compile", "device")    # change nothing but time and rounding


@dataclasses.dataclass
class Settings:
    runs: tuple = flag((), "run folders", nargs="+", type=str)
    out: str = flag("runs/figures", "folder for the two pictures")


def read_run(folder: Path) -> dict:
    """Settings, curves {name: {step: value}} and validation of a run, which may still be running. FileNotFoundError
    or ValueError name what is missing."""
    for name in ("config.json", "log.jsonl"):
        if not (folder / name).exists():
            raise FileNotFoundError(f"{folder} is no run folder: it has no {name}")

    def read(name: str) -> list[dict]:
        lines = (folder / name).read_text().split("\n") if (folder / name).exists() else [""]
        return [json.loads(line) for line in lines[:-1]]        # the last has no end: empty, or cut by a kill

    try:
        settings, log = TrainSettings(**read_json(folder / "config.json")), read("log.jsonl")
        curves = {name: {line["step"]: line[name] for line in log} for name in ("reward", "length", "entropy", "shaping")}
        curves["clipped"] = {line["step"]: None if line["clip_low"] is None else line["clip_low"] + line["clip_high"]
                             for line in log}
        curves["validation"] = {v["step"]: sum(v["solved"]) / len(v["solved"]) / v["samples"] for v in read("validation.jsonl")}
    except (TypeError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder} was not written by this version of train.py ({type(error).__name__}: {error})") from None
    final = read_json(folder / "validation.json") if (folder / "validation.json").exists() else None
    return {"settings": settings, "model": settings.model, "curves": curves, "final": final}


def by_settings(runs: list[dict]) -> dict[str, list[dict]]:
    """Runs that differ in nothing but the seed (and where they are, and SPEED) -> one entry, named by what it has of its own."""
    names = [f.name for f in dataclasses.fields(TrainSettings)
             if f.name not in ("name", "out", "overwrite", "resume", "seed", *SPEED)]
    value = lambda run, name: getattr(run["settings"], name)
    own = [name for name in names if name != "algo" and len({value(run, name) for run in runs}) > 1]
    groups: dict[tuple, list[dict]] = {}
    for run in runs:
        groups.setdefault(tuple(value(run, name) for name in names), []).append(run)
    return {f"{', '.join([value(found[0], 'algo'), *(f'{name} {value(found[0], name)}' for name in own)])} "
            f"({len(found)} run{'s' * (len(found) > 1)})": found for found in groups.values()}


def band(curves: list[dict[int, float]]) -> np.ndarray:
    """Curves of several seeds -> rows of step, mean, smallest, largest, over the steps that all of them have measured."""
    steps = sorted(set.intersection(*({step for step, value in curve.items() if value is not None} for curve in curves)))
    values = np.array([[curve[step] for curve in curves] for step in steps]).reshape(len(steps), len(curves))
    return np.column_stack([steps, values.mean(1), values.min(1), values.max(1)])


def pass_curve(runs: list[dict], model: str) -> np.ndarray:
    """Rows of K, mean Pass@K, low, high; over the problems, of each problem's mean over the seeds."""
    n = min(run["final"]["models"][model]["samples"] for run in runs)
    ks = [2 ** i for i in range(n.bit_length())]
    values = np.mean([pass_table(run["final"]["models"][model]["solved"], run["final"]["models"][model]["samples"], ks)
                      for run in runs], axis=0)
    return np.column_stack([ks, values.mean(0), *bootstrap(values)])


def draw(groups: dict[str, list[dict]], out: Path, problems: str = "validation") -> list[Path]:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("pictures need matplotlib: pip install matplotlib") from None
    out.mkdir(parents=True, exist_ok=True)
    written = [out / "curves.png", out / "pass_at_k.png"]
    figure = Figure((12, 6.5), layout="constrained")
    panels = (p for p in PANELS if all(p[0] in r["curves"] for runs in groups.values() for r in runs))
    for axis, (name, label) in zip(figure.subplots(2, 3).flat, panels):
        for style, (group, runs) in zip(STYLES * len(groups), groups.items()):
            step, mean, low, high = band([run["curves"][name] for run in runs]).T
            axis.plot(step, mean, label=group, markevery=max(1, len(step) // 6), markersize=4, linewidth=1.2, **style)
            axis.fill_between(step, low, high, color=style["color"], alpha=0.15, linewidth=0)
        axis.set(xlabel="step", ylabel=label)
        axis.grid(color="0.9")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(written[0], dpi=110)

    finished = {group: found for group, runs in groups.items() if (found := [run for run in runs if run["final"]])}
    if not finished:
        return written[:1]
    axis = Figure((7, 5), layout="constrained").subplots()
    models = {run["model"]: run for runs in finished.values() for run in runs}
    curves = {Path(model).name: pass_curve([run], "base") for model, run in models.items()}
    curves |= {group: pass_curve(runs, "trained") for group, runs in finished.items()}
    styles = [dict(color="0.5", linestyle=":", marker=".")] * len(models) + STYLES * len(curves)
    for style, (label, curve) in zip(styles, curves.items()):
        k, mean, low, high = curve.T
        axis.plot(k, mean, label=label, markersize=4, linewidth=1.2, **style)
        axis.fill_between(k, low, high, color=style["color"], alpha=0.15, linewidth=0)
    axis.set_xscale("log", base=2)
    axis.set(xlabel="K, answers per problem", ylabel=f"Pass@K on {problems}, fraction of problems", ylim=(0, 1.02))
    axis.xaxis.set_major_formatter("{x:.0f}")
    axis.grid(color="0.9")
    axis.legend(frameon=False)
    axis.figure.savefig(written[1], dpi=110)
    return written


if __name__ == "__main__":
    settings = parse_flags(Settings, __doc__)
    try:
        found = [read_run(Path(run)) for run in dict.fromkeys(settings.runs)]
        print(*draw(by_settings(found), Path(settings.out)), sep="\n")
    except (ValueError, OSError) as error:
        sys.exit(f"lab.plot: {error}")
