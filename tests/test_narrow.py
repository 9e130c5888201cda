"""lab/narrow.py and lab/difficulty.py: the weight by hand, the arms beside their flags, the thirds by
sorting, and the tables of lab/NARROW.md made again from the saved counts."""

import gzip
import json
import re
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluate import pass_table
from lab.arms import key
from lab.difficulty import weighted_group_advantage
from lab.narrow import BASE, DIFFICULTY, SETTING, TRAINED, Settings, by_difficulty, passes, tables
from lab.tables import read_all
from plumbing.settings import PRESETS, check, parse_flags
from plumbing.settings import Settings as TrainSettings

PAGE = Path("lab/NARROW.md").read_text()


def test_the_difficulty_weight_by_hand():
    """kappa = 2: 1.25 where a quarter is right, 0.75 where three quarters are, 1 at one half."""
    reward = torch.tensor([1, -1, -1, -1, 1, 1, 1, -1, 1, 1, -1, -1, 1, 1, 1, 1]).float()
    group = torch.arange(4).repeat_interleave(4)
    want = [1.5, -0.5, -0.5, -0.5, 0.5, 0.5, 0.5, -1.5, *[0.75**0.5] * 2, *[-(0.75**0.5)] * 2]
    weights = [1.25] * 4 + [0.75] * 4 + [1.0] * 4
    expected = [a * weight for a, weight in zip(want, weights)] + [0.0] * 4
    got = weighted_group_advantage(reward, group)
    assert got.tolist() == pytest.approx(expected, abs=1e-5)


def test_every_arm_is_what_its_name_says():
    changed = {
        "GRPO": dict(alpha=0.0),
        "entropy advantage": dict(),
        "full strength": dict(alpha=10.0),
        "difficulty weight alone": dict(alpha=0.0),
        "entropy regularisation": dict(alpha=0.0, entropy_coef=0.003),
        "without clip-higher": dict(alpha=0.0, clip_high=0.2),
    }
    setting = dict(task="countdown-easy", max_new_tokens=24, steps=200)
    assert [arm.name for arm in TRAINED] == list(changed)
    assert DIFFICULTY in TRAINED
    for arm in TRAINED:
        s = parse_flags(TrainSettings, "train", f"{SETTING} {arm.flags}".split())
        check(s)
        assert s == TrainSettings(**setting, **changed[arm.name])
        assert arm.against == ("" if arm.name == "GRPO" else "GRPO")


def test_the_setting_has_a_name():
    frozen = parse_flags(TrainSettings, "train", SETTING.split())
    named = parse_flags(TrainSettings, "train", ["--preset", "narrow"], PRESETS)
    named.preset = ""
    assert named == frozen


def test_thirds_hold_every_problem_once_in_order_of_difficulty():
    base = np.array([[0.5, 1], [0.1, 1], [0.9, 1], [0.2, 1], [0.7, 1], [0.3, 1]])
    thirds = by_difficulty(base)
    assert [sorted(third.tolist()) for third in thirds.values()] == [[1, 3], [0, 5], [2, 4]]


def test_the_tables_of_the_page_are_made_again_from_the_saved_counts():
    assert tables(Settings()) in PAGE


def test_how_the_setting_was_found_is_made_again_from_the_counts_of_those_runs():
    saved = Path("lab/results/narrow-found.json.gz").read_bytes()
    found = json.loads(gzip.decompress(saved))
    rows = []
    for name, run in found.items():
        first, *_, last = run["validations"]
        for validation in (first, last):
            table = pass_table(validation["solved"], validation["samples"], (1, 64, 256))
            assert len(table) == 100
            values = " | ".join(f"{value:.3f}" for value in table.mean(0))
            step = validation["step"] or ""
            rows.append(f"| {step} | {values} |".replace("|  |", "| |"))
    assert len(rows) == 6
    for row in rows:
        assert row in PAGE


def test_every_figure_of_the_verdicts_is_one_of_the_tables():
    """The gains of single seeds, which no table has, are differences of Pass@256."""
    text, _, _ = PAGE.partition("\n| mean over seeds (how many)")
    _, _, verdicts = text.partition("## The outcome")
    figures = re.findall(r"[-+]?\d\.\d{3}(?: \[[^]]*\])?", verdicts)
    records = read_all(Path("lab/results/narrow"), TRAINED)
    ours, plain = passes(records["entropy advantage"]), passes(records["GRPO"])
    gains = [f"{(ours[seed] - plain[seed])[:, -1].mean():+.3f}" for seed in ours]
    known = tables(Settings()) + " ".join(gains)
    assert len(figures) == 27
    assert [figure for figure in figures if figure not in known] == []


def interval(arm, against, column):
    """95 %, of the difference paired by seed: Student's t of four degrees of freedom, by hand."""
    records = read_all(Path("lab/results/narrow"), TRAINED)
    ours, others = passes(records[arm]), passes(records[against])
    differences = [(ours[seed] - others[seed])[:, column].mean() for seed in range(5)]
    mean = statistics.mean(differences)
    half = 2.776 * statistics.stdev(differences) / 5**0.5
    return mean - half, mean + half


@pytest.mark.parametrize(
    ("arm", "against", "single", "many"),
    [
        ("entropy advantage", "GRPO", "contains 0", "contains 0"),  # prediction 2
        ("full strength", "GRPO", "contains 0", "higher"),  # 3
        ("difficulty weight alone", "GRPO", "contains 0", "higher"),  # 4
        ("difficulty weight alone", "full strength", "contains 0", "higher"),  # 4, missed
        ("entropy regularisation", "GRPO", "contains 0", "higher"),  # 5
        ("without clip-higher", "GRPO", "contains 0", "contains 0"),  # 6, not shown
    ],
)
def test_the_verdicts_are_what_the_intervals_say(arm, against, single, many):
    """Pass@1 and Pass@256."""
    for column, verdict in ((0, single), (-1, many)):
        low, high = interval(arm, against, column)
        assert (low > 0) == (verdict == "higher")
        assert (low < 0 < high) == (verdict == "contains 0")


def test_grpo_narrows():
    """Prediction 1: every seed's Pass@256 is far below the base's, and its Pass@1 far above."""
    records = read_all(Path("lab/results/narrow"), [BASE, *TRAINED])
    base = passes(records["base"])[0].mean(0)
    for values in passes(records["GRPO"]).values():
        assert values.mean(0)[0] > 2 * base[0]
        assert values.mean(0)[-1] < 0.6 * base[-1]


IN_README = {
    "base": "base",
    "GRPO": "GRPO",
    "entropy advantage": "entropy advantage, α = 0.4",
    "full strength": "entropy advantage, nearly at full strength: α = 10",
    "difficulty weight alone": "a weight by difficulty alone, without any entropy",
    "entropy regularisation": "entropy regularisation instead",
}


def test_the_rows_of_the_readme_are_those_of_the_tables():
    """Cut to Pass@1, Pass@256 and the gain in the second."""
    levels, differences, _ = tables(Settings()).split("\n\n")
    rows = {row[0].split(" (")[0]: row for row in map(cells_of, levels.splitlines())}
    gains = {row[0].split(" − ")[0]: row for row in map(cells_of, differences.splitlines()[:-1])}
    readme = Path("README.md").read_text()
    for arm, name in IN_README.items():
        single, many = (rows[arm][column].split(" [")[0] for column in (1, 5))
        gain = ""
        if arm in gains:
            gain = gains[arm][5].replace("[", "(").replace("]", ")").replace(", ", " to ")
            gain = f" {gain}".replace("-", "−")
        assert f"| {name} | {single} | {many} |{gain} |" in readme


def cells_of(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_counts_have_names_that_do_not_collide():
    assert len({key(arm.name, 0) for arm in TRAINED}) == len(TRAINED)
