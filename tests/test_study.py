"""lab/study.py: its tables and intervals from hand-made counts."""

import gzip
import json
import re
import statistics
import time
from pathlib import Path

import pytest

import torch

import lab.study
from evaluate import parse_flags
from lab.study import ARMS, BEHAVIOUR, Settings, key, measure, ppo, read, study, tables, tuning
from train import Settings as TrainSettings
from train import check


def save(folder, arm, seed, solved):
    record = {"solved": solved, "samples": 256, **{name: 1.0 for name in BEHAVIOUR}}
    (folder / f"{key(arm, seed)}.json.gz").write_bytes(gzip.compress(json.dumps(record).encode()))


def test_tables_by_hand(tmp_path):
    plain, shaped = ARMS
    save(tmp_path, "base", 0, [0, 64])
    for seed, (a, b) in enumerate([(64, 64), (64, 128), (64, 192)]):       # Pass@1 of every problem: a / 256, b / 256
        save(tmp_path, plain, seed, [a, a])
        save(tmp_path, shaped, seed, [b, b])
    lines = tables(tmp_path).splitlines()
    assert lines[2].startswith("| base (1 seed) | 0.125 [0.000, 0.250] |")
    assert lines[3].startswith("| GRPO (3 seeds) | 0.250 [0.250, 0.250] |")
    assert lines[4].startswith("| GRPO + entropy advantage (3 seeds) | 0.500 [0.500, 0.500] |")
    # Differences 0, 0.25 and 0.5: mean 0.25, standard deviation 0.25; t(2) = 4.303, so +- 4.303 * 0.25 / sqrt(3).
    assert lines[6].startswith("| difference, interval over 3 seeds | +0.250 [-0.371, +0.871] |")
    assert any(line.startswith("| GRPO + entropy advantage, seed 2 | 0.750 |") for line in lines)


def test_a_failed_run_stops_the_study(tmp_path, monkeypatch):
    started = []

    def fail(command, **options):
        started.append(command)
        if len(started) > 1:
            time.sleep(0.5)                                                 # the others take their time
        raise lab.study.subprocess.CalledProcessError(1, command, stderr="train.py: no")
    monkeypatch.setattr(lab.study.subprocess, "run", fail)
    with pytest.raises(lab.study.subprocess.CalledProcessError):
        study(Settings(seeds=10, runs=str(tmp_path / "runs"), results=str(tmp_path / "results"), processes=1))
    assert len(started) <= 6                                                # of 21


def test_missing_counts_and_seeds_are_named(tmp_path):
    save(tmp_path, "base", 0, [1])
    with pytest.raises(ValueError, match="no saved counts of GRPO, GRPO . entropy advantage"):
        tables(tmp_path)
    with pytest.raises(ValueError, match="--seeds must be 1 to 10"):
        study(Settings(seeds=11))


def test_measure_counts_what_the_model_does(tmp_path, monkeypatch):
    monkeypatch.setattr(lab.study, "PROBLEMS", 3)
    monkeypatch.setattr(lab.study, "SAMPLES", 4)
    threads = torch.get_num_threads()
    for _ in range(2):
        measure("base", tmp_path / "base-0.json.gz")
        torch.set_num_threads(threads)
        record = read(tmp_path, "base")[0]
        assert len(record["solved"]) == 3 and record["samples"] == 4 and set(BEHAVIOUR) <= set(record)
        assert 1 < record["attempts per response"] < 9 and record["tokens per response"] > 14
    assert [p.name for p in tmp_path.iterdir()] == ["base-0.json.gz"]


def test_a_study_does_what_is_left_and_trains_every_arm_by_its_flags(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(lab.study.subprocess, "run", lambda command, **options: commands.append((command[1:], options)))
    s = Settings(seeds=2, runs=str(tmp_path / "runs"), results=str(tmp_path / "results"), processes=1)
    save_to = tmp_path / "results"
    save_to.mkdir()
    save(save_to, "GRPO", 0, [1])                                           # measured already
    done = tmp_path / "runs" / "grpo-1"
    done.mkdir(parents=True)
    (done / "config.json").write_text("{}")                                 # begun already
    study(s)
    assert all(options["env"]["OMP_NUM_THREADS"] == "1" and options["check"] for _, options in commands)
    lines = [" ".join(command) for command, _ in commands]
    assert [line for line in lines if "--resume" in line] == [f"train.py --resume {done}"]
    trained = [line for line in lines if "--name" in line]
    assert [line.split("--name ")[1] for line in trained] == ["grpo-entropy-advantage-0 --seed 0", "grpo-entropy-advantage-1 --seed 1"]
    measured = [line.split("--to ")[1].removeprefix(str(save_to) + "/") for line in lines if "--measure" in line]
    assert measured == ["base-0.json.gz", "grpo-entropy-advantage-0.json.gz", "grpo-1.json.gz", "grpo-entropy-advantage-1.json.gz"]
    for command in trained:
        check(parse_flags(TrainSettings, "train", command.split()[1:]))
    assert ARMS["GRPO"] == ["--alpha", "0"] and parse_flags(TrainSettings, "train", ARMS["GRPO"]).alpha == 0


def test_arms_have_file_names_that_do_not_collide():
    assert len({key(arm, 1) for arm in ("base", *ARMS)}) == 1 + len(ARMS)
    assert key("GRPO", 0) == "grpo-0" and key("GRPO + entropy advantage", 2) == "grpo-entropy-advantage-2"


@pytest.mark.parametrize("arm", list(ARMS))
def test_read_does_not_mix_arms(tmp_path, arm):
    for other in ARMS:
        save(tmp_path, other, 0, [1])
    save(tmp_path, arm, 1, [2])
    assert {seed: r["solved"] for seed, r in read(tmp_path, arm).items()} == {0: [1], 1: [2]}


def test_seeds_are_paired_by_their_number(tmp_path):
    plain, shaped = ARMS
    save(tmp_path, "base", 0, [0])
    for seed, a in ((0, 10), (1, 110), (2, 210)):
        save(tmp_path, plain, seed, [a])
    save(tmp_path, shaped, 1, [116])
    with pytest.raises(ValueError, match="no seed in common"):
        (tmp_path / "grpo-1.json.gz").rename(tmp_path / "aside")
        tables(tmp_path)
    (tmp_path / "aside").rename(tmp_path / "grpo-1.json.gz")
    save(tmp_path, shaped, 2, [222])
    [line] = [line for line in tables(tmp_path).splitlines() if "over 2 seeds" in line]
    assert line.split(" | ")[1].startswith("+0.035 ")                       # (6 + 12) / 2 / 256, not (106 + 112) / 2 / 256


RESULTS = Path("lab/results")


def test_the_published_tables_come_from_the_saved_counts():
    published, readme = Path("lab/RESULTS.md").read_text(), Path("README.md").read_text()
    found = tables(RESULTS)
    for line in [*found.splitlines(), *tuning(RESULTS).splitlines(), *ppo(RESULTS).splitlines()]:
        assert line in published, line
    core, _, behaviour = found.split("\n\n")
    for line in [*core.splitlines(), *behaviour.splitlines()]:
        assert line in readme, line


def test_what_is_said_of_ppo_holds_for_every_seed():
    runs = json.loads((RESULTS / "ppo.json").read_text())["runs"]
    assert [run["seed"] for run in runs] == [0, 1, 2]
    for run in runs:
        mean = lambda name, first: statistics.mean(run[name][first:first + 10])
        assert len(run["reward"]) == 100 and mean("explained_variance", 0) < 0.03 < mean("explained_variance", 90)
        assert mean("reward", 90) > mean("reward", 0) + 0.15
        first, last = ([count / run["validation"][step]["samples"] for count in run["validation"][step]["solved"]]
                       for step in ("0", "100"))
        assert statistics.mean(last) > 2 * statistics.mean(first)


def test_the_saved_counts_are_whole():
    for arm, seeds in (("base", [0]), *((arm, [0, 1, 2]) for arm in ARMS)):
        saved = read(RESULTS, arm)
        assert list(saved) == seeds
        for record in saved.values():
            assert len(record["solved"]) == 200 and record["samples"] == 256
            assert all(0 <= count <= 256 for count in record["solved"]) and set(BEHAVIOUR) <= set(record)
    assert all(len(row["solved"]) == 200 and row["samples"] == 64 for row in json.loads((RESULTS / "tuning.json").read_text()))


def test_intervals_of_the_saved_counts_by_another_way():
    """The bootstrap over problems against the normal approximation, Pass@1 of the base."""
    [record] = read(RESULTS, "base").values()
    rates = [count / 256 for count in record["solved"]]
    mean, half = statistics.mean(rates), 1.96 * statistics.stdev(rates) / len(rates) ** 0.5
    line = next(line for line in tables(RESULTS).splitlines() if line.startswith("| base"))
    printed = [float(x) for x in re.findall(r"[0-9.]+(?=[ ,\]])", line.split("|")[2])]
    assert printed == pytest.approx([mean, mean - half, mean + half], abs=0.002)
