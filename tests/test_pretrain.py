"""lab/pretrain.py: the traces that the base model learned from, and the base itself; lab/behaviour.py:
the parser of responses. Traces are held against the task's verifier and the docstring's figures."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from evaluate import evaluate
from lab.behaviour import attempts
from lab.pretrain import (
    Settings,
    batches,
    countdown_tokenizer,
    fresh_model,
    pretrain,
    random_search,
)
from model import load
from plumbing.settings import EvaluationSettings
from tasks import Problem
from tasks.countdown import Countdown, numbers_of

TRAIN = Countdown(least_solutions=1).train
NUMBERS = np.array([numbers_of(problem.prompt) for problem in TRAIN])
TARGETS = np.array([int(problem.answer) for problem in TRAIN])
TOKENIZER = countdown_tokenizer()


def search(count=4000, **changes):
    """Traces as (problem, response, whether they are said to be solved), and their lengths."""
    rng = np.random.default_rng(0)
    s = Settings(**changes)
    tokens, lengths, solved = random_search(
        (NUMBERS, TARGETS), count, rng, s, TOKENIZER.get_vocab()
    )
    found = []
    for row, length, is_solved in zip(tokens, lengths, solved):
        prompt, response = TOKENIZER.decode(row[:length]).split(" ? ")
        problem = Problem(prompt + " ?", prompt.split()[-1])
        found.append((problem, response, is_solved))
    return found, lengths


@pytest.fixture(scope="module")
def all_traces():
    """Failed ones too."""
    return search(keep_failed=1.0)


@pytest.fixture(scope="module")
def all_attempts(all_traces):
    """Those that were not cut off."""
    traces, _ = all_traces
    found = []
    for problem, response, _ in traces:
        found += attempts(problem.prompt, response.removesuffix("<eos>"))
    return [attempt for attempt in found if attempt.then]


def test_traces_reach_the_longest_positions(all_traces):
    traces, lengths = all_traces
    assert len(traces) == 4000
    assert lengths.max() == 7 + 128  # the longest positions are trained


def test_traces_are_of_training_problems_only(all_traces):
    known = {(tuple(sorted(numbers_of(p.prompt))), p.answer) for p in TRAIN}
    for problem, _, _ in all_traces[0]:
        assert (tuple(sorted(numbers_of(problem.prompt))), problem.answer) in known


def test_traces_are_solved_where_the_verifier_says_so(all_traces):
    task = Countdown()
    for problem, response, solved in all_traces[0]:
        finished = response.endswith(" <eos>")
        reward = task.reward(problem, response.removesuffix(" <eos>"), finished)
        assert (reward > 0) == solved


def test_attempts_of_traces_are_valid(all_attempts):
    for attempt in all_attempts:
        assert attempt.wrong == 0
        assert attempt.operands
        assert attempt.steps == 3


def test_attempts_of_traces_end_as_the_docstring_says(all_attempts):
    checked = [attempt.checked for attempt in all_attempts]
    assert np.mean(checked) == pytest.approx(0.6, abs=0.03)

    def commits(checked, hit):
        chosen = [a for a in all_attempts if a.checked == checked and a.hit == hit]
        return [attempt.then == "so" for attempt in chosen]

    assert np.mean(commits(checked=True, hit=True)) == 1.0
    assert len(commits(checked=True, hit=True)) > 50
    assert np.mean(commits(checked=True, hit=False)) == pytest.approx(0.15, abs=0.02)
    assert np.mean(commits(checked=False, hit=False)) == pytest.approx(0.5, abs=0.03)


def test_failed_traces_are_kept_less_often():
    def counts(**changes):
        """Of failed and of solved traces."""
        traces, _ = search(20_000, **changes)
        failed = sum(not solved for _, _, solved in traces)
        return failed, len(traces) - failed

    failed, solved = counts(keep_failed=1.0)
    kept_failed, kept_solved = counts()
    assert kept_failed / failed == pytest.approx(0.3, abs=0.02)
    assert kept_solved == pytest.approx(solved, rel=0.1)


def test_batches_are_of_similar_length_and_cover_all_lengths():
    stream = batches(Settings(batch=32), TOKENIZER.get_vocab())
    seen = [next(stream) for _ in range(40)]
    for tokens, length in seen:
        assert tokens.shape == (32, int(length.max()))
    spread = [int(length.max() - length.min()) for _, length in seen]
    assert np.median(spread) <= 4
    longest = [tokens.shape[1] for tokens, _ in seen]
    assert max(longest) == 135
    assert min(longest) < 40


PROMPT = "7 7 1 8 -> 23 ?"


def test_attempts_takes_a_response_apart():
    got = attempts(
        PROMPT,
        "7 * 8 = 56 / 1 = 57 + 7 = 63 vs 23 wait 1 + 8 = 9 + 8 = 17 + 7 = 24 wait "
        "1 + 8 = 9 + 7 = 16 + 7 = 23 vs 23 so",
    )
    assert [a.wrong for a in got] == [2, 0, 0]  # 56 / 1 is 56, and 57 + 7 is not 63
    assert [a.operands for a in got] == [True, False, True]
    assert [a.checked for a in got] == [True, False, True]
    assert [a.hit for a in got] == [False, False, True]
    assert [a.then for a in got] == ["wait", "wait", "so"]


def test_an_attempt_that_was_cut_off_ends_in_nothing():
    cut = attempts(PROMPT, "1 + 8 = 9 + 7")
    assert len(cut) == 1
    assert cut[0].then == ""
    assert not cut[0].hit


def test_attempts_never_raises():
    assert attempts(PROMPT, "") == []
    assert attempts(PROMPT, "vs so wait = ? -> x")


def test_pretraining_changes_every_matrix(tmp_path):
    s = Settings(
        out=str(tmp_path / "model"), steps=30, batch=16, layers=1, width=16, inner=16, warmup=5
    )
    pretrain(s)
    trained, _ = load(s.out)
    start, _ = fresh_model(s)
    for (name, after), before in zip(trained.named_parameters(), start.parameters()):
        if "proj.weight" in name:
            assert not np.array_equal(after.detach(), before.detach()), name


def test_pretraining_does_not_write_over_a_model(tmp_path):
    with pytest.raises(FileExistsError, match="exists"):
        pretrain(Settings(out=str(tmp_path)))


def test_pretraining_refuses_no_steps(tmp_path):
    with pytest.raises(ValueError, match="at least 1"):
        pretrain(Settings(out=str(tmp_path / "new"), steps=0))


def test_base_is_what_it_is_said_to_be():
    record = evaluate(
        EvaluationSettings(models=("base",), split="validation", problems=100, samples=64, k="1,64")
    )
    one, many = record["models"]["base"]["pass"]
    assert 0.05 < one < 0.12
    assert many > 0.8
    model, _ = load("base")
    assert sum(parameter.numel() for parameter in model.parameters()) <= 450_000


@pytest.mark.parametrize(
    "name, digest",
    [
        ("model.safetensors", "9058999f64404fc7135cde668e4cdb624a9ba7b92a5bfba276f751b70035c329"),
        ("tokenizer.json", "fedc22cb0a347912462f2d9a153622ced06ed035017bbe72a4a9a429d5c6eabb"),
    ],
)
def test_base_is_frozen(name, digest):
    """Every figure of the README and of lab/RESULTS.md is of these weights; whoever changes them
    makes all anew."""
    assert hashlib.sha256(Path("base", name).read_bytes()).hexdigest() == digest


def test_base_is_small():
    assert sum(file.stat().st_size for file in Path("base").iterdir()) < 2_000_000
