"""lab/study.py and lab/arms.py: what a study runs, in which order, with which settings, and what it
measures of a run. Held against lists written by hand, and against arithmetic on a group of 16."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import lab.children
from lab.arms import ARMS, CORE, FRESH, GRPO, GRPO_ENTROPY, MAP, OTHERS, PPO, key
from lab.behaviour import Behaviour
from lab.study import Settings, Watch, measure, study
from lab.tables import CURVES, read
from plumbing.settings import Settings as TrainSettings
from plumbing.settings import check, parse_flags, run_name
from rollout import Episode
from tasks import Problem
from train import train

FIGURES = [*Behaviour().figures(), "repeated 4-grams, share"]


# The arms.

HARD = dict(task="countdown-hard")
EASY = dict(task="countdown-easy")
LONGER = dict(steps=300)
SLOWER = dict(lr=1e-4, minibatch=2)
WITHOUT = dict(alpha=0.0)
# What each arm changes in train.py's defaults.
WANTED = {
    "GRPO": WITHOUT,
    "GRPO + entropy advantage": {},
    "GRPO + entropy regularisation": WITHOUT | dict(entropy_coef=0.003),
    "GRPO without clip-higher": WITHOUT | dict(clip_high=0.2),
    "PPO": WITHOUT | dict(algo="ppo"),
    "PPO + entropy advantage": dict(algo="ppo", alpha=0.1),
    "beta 0.003": WITHOUT | dict(entropy_coef=0.003),
    "beta 0.01": WITHOUT | dict(entropy_coef=0.01),
    "beta 0.03": WITHOUT | dict(entropy_coef=0.03),
    "alpha 1": dict(alpha=1.0),
    "alpha 2": dict(alpha=2.0),
    "kappa 1.5": dict(kappa=1.5),
    "kappa 4": dict(kappa=4.0),
    "steps x 3": WITHOUT | LONGER,
    "steps x 3 + entropy advantage": LONGER,
    "lr 1e-4, minibatch 2": WITHOUT | SLOWER,
    "lr 1e-4, minibatch 2 + entropy advantage": SLOWER,
    "hard": WITHOUT | HARD,
    "hard + entropy advantage": HARD,
    "easy": WITHOUT | EASY,
    "easy + entropy advantage": EASY,
    "fresh GRPO": WITHOUT,
    "fresh GRPO + entropy advantage": {},
    "fresh kappa 4": dict(kappa=4.0),
    "fresh hard": WITHOUT | HARD,
    "fresh hard + entropy advantage": HARD,
    "repeated hard": WITHOUT | HARD,
    "repeated hard + entropy advantage": HARD,
}


def test_no_arm_is_missing_or_there_twice():
    assert sorted(arm.name for arm in ARMS) == sorted(WANTED)
    assert ARMS == [*CORE, *OTHERS, *MAP, *FRESH]


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: key(arm.name))
def test_every_arm_is_what_its_name_says(arm):
    s = parse_flags(TrainSettings, "train", arm.flags.split())
    check(s)
    assert vars(s) == vars(TrainSettings()) | WANTED[arm.name]


def test_every_arm_is_compared_with_its_own_baseline():
    against = {arm.name: arm.against for arm in ARMS if arm.against}
    assert against["PPO + entropy advantage"] == PPO
    assert against["hard + entropy advantage"] == "hard"
    assert against["fresh kappa 4"] == "fresh GRPO"
    assert against["fresh GRPO + entropy advantage"] == "fresh GRPO"
    assert against["kappa 4"] == GRPO
    assert against["fresh hard + entropy advantage"] == "fresh hard"
    assert not {"fresh GRPO", "fresh hard"} & set(against)
    assert against["repeated hard + entropy advantage"] == "repeated hard"
    assert "repeated hard" not in against
    with_grpo = (GRPO_ENTROPY, "GRPO without clip-higher", "alpha 2", "beta 0.01")
    assert {against[arm] for arm in with_grpo} == {GRPO}
    assert set(against.values()) <= set(WANTED)


def test_arms_have_file_names_that_do_not_collide():
    names = ["base", *(arm.name for arm in ARMS)]
    assert len({key(name, 1) for name in names}) == 1 + len(ARMS)
    assert key(GRPO, 0) == "grpo-0"
    longest = "lr 1e-4, minibatch 2 + entropy advantage"
    assert key(longest, 2) == "lr-1e-4-minibatch-2-entropy-advantage-2"


# What a study runs.


@pytest.fixture
def commands_of(monkeypatch):
    """commands_of(settings) -> the commands of a study that runs nothing, as they would be typed
    after `python`."""

    def run_study(s):
        commands = []

        def note(self, *command):
            commands.append(" ".join(command))

        monkeypatch.setattr(lab.children.Children, "run", note)
        assert study(s) == []
        return commands

    return run_study


@pytest.fixture
def begun(tmp_path):
    """A results folder where seed 0 of GRPO is measured, and a runs folder where seed 1 is begun."""
    results = tmp_path / "results"
    results.mkdir()
    (results / "grpo-0.json.gz").touch()
    run = tmp_path / "runs" / "grpo-1"
    run.mkdir(parents=True)
    write_config(run)
    return tmp_path


def write_config(run, *more):
    flags = ["--alpha", "0", "--seed", "1", "--final-samples", "8", "--eval-problems", "20"]
    s = parse_flags(TrainSettings, "train", [*flags, *more])
    (run / "config.json").write_text(json.dumps(vars(s)))


def settings_in(folder, **changes):
    return Settings(
        runs=str(folder / "runs"), results=str(folder / "results"), processes=1, **changes
    )


TRAINED_FIRST = [
    "grpo-entropy-advantage-0 --seed 0",
    "grpo-entropy-advantage-1 --seed 1",
    "grpo-entropy-regularisation-0 --seed 0 --alpha 0 --entropy-coef 0.003",
    "grpo-without-clip-higher-0 --seed 0 --alpha 0 --clip-high 0.2",
    "ppo-0 --seed 0 --algo ppo --alpha 0",
    "ppo-entropy-advantage-0 --seed 0 --algo ppo",
]
# Twice: with seeds 5 and 0, and with seeds 6 and 1.
TRAINED_AGAIN = [
    "fresh-grpo-{fresh} --seed {fresh} --alpha 0",
    "fresh-grpo-entropy-advantage-{fresh} --seed {fresh}",
    "fresh-kappa-4-{fresh} --seed {fresh} --kappa 4",
    "fresh-hard-{fresh} --seed {fresh} --task countdown-hard --alpha 0",
    "fresh-hard-entropy-advantage-{fresh} --seed {fresh} --task countdown-hard",
    "repeated-hard-{repeated} --seed {repeated} --task countdown-hard --alpha 0",
    "repeated-hard-entropy-advantage-{repeated} --seed {repeated} --task countdown-hard",
]
MEASURED_FIRST = [
    "base-0",
    "grpo-entropy-advantage-0",
    "grpo-1",
    "grpo-entropy-advantage-1",
    "grpo-entropy-regularisation-0",
    "grpo-without-clip-higher-0",
    "ppo-0",
    "ppo-entropy-advantage-0",
]


def with_seeds(lines):
    first = [line.format(fresh=5, repeated=0) for line in lines]
    second = [line.format(fresh=6, repeated=1) for line in lines]
    return first + second


def test_a_study_trains_what_is_left_core_first(begun, commands_of):
    lines = commands_of(settings_in(begun, seeds=2, other_seeds=1))
    named = [line.split("--name ")[1] for line in lines if "--name" in line]
    trained = [flags.split(" --final")[0] for flags in named]
    assert trained == TRAINED_FIRST + with_seeds(TRAINED_AGAIN)


def test_a_study_measures_what_is_left_core_first(begun, commands_of):
    lines = commands_of(settings_in(begun, seeds=2, other_seeds=1))
    counts = r"results/(\S+?)\.json\.gz', 'test', 200, 256"
    measured = [re.search(counts, line)[1] for line in lines if line.startswith("-c")]
    again = [line.split(" --seed")[0] for line in TRAINED_AGAIN]
    assert measured == MEASURED_FIRST + with_seeds(again)


def test_a_study_goes_on_with_what_was_begun(begun, commands_of):
    lines = commands_of(settings_in(begun, seeds=2, other_seeds=1))
    resumed = [line for line in lines if "--resume" in line]
    assert resumed == [f"train.py --resume {begun}/runs/grpo-1"]


def test_a_run_with_other_settings_is_not_gone_on_with(begun):
    write_config(begun / "runs" / "grpo-1", "--lr", "1e-3")
    [failure] = study(settings_in(begun, seeds=2, arms="grpo"))
    assert "grpo-1 is not a run of GRPO: its settings are others; move it away" in failure


@pytest.mark.parametrize(
    "changes",
    [dict(), dict(map=True), dict(quick=True), dict(quick=True, map=True)],
    ids=["study", "map", "quick", "quick map"],
)
def test_every_training_command_is_valid(tmp_path, commands_of, changes):
    lines = commands_of(settings_in(tmp_path, **changes))
    trained = [line.split()[1:] for line in lines if line.startswith("train.py")]
    others = len(MAP) if "map" in changes else 3 * len(OTHERS) + 5 * len(FRESH)
    assert len(trained) == 10 + others
    for flags in trained:
        check(parse_flags(TrainSettings, "train", flags))

    # Test problems are never measured in passing.
    is_study = changes == {}
    for line in lines:
        if line.startswith("-c"):
            assert ("'test'" in line) == is_study


def test_the_map_stays_on_validation(tmp_path, commands_of):
    lines = commands_of(settings_in(tmp_path, map=True, seeds=1))
    measured = [line for line in lines if line.startswith("-c")]
    assert len(measured) == 2 + len(MAP)
    for line in measured:
        assert "'validation', 200, 64" in line
        assert "/map/" in line


def test_a_diverging_arm_is_told_and_does_not_stop_the_others(tmp_path, monkeypatch):
    started = []

    def fail_with_ppo(self, *command):
        started.append(command)
        if "ppo" in command:
            raise ChildProcessError("train.py failed: the loss is nan")

    monkeypatch.setattr(lab.children.Children, "run", fail_with_ppo)
    failures = study(settings_in(tmp_path, seeds=1, other_seeds=1))
    assert failures == ["train.py failed: the loss is nan"] * 2  # PPO without and with
    trained = [command for command in started if command[0] == "train.py"]
    assert len(trained) == len(CORE) + len(OTHERS) + len(FRESH)


def test_a_child_has_one_thread_and_its_last_line_is_told():
    with pytest.raises(ChildProcessError, match="failed: threads 1$"):
        lab.children.Children().run(
            "-c", "import os, sys; sys.exit('no\\nthreads ' + os.environ['OMP_NUM_THREADS'])"
        )


def command_of_a_study(folder, *flags):
    """A study of one long run, in a process of its own."""
    where = ["--runs", str(folder / "runs"), "--results", str(folder / "results")]
    return subprocess.Popen(
        [sys.executable, "-m", "lab.study", "--arms", "grpo", "--seeds", "1", *where, *flags],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def processes_about(folder):
    """Ids of the processes whose command names the folder."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = file.read_bytes().decode(errors="replace")
        except OSError:  # it has ended meanwhile
            continue
        if str(folder) in command:
            found.append(int(file.parent.name))
    return found


def wait_for(condition):
    for _ in range(600):
        if condition():
            return
        time.sleep(0.1)
    pytest.fail("it did not happen within a minute")


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc")
def test_a_second_study_is_refused_and_sigterm_ends_the_first_with_its_runs(tmp_path):
    first = command_of_a_study(tmp_path)
    wait_for(lambda: (tmp_path / "runs/grpo-0/config.json").exists())

    second = command_of_a_study(tmp_path)
    _, told = second.communicate()
    assert second.returncode == 1
    assert "is in use by process" in told
    assert "Traceback" not in told

    first.send_signal(signal.SIGTERM)
    _, told = first.communicate()
    assert first.returncode == 1
    assert "lab.study: stopped; the same command goes on" in told
    assert processes_about(tmp_path) == []


def test_more_seeds_than_ten_are_refused(capsys):
    with pytest.raises(SystemExit):
        parse_flags(Settings, "study", ["--seeds", "11"])
    refused = "argument --seeds: invalid choice: 11 (choose from 1, 2, "
    assert refused in capsys.readouterr().err


def test_an_unknown_arm_is_named():
    with pytest.raises(ValueError, match="no arm is called grpoo; there are base, fresh-grpo, "):
        study(Settings(arms="grpo,grpoo"))


# What is measured of a run.


class YesIsRight:
    @staticmethod
    def reward(problem, response, finished):
        return 1.0 if response == "yes" else -1.0


PROBLEM = Problem("1 2 -> 3 ?", "3")


def episode_of(*entropy):
    """A finished episode with one token for each entropy."""
    zeros = torch.zeros(len(entropy))
    return Episode(torch.zeros(1), zeros, zeros, torch.tensor(entropy), True, 0)


@pytest.fixture
def watch():
    """Has seen a group of 16 with one right answer of two tokens and fifteen wrong ones of one, and
    a group that is right altogether."""
    watch = Watch(YesIsRight)
    watch.watch(PROBLEM, "yes", episode_of(1.0, 9.0))
    for entropy in [0.5, 0.3, *[0.1] * 13]:
        watch.watch(PROBLEM, "a b a b a b", episode_of(entropy))
    for _ in range(16):
        watch.watch(PROBLEM, "yes", episode_of(1.0))
    return watch


def test_what_the_entropy_advantage_adds_to_each_side_by_hand(watch):
    """A is 15/4 and -1/4 (std of the group with n - 1: 0.5), alpha H is 0.4 H, the cap |A| / 2; of an
    entropy of 0.3 it is 0.12 / 0.25 = 0.48, not capped. Nothing is added to a group of equals."""
    assert list(watch.added["right"]) == list(watch.added["wrong"]) == [1]
    right = 0.4 / 3.75 + 0.5
    assert watch.added["right"][1] == [2, pytest.approx(right, abs=1e-4), 1]
    wrong = 13 * 0.04 / 0.25 + 0.12 / 0.25 + 0.5
    assert watch.added["wrong"][1] == [15, pytest.approx(wrong, abs=1e-4), 1]


def test_repeated_runs_of_four_words_are_counted(watch):
    """ "a b a b a b" has three runs of four words, of which the third repeats the first."""
    assert watch.figures()["repeated 4-grams, share"] == pytest.approx(15 / 45)


@pytest.fixture
def keep_threads():
    """`measure` takes one thread, as it is a process of its own in a study."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_measure_counts_what_the_model_does(tmp_path, keep_threads):
    file = tmp_path / "base-0.json.gz"
    measure("base", str(file), "validation", 3, 16)
    record = read(tmp_path, "base")[0]
    assert len(record["solved"]) == 3
    assert record["samples"] == 16
    assert set(FIGURES) <= set(record)
    assert 1 < record["attempts per response"] < 9
    assert record["tokens per response"] > 14
    mixed = {str(count) for count in record["solved"] if 0 < count < 16}
    assert set(record["line"]["right"]) == set(record["line"]["wrong"]) == mixed
    assert list(tmp_path.iterdir()) == [file]


def test_measure_writes_the_same_bytes_twice(tmp_path, keep_threads):
    threads = torch.get_num_threads()
    file = tmp_path / "base-0.json.gz"
    measure("base", str(file), "validation", 3, 16)
    first = file.read_bytes()
    torch.set_num_threads(threads)
    measure("base", str(file), "validation", 3, 16)
    assert file.read_bytes() == first


@pytest.fixture
def ppo_run(tmp_path):
    """A trained run of two steps, the first of which is the critic's -> its settings and folder."""
    s = TrainSettings(
        name="ppo-3",
        out=str(tmp_path / "runs"),
        algo="ppo",
        steps=2,
        critic_warmup=1,
        prompts=4,
        samples=2,
        seed=3,
        task="countdown-easy",
        eval_problems=1,
        eval_samples=1,
        final_samples=1,
        slots=16,
        max_new_tokens=24,
    )
    train(s)
    return s, tmp_path / "runs" / "ppo-3"


def test_measure_takes_a_run_apart(tmp_path, ppo_run, keep_threads):
    s, run = ppo_run
    measure(str(run), f"{tmp_path}/ppo-3.json.gz", "validation", 2, 4)
    record = read(tmp_path, PPO)[3]
    assert record["run"] == run_name(s)
    assert len(record["solved"]) == 2
    assert record["tokens per response"] <= 24
    weights = (run / "model" / "model.safetensors").read_bytes()
    assert record["weights"] == hashlib.sha256(weights).hexdigest()

    assert record["curves"]["shaping"][0] is None  # the critic's step
    assert list(record["curves"]) == list(CURVES)
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    for name, values in record["curves"].items():
        logged = [line[name] for line in log]
        assert values == [value and pytest.approx(value, rel=1e-3) for value in logged]
