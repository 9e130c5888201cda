"""lab/analyze.py: statistics against hand, enumeration and brute force; the command on countdown and on text."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
from test_exploration import SENTENCES, WORDS, text_model
from test_page import Parsed

from evaluate import parse_flags
from lab.analyze import Settings, analyze, behaviour, compare, distances, nearest, permutation_p, ratio, within
from lab.exploration import PIVOTAL, Reading, dissect_text


def reading(text, entropy=None):
    pieces = WORDS.findall(text)
    return Reading(0, "p", list(range(len(pieces))), pieces, *dissect_text(pieces), np.array(entropy or [1.0] * len(pieces)), 1.0)


def test_nearest_equals_brute_force():
    a, b = (torch.randn(n, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (300, 40))
    for k, got in ((5, nearest(a, b)), (1, nearest(a, b, 1)), (40, nearest(a, b, 99))):
        distance = lambda u, v: sum((x - y) ** 2 for x, y in zip(u, v)) ** 0.5
        want = [sum(sorted(distance(u, v) for v in b.tolist())[:k]) / k for u in a[:20].tolist()]
        assert got[:20].tolist() == pytest.approx(want, abs=1e-7)


def test_distances_count_every_sentence_and_read_each_once():
    seen, place = [], {"A.": 0.0, "B.": 1.0, "C.": 10.0}
    def vectors(sentences):
        seen.extend(sentences)
        return [[place[s]] for s in sentences]
    got = distances(vectors, [reading("C. A. C.")], [reading("A. A. B."), reading("B. B. B.")])
    assert sorted(seen) == ["A.", "B.", "C."]
    assert distances(vectors, [reading("C.")], [reading("!")]) is None
    assert got == pytest.approx([(9 * 4 + 10) / 5, (0 + 0 + 1 + 1 + 1) / 5, (9 * 4 + 10) / 5])


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
    group = rng.integers(0, 3, 9)
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
    got = compare(values, label, group)
    one, other = values[label], values[~label]                  # 1 3 4 and 2 0 2
    assert got["mean"]["mean"] == pytest.approx(8 / 3) and got["others"]["mean"] == pytest.approx(4 / 3)
    assert got["difference"]["mean"] == pytest.approx(4 / 3) and (got["n"], got["n others"]) == (3, 3)
    assert got["d"]["mean"] == pytest.approx(4 / 3 / np.sqrt((one.var(ddof=1) + other.var(ddof=1)) / 2))
    assert got["p"] == pytest.approx(by_enumeration(values, label, group))
    assert compare(values, np.arange(6) == 0, group) is None    # one alone has no spread


def test_intervals_are_over_responses():
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(40), 50)
    values = rng.normal(size=40)[group] + 0.01 * rng.normal(size=2000)     # tokens of a response say the same
    got = compare(values, np.arange(2000) % 2 == 0, group)
    low, high = got["mean"]["interval"]
    spread = np.std([values[group == g].mean() for g in range(40)]) / np.sqrt(40)
    assert high - low == pytest.approx(2 * 1.96 * spread, rel=0.15)
    low, high = got["difference"]["interval"]                   # both kinds in every response: what they share cancels
    assert high - low < 0.01
    r = ratio([2.0, 4.0, 6.0], [1, 2, 1])
    assert r["mean"] == 3.0 and 2.0 <= r["interval"][0] < 3.0 < r["interval"][1] <= 6.0
    assert np.isnan(ratio([0, 0], [0, 0])["mean"])


def test_a_confounder_is_seen_within_its_bins():
    position = np.tile(np.arange(20), 30)
    group, rng = np.repeat(np.arange(30), 20), np.random.default_rng(0)
    values = (position < 10) + 0.1 * rng.normal(size=600)       # only the position matters ...
    label = rng.random(600) < np.where(position < 10, 0.8, 0.2)     # ... and labels prefer the front
    assert compare(values, label, group)["difference"]["mean"] > 0.5
    bins = within(values, label, group, position)
    assert list(bins) == ["0 to 4", "5 to 9", "10 to 14", "15 to 19"]
    assert all(abs(c["difference"]["mean"]) < 0.06 for c in bins.values())
    kinds = within(values, label, group, np.where(position < 10, "front", "back"))
    assert list(kinds) == ["back", "front"]
    assert kinds["front"]["mean"]["mean"] == pytest.approx(values[label & (position < 10)].mean())


def test_behaviour_by_hand():
    a = reading("So a b c d. So a b c d. Wait, check.", [2.0] + [0.0] * 5 + [4.0] + [0.0] * 3 + [1.0, 3.0])
    a = Reading(**{**vars(a), "ids": [1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 6, 7]})
    got = behaviour([a], "text")
    assert [round(f["mean"], 6) for f in got.values()] == [12, round(2 / 9, 6), 2, round(200 / 12, 6), 1, round(10 / 12, 6),
                                                          1, 2]


def test_countdown_report(tmp_path, capsys, qwen2):
    folder, _ = qwen2(seed=1)
    s = parse_flags(Settings, "x", [str(folder), "--base", "base", "--problems", "6", "--samples", "4",
                                    "--max-new-tokens", "60", "--out", str(tmp_path / "out")])
    analyze(s)
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "report.json").read_text(), parse_constant=lambda c: pytest.fail(c))
    base = report["models"]["base"]
    assert list(report["models"]) == ["base", str(folder)]
    assert base["pivotal tokens"]["all"]["difference"]["interval"][0] > 0.5
    assert base["pivotal tokens"]["kinds"]["="]["mean"] < 0.01 < 0.5 < base["pivotal tokens"]["kinds"]["operand"]["mean"]
    assert base["pivotal tokens"]["all"]["p"] == pytest.approx(1 / 1001) and "rare behaviours" not in base
    assert {"position", "difficulty"} <= set(base["reflective actions"]["within"])
    assert "base: pivotal tokens" in printed and "\x1b" not in printed
    parsed = Parsed((tmp_path / "out" / "responses.html").read_text())
    assert sum(tag == "h3" for tag, _ in parsed.elements) == 6              # three problems, two models
    matplotlib = pytest.importorskip("matplotlib", reason="pip install matplotlib")
    image = matplotlib.image.imread(tmp_path / "out" / "entropy.png")
    assert np.ptp(image[..., :3], axis=-1).max() < 0.05 and 0.02 < (image[..., :3].mean(-1) < 0.9).mean() < 0.6


def test_text_is_read_or_sampled_from_a_file(tmp_path, qwen2):
    folder, _ = text_model(qwen2, max_position_embeddings=2048)
    lines = [{"problem": f"What is {i} + 1?", "level": 1 + i % 3, "solution": " ".join(s for s, _, _ in SENTENCES[i::6])}
             for i in range(6)]
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n")
    s = Settings(models=(str(folder),), base=str(folder), task="text", texts=str(file), out=str(tmp_path / "out"), samples=2)
    record = analyze(s)["models"][str(folder)]
    want = {c: sum(p.count(c) for _, p, _ in SENTENCES) for c in PIVOTAL}
    assert {c: record["pivotal tokens"]["kinds"][c]["n"] for c in want} == want        # byte-level tokens, the same words
    assert record["reflective actions"]["kinds"]["verify"]["n"] == 3
    assert set(record["pivotal tokens"]["within"]) == {"position", "difficulty", "place"}
    sampled = analyze(dataclasses.replace(s, resample=True, problems=3, max_new_tokens=40))
    assert sampled["models"][str(folder)]["behaviour"]["tokens per response"]["n"] == 6


@pytest.mark.parametrize("changes,message", [
    (dict(models=("nowhere/at/all",)), "no model folder"), (dict(samples=0), "at least 1"), (dict(temperature=0.0), "0.001"),
    (dict(task="text"), "--texts FILE"), (dict(texts="missing.jsonl"), "missing.jsonl"), (dict(encoder="x"), "pip install"),
    (dict(texts="[1]"), "line 1, holds no JSON object"), (dict(texts='{"answer": "a"}'), "has no problem"),
    (dict(texts='{"problem": "\\ud800"}'), "valid text"), (dict(texts=""), None), (dict(texts='{"problem": "Add 1."}'), "no countdown prompt"),
    (dict(texts='{"problem": "Add."}', task="text"), "has no words")])
def test_bad_input_is_one_sentence(tmp_path, changes, message):
    if changes.get("texts", "")[:1] in ("[", "{"):
        (tmp_path / "x.jsonl").write_text(changes["texts"])
        changes = changes | {"texts": str(tmp_path / "x.jsonl")}
    smallest = {"models": ("base",), "problems": 1, "samples": 1, "max_new_tokens": 4, "out": str(tmp_path / "o")}
    s = Settings(**smallest | changes)
    if message is None:
        analyze(s)                                              # the smallest run there is
        return
    if "encoder" in changes:
        try:
            import sentence_transformers                        # noqa: F401
            pytest.skip("sentence-transformers is installed")
        except ImportError:
            pass
    with pytest.raises((ValueError, OSError), match=message) as error:
        analyze(s)
    assert "\n" not in str(error.value)
