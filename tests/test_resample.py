"""--resample: which problems are drawn and which groups are kept, against a slow loop and by hand; a
run against one without the flag, a resumed one, two processes, and the plan."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train
from model import load
from plumbing import memory
from plumbing.batch import problems_of_step
from plumbing.resample import further_problems, resample
from plumbing.run import settings_of_run
from plumbing.seeds import seeded_generator
from plumbing.settings import PRESETS, Settings, check, parse_flags
from rollout import Sampler
from tasks import load_task
from test_distributed import TWO, lines, run
from training_runs import (
    SMALL,
    read_jsonl,
    replace_reward,
    reward_by_length,
    reward_none,
    small_run,
)


def shuffled(candidates, seed, step, number):
    generator = seeded_generator(seed, step, f"further problems {number}")
    return [candidates[i] for i in torch.randperm(len(candidates), generator=generator).tolist()]


def slow_rounds(problems, candidates, teaches, seed, step, rounds):
    """-> what each round asks, as (place, problem), and the round that each place keeps, 0 for that
    of the step's own problem. One place after the other, each with the first problem in the
    round's order that is not drawn yet; teaches(problem, round)."""
    drawn = list(problems)
    kept = {place: 0 for place in range(len(problems))}
    is_open = [not teaches(problem, 0) for problem in problems]
    asked = []
    for number in range(1, rounds + 1):
        if not any(is_open):
            break
        order = shuffled(candidates, seed, step, number)
        before = list(drawn)
        this_round = []
        for place in range(len(problems)):
            if not is_open[place]:
                continue
            choice = None
            for problem in order:
                if problem not in drawn and choice is None:
                    choice = problem
            # All have been drawn: those of earlier rounds, then anything, in the round's order.
            for problem in order:
                new = problem not in [p for _, p in this_round]
                if choice is None and new and problem in before:
                    choice = problem
            if choice is None:
                distinct = [problem for _, problem in this_round]
                choice = distinct[len(this_round) % len(candidates)]
            drawn.append(choice)
            this_round.append((place, choice))
        for place, problem in this_round:
            if teaches(problem, number):
                is_open[place] = False
                kept[place] = number
        asked.append(this_round)
    return asked, kept


@pytest.mark.parametrize("candidates", [range(100), range(13), range(3)])
@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_the_problems_that_are_drawn_and_the_groups_that_are_kept(candidates, rounds):
    """Against a slow loop, for ten steps. Whether a group teaches is a coin of its problem and
    round; an answer is the place, the problem and the round that it comes from."""
    s = Settings(prompts=8, samples=2, minibatch=4, resample=rounds, seed=3)

    def teaches(problem, number):
        return (7 * problem + 3 * number + 5 * problem * number) % 11 < 4

    def answer(problems, number):
        episodes = [(problem, number, i) for problem in problems for i in range(2)]
        rewards = [
            1.0 if teaches(problem, number) and i else -1.0 for problem, number, i in episodes
        ]
        return episodes, torch.tensor(rewards)

    used = set()
    for step in range(1, 11):
        problems = problems_of_step(candidates, 8, step - 1, 3)
        want, kept = slow_rounds(problems, candidates, teaches, 3, step, rounds)
        asked = []

        def draw(problems, number):
            asked.append((number, problems))
            return answer(problems, number)

        episodes, reward, count = resample(
            problems, *answer(problems, 0), draw, candidates, step, s
        )
        assert asked == [
            (number, [problem for _, problem in this_round])
            for number, this_round in enumerate(want, start=1)
        ]
        assert count == len(want)
        problem_of = [dict(enumerate(problems)), *map(dict, want)]
        groups = [(problem_of[kept[place]][place], kept[place]) for place in range(8)]
        assert episodes == [(*group, i) for group in groups for i in range(2)]
        signs = [1.0 if teaches(*group) and i else -1.0 for group in groups for i in range(2)]
        assert reward.tolist() == signs
        used.add(count)
    assert max(used) == rounds


def test_no_problem_twice_in_a_step_as_long_as_there_are_others():
    """Of 40, of which the step has drawn 8: 32 further ones at most, also where the data has each
    problem twice."""
    twice = [*range(40), *range(40)]
    drawn = list(range(8))
    for count in (1, 20, 32):
        further = further_problems(twice, drawn, count, seeded_generator(0, 1, "test"))
        assert len({*drawn, *further}) == 8 + count
    # 45 places: all 32 others, the 8 that the step had, and from the start again.
    further = further_problems(twice, drawn, 45, seeded_generator(0, 1, "test"))
    assert set(further[:32]) == set(range(8, 40))
    assert set(further[32:40]) == set(range(8))
    assert further[40:] == further[:5]


def test_the_order_is_one_of_seed_step_and_round():
    """Each changes it; nothing else is asked."""
    s = Settings(prompts=4, samples=2, minibatch=4, resample=2)
    nothing = torch.full((8,), -1.0)

    def first_and_second(step, seed):
        asked = []

        def draw(problems, number):
            asked.append(tuple(problems))
            return [0] * 8, nothing

        s.seed = seed
        torch.manual_seed(len(asked) + step)  # global randomness must not matter
        resample(range(4), [0] * 8, nothing, draw, range(1000), step, s)
        return asked

    orders = [*first_and_second(1, 0), *first_and_second(2, 0), *first_and_second(1, 1)]
    assert len(set(orders)) == 6
    assert first_and_second(2, 0) == orders[2:4]


# The rewards of three answers to a problem, call after call: the step's four problems, then three
# further ones for places 1 to 3, then two for places 1 and 3, of which the last stays open.
MIXED = [1.0, -1.0, -1.0]
ALSO_MIXED = [1.0, 1.0, -1.0]
WRONG = [-1.0, -1.0, -1.0]
RIGHT = [1.0, 1.0, 1.0]
CALLS = [[MIXED, WRONG, WRONG, RIGHT], [WRONG, ALSO_MIXED, WRONG], [MIXED, WRONG]]


def test_the_wiring_of_a_step(tmp_path, monkeypatch):
    """One step, two updates: who is asked, with which random numbers, which answers come to which
    update with which advantage, and the log line; all by hand."""
    rollouts = []
    updates = []
    generate = Sampler.generate
    update = train.update

    def spy_generate(sampler, prompts, samples, *arguments, **options):
        episodes = generate(sampler, prompts, samples, *arguments, **options)
        if samples == 3:  # not a validation
            rollouts.append((prompts, arguments[-1].initial_seed(), episodes))
        return episodes

    def spy_update(model, optimizer, episodes, old_logp, advantage, s):
        updates.append((episodes, old_logp, advantage))
        return update(model, optimizer, episodes, old_logp, advantage, s)

    rewards = [reward for call in CALLS for group in call for reward in group]
    for_validations = [-1.0] * 5 * 4
    in_turn = iter([*for_validations, *rewards, *for_validations])
    monkeypatch.setattr(Sampler, "generate", spy_generate)
    monkeypatch.setattr(train, "update", spy_update)
    replace_reward(monkeypatch, lambda problem, response, finished: next(in_turn))
    changes = dict(steps=1, samples=3, resample=2, max_new_tokens=20)
    _, [line] = small_run(tmp_path, "a", **changes)

    task = load_task("countdown")
    tokenizer = load("base")[1]
    problems = problems_of_step(task.train, 4, 0, 0)
    asked = [problems]
    for number, count in ((1, 3), (2, 2)):
        drawn = [problem for part in asked for problem in part]
        order = shuffled(task.train, 0, 1, number)
        asked.append([problem for problem in order if problem not in drawn][:count])
    prompts = [[task.encode(problem, tokenizer) for problem in part] for part in asked]
    assert [rollout[0] for rollout in rollouts] == prompts
    streams = ("rollout", "resample 1 0", "resample 2 0")
    assert [rollout[1] for rollout in rollouts] == [
        seeded_generator(0, 1, stream).initial_seed() for stream in streams
    ]

    first, second, third = (rollout[2] for rollout in rollouts)
    kept = [*first[:3], *third[:3], *second[3:6], *first[9:]]
    advantages = [2, -1, -1, 2, -1, -1, 1, 1, -2, 0, 0, 0]  # times 1 / sqrt(3)
    for half, (episodes, old_logp, advantage) in enumerate(updates):
        for i, episode in enumerate(episodes):
            assert episode is kept[6 * half + i]
            length = len(episode.response)
            assert torch.equal(old_logp[i, :length], episode.logp)
            want = torch.full((length,), advantages[6 * half + i] / 3**0.5)
            assert torch.allclose(advantage[i, :length], want, atol=1e-5)
            assert not advantage[i, length:].any()
    assert len(updates) == 2

    everything = [*first, *second, *third]
    assert line["drawn"] == 9
    assert line["rounds"] == 2
    assert line["reward"] == pytest.approx(sum(rewards) / 27)
    assert line["equal_groups"] == pytest.approx(6 / 9)
    assert line["kept_reward"] == pytest.approx((-1 - 1 + 1 + 3) / 12)
    assert line["kept_equal_groups"] == 1 / 4
    assert line["tokens"] == sum(len(episode.response) for episode in everything)
    assert line["arm"].endswith(", resample 2")


def comparable(log):
    """Without times, memory, and what --resample adds."""
    added = ("arm", "drawn", "rounds", "kept_reward", "kept_equal_groups")
    return [
        {
            key: value
            for key, value in line.items()
            if key not in added and not key.endswith(("_s", "_gb"))
        }
        for line in log
    ]


def state(folder: Path) -> bytes:
    return (folder / "state.safetensors").read_bytes()


def test_where_every_group_teaches_nothing_changes(tmp_path, monkeypatch):
    """Bit for bit the state and the log of a run without the flag; every second answer is right."""
    logs = []
    states = []
    for rounds in (0, 3):
        count = iter(range(10**6))
        replace_reward(monkeypatch, lambda *_: 1.0 if next(count) % 2 else -1.0)
        folder, log = small_run(tmp_path, f"run-{rounds}", resample=rounds, max_new_tokens=24)
        logs.append(log)
        states.append(state(folder))
    without, with_rounds = logs
    assert states[0] == states[1]
    assert comparable(without) == comparable(with_rounds)
    assert "drawn" not in without[0]
    for line in with_rounds:
        assert (line["drawn"], line["rounds"]) == (4, 0)
        assert line["kept_equal_groups"] == line["equal_groups"] == 0.0


def test_where_nothing_teaches_all_rounds_are_used_and_the_first_groups_stay(tmp_path, monkeypatch):
    """The state is that of a run without the flag, bit for bit: the denominator counts the same
    tokens (the entropy bonus makes it matter)."""
    replace_reward(monkeypatch, reward_none)
    changes = dict(entropy_coef=0.01, max_new_tokens=24)
    without, _ = small_run(tmp_path, "without", **changes)
    folder, log = small_run(tmp_path, "with", resample=3, **changes)
    assert state(without) == state(folder)
    for line in log:
        assert (line["drawn"], line["rounds"]) == (4 * 4, 3)
        assert line["kept_equal_groups"] == line["equal_groups"] == 1.0
        assert line["kept_reward"] == line["reward"] == -1.0


def test_a_resumed_run_is_the_same(tmp_path, monkeypatch):
    """Bit for bit: state and log."""
    replace_reward(monkeypatch, reward_by_length)
    changes = dict(samples=3, resample=2, max_new_tokens=24)
    whole, log = small_run(tmp_path, "whole", steps=4, **changes)
    half, _ = small_run(tmp_path, "half", steps=2, **changes)
    train.train(Settings(resume=str(half), steps=4))
    assert state(whole) == state(half)
    assert comparable(read_jsonl(half / "log.jsonl")) == comparable(log)
    assert log[2]["rounds"] + log[3]["rounds"] > 0
    assert len({line["drawn"] for line in log}) > 1


def test_a_run_from_before_the_flag_goes_on_without_it(tmp_path):
    folder, _ = small_run(tmp_path, "old", steps=1, max_new_tokens=8)
    config = json.loads((folder / "config.json").read_text())
    del config["resample"]
    (folder / "config.json").write_text(json.dumps(config))
    assert settings_of_run(str(folder)).resample == 0


# Every fourth problem has right and wrong answers, whatever the answers are; who is asked is
# written down, call after call.
KNOWN = """
import json, os
from pathlib import Path
from tasks import Problem

class Known:
    train = [Problem(f"{i} -> ?", "mixed" if i % 4 == 0 else "wrong") for i in range(60)]
    validation = [Problem("1 1 -> ?", "validation")]

    def encode(self, problem, tokenizer):
        return tokenizer.encode(problem.prompt)

    def rewards(self, problems, responses, finished):
        if problems[0].answer != "validation":
            file = Path(__file__).with_name(f"asked-{os.environ.get('RANK', '0')}.jsonl")
            with file.open("a") as out:
                print(json.dumps([problem.prompt for problem in problems[::2]]), file=out)
        return [self.reward(p, i % 2) for i, p in enumerate(problems)]

    def reward(self, problem, right, finished=True):
        return 1.0 if right and problem.answer == "mixed" else -1.0
"""
SIZES = (
    "--steps 2 --prompts 8 --samples 2 --minibatch 4 --max-new-tokens 4 --eval-problems 1 "
    "--eval-samples 2 --final-samples 2 --resample 3"
).split()


def known(folder: Path, *flags: str) -> list[str]:
    """Flags of a run on that task; the folder is made."""
    folder.mkdir()
    (folder / "known.py").write_text(KNOWN)
    task = f"{folder}/known.py:Known"
    return [*SIZES, "--task", task, "--out", str(folder), "--name", "run", *flags]


def train_with_two(*flags: str) -> None:
    done = run(TWO, "train.py", *flags)
    assert done.returncode == 0, done.stderr


def test_two_processes_draw_the_problems_of_one_and_resume(tmp_path):
    """The same problems in the same places, by the slow loop, each asked by the process that has the
    place; the log's counts; and a run of two steps at once against one that is resumed."""
    train.train(parse_flags(Settings, "train", known(tmp_path / "one")))
    train_with_two(*known(tmp_path / "two"))
    task = load_task(f"{tmp_path}/one/known.py:Known")
    want = {"all": [], "0": [], "1": []}
    counts = []
    for step in (1, 2):
        problems = problems_of_step(task.train, 8, step - 1, 0)
        rounds, kept = slow_rounds(
            problems,
            candidates=task.train,
            teaches=lambda problem, number: problem.answer == "mixed",
            seed=0,
            step=step,
            rounds=3,
        )
        asked = [list(enumerate(problems)), *rounds]
        for part in asked:
            of_first = [problem.prompt for place, problem in part if place in (0, 1, 4, 5)]
            of_second = [problem.prompt for place, problem in part if place in (2, 3, 6, 7)]
            want["all"].append([problem.prompt for _, problem in part])
            want["0"].append(of_first)
            want["1"].append(of_second)
        still_open = sum(
            number == 0 and problems[place].answer != "mixed" for place, number in kept.items()
        )
        counts.append((sum(map(len, asked)), len(rounds), still_open / 8))
    # A process without an open place asks nothing.
    want = {name: [part for part in parts if part] for name, parts in want.items()}
    assert read_jsonl(tmp_path / "one/asked-0.jsonl") == want["all"]
    assert read_jsonl(tmp_path / "two/asked-0.jsonl") == want["0"]
    assert read_jsonl(tmp_path / "two/asked-1.jsonl") == want["1"]
    for folder in ("one", "two"):
        log = read_jsonl(tmp_path / folder / "run/log.jsonl")
        names = ("drawn", "rounds", "kept_equal_groups")
        assert [tuple(line[name] for name in names) for line in log] == counts
        for line, (_, _, still_open) in zip(log, counts):
            assert line["kept_reward"] == pytest.approx(-still_open)

    train_with_two(*known(tmp_path / "resumed", "--steps", "1"))
    resumed = tmp_path / "resumed/run"
    train_with_two("--resume", str(resumed), "--steps", "2")
    assert state(resumed) == state(tmp_path / "two/run")
    assert lines(resumed / "log.jsonl") == lines(tmp_path / "two/run/log.jsonl")


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (dict(algo="ppo", resample=1), "must be 0 with --algo ppo, which has no groups; it is 1"),
        (dict(resample=-1), "must be at least 0; it is -1"),
    ],
)
def test_what_is_refused(changes, sentence):
    with pytest.raises(ValueError, match=f"^--resample {sentence}$"):
        check(Settings(**changes))


def test_every_process_and_round_has_random_numbers_of_its_own():
    seeds = set()
    for rank in range(3):
        learner = SimpleNamespace(rank=rank, device="cpu")
        for number in range(3):
            generator = train.rollout_generator(5, learner, Settings(), number)
            seeds.add(generator.initial_seed())
    assert len(seeds) == 9


def test_a_dry_run_is_one_of_all_rounds(capsys):
    """Its answers never end, so they are all wrong."""
    train.train(Settings(dry_run=True, resample=2, max_new_tokens=8, **SMALL))
    assert f"{3 * 4 * 4} sequences of " in capsys.readouterr().out


def test_the_answers_that_are_dropped_are_planned(monkeypatch):
    """They stay until the step is logged. 4096 answers a round, by hand as in test_memory.py."""
    needed = 3 * 4096 * (9216 * 8 + 8192 * 25 + 2000)
    monkeypatch.setattr(memory, "free_bytes", lambda device: needed)
    cpu = torch.device("cpu")
    for rounds in (0, 2):
        s = Settings(resample=rounds, **PRESETS["paper-grpo"])
        memory.check_host(s, 9216, cpu, on_device=0, copied=0)
    s.resample = 3
    with pytest.raises(ValueError, match="16384 answers of up to 9216 tokens"):
        memory.check_host(s, 9216, cpu, on_device=0, copied=0)
