"""The published relatives of the entropy advantage (lab/methods.py) side by side: what does each do to
Pass@K, beside GRPO?

    python -m lab.relatives             trains every method, measures it on the *test* problems once,
                                        prints the tables
    python -m lab.relatives --tables    only prints the tables, from the saved counts, and draws the
                                        picture (matplotlib)

Two settings, three seeds each, every method as published (docs/methods.md says what differs):

    narrow     `--preset narrow`, where GRPO gives up many problems (lab/narrow.py, which has measured
               GRPO, the entropy advantage, full strength and the difficulty weight there already:
               their counts of the same seeds stand beside these)
    embedded   train.py's defaults, 40 steps: there GRPO's reward has stopped to rise (lab/RESULTS.md)

The base stands beside both. No learning rate is another than train.py's: AdamW divides by the
gradient's size. GSPO has its paper's clips, CISPO no lower one. `gspo-token` is left out: with one
advantage an answer it is GSPO.

## Frozen before any of these runs, with what was known

Known: no method of lab/methods.py but `grpo` and `difficulty` had been trained for more than a few
steps. The results of lab.narrow and lab.study were. A step of the optimizer has about 1,300 tokens in
narrow, 6,000 in embedded, so the shares of Clip-Cov and KL-Cov, 0.0002, are one token.

Outcomes: Pass@1 and Pass@64 minus GRPO's, paired by seed, 95 % t intervals over three seeds. "No
difference" means: three seeds show none. Nothing is corrected for how many comparisons there are.

Predictions, narrow:

    1. MaxRL narrows less: Pass@64 higher. Its weight beside GRPO's, sqrt((1 - p) / p), favours hard
       problems more than the difficulty weight does.
    2. Dr. GRPO, RLOO and REINFORCE++ do not narrow less: Pass@64 not higher. Beside GRPO they weigh a
       problem with sqrt(p (1 - p)), which favours those that are solved half of the time. Between the
       three there is no difference.
    3. Clip-Cov and adaptive entropy: no difference, because they hardly act: one token a step; the
       entropy is hardly ever at 0.2.
    4. KL-Cov and CISPO: no difference. They drop the clip, or its effect on the gradient.
    5. The multiplied form and 80/20: no difference. They weigh tokens, not problems.
    6. GSPO learns less: its clips cut most answers after the first of eight updates. So Pass@1 is
       lower and Pass@64 higher.
    7. The cosine to GRPO's update on the base (lab.effect) does not order the changes of Pass@64:
       80/20 turns the update further than the difficulty weight and changes Pass@64 less.

Predictions, embedded:

    8. No method but GSPO has a difference in Pass@64; GSPO's Pass@1 is lower.

## GTPO came later

Both forms were added after narrow's other runs were known, and before any embedded run but GRPO's
first was looked at. Neither had been trained.

    9. GTPO, in both settings: no difference in Pass@64. Its advantages are GRPO's, a tenth more or
       less.
   10. GTPO apart: in both settings Pass@1 is lower than the base's, for nothing in its advantages
       says which answers were right.

Said by a reader, still before any result: the reasons are not quite so. A wrong token may have most of
the bonus of its place, up to a tenth of the number of wrong answers, and means are over tokens, so
lengths count. And apart, right still decides whether H or 1 / H counts. The predictions stand; 10 is
judged by the 95 % interval over seeds of the difference to the base's Pass@1, a fixed number.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lab import narrow
from lab.arms import Arm, key
from lab.children import Children, side_by_side, study_in_a_sentence
from lab.effect_methods_report import Place
from lab.methods import PAPER_CLIPS
from lab.narrow import passes
from lab.saved import read_packed
from lab.tables import (
    Records,
    Values,
    gains,
    interval_over_seeds,
    over_problems,
    over_seeds,
    read_all,
    table,
)
from plumbing.lock import lock
from plumbing.settings import flag, parse_flags

SEEDS = range(3)
VALIDATION = "--eval-problems 20 --eval-every 100 --final-samples 8"  # seldom, it is not reported
SETTINGS = {"narrow": "--preset narrow", "embedded": "--steps 40"}
# Of the embedded setting: test problems, and answers to each.
PROBLEMS = 100
SAMPLES = 128
KS = (1, 4, 16, 64)
OUTCOMES = (1, 64)  # those that the predictions speak of


def clip_flags(method: str) -> str:
    flags = [f" --{name} {value}" for name, value in PAPER_CLIPS[method].items()]
    return "".join(flags).replace("_", "-")


GRPO = Arm("GRPO", "--method grpo")
RELATIVES = [
    Arm("80-20", "--method 80-20"),
    Arm("clip-cov", "--method clip-cov"),
    Arm("kl-cov", "--method kl-cov"),
    Arm("adaptive-entropy", "--method adaptive-entropy"),
    Arm("multiplied", "--method multiplied"),
    Arm("gtpo", "--method gtpo"),
    Arm("gtpo-apart", "--method gtpo-apart"),
    Arm("dr-grpo", "--method dr-grpo"),
    Arm("rloo", "--method rloo"),
    Arm("reinforce++", "--method reinforce++"),
    Arm("maxrl", "--method maxrl"),
    Arm("gspo", "--method gspo" + clip_flags("gspo")),
    Arm("cispo", "--method cispo" + clip_flags("cispo")),
]
# lab.narrow has measured these in its setting, from `base` on.
FROM_NARROW = [
    narrow.BASE,
    narrow.GRPO,
    Arm("entropy advantage"),
    narrow.FULL_STRENGTH,
    narrow.DIFFICULTY,
]
EMBEDDED = [
    GRPO,
    Arm("entropy advantage", "--alpha 0.4"),
    Arm("difficulty", "--method difficulty"),
    *RELATIVES,
]
# As lab.effect_methods calls them.
AS_A_METHOD = {narrow.DIFFICULTY.name: "difficulty", narrow.FULL_STRENGTH.name: "full strength"}
BASE_COUNTS = "lab/results/base-0.json.gz"
EFFECT = "lab/results/effect-methods.json.gz"
# Predictions 2 and 7 compare methods with each other, 10 one with the base.
PAIRS = [
    ("rloo", "dr-grpo"),
    ("reinforce++", "dr-grpo"),
    ("reinforce++", "rloo"),
    # The difficulty weight has a name in each setting.
    ("80-20", narrow.DIFFICULTY.name),
    ("maxrl", narrow.DIFFICULTY.name),
    ("80-20", "difficulty"),
    ("maxrl", "difficulty"),
    ("gtpo-apart", narrow.BASE.name),
]
ARMS = {"narrow": RELATIVES, "embedded": EMBEDDED}
POINT = dict(fmt="o", color="0.3", elinewidth=0.6, capsize=2)
LABEL = dict(xytext=(5, 3), textcoords="offset points", fontsize=8)


@dataclass
class Settings:
    runs: str = flag("runs/relatives", "where the training runs go")
    results: str = flag("lab/results/relatives", "where the counts go")
    processes: int = flag(2, "single-threaded processes side by side")
    tables: bool = flag(False, "only print the tables from the saved counts, and draw the picture")
    figure: str = flag("lab/figures/relatives.png", "where the picture goes")


@dataclass(frozen=True)
class Job:
    setting: str  # of SETTINGS
    arm: Arm
    seed: int

    @property
    def name(self) -> str:
        return f"{self.setting}/{key(self.arm.name, self.seed)}"


def jobs(s: Settings) -> list[Job]:
    """What has no counts yet: a setting after the other, in it all methods of a seed before the next
    seed."""
    planned = []
    for setting, arms in ARMS.items():
        for seed in SEEDS:
            planned += [Job(setting, arm, seed) for arm in arms]
    return [job for job in planned if not counts_file(s, job).exists()]


def counts_file(s: Settings, job: Job) -> Path:
    return Path(s.results, f"{job.name}.json.gz")


def work(job: Job, s: Settings, children: Children) -> None:
    """Trains one run, or goes on with it, and measures it."""
    folder = Path(s.runs, job.name)
    flags = f"{SETTINGS[job.setting]} {VALIDATION} {job.arm.flags} --seed {job.seed}".split()
    children.train(folder, flags)
    counts = str(counts_file(s, job))
    if job.setting == "narrow":
        arguments = (str(folder), counts)
        command = f"from lab.narrow import measure; measure{arguments}"
    else:
        arguments = (str(folder), counts, "test", PROBLEMS, SAMPLES)
        command = f"from lab.study import measure; measure{arguments}"
    children.run("-c", command)


def run_and_print(s: Settings) -> None:
    """ChildProcessError, after the tables, if a run failed."""
    failures = []
    if not s.tables:
        with lock(Path(s.results)):
            failures = side_by_side(
                lambda job, children: work(job, s, children), jobs(s), s.processes, "relatives"
            )
    print(tables(s))
    draw(s)
    if failures:
        raise ChildProcessError("; ".join(failures))


def tables(s: Settings) -> str:
    """Markdown: the outcomes side by side, then all tables of each setting."""
    return "\n\n".join([summary(s), *[tables_of(s, setting) for setting in SETTINGS]])


def summary(s: Settings) -> str:
    """Of every arm the differences to GRPO in Pass@1 and Pass@64, in both settings."""
    columns = [KS.index(k) for k in OUTCOMES]
    found: dict[str, dict[str, list[str]]] = {}  # arm -> setting -> cells
    for setting in SETTINGS:
        for name, gain in gains_over_grpo(s, setting).items():
            row = found.setdefault(AS_A_METHOD.get(name, name), {})
            row[setting] = over_seeds(gain[:, columns])

    titles = [f"{setting}, Pass@{k}" for setting in SETTINGS for k in OUTCOMES]
    rows = []
    for name, row in found.items():
        of_settings = [row.get(setting, [""] * len(OUTCOMES)) for setting in SETTINGS]
        rows.append([name, *itertools.chain.from_iterable(of_settings)])
    return table(["minus GRPO, 95 % interval over seeds", *titles], rows)


def gains_over_grpo(s: Settings, setting: str) -> dict[str, np.ndarray]:
    """Arm -> its Pass@K minus GRPO's, [seeds, K], of arms that have at least two seeds with GRPO."""
    rate = {name: passes(records, KS) for name, records in read_setting(s, setting).items()}
    gains_of = {name: gain_over_grpo(name, values, rate) for name, values in rate.items()}
    return {name: gain for name, gain in gains_of.items() if len(gain) > 1}


def tables_of(s: Settings, setting: str) -> str:
    """The levels, and the differences to GRPO, paired by seed. Markdown."""
    titles = [f"Pass@{k}" for k in KS]
    rate = {name: passes(records, KS) for name, records in read_setting(s, setting).items()}
    levels = []
    differences = []
    for name, values in rate.items():
        stacked = np.stack(list(values.values()))  # [seeds, problems, K]
        levels.append([f"{name} ({len(values)})", *over_problems(stacked)])
        gain = gain_over_grpo(name, values, rate)
        if len(gain):
            differences.append([f"{name} − GRPO ({len(gain)})", *over_seeds(gain)])
    # The base is not trained: it is the same beside every seed.
    if narrow.BASE.name in rate:
        [base] = rate[narrow.BASE.name].values()
        rate[narrow.BASE.name] = dict.fromkeys(SEEDS, base)
    for name, other in PAIRS:
        if name in rate and other in rate:
            gain = gains(rate[name], rate[other]).mean(1)
            differences.append([f"{name} − {other} ({len(gain)})", *over_seeds(gain)])
    levels_title = f"{setting}, mean over seeds (how many), 95 % interval over problems"
    differences_title = f"{setting}, difference (seeds), 95 % interval over seeds"
    first = table([levels_title, *titles], levels)
    second = table([differences_title, *titles], differences)
    return f"{first}\n\n{second}"


def read_setting(s: Settings, setting: str) -> dict[str, Records]:
    """Arm -> seed -> what was measured, of those that have some."""
    if setting == "narrow":
        found = read_all(Path(narrow.Settings.results), FROM_NARROW)
    else:
        found = {narrow.BASE.name: {0: base_of_the_study()}}
    found |= read_all(Path(s.results, setting), ARMS[setting])
    return {name: of_seeds(records) for name, records in found.items()}


def base_of_the_study() -> dict:
    """lab.study has measured the base on more of the same problems, the first PROBLEMS among them."""
    record = read_packed(BASE_COUNTS)
    return record | {"solved": record["solved"][:PROBLEMS]}


def of_seeds(records: Records) -> Records:
    """Those of this comparison's seeds; lab.narrow has more."""
    return {seed: record for seed, record in records.items() if seed in SEEDS}


def draw(s: Settings) -> None:
    """Against the angle between a method's update of the base and GRPO's, the last of a rollout: the
    change of Pass@64, with its interval over seeds."""
    from matplotlib.figure import Figure  # which only this picture needs

    cosine = cosines()
    found = {setting: gains_over_grpo(s, setting) for setting in SETTINGS}
    measured = [setting for setting in SETTINGS if found[setting]]
    figure = Figure((8 * len(measured), 5.2), layout="constrained")
    axes = figure.subplots(1, len(measured), squeeze=False)[0]
    for axis, setting in zip(axes, measured):
        for name, gain in found[setting].items():
            method = AS_A_METHOD.get(name, name)
            if method not in cosine:  # lab.effect_methods has not measured it yet
                continue
            angle = np.degrees(np.arccos(min(1.0, cosine[method])))
            mean, half = interval_over_seeds(gain[:, KS.index(64)])
            axis.errorbar(angle, mean, half, **POINT)
            axis.annotate(name, (angle, mean), **LABEL)
        axis.axhline(0, color="0.6", linewidth=0.8)
        # Most lie within ten degrees: the square root spreads them.
        axis.set_xscale("function", functions=(np.sqrt, np.square))
        axis.set(title=setting, xlim=(0, 90), xticks=(0, 1, 5, 10, 20, 40, 60, 90))
        axis.set_xlabel("angle to GRPO's update of the base, degrees")
    axes[0].set_ylabel("Pass@64 minus GRPO's, 95 % over seeds")
    figure.savefig(s.figure, dpi=100)


def cosines() -> dict[str, float]:
    """Of each method's update of the base with GRPO's, over all tokens (lab.effect_methods)."""
    [record] = [found for name, found in read_packed(EFFECT).items() if name == "base"]
    place = Place(record, record["places"]["last"])
    found = {}
    for i, name in enumerate(record["methods"]):
        cosine, _, _ = place.figures(i, "all tokens")
        found[name] = cosine["mean"]
    return found


def gain_over_grpo(name: str, values: Values, rate: dict[str, Values]) -> np.ndarray:
    """Differences of the seeds that both have, [seeds, K]; none for GRPO itself and the base."""
    others = rate.get(GRPO.name, {})
    is_arm = name not in (GRPO.name, narrow.BASE.name)
    both = [seed for seed in values if seed in others]
    if not is_arm or not both:
        return np.zeros((0, len(KS)))
    return gains(values, others).mean(1)


if __name__ == "__main__":
    with study_in_a_sentence("lab.relatives"):
        run_and_print(parse_flags(Settings, __doc__))
