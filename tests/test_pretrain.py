"""lab/pretrain.py: the traces that the base model learned from, the parser of responses, and the base itself."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from evaluate import Settings as EvaluateSettings
from evaluate import evaluate
from lab.pretrain import Settings, attempts, batches, countdown_tokenizer, fresh_model, pretrain, random_search
from model import load
from task import Countdown, Problem, numbers_of

TRAIN = Countdown(solutions=1).train
PROBLEMS = np.array([numbers_of(p.prompt) for p in TRAIN]), np.array([int(p.answer) for p in TRAIN])
TOKENIZER = countdown_tokenizer()


def traces(count=4000, seed=0, **changes):
    rng = np.random.default_rng(seed)
    tokens, length, solved = random_search(PROBLEMS, count, rng, Settings(**changes), TOKENIZER.get_vocab())
    return [(*TOKENIZER.decode(t[:n]).split(" ? "), s) for t, n, s in zip(tokens, length, solved)], length


def test_traces_are_what_the_verifier_and_the_docstring_say():
    found, length = traces(keep_failed=1.0)
    assert len(found) == 4000 and length.max() == 7 + 128                  # the longest positions are trained
    task, keys = Countdown(), {(tuple(sorted(numbers_of(p.prompt))), p.answer) for p in TRAIN}
    checks, after = [], {(c, h): [] for c in (True, False) for h in (True, False)}
    for prompt, response, solved in found:
        finished = response.endswith(" <eos>")
        problem = Problem(prompt + " ?", prompt.split()[-1])
        assert (tuple(sorted(numbers_of(prompt))), problem.answer) in keys  # training problems only
        assert (task.reward(problem, response.removesuffix(" <eos>"), finished) > 0) == solved
        for a in attempts(problem.prompt, response.removesuffix("<eos>")):
            if a["then"]:
                assert a["wrong"] == 0 and a["operands"] and a["steps"] == 3
                checks.append(a["checked"])
                after[a["checked"], a["hit"]].append(a["then"] == "so")
    assert np.mean(checks) == pytest.approx(0.6, abs=0.03)
    assert np.mean(after[True, True]) == 1.0 and len(after[True, True]) > 50
    assert np.mean(after[True, False]) == pytest.approx(0.15, abs=0.02)
    assert np.mean(after[False, False]) == pytest.approx(0.5, abs=0.03)


def test_failed_traces_are_kept_less_often():
    everything, some = traces(20_000, keep_failed=1.0)[0], traces(20_000)[0]
    failed = lambda found: sum(not s for _, _, s in found)
    assert failed(some) / failed(everything) == pytest.approx(0.3, abs=0.02)
    assert len(some) - failed(some) == pytest.approx(len(everything) - failed(everything), rel=0.1)


def test_batches_are_of_similar_length_and_cover_all_lengths():
    stream = batches(Settings(batch=32), TOKENIZER.get_vocab())
    seen = [next(stream) for _ in range(40)]
    assert all(tokens.shape == (32, int(length.max())) for tokens, length in seen)
    spread = [int(length.max() - length.min()) for _, length in seen]
    assert np.median(spread) <= 4 and max(t.shape[1] for t, _ in seen) == 135 and min(t.shape[1] for t, _ in seen) < 40


def test_attempts_takes_a_response_apart():
    got = attempts("7 7 1 8 -> 23 ?", "7 * 8 = 56 / 1 = 57 + 7 = 63 vs 23 wait 1 + 8 = 9 + 8 = 17 + 7 = 24 wait "
                                      "1 + 8 = 9 + 7 = 16 + 7 = 23 vs 23 so")
    assert [a["wrong"] for a in got] == [2, 0, 0]                           # 56 / 1 is 56, and 57 + 7 is not 63
    assert [a["operands"] for a in got] == [True, False, True]
    assert [a["checked"] for a in got] == [True, False, True]
    assert [a["hit"] for a in got] == [False, False, True]
    assert [a["then"] for a in got] == ["wait", "wait", "so"]
    cut = attempts("7 7 1 8 -> 23 ?", "1 + 8 = 9 + 7")
    assert len(cut) == 1 and cut[0]["then"] == "" and not cut[0]["hit"]
    assert attempts("7 7 1 8 -> 23 ?", "") == [] and attempts("7 7 1 8 -> 23 ?", "vs so wait = ? -> x")    # never raises


def test_pretraining_learns_and_reports(tmp_path, capsys):
    s = Settings(out=str(tmp_path / "model"), steps=30, batch=16, layers=1, width=16, inner=16, warmup=5)
    pretrain(s)
    model, _ = load(s.out)
    start, _ = fresh_model(s)
    assert not any(np.array_equal(a.detach(), b.detach()) for (n, a), b in zip(model.named_parameters(), start.parameters())
                   if "proj.weight" in n)


def test_pretraining_does_not_write_over_a_model(tmp_path):
    with pytest.raises(FileExistsError, match="exists"):
        pretrain(Settings(out=str(tmp_path)))
    with pytest.raises(ValueError, match="at least 1"):
        pretrain(Settings(out=str(tmp_path / "new"), steps=0))


def test_base_is_what_it_is_said_to_be():
    record = evaluate(EvaluateSettings(models=("base",), split="validation", problems=100, samples=64, k="1,64"))
    one, many = record["models"]["base"]["pass"]
    assert 0.05 < one < 0.12 and many > 0.8
    model, _ = load("base")
    assert sum(p.numel() for p in model.parameters()) <= 450_000


def test_base_is_frozen():
    """Every figure of the README and of lab/RESULTS.md is of these weights; whoever changes them makes all anew."""
    digest = lambda name: hashlib.sha256(Path("base", name).read_bytes()).hexdigest()
    assert digest("model.safetensors") == "9058999f64404fc7135cde668e4cdb624a9ba7b92a5bfba276f751b70035c329"
    assert digest("tokenizer.json") == "fedc22cb0a347912462f2d9a153622ced06ed035017bbe72a4a9a429d5c6eabb"
    assert sum(file.stat().st_size for file in Path("base").iterdir()) < 2_000_000
