"""evaluate.py against enumeration, closed forms, hand-computed tables, and a sampler and a task
whose right answers are known."""

import itertools
import json
from fractions import Fraction

import numpy as np
import pytest
import torch
from pytest import approx

import evaluate as module
from evaluate import bootstrap, count_solved, evaluate, pass_at_k, pass_table, report
from lab.pretrain import countdown_tokenizer
from plumbing.seeds import seeded_generator
from plumbing.settings import EVALUATION_PRESETS, EvaluationSettings, parse_flags
from rollout import Episode, Sampler
from tasks import Problem, load_task


def share_with_a_right_one(n, c, k):
    """Of all k-subsets of n answers, c of them right, by enumeration."""
    answers = [True] * c + [False] * (n - c)
    subsets = list(itertools.combinations(answers, k))
    solved = [any(subset) for subset in subsets]
    return sum(solved) / len(subsets)


@pytest.mark.parametrize("n", range(1, 13))
def test_pass_at_k_equals_enumeration_over_all_subsets(n):
    for c in range(n + 1):
        for k in range(1, n + 1):
            want = share_with_a_right_one(n, c, k)
            assert pass_at_k(n, c, k) == approx(want, abs=1e-12)


def test_pass_at_k_is_exact_for_large_n():
    assert pass_at_k(50_000, 1, 20_000) == 0.4  # c = 1: k / n
    assert pass_at_k(50_000, 123, 1) == 123 / 50_000  # k = 1: c / n
    assert pass_at_k(30_000, 20_001, 10_000) == 1.0  # no k wrong ones to draw

    both_wrong = Fraction(29_990 * 29_989, 30_000 * 29_999)
    want = float(1 - both_wrong)
    assert pass_at_k(30_000, 10, 2) == approx(want, rel=1e-15)

    all_64_wrong = Fraction(1)
    for i in range(64):
        all_64_wrong *= Fraction(9_700 - i, 10_000 - i)
    want = float(1 - all_64_wrong)
    assert pass_at_k(10_000, 300, 64) == approx(want, rel=1e-15)


@pytest.mark.parametrize(
    "n, c, k, sentence",
    [
        (4, 2, 5, "1 <= K <= n"),
        (4, 2, 0, "1 <= K <= n"),
        (0, 0, 1, "1 <= K <= n"),
        (4, 5, 2, "0 <= c <= n"),
        (4, -1, 2, "0 <= c <= n"),
    ],
)
def test_pass_at_k_refuses_impossible_counts(n, c, k, sentence):
    with pytest.raises(ValueError, match=sentence):
        pass_at_k(n, c, k)


def test_pass_table_by_hand():
    table = pass_table([0, 1, 4], n=4, ks=(1, 2, 4))
    assert table.tolist() == [
        [0, 0, 0],
        [0.25, 0.5, 1],
        [1, 1, 1],
    ]


def test_bootstrap_interval_is_that_of_the_mean():
    """For many 0/1 values the interval is close to the normal one, p +- 1.96 sqrt(p (1-p) / n)."""
    values = np.zeros((400, 2))
    values[:100, 0] = 1
    low, high = bootstrap(values)
    variance = 0.25 * 0.75 / 400
    half = 1.96 * variance**0.5
    assert low[0] == approx(0.25 - half, abs=0.004)
    assert high[0] == approx(0.25 + half, abs=0.004)
    assert low[1] == high[1] == 0


def test_bootstrap_gives_the_same_every_time():
    values = np.repeat([[0.0], [1.0]], [300, 100], axis=0)
    assert np.array_equal(bootstrap(values), bootstrap(values))


def result_of(solved):
    return {
        "solved": solved,
        "samples": 4,
        "tokens": 10.0,
        "finished": 1.0,
    }


def test_report_pairs_the_problems():
    """Two models that differ by 1 of 4 on every problem: the difference has no spread, however the
    levels do."""
    results = {
        "a": result_of([0, 1, 2, 3] * 10),
        "b": result_of([1, 2, 3, 4] * 10),
    }
    text, record = report(results, (1, 4))
    level = record["models"]["a"]
    difference = record["models"]["b - a"]
    assert difference["pass"][0] == 0.25
    assert difference["low"][0] == approx(0.25)
    assert difference["high"][0] == approx(0.25)
    assert level["low"][0] < 0.375
    assert level["high"][0] > 0.375
    assert level["solved"] == [0, 1, 2, 3] * 10  # the counts are kept
    assert "+0.250 [+0.250, +0.250]" in text
    assert "Pass@4" in text


def test_the_command_end_to_end(tmp_path, capsys):
    file = tmp_path / "table.json"
    s = EvaluationSettings(
        models=("base",),
        split="validation",
        problems=20,
        samples=16,
        k="1,16",
        json=str(file),
    )
    record = evaluate(s)
    again = evaluate(s)  # same seed, same counts
    saved = json.loads(file.read_text())
    assert saved == as_json(record)
    assert saved == as_json(again)
    assert saved["settings"]["split"] == "validation"
    assert "Pass@16" in capsys.readouterr().out

    base = saved["models"]["base"]
    solved = base["solved"]
    solved_at_all = [c for c in solved if c > 0]
    pass_at_1, pass_at_16 = base["pass"]
    assert len(solved) == 20
    assert pass_at_1 == approx(sum(solved) / 20 / 16)
    assert pass_at_16 == approx(len(solved_at_all) / 20)

    s.seed = 1
    other = evaluate(s)
    assert other["models"]["base"]["solved"] != solved


def as_json(record):
    return json.loads(json.dumps(record))


def test_the_default_k_go_as_far_as_the_samples():
    s = EvaluationSettings(models=("base",), problems=2, samples=17)
    assert evaluate(s)["k"] == [1, 4, 16]


def parse(flags):
    return parse_flags(EvaluationSettings, "evaluate", flags.split(), EVALUATION_PRESETS)


def test_the_papers_preset_samples_the_papers_distribution(capsys):
    flags = "base --problems 2 --samples 2 --k 1 --preset paper"
    evaluate(parse(flags))
    assert "temperature 0.6, top-p 0.95" in capsys.readouterr().out
    assert parse(flags + " --top-p 1").top_p == 1  # a flag beside it wins


class FakeSampler:
    """Answers problem i of the whole list right i times of 4, with i + 1 tokens, the last answer
    cut."""

    device = torch.device("cpu")

    def __init__(self):
        self.calls = []

    def generate(self, prompts, samples, max_new_tokens, temperature, generator, top_p, progress):
        call = {
            "problems": len(prompts),
            "settings": (samples, max_new_tokens, temperature, top_p),
            "seed": generator.initial_seed(),
        }
        self.calls.append(call)
        return [
            self.episode(row, prompt, sample)
            for row, prompt in enumerate(prompts)
            for sample in range(samples)
        ]

    def episode(self, row, prompt, sample):
        tokenizer = countdown_tokenizer()
        i = int(tokenizer.decode(prompt))
        word = "1" if sample < i else "0"
        answer = " ".join([word] * (i + 1))
        return Episode(
            prompt=torch.tensor(prompt),
            response=torch.tensor(tokenizer.encode(answer)),
            logp=None,
            entropy=None,
            finished=sample < 3,
            prompt_index=row,
        )


class FakeTask:
    def encode(self, problem, tokenizer):
        return tokenizer.encode(problem.prompt)

    def reward(self, problem, response, finished):
        right = finished and response.startswith("1")
        return 1.0 if right else -1.0

    def rewards(self, problems, responses, finished):
        return [self.reward(*answer) for answer in zip(problems, responses, finished)]


def test_counting_in_several_blocks(monkeypatch):
    monkeypatch.setattr(module, "SEQUENCES", 8)  # two problems a block
    sampler = FakeSampler()
    seen = []

    def watch(problem, response, episode):
        length = len(episode.response)
        seen.append((problem.prompt, length))

    got = count_solved(
        sampler,
        countdown_tokenizer(),
        FakeTask(),
        problems=[Problem(str(i), "") for i in range(5)],
        samples=4,
        max_new_tokens=99,
        temperature=0.5,
        top_p=0.9,
        seed=7,
        step=3,
        watch=watch,
    )
    assert got == {
        "solved": [0, 1, 2, 3, 3],  # the last would have 4 of 4, but one was cut
        "samples": 4,
        "tokens": 3.0,
        "finished": 0.75,
    }
    assert seen == [(str(i), i + 1) for i in range(5) for _ in range(4)]
    assert [call["problems"] for call in sampler.calls] == [2, 2, 1]
    for call in sampler.calls:
        assert call["settings"] == (4, 99, 0.5, 0.9)

    seeds = {call["seed"] for call in sampler.calls}
    assert len(seeds) == 3
    for step in range(10):
        of_training = seeded_generator(7, step, "rollout").initial_seed()
        assert of_training not in seeds


def test_the_command_measures_what_it_was_asked_to(qwen2, monkeypatch):
    """Every model by its own weights, on its split and all of its problems, at its temperature and
    top-p."""
    widths = []
    prompts_asked = []
    distributions = []
    generate = Sampler.generate

    def spy(self, prompts, samples, max_new_tokens, temperature, generator, top_p, progress):
        widths.append(self.model.config["hidden_size"])
        prompts_asked.append(prompts)
        distributions.append((temperature, top_p))
        return generate(
            self,
            prompts[:2],
            samples_per_prompt=1,
            max_new_tokens=2,
            temperature=temperature,
            generator=generator,
            top_p=top_p,
        )

    monkeypatch.setattr(Sampler, "generate", spy)
    folder, _ = qwen2()
    s = EvaluationSettings(
        models=("base", str(folder)),
        split="test",
        problems=0,
        samples=1,
        k="1",
        temperature=0.6,
        top_p=0.95,
    )
    evaluate(s)
    task = load_task("countdown")
    tokenizer = countdown_tokenizer()
    whole_split = [task.encode(problem, tokenizer) for problem in task.test]
    assert widths == [96, 32]
    assert distributions == [(0.6, 0.95)] * 2
    assert prompts_asked == [whole_split] * 2


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"k": "1,300", "samples": 256}, "does not fit --samples 256"),
        ({"k": "0"}, "1 <= K"),
        ({"k": "a"}, "whole numbers"),
        ({"samples": 0}, "1 <= K"),
        ({"problems": -1}, "at least 0"),
        ({"slots": 0}, "at least 1"),
        ({"task": "chess"}, "unknown task 'chess'"),
        ({"models": ("./nowhere",)}, "no model folder ./nowhere"),
        ({"models": ("base", "./nowhere")}, "no model folder ./nowhere"),
        ({"models": ("base/nowhere",)}, "no model folder base/nowhere"),
        ({"device": "cuda:99"}, "cannot be used here"),
        ({"temperature": 0.0}, "temperature > 0"),
        ({"temperature": float("nan")}, "temperature must be a finite number"),
        ({"json": "no/such/table.json"}, "folder that does not exist"),
    ],
)
def test_bad_settings_get_one_sentence(changes, sentence):
    small = {
        "models": ("base",),
        "samples": 2,
        "problems": 2,
        "k": "1",
    }
    s = EvaluationSettings(**(small | changes))
    with pytest.raises((ValueError, OSError), match=sentence) as error:
        evaluate(s)
    assert "\n" not in str(error.value)
