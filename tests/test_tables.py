"""lab/tables.py: tables and intervals of hand-made counts; then the saved counts, and that TABLES.md,
RESULTS.md and README.md say of them what they are.

Held against arithmetic by hand, `statistics`, numerical integration of Student's density and the
normal approximation.
"""

import dataclasses
import gzip
import json
import math
import re
import statistics
from pathlib import Path

import numpy as np
import pytest

from lab import narrow
from lab.arms import ARMS, BASE, CORE, FRESH, GRPO, GRPO_ENTROPY, MAP, OTHERS, PPO, key
from lab.behaviour import Behaviour
from lab.published import PAGE, RESULTS, page
from lab.tables import (
    CURVES,
    KS,
    T_975,
    compared,
    figures,
    map_tables,
    passes,
    read,
    read_all,
    tables,
)
from plumbing.settings import Settings as TrainSettings
from plumbing.settings import parse_flags, run_name
from tasks import load_task

FIGURES = [*Behaviour().figures(), "repeated 4-grams, share"]
PAGES = {"README": Path("README.md"), "RESULTS": Path("lab/RESULTS.md")}


def save_counts(folder, arm, seed, solved, samples=256, **more):
    """Counts like those that lab.study.measure saves."""
    added = {
        "right": {"1": [10, 2.0, 1], "3": [30, 3.0, 3]},
        "wrong": {"1": [100, 40.0, 30], "3": [50, 10.0, 5]},
    }
    record = {"split": "test", "solved": solved, "samples": samples, "line": added}
    record |= dict.fromkeys(FIGURES, 1.0) | more
    if arm != "base":
        record["curves"] = {name: [i + step for step in range(40)] for i, name in enumerate(CURVES)}
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{key(arm, seed)}.json.gz"
    file.write_bytes(gzip.compress(json.dumps(record).encode()))


# Tables of counts made by hand.


@pytest.fixture
def rows_by_hand(tmp_path):
    """The tables of a base, of three seeds of GRPO and of three with the entropy advantage, by the
    first cell of each row. Pass@1 of the first of two problems: 64 / 256 in GRPO, and 64, 128 and
    192 / 256 with the entropy advantage; nothing solves the second."""
    save_counts(tmp_path, "base", 0, [0, 64])
    for seed, count in enumerate((64, 128, 192)):
        save_counts(tmp_path, GRPO, seed, [64, 0])
        tokens = {"tokens per response": 1.0 + seed}
        save_counts(tmp_path, GRPO_ENTROPY, seed, [count, 0], **tokens)
    rows = {}
    for line in tables(tmp_path).splitlines():
        rows[line.split(" | ")[0]] = line.strip("| ").split(" | ")[1:]
    return rows


def pass_at(k, right, samples=256):
    """As a product: each of k draws misses."""
    return 1 - math.prod((samples - right - i) / (samples - i) for i in range(k))


def test_rates_are_those_of_the_counts(rows_by_hand):
    base = rows_by_hand["| base (1)"]
    assert base[0] == "0.125 [0.000, 0.250]"
    assert base[3].startswith(f"{pass_at(64, 64) / 2:.3f} [")
    pass_4 = pass_at(4, 64)
    assert rows_by_hand["| GRPO (3)"][:2] == [
        "0.125 [0.000, 0.250]",
        f"{pass_4 / 2:.3f} [0.000, {pass_4:.3f}]",
    ]
    assert rows_by_hand["| GRPO + entropy advantage, seed 2"][0] == "0.375"


def test_differences_over_problems_are_paired_by_problem(rows_by_hand):
    """0.25 on one of them, 0 on the other. 128 and 192 right answers miss 64 times with less than
    1e-20."""
    row = rows_by_hand["| GRPO + entropy advantage − GRPO, over problems"]
    assert row[0] == "+0.125 [+0.000, +0.250]"
    [*_, pass_64, _] = row
    missed = 2 - 2 * pass_at(64, 64)
    assert pass_64 == f"{missed / 6:+.3f} [+0.000, {missed / 3:+.3f}]"


def test_differences_over_seeds_are_students_intervals(rows_by_hand):
    """Differences 0, 0.125 and 0.25: mean 0.125, standard deviation 0.125; t(2) = 4.303, so
    +- 4.303 * 0.125 / sqrt(3)."""
    row = rows_by_hand["| the same, over the 3 seeds of both"]
    assert row[0] == "+0.125 [-0.186, +0.436]"
    four = [pass_at(4, right) for right in (64, 128, 192)]
    gains = [(rate - four[0]) / 2 for rate in four]
    mean = statistics.mean(gains)
    half = 4.303 * statistics.stdev(gains) / 3**0.5
    assert row[1] == f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]"
    # Differences 0, 1 and 2: mean 1, standard deviation 1.
    tokens = rows_by_hand["| tokens per response"]
    assert tokens == ["1.000", "1.000", "2.000", "+1.000 [-1.484, +3.484]"]


def test_what_is_added_to_right_and_to_wrong_answers_is_summed_over_seeds(rows_by_hand):
    """Three seeds, each with 10 tokens of right answers where one of 16 is right: psi / |A| is 2 / 10,
    one of them is capped."""
    assert rows_by_hand["| 1 to 1"] == ["30", "0.200", "0.100", "300", "0.400", "0.300"]
    assert rows_by_hand["| 2 to 3"] == ["90", "0.100", "0.100", "150", "0.200", "0.100"]
    assert rows_by_hand["| 12 to 15"][0] == "0"


def test_training_is_averaged_over_twenty_steps(rows_by_hand):
    first = rows_by_hand["| GRPO, steps 1 to 20"]
    assert first[:2] == ["9.5", "10.5"]  # means of 0 to 19, and of 1 to 20
    assert rows_by_hand["| GRPO, steps 21 to 40"][1] == "30.5"


def test_a_run_of_the_map_is_compared_with_the_mean_of_the_core(tmp_path):
    """Core arms of two and three seeds, Pass@1 by the count in 256 samples: squares of deviations 32
    and 50, so the variance of a run is 82 / 3; t(3) = 3.182; the baseline is a mean of two."""
    counts_of = {GRPO: (100, 108), GRPO_ENTROPY: (120, 125, 130), "alpha 1": (112,)}
    for arm, counts in counts_of.items():
        for seed, count in enumerate(counts):
            save_counts(tmp_path, arm, seed, [count])

    text = "\n".join(compared({arm: read(tmp_path, arm) for arm in counts_of}))
    half = 3.182 * (82 / 3 * (1 + 1 / 2)) ** 0.5 / 256
    # (112 - 104) / 256
    assert "alpha 1 − GRPO, over problems | +0.031 [+0.031, +0.031]" in text
    interval = f"[{8 / 256 - half:+.3f}, {8 / 256 + half:+.3f}]"
    assert f"over seeds (spread of the core) | +0.031 {interval}" in text

    single = {arm: {0: read(tmp_path, arm)[0]} for arm in (GRPO, "alpha 1")}
    text = "\n".join(compared(single))
    assert "over seeds (spread of the core) | +0.047 [-inf, +inf]" in text


def test_students_t_by_integration():
    for freedom, t in enumerate(T_975[1:], 1):
        x = np.linspace(0, t, 200_001)
        density = (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
        gammas = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2)
        scale = gammas / math.sqrt(freedom * math.pi)
        assert np.trapezoid(density, x) * scale == pytest.approx(0.475, abs=3e-5)  # three decimals


def test_seeds_are_paired_by_their_number(tmp_path):
    save_counts(tmp_path, "base", 0, [0])
    save_counts(tmp_path, GRPO, 0, [10])
    save_counts(tmp_path, GRPO, 2, [210])
    save_counts(tmp_path, GRPO_ENTROPY, 1, [116])
    with pytest.raises(ValueError, match="one seed in common"):
        tables(tmp_path)
    save_counts(tmp_path, GRPO, 1, [110])
    save_counts(tmp_path, GRPO_ENTROPY, 2, [222])
    text = tables(tmp_path)
    # (6 + 12) / 2 / 256, not (106 + 112) / 2 / 256.
    assert "\n| GRPO + entropy advantage − GRPO, over problems | +0.035 " in text
    assert "\n| the same, over the 2 seeds of both | +0.035 " in text


def test_missing_counts_are_named(tmp_path):
    save_counts(tmp_path, "base", 0, [1])
    wanted = "needs saved counts of the base, and of GRPO and GRPO . entropy advantage"
    with pytest.raises(ValueError, match=wanted):
        tables(tmp_path)


def test_pictures_are_drawn(tmp_path):
    matplotlib = pytest.importorskip("matplotlib", reason="pip install matplotlib")
    save_counts(tmp_path, "base", 0, [10, 20], **{"tokens per response": 1.0})
    for arm in (GRPO, GRPO_ENTROPY, PPO):
        for seed in range(2):
            save_counts(tmp_path, arm, seed, [10, 20], **{"tokens per response": 1.0 + seed})
    written = figures(tmp_path, tmp_path / "out")
    assert [file.name for file in written] == ["curves.png", "pass_at_k.png", "behaviour.png"]
    for file in written:
        image = matplotlib.image.imread(file)
        assert min(image.shape[:2]) > 500
        ink = (image[..., :3].mean(-1) < 0.9).mean()
        assert 0.001 < ink < 0.5


# The saved counts.

TESTED = read_all(RESULTS, [BASE, *CORE, *OTHERS, *FRESH])
TRIED = read_all(RESULTS / "map", [*CORE, *MAP])
FLAGS = {arm.name: arm.flags.split() for arm in ARMS}


def every_record(arms):
    for arm, records in arms.items():
        for seed, record in records.items():
            yield arm, seed, record


def test_no_saved_counts_are_missing():
    five = [0, 1, 2, 3, 4]
    assert list(TESTED["base"]) == [0]
    for arm in CORE:
        assert list(TESTED[arm.name]) == list(TRIED[arm.name]) == five
    for arm in OTHERS:
        assert list(TESTED[arm.name]) == [0, 1, 2]
    for arm in FRESH:
        is_fresh = arm.name.startswith("fresh")
        assert list(TESTED[arm.name]) == ([5, 6, 7, 8, 9] if is_fresh else five)


@pytest.mark.parametrize("arms, split, samples", [(TESTED, "test", 256), (TRIED, "validation", 64)])
def test_the_saved_counts_are_whole_and_of_what_they_say(arms, split, samples):
    for arm, seed, record in every_record(arms):
        problems = 107 if arm.startswith("easy") else 200  # countdown-easy has no more to validate
        assert len(record["solved"]) == problems
        assert record["samples"] == samples
        assert record["split"] == split
        assert all(0 <= count <= samples for count in record["solved"])
        assert set(FIGURES) <= set(record)
        if arm != "base":
            flags = [*FLAGS[arm], "--seed", str(seed), "--final-samples", "8"]
            s = parse_flags(TrainSettings, "train", flags)
            assert len(record["curves"]["reward"]) == s.steps
            # The earliest runs validated on all 200 problems.
            fewer = dataclasses.replace(s, eval_problems=20)
            assert record["run"] in (run_name(s), run_name(fewer))


def test_easy_problems_are_few():
    assert len(load_task("countdown-easy").validation) == 107


def test_the_same_seed_made_the_same_weights_twice():
    """Two sessions trained seed 0 of the core, and of the hard problems, on their own; those of the
    core with other validations on the way; other seeds differ."""
    for arm in (GRPO, GRPO_ENTROPY):
        tested = TESTED[arm]
        tried = TRIED[arm]
        assert tested[0]["curves"].items() <= tried[0]["curves"].items()
        assert tried[0]["run"] != tested[0]["run"]  # the validations
        digests = [record["weights"] for record in tested.values()]
        assert [record["weights"] for record in tried.values()] == digests
    for arm in ("hard", "hard + entropy advantage"):
        assert TESTED["repeated " + arm][0]["weights"] == TRIED[arm][0]["weights"]
    digests = [record["weights"] for arm, _, record in every_record(TESTED) if arm != "base"]
    assert len(set(digests)) == len(digests)


# The published pages.


@pytest.fixture(scope="module")
def study_text():
    return tables(RESULTS)


@pytest.fixture(scope="module")
def map_text():
    return map_tables(RESULTS)


def in_one_line(name):
    return " ".join(PAGES[name].read_text().split())


def markdown_tables(text):
    """Each table as its rows, each row as its cells, without the rule under the head."""
    found = [[]]
    for line in text.splitlines():
        if not line.startswith("|"):
            found.append([])
        elif not line.startswith(("| ---", "|---")):
            found[-1].append(line.removeprefix("| ").removesuffix(" |").split(" | "))
    return [rows for rows in found if rows]


def test_the_page_of_tables_is_what_the_saved_counts_give(study_text, map_text):
    published = PAGE.read_text()
    assert published == page(RESULTS), "python -m lab.published writes it again"

    # It holds each table that `python -m lab.study` prints, and no other with such a head.
    blocks = published.split("\n\n")
    printed = [*study_text.split("\n\n"), *map_text.split("\n\n")]
    for block in printed:
        assert block in blocks, block
    heads = {block.splitlines()[0] for block in printed}
    assert sum(block.split("\n")[0] in heads for block in blocks) == len(printed)


@pytest.mark.parametrize("name", PAGES)
def test_a_table_quoted_on_a_page_is_part_of_one_of_the_tables(name):
    """Some of its rows, one after another, and of its columns, from the left."""
    whole = markdown_tables(PAGE.read_text())
    heads = {table[0][0] for table in whole}
    for quoted in markdown_tables(PAGES[name].read_text()):
        if quoted[0][0] in heads:
            assert any(is_part(quoted, table) for table in whole), quoted


@pytest.mark.parametrize("name", PAGES)
def test_an_interval_in_a_table_of_a_page_is_one_of_the_tables(name):
    """Under whatever head it stands."""
    known = {cell for table in markdown_tables(PAGE.read_text()) for row in table for cell in row}
    for quoted in markdown_tables(PAGES[name].read_text()):
        for row in quoted:
            for cell in row:
                if "[" in cell and "](" not in cell:  # not a link
                    assert cell in known


def is_part(quoted, table):
    width = len(quoted[0])
    head, *rows = [row[:width] for row in table]
    starts = range(len(rows))
    return quoted[0] == head and any(
        rows[start : start + len(quoted) - 1] == quoted[1:] for start in starts
    )


@pytest.fixture
def core_rates(study_text):
    """The rows of base, GRPO and GRPO + entropy advantage."""
    head, *rows = markdown_tables(study_text)[0][:4]
    assert [row[0] for row in rows] == ["base (1)", "GRPO (5)", "GRPO + entropy advantage (5)"]
    return head, rows


def test_results_show_base_and_both_core_arms(core_rates):
    head, rows = core_rates
    wanted = [row[:6] for row in (head, *rows)]  # up to Pass@128
    assert wanted in markdown_tables(PAGES["RESULTS"].read_text())


def test_an_interval_over_problems_is_near_the_normal_approximation(study_text):
    """Pass@1 of the base."""
    rates = [count / 256 for count in TESTED["base"][0]["solved"]]
    mean = statistics.mean(rates)
    half = 1.96 * statistics.stdev(rates) / len(rates) ** 0.5
    line = next(line for line in study_text.splitlines() if line.startswith("| base"))
    printed = [float(number) for number in re.findall(r"[0-9.]+(?=[ ,\]])", line.split("|")[2])]
    assert printed == pytest.approx([mean, mean - half, mean + half], abs=0.0006)


# What the pages say of the effect.


def t_interval(differences):
    """Of differences, one per seed, by hand: low, mean, high."""
    t = {3: 4.303, 5: 2.776, 10: 2.262}[len(differences)]
    mean = statistics.mean(differences)
    half = t * statistics.stdev(differences) / len(differences) ** 0.5
    return mean - half, mean, mean + half


def interval_at(k, arm, other, seeds):
    """arm minus other, Pass@K by seed."""
    column = KS.index(k)
    return t_interval([(arm[seed] - other[seed])[:, column].mean() for seed in seeds])


def contains_zero(interval):
    low, _, high = interval
    return low < 0 < high


def as_quoted(interval):
    low, mean, high = interval
    return f"{mean:+.3f} ({low:+.3f} to {high:+.3f})".replace("-", "−")


def without_bracket(interval):
    """As quoted where "over seeds" may follow."""
    return as_quoted(interval)[:-1]


@pytest.fixture(scope="module")
def rates():
    return {arm: passes(records) for arm, records in TESTED.items()}


@pytest.fixture(scope="module")
def core(rates):
    """Both arms, all ten seeds."""
    return {arm: rates[arm] | rates["fresh " + arm] for arm in (GRPO, GRPO_ENTROPY)}


SEEDS = {
    "0 to 4, as planned": range(5),
    "5 to 9, a repetition": range(5, 10),
    "all ten": range(10),
}


@pytest.mark.parametrize("name", SEEDS)
def test_the_primary_intervals_are_quoted_and_contain_zero(name, core):
    """At every K: "no difference"."""
    found = {k: interval_at(k, core[GRPO_ENTROPY], core[GRPO], SEEDS[name]) for k in KS}
    assert all(contains_zero(interval) for interval in found.values())
    row = f"| {name} | {as_quoted(found[1])} | {as_quoted(found[64])} |"
    assert row in in_one_line("RESULTS")
    if name == "all ten":
        assert row in in_one_line("README")


def test_both_pages_say_that_there_is_no_difference():
    assert "no difference that five seeds can show, nor ten" in in_one_line("README")
    assert "**No difference that five seeds can show, nor ten.**" in in_one_line("RESULTS")


def test_what_ten_seeds_exclude_and_nearly_show_is_said(core):
    found = {k: interval_at(k, core[GRPO_ENTROPY], core[GRPO], range(10)) for k in KS}
    _, _, high = found[1]
    assert high < 0.0095  # "more than 0.9 points"
    for k in (4, 16):
        assert f"Pass@{k}, {as_quoted(found[k])}" in in_one_line("RESULTS")


def test_the_other_arms_show_no_difference_at_any_k(rates):
    for arm in OTHERS:
        if arm.name == PPO:
            continue
        for k in KS:
            interval = interval_at(k, rates[arm.name], rates[arm.against], range(3))
            assert contains_zero(interval), (arm.name, k)


@pytest.mark.parametrize("k", [1, 64])
def test_the_intervals_of_ppo_are_quoted(k, rates):
    interval = interval_at(k, rates["PPO + entropy advantage"], rates[PPO], range(3))
    assert f"Pass@{k} {without_bracket(interval)}" in in_one_line("RESULTS")


def test_a_gain_on_hard_problems_was_not_confirmed(rates):
    found = {}
    for again, seeds in (("fresh", range(5, 10)), ("repeated", range(5))):
        with_it = rates[f"{again} hard + entropy advantage"]
        found[again] = interval_at(1, with_it, rates[f"{again} hard"], seeds)
    low, _, _ = found["fresh"]
    assert low > 0
    assert contains_zero(found["repeated"])
    for interval in found.values():
        assert without_bracket(interval) in in_one_line("RESULTS")


def test_a_gain_with_kappa_4_was_not_confirmed(rates):
    interval = interval_at(16, rates["fresh kappa 4"], rates["fresh GRPO"], range(5, 10))
    assert contains_zero(interval)
    quoted = f"No gain shows: Pass@16 {without_bracket(interval)} over seeds)"
    assert quoted in in_one_line("RESULTS")


def test_every_interval_in_the_text_is_one_of_the_tables(study_text, map_text):
    known = study_text + map_text + narrow.tables(narrow.Settings())
    # Checks per response of all ten seeds are in no table.
    checks = {}
    for arm in (GRPO, GRPO_ENTROPY):
        both = TESTED[arm] | TESTED["fresh " + arm]
        checks[arm] = [record["checks per response"] for record in both.values()]
    pairs = zip(checks[GRPO], checks[GRPO_ENTROPY])
    low, mean, high = t_interval([with_it - without for without, with_it in pairs])
    known += f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"
    # Of the earlier study, whose counts are not here.
    known += "-0.001 [-0.024, +0.022] +0.002 [-0.042, +0.046]"

    number = r"([+−][0-9.]+)"
    count = 0
    for name in PAGES:
        text = in_one_line(name)
        for mean, low, high in re.findall(rf"{number} \({number} to {number}", text):
            as_in_table = f"{mean} [{low}, {high}]".replace("−", "-")
            assert as_in_table in known, (name, mean, low, high)
            count += 1
        # Written so that the search above finds it.
        assert not re.search(rf"{number}, {number} to {number}", text)
    assert count > 25
