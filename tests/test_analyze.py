"""lab/analyze.py: statistics against hand, enumeration and brute force; the command on countdown and on text."""

import itertools
import json
import sys

import numpy as np
import pytest
import torch
from test_exploration import SENTENCES, WORDS, text_model
from test_page import Parsed

import lab.analyze
from evaluate import parse_flags
from lab.analyze import (PIVOTAL, TEXT, Reading, Settings, analyze, behaviour, bootstrap, compare, comparisons, dissect_text,
                         nearest, permutation_p)
from task import Problem


def reading(text, entropy=None, problem=0, **changes):
    pieces = WORDS.findall(text)
    kinds, sentences = dissect_text(pieces)
    return Reading(**dict(problem=problem, prompt="p", ids=list(range(len(pieces))), pieces=pieces, kinds=kinds, sentences=sentences,
                          entropy=np.array([1.0] * len(pieces) if entropy is None else entropy), likeliest=[], difficulty=1.0) | changes)


def table(values, group, **columns):
    """Rows as `compare` takes them: every response a problem of its own."""
    return {"entropy": np.array(values, dtype=float), "problem": np.array(group), "response": np.array(group)} | columns


def test_nearest_equals_brute_force():
    a, b = (torch.randn(n, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (300, 40))
    for k, got in ((5, nearest(a, b)), (1, nearest(a, b, 1)), (40, nearest(a, b, 99))):
        distance = lambda u, v: sum((x - y) ** 2 for x, y in zip(u, v)) ** 0.5
        want = [sum(sorted(distance(u, v) for v in b.tolist())[:k]) / k for u in a[:20].tolist()]
        assert got[:20].tolist() == pytest.approx(want, abs=1e-7)


def by_enumeration(values, label, group):
    """Every arrangement of the labels within the groups, the difference of means of each."""
    values, label, group = map(np.array, (values, label, group))
    choices = [[(members, c) for c in itertools.combinations(members, label[members].sum())]
               for members in (np.flatnonzero(group == g) for g in np.unique(group))]
    difference = lambda l: values[l].mean() - values[~l].mean()
    every = []
    for arrangement in itertools.product(*choices):
        l = np.zeros(len(values), dtype=bool)
        l[[i for _, c in arrangement for i in c]] = True
        every.append(difference(l))
    centre = np.mean(every)
    return np.mean(np.abs(np.array(every) - centre) >= abs(difference(label) - centre) - 1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_permutation_test_equals_full_enumeration(seed):
    rng = np.random.default_rng(seed)
    group = np.sort(rng.integers(0, 3, 9))
    label = rng.random(9) < 0.4
    label[np.flatnonzero(group == group[0])[0]] = True
    values = rng.integers(0, 4, 9) + 1.0 * label                # ties, which must count as extreme
    if not any(0 < label[group == g].sum() < (group == g).sum() for g in range(3)):
        return
    want = by_enumeration(values, label, group)
    assert permutation_p(values, label, group, 10 ** 6) == pytest.approx(want)


def test_random_permutations_come_close_to_enumeration_and_stay_within_groups():
    rng = np.random.default_rng(1)
    group, label = np.repeat([0, 1], 7), np.tile([True, True, False, False, True, False, False], 2)
    values = rng.normal(size=14) + 0.8 * label                  # 35 * 35 = 1225 arrangements
    assert permutation_p(values, label, group, 1224) == pytest.approx(by_enumeration(values, label, group), abs=0.05)
    # A difference between groups alone is none within them.
    group, values = np.repeat([0, 1], 50), np.repeat([0.0, 5.0], 50)
    label = np.r_[np.arange(50) < 5, np.arange(50) < 45]
    assert permutation_p(values, label, group, 200) == 1.0
    assert np.isnan(permutation_p(values, group == 0, group, 200))


def test_comparison_by_hand():
    values, group = np.array([1.0, 3.0, 2.0, 0.0, 4.0, 2.0]), np.array([0, 0, 0, 1, 1, 1])
    label = np.array([True, True, False, False, True, False])
    got = compare(table(values, group), label)
    one, other = values[label], values[~label]                  # 1 3 4 and 2 0 2
    assert got["mean"]["mean"] == pytest.approx(8 / 3) and got["others"]["mean"] == pytest.approx(4 / 3)
    assert got["difference"]["mean"] == pytest.approx(4 / 3) and (got["n"], got["n others"]) == (3, 3)
    assert got["d"]["mean"] == pytest.approx(4 / 3 / np.sqrt((one.var(ddof=1) + other.var(ddof=1)) / 2))
    assert got["p"] == pytest.approx(by_enumeration(values, label, group))
    assert compare(table(values, group), np.arange(6) == 0) is None     # one alone has no spread


def test_intervals_are_over_problems():
    """Not over tokens, and not over responses: here the eight responses to a problem say the same."""
    rng = np.random.default_rng(0)
    problem, response = np.repeat(np.arange(40), 80), np.repeat(np.arange(320), 10)
    values = rng.normal(size=40)[problem] + 0.01 * rng.normal(size=3200)
    got = compare(table(values, problem) | {"response": response}, np.arange(3200) % 2 == 0)
    low, high = got["mean"]["interval"]
    spread = np.std([values[problem == g].mean() for g in range(40)]) / np.sqrt(40)
    assert high - low == pytest.approx(2 * 1.96 * spread, rel=0.15)
    low, high = got["difference"]["interval"]                   # both kinds in every problem: what they share cancels
    assert high - low < 0.01


def test_the_bootstrap_is_a_slow_loop_over_problems():
    totals = np.array([[2.0, 1], [4, 2], [6, 1], [0, 0], [1, 3]])
    got, = bootstrap(lambda t: t[:1] / t[1:], totals)
    rng, many = np.random.default_rng(1), []
    for _ in range(20_000):
        numerator, denominator = totals[rng.integers(0, 5, 5)].sum(0)
        if denominator:
            many.append(numerator / denominator)
    assert got["mean"] == pytest.approx(13 / 7)
    assert got["interval"] == pytest.approx(np.percentile(many, [2.5, 97.5]), rel=0.1)
    assert np.isnan(bootstrap(lambda t: t[:1] / t[1:], np.zeros((2, 2)))[0]["interval"]).all()


def test_a_confounder_is_seen_within_its_bins():
    rng, readings = np.random.default_rng(0), []
    for i in range(30):                                         # only the position matters, and pivotal words prefer the front
        pivotal = rng.random(20) < np.repeat([0.8, 0.2], 10)
        readings.append(reading(" ".join("so" if p else "x" for p in pivotal), (np.arange(20) < 10) + 0.1 * rng.normal(size=20),
                                problem=i, difficulty=float(i % 2)))
    got = comparisons(readings, lambda r: [(t, t + 1, kind) for t, kind in enumerate(r.kinds)], TEXT[0])
    assert list(got) == ["all", "position 0 to 4", "position 5 to 9", "position 10 to 14", "position 15 to 19",
                         "difficulty 0 to 0", "difficulty 1 to 1", "kind causal", "kind other"]
    assert got["all"]["difference"]["mean"] > 0.5 and got["all"] == got["kind causal"]
    assert all(abs(c["difference"]["mean"]) < 0.06 for name, c in got.items() if name.startswith("position"))
    front = [(r.entropy[t], r.kinds[t]) for r in readings for t in range(5, 10)]
    assert got["position 5 to 9"]["mean"]["mean"] == pytest.approx(np.mean([h for h, kind in front if kind == "causal"]))


def test_rare_sentences_are_the_furthest_tenth():
    readings = [reading("A b. " * 10, np.repeat(np.arange(10.0) + i, 2), problem=i) for i in range(4)]
    far = np.tile([9.0] * 9 + [1.0], 4)
    far[[3, 17]] = 50.0, 50.0
    far[[5, 25]] = 40.0, 40.0
    got = comparisons(readings, lambda r: r.sentences, {}, far)
    assert (got["all"]["n"], got["all"]["n others"]) == (4, 36)
    assert got["all"]["mean"]["mean"] == pytest.approx((3 + (7 + 1) + 5 + (5 + 2)) / 4)
    assert comparisons([], lambda r: r.sentences, {}) == {"all": None}


def test_behaviour_by_hand():
    a = reading("So a b c d. So a b c d. Wait, check.", [2.0] + [0.0] * 5 + [4.0] + [0.0] * 3 + [1.0, 3.0],
                ids=[1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 6, 7])
    got = behaviour([a, reading("x", [2.0], problem=1, ids=[1])], TEXT)
    assert [round(f["mean"], 6) for f in got.values()] == [13 / 2, round(2 / 9, 6), 1, round(200 / 13, 6), 0.5, round(12 / 13, 6), 1, 2]


def test_countdown_report(tmp_path, capsys, qwen2):
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    folder, _ = qwen2(seed=1)
    analyze(parse_flags(Settings, "x", ["base", str(folder), "--problems", "6", "--samples", "4", "--max-new-tokens", "60",
                                        "--out", str(tmp_path / "out")]))
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "report.json").read_text(), parse_constant=lambda c: pytest.fail(c))
    assert list(report["behaviour"]) == ["base", str(folder)] and list(report["comparisons"]["rare behaviours"]) == [str(folder)]
    base = report["comparisons"]["pivotal tokens"]["base"]
    assert base["all"]["difference"]["interval"][0] > 0.5 and base["all"]["p"] == pytest.approx(1 / 1001)
    assert base["kind ="]["mean"]["mean"] < 0.01 < 0.5 < base["kind operand"]["mean"]["mean"]
    assert {name.split()[0] for name in base} == {"all", "position", "difficulty", "kind"}
    assert "base: pivotal tokens" in printed and "\x1b" not in printed
    assert set(report["answers"][0]) == {"base", str(folder)} and len(report["answers"]) == 3
    parsed = Parsed((tmp_path / "out" / "responses.html").read_text())
    assert sum(tag == "h3" for tag, _ in parsed.elements) == 6              # three problems, two models
    from matplotlib import image
    pixels = image.imread(tmp_path / "out" / "entropy.png")
    assert np.ptp(pixels[..., :3], axis=-1).max() < 0.05 and 0.02 < (pixels[..., :3].mean(-1) < 0.9).mean() < 0.6


def test_english_is_read_from_a_file_or_sampled(tmp_path, qwen2, monkeypatch):
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    folder, _ = text_model(qwen2, max_position_embeddings=2048)
    lines = [{"problem": f"What is {i} + 1?", "level": 1 + i % 3, "solution": " ".join(s for s, _, _ in SENTENCES[i::6])}
             for i in range(6)]
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n")
    s = Settings(models=(str(folder),), task="math", saved=str(file), out=str(tmp_path / "out"), samples=2)
    record = {subject: models.get(str(folder)) for subject, models in analyze(s)["comparisons"].items()}
    want = {c: sum(p.count(c) for _, p, _ in SENTENCES) for c in PIVOTAL}
    assert {c: record["pivotal tokens"][f"kind {c}"]["n"] for c in want} == want       # byte-level tokens, the same words
    assert record["reflective actions"]["kind verify"]["n"] == 3
    assert {"difficulty 1 to 1", "difficulty 3 to 3"} <= set(record["pivotal tokens"])
    assert record["pivotal tokens"]["kind within a word"]["n"] > 100

    class Stub:
        validation = [Problem("What is 1 + 1?", "2"), Problem("Prove it.", "")]
        encode = staticmethod(lambda p, tokenizer: tokenizer.encode("Q: " + p.prompt))
        reward = staticmethod(lambda p, response, finished: -1.0)
    monkeypatch.setattr(lab.analyze, "load_task", lambda *_: Stub)
    figures = analyze(Settings(models=(str(folder),), task="math", out=str(tmp_path / "out"), samples=2, max_new_tokens=30))
    assert 1 < figures["behaviour"][str(folder)]["tokens per response"]["mean"] <= 30


@pytest.mark.parametrize("changes,message", [
    (dict(models=("nowhere/at/all",)), "no model folder"), (dict(samples=0), "at least 1"), (dict(temperature=0.0), "0.001"),
    (dict(task="x"), "unknown task"), (dict(saved="missing.jsonl"), "missing.jsonl"), (dict(problems=1), "two problems"),
    (dict(saved="[1]"), "line 1, needs a problem"), (dict(), None),
    (dict(saved='{"problem": "a"}'), "line 1, needs"), (dict(saved='{"problem": "a", "response": "\\ud800"}'), "line 1, needs"),
    (dict(saved='{"problem": "Add.", "response": "b"}\n{"problem": "A", "response": "c"}', task="math"), "words for all")])
def test_bad_input_is_one_sentence(tmp_path, changes, message):
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    if changes.get("saved", "")[:1] in ("[", "{"):
        (tmp_path / "x.jsonl").write_text(changes["saved"])
        changes = changes | {"saved": str(tmp_path / "x.jsonl")}
    s = Settings(**{"models": ("base",), "problems": 2, "samples": 1, "max_new_tokens": 4, "out": str(tmp_path / "o")} | changes)
    if message is None:
        analyze(s)                                              # the smallest run there is
        return
    with pytest.raises((ValueError, OSError, ImportError), match=message) as error:
        analyze(s)
    assert "\n" not in str(error.value)


def test_without_matplotlib_nothing_is_sampled(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(lab.analyze, "read", lambda *_: pytest.fail("the lack shows only after the work"))
    with pytest.raises(ValueError, match="pip install matplotlib"):
        analyze(Settings(models=("base",), out=str(tmp_path / "out")))
