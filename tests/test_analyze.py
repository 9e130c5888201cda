"""lab/analyze.py: the whole command, on countdown and on text, against what must be in its report
and its picture; and what it refuses."""

import json
import sys

import numpy as np
import pytest
import torch
from readings import SENTENCES, text_model
from test_page import Parsed

import lab.analyze
import lab.reading
from lab.analyze import Settings, analyze
from lab.exploration import PIVOTAL
from plumbing.settings import parse_flags
from tasks import Problem


@pytest.fixture
def matplotlib():
    return pytest.importorskip("matplotlib", reason="pip install matplotlib")


@pytest.fixture
def small(tmp_path):
    """Settings of the smallest run there is."""
    return {
        "models": ("base",),
        "problems": 2,
        "samples": 1,
        "max_new_tokens": 4,
        "out": str(tmp_path / "o"),
    }


def test_countdown_report(tmp_path, capsys, qwen2, matplotlib):
    folder, _ = qwen2(seed=1)
    out = tmp_path / "out"
    flags = "--problems 6 --samples 4 --max-new-tokens 60 --out".split()
    analyze(parse_flags(Settings, "x", ["base", str(folder), *flags, str(out)]))

    text = (out / "report.json").read_text()
    report = json.loads(text, parse_constant=lambda constant: pytest.fail(constant))
    assert list(report["behaviour"]) == ["base", str(folder)]
    assert list(report["comparisons"]["rare behaviours"]) == [str(folder)]
    base = report["comparisons"]["pivotal tokens"]["base"]
    assert base["all"]["difference"]["interval"][0] > 0.5
    assert base["all"]["p"] == pytest.approx(1 / 1001)
    assert base["kind ="]["mean"]["mean"] < 0.01 < 0.5 < base["kind operand"]["mean"]["mean"]
    assert {name.split()[0] for name in base} == {"all", "position", "difficulty", "kind"}
    assert set(report["answers"][0]) == {"base", str(folder)}
    assert len(report["answers"]) == 3

    printed = capsys.readouterr().out
    assert "base: pivotal tokens" in printed and "\x1b" not in printed

    page = Parsed((out / "responses.html").read_text())
    heads = [tag for tag, _ in page.elements if tag == "h3"]
    assert len(heads) == 6  # three problems, two models

    from matplotlib import image

    pixels = image.imread(out / "entropy.png")[..., :3]
    assert np.ptp(pixels, axis=-1).max() < 0.05  # grey
    assert 0.02 < (pixels.mean(-1) < 0.9).mean() < 0.6  # drawn, not blank


def test_english_is_read_from_a_file(tmp_path, qwen2, matplotlib):
    folder, _ = text_model(qwen2, max_position_embeddings=2048)
    rows = []
    for i in range(6):
        solution = " ".join(sentence for sentence, _, _ in SENTENCES[i::6])
        rows.append({"problem": f"What is {i} + 1?", "level": 1 + i % 3, "solution": solution})
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    settings = Settings(
        models=(str(folder),),
        task="math",
        saved=str(file),
        out=str(tmp_path / "out"),
        samples=2,
    )
    report = analyze(settings)
    comparisons = report["comparisons"]
    pivotal = comparisons["pivotal tokens"][str(folder)]
    reflective = comparisons["reflective actions"][str(folder)]

    # Byte-level tokens, the same words.
    found = {category: pivotal[f"kind {category}"]["n"] for category in PIVOTAL}
    by_hand = {c: sum(categories.count(c) for _, categories, _ in SENTENCES) for c in PIVOTAL}
    assert found == by_hand
    assert reflective["kind verify"]["n"] == 5
    assert {"difficulty 1 to 1", "difficulty 3 to 3"} <= set(pivotal)
    assert pivotal["kind within a word"]["n"] > 100
    counts = report["counts"][str(folder)]
    assert {category: counts["tokens"][category] for category in PIVOTAL} == by_hand
    assert counts["sentences"]["verify"] == 5

    # The controls have the same tokens; all words of a category are compared with other words.
    matched = report["controls"]["pivotal tokens"][str(folder)]
    for category, found in matched["other words"].items():
        if category != "all":
            assert found is None or found["n"] == by_hand[category]
    assert matched["other words"]["all"]["n"] == sum(by_hand.values())
    assert matched["other tokens"]["all"]["mean"] == pivotal["all"]["mean"]


class TwoProblems:
    """A stand-in for the task `math`, which would need data."""

    validation = [Problem("What is 1 + 1?", "2"), Problem("Prove it.", "")]

    @staticmethod
    def encode(problem, tokenizer):
        return tokenizer.encode("Q: " + problem.prompt)

    @staticmethod
    def reward(problem, response, finished):
        return -1.0

    @staticmethod
    def rewards(problems, responses, finished):
        return [-1.0] * len(responses)


def test_english_is_sampled(tmp_path, qwen2, monkeypatch, matplotlib):
    folder, _ = text_model(qwen2, max_position_embeddings=2048)
    monkeypatch.setattr(lab.reading, "load_task", lambda *_: TwoProblems)
    settings = Settings(
        models=(str(folder),),
        task="math",
        out=str(tmp_path / "out"),
        samples=2,
        max_new_tokens=30,
    )
    figures = analyze(settings)["behaviour"][str(folder)]
    assert 1 < figures["tokens per response"]["mean"] <= 30


def test_sampled_in_bfloat16_and_truncated(tmp_path, qwen2, monkeypatch, matplotlib):
    """The entropies are of the whole distribution all the same: one nearly certain token at a time
    is left by a top-p of 0.01, but the random model is as uncertain as before."""
    folder, _ = text_model(qwen2, max_position_embeddings=2048)
    monkeypatch.setattr(lab.reading, "load_task", lambda *_: TwoProblems)
    settings = Settings(
        models=(str(folder),),
        task="math",
        dtype="bfloat16",
        top_p=0.01,
        out=str(tmp_path / "out"),
        samples=2,
        max_new_tokens=30,
    )
    with torch.no_grad():
        _, readings = lab.reading.read_responses(str(folder), settings)
    assert readings[0].ids == readings[1].ids  # the likeliest token, always
    assert min(readings[0].entropy) > 0.5 * np.log(340)
    # Both problems are wrong in all answers.
    assert {reading.difficulty for reading in readings} == {1.0}


def test_the_smallest_run_there_is(small, matplotlib):
    analyze(Settings(**small))


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(models=("nowhere/at/all",)), "no model folder"),
        (dict(samples=0), "at least 1"),
        (dict(top_p=0.0), "--top-p"),
        (dict(task="math", split="test", test_data="no.jsonl"), "no.jsonl"),
        (dict(task="math", split="test"), "no test problems"),
        (dict(temperature=0.0), "0.001"),
        (dict(task="x"), "unknown task"),
        (dict(saved="missing.jsonl"), "missing.jsonl"),
        (dict(problems=1), "two problems"),
    ],
)
def test_a_bad_setting_is_one_sentence(small, changes, message, matplotlib):
    with pytest.raises((ValueError, OSError, ImportError), match=message) as error:
        analyze(Settings(**small | changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "lines,changes,message",
    [
        ("[1]", {}, "line 1, needs a problem"),
        ('{"problem": "a"}', {}, "line 1, needs"),
        ('{"problem": "a", "response": "\\ud800"}', {}, "line 1, needs"),
        (
            '{"problem": "Add.", "response": "b"}\n{"problem": "A", "response": "c"}',
            dict(task="math"),
            "words for all",
        ),
    ],
)
def test_a_bad_file_is_one_sentence(tmp_path, small, lines, changes, message, matplotlib):
    file = tmp_path / "x.jsonl"
    file.write_text(lines)
    with pytest.raises((ValueError, OSError, ImportError), match=message) as error:
        analyze(Settings(**small | changes, saved=str(file)))
    assert "\n" not in str(error.value)


def test_without_matplotlib_nothing_is_sampled(tmp_path, monkeypatch):
    def too_late(*_):
        pytest.fail("the lack shows only after the work")

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(lab.analyze, "read_responses", too_late)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        analyze(Settings(models=("base",), out=str(tmp_path / "out")))
