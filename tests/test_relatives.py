"""lab/relatives.py: what is trained, beside settings written by hand; what is run for a job; and the tables
of lab/METHODS.md made again from the saved counts, their intervals once more by hand."""

import gzip
import json
import math
import re
import statistics
from pathlib import Path

import pytest

from lab import relatives
from lab.arms import key
from lab.children import Children
from lab.methods import METHODS
from lab.relatives import (
    ARMS,
    EMBEDDED,
    RELATIVES,
    SETTINGS,
    Job,
    Settings,
    jobs,
    read_setting,
    summary,
    tables,
    tables_of,
    work,
)
from plumbing.settings import PRESETS, check, parse_flags
from plumbing.settings import Settings as TrainSettings

# Beside --method with the arm's own name.
OTHER_FLAGS = {
    "GRPO": dict(method="grpo"),
    "entropy advantage": dict(method="", alpha=0.4),
    "gspo": dict(method="gspo", clip_low=3e-4, clip_high=4e-4),
    "cispo": dict(method="cispo", clip_low=0.999),
}
IN_SETTING = {
    "narrow": dict(preset="narrow", task="countdown-easy", max_new_tokens=24, steps=200),
    "embedded": dict(steps=40),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_arm_is_what_its_name_says(setting):
    for arm in ARMS[setting]:
        flags = f"{SETTINGS[setting]} {arm.flags}".split()
        s = parse_flags(TrainSettings, "train", flags, presets=PRESETS)
        check(s)
        changed = dict(method=arm.name) | OTHER_FLAGS.get(arm.name, {})
        assert s == TrainSettings(**IN_SETTING[setting], **changed)


def test_every_method_is_compared_but_the_one_that_is_another():
    """GSPO-token is GSPO where all tokens of an answer have one advantage (tests/test_methods.py)."""
    compared = {arm.flags.split()[1] for arm in EMBEDDED if "--method" in arm.flags}
    assert compared == set(METHODS) - {"gspo-token"}


def test_all_methods_of_a_seed_come_before_the_next_seed(tmp_path):
    wanted = []
    for setting, arms in (("narrow", RELATIVES), ("embedded", EMBEDDED)):
        for seed in (0, 1, 2):
            wanted += [f"{setting}/{key(arm.name)}-{seed}" for arm in arms]
    s = Settings(results=str(tmp_path))
    assert [job.name for job in jobs(s)] == wanted
    (tmp_path / "narrow").mkdir()
    (tmp_path / "narrow/maxrl-0.json.gz").touch()
    wanted.remove("narrow/maxrl-0")
    assert [job.name for job in jobs(s)] == wanted


class Recorder(Children):
    """Keeps what would be run, and starts no process."""

    def __init__(self):
        super().__init__()
        self.commands = []

    def run(self, *command):
        self.commands.append(command)


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_job_is_trained_or_gone_on_with_and_then_measured(setting, tmp_path):
    s = Settings(runs=str(tmp_path / "runs"), results=str(tmp_path / "results"))
    job = Job(setting, RELATIVES[0], 2)
    run = f"{s.runs}/{setting}/80-20-2"
    counts = f"{s.results}/{setting}/80-20-2.json.gz"
    measured = {
        "narrow": f"from lab.narrow import measure; measure('{run}', '{counts}')",
        "embedded": f"from lab.study import measure; measure('{run}', '{counts}', 'test', 100, 128)",
    }

    fresh = Recorder()
    work(job, s, fresh)
    trained, last = fresh.commands
    assert trained[0] == "train.py"
    settings = parse_flags(TrainSettings, "train", list(trained[1:]), presets=PRESETS)
    assert (settings.method, settings.seed) == ("80-20", 2)
    assert (settings.out, settings.name) == (f"{s.runs}/{setting}", "80-20-2")
    assert last == ("-c", measured[setting])

    (tmp_path / "runs" / setting / "80-20-2").mkdir(parents=True)
    again = Recorder()
    work(job, s, again)
    assert again.commands == [("train.py", "--resume", run), ("-c", measured[setting])]


def interval_by_hand(differences):
    """Of two seeds."""
    mean = statistics.mean(differences)
    half = 12.706 * statistics.stdev(differences) / 2**0.5
    return f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]"


def test_intervals_of_the_tables_by_hand(tmp_path, monkeypatch):
    """Two problems, 64 samples, two seeds that both have: Pass@1 is the share that is right. A seed that
    GRPO lacks is left out of the difference, not of the level."""
    monkeypatch.setattr(relatives, "base_of_the_study", lambda: {"solved": (8, 8), "samples": 64})
    counts = {
        "grpo-0": (16, 32),
        "grpo-1": (16, 16),
        "maxrl-0": (32, 32),
        "maxrl-1": (48, 32),
        "maxrl-2": (64, 64),
        "gtpo-apart-0": (0, 8),
        "gtpo-apart-1": (4, 8),
    }
    (tmp_path / "embedded").mkdir()
    for name, solved in counts.items():
        record = json.dumps({"solved": solved, "samples": 64}).encode()
        (tmp_path / f"embedded/{name}.json.gz").write_bytes(gzip.compress(record))
    found = tables(Settings(results=str(tmp_path)))

    interval = interval_by_hand([0.5 - 0.375, 0.625 - 0.25])
    assert f"| maxrl − GRPO (2) | {interval} |" in found
    level = (0.5 + 0.625 + 1) / 3
    assert f"| maxrl (3) | {level:.3f} [" in found
    to_base = interval_by_hand([0.0625 - 0.125, 0.09375 - 0.125])
    assert f"| gtpo-apart − base (2) | {to_base} |" in found

    # Nothing of narrow is in this folder but what lab.narrow has measured.
    side_by_side, *_ = found.split("\n\n")
    [row] = [line for line in side_by_side.splitlines() if line.startswith("| maxrl ")]
    _, name, narrow_1, narrow_64, embedded_1, _, _ = row.split("|")
    assert narrow_1.strip() == narrow_64.strip() == ""
    assert embedded_1.strip() == interval


def test_the_base_of_the_embedded_setting_is_the_studys():
    """Its first 100 problems, which are the ones that every arm was measured on."""
    record = json.loads(gzip.decompress(Path("lab/results/base-0.json.gz").read_bytes()))
    [base] = RECORDS["embedded"]["base"].values()
    assert base["solved"] == record["solved"][:100]
    assert base["samples"] == record["samples"] == 256
    for name, records in RECORDS["embedded"].items():
        assert {len(record["solved"]) for record in records.values()} == {100}, name


PAGE = Path("lab/METHODS.md").read_text()
LONG_TABLES = Path("lab/results/METHODS.md").read_text()
RECORDS = {setting: read_setting(Settings(), setting) for setting in SETTINGS}


def test_the_tables_of_both_pages_are_made_again_from_the_saved_counts():
    assert summary(Settings()) in PAGE
    for setting in SETTINGS:
        levels, differences = tables_of(Settings(), setting).split("\n\n")
        assert levels in LONG_TABLES
        assert differences in LONG_TABLES


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_arm_has_three_seeds(setting):
    records = RECORDS[setting]
    assert {arm.name for arm in ARMS[setting]} <= set(records)
    for name, of_arm in records.items():
        assert set(of_arm) == ({0} if name == "base" else {0, 1, 2}), name


def rates(setting, arm, seed):
    """Pass@1 and Pass@64, by the estimator's own formula with math.comb."""
    record = RECORDS[setting][arm][seed]
    n = record["samples"]
    values = []
    for k in (1, 64):
        of_problems = [1 - math.comb(n - c, k) / math.comb(n, k) for c in record["solved"]]
        values.append(statistics.mean(of_problems))
    return values


def verdict(differences):
    """Student's t of two degrees of freedom, by hand, of three seeds."""
    mean = statistics.mean(differences)
    half = 4.303 * statistics.stdev(differences) / 3**0.5
    if mean - half > 0:
        return "higher"
    if mean + half < 0:
        return "lower"
    return "contains 0"


NARROW_VERDICTS = {
    "maxrl": ("contains 0", "higher"),  # prediction 1
    "dr-grpo": ("contains 0", "contains 0"),  # 2
    "rloo": ("contains 0", "lower"),
    "reinforce++": ("contains 0", "contains 0"),
    "clip-cov": ("contains 0", "contains 0"),  # 3
    "kl-cov": ("contains 0", "higher"),  # 4, missed
    "cispo": ("contains 0", "contains 0"),
    "multiplied": ("contains 0", "contains 0"),  # 5
    "80-20": ("lower", "higher"),  # missed
    "gspo": ("lower", "higher"),  # 6
    "gtpo": ("contains 0", "higher"),  # 9, missed
    # What the page says beside the predictions.
    "difficulty weight alone": ("contains 0", "higher"),
    "full strength": ("contains 0", "higher"),
    "entropy advantage": ("contains 0", "contains 0"),
}
EMBEDDED_VERDICTS = {
    "gspo": ("lower", "higher"),  # 8
    "maxrl": ("contains 0", "higher"),  # missed
    "difficulty": ("contains 0", "higher"),  # missed
    "entropy advantage": ("contains 0", "contains 0"),
    "80-20": ("lower", "contains 0"),
    "clip-cov": ("lower", "contains 0"),
    "kl-cov": ("contains 0", "contains 0"),
    "adaptive-entropy": ("contains 0", "contains 0"),
    "multiplied": ("lower", "contains 0"),
    "dr-grpo": ("contains 0", "contains 0"),
    "rloo": ("lower", "contains 0"),
    "reinforce++": ("contains 0", "contains 0"),
    "cispo": ("contains 0", "contains 0"),
    "gtpo": ("contains 0", "contains 0"),  # 9
}
VERDICTS = [
    *[("narrow", arm, *said) for arm, said in NARROW_VERDICTS.items()],
    *[("embedded", arm, *said) for arm, said in EMBEDDED_VERDICTS.items()],
]


@pytest.mark.parametrize(("setting", "arm", "single", "many"), VERDICTS)
def test_the_verdicts_are_what_the_intervals_say(setting, arm, single, many):
    pairs = [(rates(setting, arm, seed), rates(setting, "GRPO", seed)) for seed in range(3)]
    found = []
    for column in range(2):
        found.append(verdict([ours[column] - plain[column] for ours, plain in pairs]))
    assert found == [single, many]


@pytest.mark.parametrize(("setting", "said"), [("narrow", "lower"), ("embedded", "contains 0")])
def test_gtpo_apart_beside_the_base(setting, said):
    """Prediction 10: shown in narrow only."""
    base, _ = rates(setting, "base", 0)
    assert verdict([rates(setting, "gtpo-apart", seed)[0] - base for seed in range(3)]) == said


@pytest.mark.parametrize("setting", SETTINGS)
def test_adaptive_entropy_never_acted(setting):
    """Its runs are GRPO's, bit for bit: its target of 0.2 nats was never reached. Those of narrow were
    made at another commit than GRPO's."""
    for seed in range(3):
        ours, plain = RECORDS[setting]["adaptive-entropy"][seed], RECORDS[setting]["GRPO"][seed]
        assert min(ours.get("training_entropy") or ours["curves"]["entropy"]) > 0.2
        assert ours["weights"] == plain["weights"]
        assert ours["solved"] == plain["solved"]


def test_every_figure_of_the_text_is_one_of_the_tables():
    _, section = PAGE.split("## Trained side by side\n")
    section, _ = section.split("\n## Which of them")
    text = section.replace(summary(Settings()), "")
    known = tables(Settings())
    figures = re.findall(r"[-+]?\d\.\d{3}(?: \[[^]]*\])?", text)
    assert len(figures) > 20
    assert [figure for figure in figures if figure not in known] == []


def test_how_many_comparisons_exclude_0():
    """Of those in the table that the page shows; an interval is printed with its signs."""
    rows = summary(Settings()).splitlines()[2:]
    signs = [pair for row in rows for pair in re.findall(r"\[(.)[\d.]+, (.)[\d.]+\]", row)]
    excluding = sum(low == high for low, high in signs)
    assert f"Of the {len(signs)} comparisons with GRPO in the table, {excluding} exclude 0" in PAGE
