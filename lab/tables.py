"""Tables and figures of the study, from the saved counts alone: nothing is sampled here.

    python -m lab.study --tables    prints them and draws the figures
    python -m lab.published         writes them, and others, to lab/results/TABLES.md

Two kinds of 95 % intervals, which answer different questions:

    over problems   bootstrap: what other problems would give these models
    over seeds      Student's t, paired by seed: what other training runs would give

Only the second speaks of the method. Shapes: S seeds, P problems, K columns of Pass@K.
"""

from pathlib import Path
from typing import Sequence

import numpy as np

from evaluate import bootstrap, pass_table
from lab.arms import ARMS, BASE, CORE, FRESH, GRPO, GRPO_ENTROPY, MAP, OTHERS, Arm, key
from lab.plot import draw
from lab.saved import read_packed

KS = (1, 4, 16, 64, 128)
SEEDS = range(10)  # those that an arm may have saved counts of
CURVES = (
    "reward",
    "length",
    "entropy",
    "equal_groups",
    "shaping",
    "shaping_up",
    "shaping_down",
    "capped",
    "explained_variance",
)
# Student's t at 97.5 %, by degrees of freedom; two arms of ten seeds have 18. Without a degree of
# freedom an interval has no end.
T_975 = (
    np.inf, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262,
    2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101,
)  # fmt: skip

Records = dict[int, dict]  # what lab.study.measure saved, by seed
Values = dict[int, np.ndarray]  # numbers made of it, by seed


# Reading.


def read(results: Path, arm: str) -> Records:
    """The saved counts of an arm."""
    records = {}
    for seed in SEEDS:
        file = results / f"{key(arm, seed)}.json.gz"
        if file.exists():
            records[seed] = read_packed(file)
    return records


def read_all(results: Path, arms: Sequence[Arm]) -> dict[str, Records]:
    """Of the arms that have some."""
    found = {arm.name: read(results, arm.name) for arm in arms}
    return {name: records for name, records in found.items() if records}


def columns_of(record: dict) -> list[int]:
    """The K for which there are enough samples."""
    return [k for k in KS if k <= record["samples"]]


def passes(records: Records) -> Values:
    """Pass@K of every problem: [P, K] by seed."""
    found = {}
    for seed, record in records.items():
        found[seed] = pass_table(record["solved"], record["samples"], columns_of(record))
    return found


def figure_names(record: dict) -> list[str]:
    """What is known of the responses."""
    return [name for name, value in record.items() if isinstance(value, float)]


# Statistics.


def stacked(values: Values) -> np.ndarray:
    """[S, ...]"""
    return np.stack(list(values.values()))


def gains(arm: Values, other: Values) -> np.ndarray:
    """arm minus other, [S, ...], of the seeds that both have; a single run is compared with the
    other arm's mean over seeds."""
    if len(arm) == 1:
        mean = np.mean(list(other.values()), axis=0)
        other = {seed: mean for seed in arm}
    both = sorted(set(arm) & set(other))
    return np.array([arm[seed] - other[seed] for seed in both])


def cells(means: np.ndarray, lows: np.ndarray, highs: np.ndarray, sign: str = "") -> list[str]:
    found = []
    for mean, low, high in zip(means, lows, highs):
        found.append(f"{mean:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]")
    return found


def over_problems(values: np.ndarray, sign: str = "") -> list[str]:
    """[S, P, K] -> means with bootstrap intervals over problems, each problem being its mean over
    the seeds."""
    low, high = bootstrap(values.mean(0))
    return cells(values.mean((0, 1)), low, high, sign)


def half_interval(variance: np.ndarray, freedom: int) -> np.ndarray:
    """Half of a t interval, from the variance of the mean."""
    return T_975[freedom] * np.sqrt(np.maximum(variance, 1e-30))  # not 0: inf * 0 is no number


def student(mean: np.ndarray, variance: np.ndarray, freedom: int) -> list[str]:
    """[K] -> means with t intervals, from the variance of the mean."""
    half = half_interval(variance, freedom)
    return cells(mean, mean - half, mean + half, "+")


def interval_over_seeds(gain: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Paired differences [S, K] -> their means, and half of their t intervals over seeds."""
    seeds = len(gain)
    mean = gain.mean(0)
    variance = ((gain - mean) ** 2).sum(0) / max(1, seeds - 1)
    return mean, half_interval(variance / seeds, seeds - 1)


def over_seeds(gain: np.ndarray) -> list[str]:
    """The same, as cells of a table."""
    mean, half = interval_over_seeds(gain)
    return cells(mean, mean - half, mean + half, "+")


def variance_of_a_run(rate: dict[str, Values]) -> tuple[np.ndarray, int]:
    """From the core arms, as if it were the same in all: [K], and its degrees of freedom."""
    squares = 0.0
    freedom = 0
    for arm in CORE:
        if arm.name in rate:
            runs = stacked(rate[arm.name]).mean(1)  # [S, K]
            squares = squares + ((runs - runs.mean(0)) ** 2).sum(0)
            freedom += len(runs) - 1
    return squares / max(1, freedom), freedom


# Tables.


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def first_record(arms: dict[str, Records]) -> dict:
    """All records that are compared have the same split and number of samples."""
    records = next(iter(arms.values()))
    return next(iter(records.values()))


def pass_titles(record: dict) -> list[str]:
    return [f"Pass@{k}" for k in columns_of(record)]


def rates_table(arms: dict[str, Records], rate: dict[str, Values]) -> str:
    """A row an arm: its Pass@K, and how long and how certain its responses are."""
    record = first_record(arms)
    also = ["tokens per response", "entropy in nats"]
    title = f"{record['split']}, mean over seeds (how many), 95 % interval over problems"
    rows = []
    for arm, records in arms.items():
        row = [f"{arm} ({len(records)})"]
        row += over_problems(stacked(rate[arm]))
        for name in also:
            mean = np.mean([record[name] for record in records.values()])
            row.append(f"{mean:.3f}")
        rows.append(row)
    return table([title, *pass_titles(record), *also], rows)


def differences_table(arms: dict[str, Records], rate: dict[str, Values]) -> str:
    """Two rows an arm that has a baseline: the difference over problems and over seeds."""
    variance, freedom = variance_of_a_run(rate)
    rows = []
    for arm in ARMS:
        both_measured = arm.name in rate and arm.against in rate
        if not both_measured:
            continue
        baseline = rate[arm.against]
        gain = gains(rate[arm.name], baseline)  # [S, P, K]
        if not len(gain):  # no seed that both have, yet
            continue

        per_seed = gain.mean(1)  # [S, K]
        if len(rate[arm.name]) > 1:
            what = f"the {len(gain)} seeds of both"
            intervals = over_seeds(per_seed)
        else:
            # One run says nothing of its spread. The baseline's mean has some of it too.
            what = "seeds (spread of the core)"
            intervals = student(per_seed[0], variance * (1 + 1 / len(baseline)), freedom)
        rows.append([f"{arm.name} − {arm.against}, over problems", *over_problems(gain, "+")])
        rows.append([f"the same, over {what}", *intervals])
    titles = pass_titles(first_record(arms))
    return table(["difference, 95 % interval", *titles], rows)


def compared(arms: dict[str, Records]) -> list[str]:
    """Two tables of arms that have counts: their Pass@K, and each against its baseline."""
    rate = {arm: passes(records) for arm, records in arms.items()}
    return [rates_table(arms, rate), differences_table(arms, rate)]


def runs_table(arms: dict[str, Records]) -> str:
    """Pass@K of every single run."""
    rows = []
    for arm, records in arms.items():
        if arm == BASE.name:
            continue
        for seed, values in passes(records).items():
            rows.append([f"{arm}, seed {seed}", *(f"{rate:.3f}" for rate in values.mean(0))])
    return table(["one run", *(f"Pass@{k}" for k in KS)], rows)


def behaviour_table(arms: dict[str, Records]) -> str:
    """A row a figure of the responses, a column an arm; after the core, their difference."""
    names = figure_names(arms[BASE.name][0])
    figures: dict[str, Values] = {}
    means: dict[str, list[str]] = {}
    for arm, records in arms.items():
        figures[arm] = {}
        for seed, record in records.items():
            figures[arm][seed] = np.array([record[name] for name in names])
        means[arm] = [f"{mean:.3f}" for mean in stacked(figures[arm]).mean(0)]

    core = [BASE.name, GRPO, GRPO_ENTROPY]
    others = [arm for arm in arms if arm not in core]
    columns = [names]
    columns += [means[arm] for arm in core]
    columns.append(over_seeds(gains(figures[GRPO_ENTROPY], figures[GRPO])))
    columns += [means[arm] for arm in others]
    head = ["mean over seeds", *core, "difference, interval over seeds", *others]
    return table(head, list(zip(*columns)))


def sides_table(records: Records) -> str:
    """What the entropy advantage adds to right and to wrong answers, in groups of 16 by how many
    of them are right."""
    sides = ("right", "wrong")
    head = ["right of 16"]
    for side in sides:
        head += [f"{what}, {side} answers" for what in ("tokens", "ψ / abs(A)", "capped")]

    rows = []
    for right in (range(1, 2), range(2, 4), range(4, 8), range(8, 12), range(12, 16)):
        row = [f"{right[0]} to {right[-1]}"]
        for side in sides:
            sums = np.zeros(3)
            for record in records.values():
                for number in right:
                    sums += record["line"][side].get(str(number), [0, 0, 0])
            tokens, psi, capped = sums
            row.append(f"{tokens:,.0f}")
            row.append(f"{psi / max(1, tokens):.3f}")
            row.append(f"{capped / max(1, tokens):.3f}")
        rows.append(row)
    return table(head, rows)


def training_table(arms: dict[str, Records]) -> str:
    """The means of the log's columns over twenty steps at a time."""
    rows = []
    for arm, records in arms.items():
        if arm == BASE.name:
            continue
        curves = [record["curves"] for record in records.values()]
        for first in range(0, len(curves[0]["reward"]), 20):
            row = [f"{arm}, steps {first + 1} to {first + 20}"]
            for name in CURVES:
                values = []
                for curve in curves:
                    values += curve.get(name, [])[first : first + 20]
                known = [value for value in values if value is not None]
                row.append(f"{np.mean(known):.3g}" if known else "–")
            rows.append(row)
    return table(["training, mean over seeds", *CURVES], rows)


def all_seeds(arms: dict[str, Records], fresh: dict[str, Records]) -> dict[str, Records]:
    """The arms that were tried again with other seeds, all their seeds together."""
    together = {}
    for arm in (GRPO, GRPO_ENTROPY, "hard", "hard + entropy advantage"):
        records: Records = {}
        for found in (arms.get(arm), fresh.get(f"fresh {arm}"), fresh.get(f"repeated {arm}")):
            records |= found or {}
        if records:
            together[arm] = records
    return together


def study_tables(results: Path) -> dict[str, str]:
    """Those of the test problems, of the arms that have counts, by name."""
    arms = read_all(results, [BASE, *CORE, *OTHERS])
    fresh = read_all(results, FRESH)
    paired = set(arms.get(GRPO, {})) & set(arms.get(GRPO_ENTROPY, {}))
    if BASE.name not in arms or not paired:
        raise ValueError(
            f"{results} needs saved counts of the base, and of {GRPO} and {GRPO_ENTROPY} "
            f"with one seed in common at least"
        )
    rates, differences = compared(arms)
    found = {
        "rates": rates,
        "differences": differences,
        "runs": runs_table(arms | fresh),
        "behaviour": behaviour_table(arms),
        "sides": sides_table(arms[GRPO_ENTROPY]),
        "training": training_table(arms),
    }
    if fresh:
        found["fresh rates"], found["fresh differences"] = compared(fresh)
        found["all rates"], found["all differences"] = compared(all_seeds(arms, fresh))
    return found


def tables(results: Path) -> str:
    return "\n\n".join(study_tables(results).values())


def map_tables(results: Path) -> str:
    """Those of the map, of validation problems: whoever chooses by them reads no count of a test
    problem."""
    tried = read_all(results / "map", [*CORE, *MAP])
    if GRPO not in tried:
        raise ValueError(
            f"{results}/map needs saved counts of {GRPO}, which the others are compared with"
        )
    return "\n\n".join(compared(tried))


# Figures.


def figures(results: Path, out: Path) -> list[Path]:
    """curves.png and pass_at_k.png, as lab/plot.py draws them, and behaviour.png."""
    arms = read_all(results, [BASE, *CORE, *OTHERS])
    base = arms[BASE.name][0]
    runs = {}
    for arm, records in arms.items():
        if arm != BASE.name:
            plotted = [as_plotted_run(record, base) for record in records.values()]
            runs[f"{arm} ({len(records)})"] = plotted
    written = draw(runs, out, f"the {base['split']} problems")
    return [*written, draw_behaviour(arms, out / "behaviour.png")]


def as_plotted_run(record: dict, base: dict) -> dict:
    """As lab.plot.read_run makes it of a run folder."""
    curves = {name: dict(enumerate(values, 1)) for name, values in record["curves"].items()}
    final = {"models": {"base": base, "trained": record}}
    return {"model": "base", "curves": curves, "final": final}


def draw_behaviour(arms: dict[str, Records], file: Path) -> Path:
    """A panel a figure of the responses: bars are means, ticks are seeds."""
    from matplotlib.figure import Figure  # there, as `draw` has not complained

    figure = Figure((15, 8), layout="constrained")
    panels = figure.subplots(3, 4, sharey=True).flat
    for axis, name in zip(panels, figure_names(arms[BASE.name][0])):
        values = [[record[name] for record in records.values()] for records in arms.values()]
        axis.barh(list(arms), [np.mean(of_arm) for of_arm in values], color="0.8")
        for place, of_arm in enumerate(values):
            axis.plot(of_arm, [place] * len(of_arm), "|", color="0", markersize=10)
        axis.set_title(name, fontsize="medium")
    axis.invert_yaxis()  # shared: of all panels
    figure.savefig(file, dpi=100)
    return file
