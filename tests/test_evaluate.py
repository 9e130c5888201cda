"""evaluate.py against enumeration, closed forms and hand-computed tables."""

import itertools
import json
from fractions import Fraction

import numpy as np
import pytest

import torch

import evaluate as module
from evaluate import PRESETS, Settings, bootstrap, count_solved, evaluate, pass_at_k, pass_table, report, parse_flags
from lab.pretrain import countdown_tokenizer
from rollout import Episode, Sampler, seeded_generator
from task import Problem


def test_pass_at_k_equals_enumeration_over_all_subsets():
    for n in range(1, 13):
        for c in range(n + 1):
            right = [True] * c + [False] * (n - c)
            for k in range(1, n + 1):
                subsets = list(itertools.combinations(right, k))
                assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_k_is_exact_for_large_n():
    assert pass_at_k(50_000, 1, 20_000) == 0.4                              # c = 1: k / n
    assert pass_at_k(50_000, 123, 1) == 123 / 50_000                        # k = 1: c / n
    assert pass_at_k(30_000, 20_001, 10_000) == 1.0                         # no k wrong ones to draw
    want = 1 - Fraction(29_990 * 29_989, 30_000 * 29_999)
    assert pass_at_k(30_000, 10, 2) == pytest.approx(float(want), rel=1e-15)
    product = Fraction(1)
    for i in range(64):
        product *= Fraction(9_700 - i, 10_000 - i)
    assert pass_at_k(10_000, 300, 64) == pytest.approx(float(1 - product), rel=1e-15)


@pytest.mark.parametrize("n, c, k", [(4, 2, 5), (4, 5, 2), (4, -1, 2), (4, 2, 0), (0, 0, 1)])
def test_pass_at_k_refuses(n, c, k):
    with pytest.raises(ValueError, match="1 <= K <= n"):
        pass_at_k(n, c, k)


def test_pass_table_by_hand():
    assert pass_table([0, 1, 4], 4, (1, 2, 4)).tolist() == [[0, 0, 0], [0.25, 0.5, 1], [1, 1, 1]]


def test_bootstrap_interval_is_that_of_the_mean():
    """For many 0/1 values the interval is close to the normal one, p +- 1.96 sqrt(p (1-p) / n)."""
    values = np.repeat([[0.0, 0.0], [1.0, 0.0]], [300, 100], axis=0)
    low, high = bootstrap(values)
    half = 1.96 * (0.25 * 0.75 / 400) ** 0.5
    assert low[0] == pytest.approx(0.25 - half, abs=0.004) and high[0] == pytest.approx(0.25 + half, abs=0.004)
    assert low[1] == high[1] == 0
    assert np.array_equal(bootstrap(values), bootstrap(values))


def test_report_pairs_the_problems():
    """Two models that differ by 1 of 4 on every problem: the difference has no spread, however the levels do."""
    results = {name: {"solved": counts, "samples": 4, "tokens": 10.0, "finished": 1.0}
               for name, counts in (("a", [0, 1, 2, 3] * 10), ("b", [1, 2, 3, 4] * 10))}
    text, record = report(results, (1, 4))
    row = record["models"]["b - a"]
    assert row["pass"][0] == 0.25 and [row["low"][0], row["high"][0]] == pytest.approx([0.25, 0.25])
    assert record["models"]["a"]["low"][0] < 0.375 < record["models"]["a"]["high"][0]
    assert record["models"]["a"]["solved"] == [0, 1, 2, 3] * 10             # the counts are kept
    assert "+0.250 [+0.250, +0.250]" in text and "Pass@4" in text


def test_the_command_end_to_end(tmp_path, capsys):
    s = Settings(models=("base",), split="validation", problems=20, samples=16, k="1,16", json=str(tmp_path / "table.json"))
    record = evaluate(s)
    again = evaluate(s)
    saved = json.loads((tmp_path / "table.json").read_text())
    assert saved == json.loads(json.dumps(record)) == json.loads(json.dumps(again))         # same seed, same counts
    base = saved["models"]["base"]
    assert len(base["solved"]) == 20 and saved["settings"]["split"] == "validation"
    assert base["pass"][0] == pytest.approx(sum(base["solved"]) / 20 / 16)
    assert base["pass"][1] == pytest.approx(sum(c > 0 for c in base["solved"]) / 20)
    assert "Pass@16" in capsys.readouterr().out
    other = evaluate(Settings(models=("base",), split="validation", problems=20, samples=16, k="1", seed=1))
    assert other["models"]["base"]["solved"] != base["solved"]


def test_the_default_k_go_as_far_as_the_samples(capsys):
    assert evaluate(Settings(models=("base",), problems=2, samples=17))["k"] == [1, 4, 16]


def test_the_papers_preset_samples_the_papers_distribution(capsys):
    flags = "base --problems 2 --samples 2 --k 1 --preset paper".split()
    evaluate(parse_flags(Settings, "evaluate", flags, PRESETS))
    assert "temperature 0.6, top-p 0.95" in capsys.readouterr().out
    assert parse_flags(Settings, "evaluate", [*flags, "--top-p", "1"], PRESETS).top_p == 1      # a flag beside it wins


class FakeSampler:
    """Answers problem i of the whole list right i times of 4, with i + 1 tokens, the last answer cut."""
    device = torch.device("cpu")

    def __init__(self):
        self.calls = []

    def generate(self, prompts, samples, max_new_tokens, temperature, generator, top_p, progress):
        self.calls.append((len(prompts), samples, max_new_tokens, temperature, top_p, generator.initial_seed()))
        tokenizer, episodes = countdown_tokenizer(), []
        for row, prompt in enumerate(prompts):
            i = prompt[0] - tokenizer.convert_tokens_to_ids("0")
            for j in range(samples):
                text = tokenizer.encode(" ".join(["1" if j < i else "0"] * (i + 1)))
                episodes.append(Episode(torch.tensor(prompt), torch.tensor(text), None, None, j < 3, row))
        return episodes


class FakeTask:
    def encode(self, problem, tokenizer):
        return tokenizer.encode(problem.prompt)

    def reward(self, problem, response, finished):
        return 1.0 if finished and response.startswith("1") else -1.0


def test_counting_in_several_blocks(monkeypatch):
    monkeypatch.setattr(module, "SEQUENCES", 8)                             # two problems a block
    sampler, seen = FakeSampler(), []
    problems = [Problem(str(i), "") for i in range(5)]
    got = count_solved(sampler, countdown_tokenizer(), FakeTask(), problems, 4, 99, 0.5, 0.9, 7, 3,
                       watch=lambda p, r, e: seen.append((p.prompt, len(e.response))))
    assert got == {"solved": [0, 1, 2, 3, 3], "samples": 4, "tokens": 3.0, "finished": 0.75}    # 4 of 4, but one was cut
    assert seen == [(str(i), i + 1) for i in range(5) for _ in range(4)]
    assert [c[0] for c in sampler.calls] == [2, 2, 1] and {c[1:5] for c in sampler.calls} == {(4, 99, 0.5, 0.9)}
    seeds = {c[5] for c in sampler.calls}
    assert len(seeds) == 3 and seeds.isdisjoint(seeded_generator(7, step, "rollout").initial_seed() for step in range(10))


def test_the_command_measures_what_it_was_asked_to(monkeypatch, qwen2):
    """Every model by its own weights, on its split and all of its problems, at its temperature and top-p."""
    asked, generate = [], Sampler.generate

    def spy(self, prompts, samples, max_new_tokens, temperature, generator, top_p, progress):
        asked.append((self.model.config["hidden_size"], prompts, temperature, top_p))
        return generate(self, prompts[:2], 1, 2, temperature, generator, top_p)
    monkeypatch.setattr(Sampler, "generate", spy)
    folder, _ = qwen2()
    evaluate(Settings(models=("base", str(folder)), split="test", problems=0, samples=1, k="1", temperature=0.6, top_p=0.95))
    task, tokenizer = module.load_task("countdown"), countdown_tokenizer()
    assert [(a[0], a[2], a[3]) for a in asked] == [(96, 0.6, 0.95), (32, 0.6, 0.95)]
    assert all(a[1] == [task.encode(p, tokenizer) for p in task.test] for a in asked)


@pytest.mark.parametrize("changes, sentence", [
    ({"k": "1,300"}, "does not fit --samples 256"), ({"k": "0"}, "1 <= K"), ({"k": "a"}, "whole numbers"),
    ({"samples": 0, "k": "1"}, "1 <= K"), ({"problems": -1}, "at least 0"), ({"slots": 0}, "at least 1"),
    ({"task": "chess"}, "unknown task 'chess'"), ({"models": ("./nowhere",)}, "no model folder ./nowhere"),
    ({"device": "cuda:99"}, "cannot be used here"), ({"temperature": 0.0}, "temperature > 0"),
    ({"temperature": float("nan")}, "temperature must be a finite number"), ({"models": ("base", "./nowhere")}, "no model folder ./nowhere"),
    ({"models": ("base/nowhere",)}, "no model folder base/nowhere"), ({"json": "no/such/table.json"}, "folder that does not exist")])
def test_bad_settings_get_one_sentence(changes, sentence):
    small = {"models": ("base",)} if "samples" in changes or "300" in changes.get("k", "") else {
        "models": ("base",), "samples": 2, "problems": 2, "k": "1"}
    with pytest.raises((ValueError, OSError), match=sentence) as error:
        evaluate(Settings(**(small | changes)))
    assert "\n" not in str(error.value)
