"""evaluate.py against enumeration, closed forms and hand-computed tables."""

import itertools
import json
from fractions import Fraction

import numpy as np
import pytest

from evaluate import Settings, bootstrap, evaluate, pass_at_k, pass_table, report


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


def test_the_papers_preset_samples_the_papers_distribution(capsys):
    evaluate(Settings(models=("base",), split="validation", problems=2, samples=2, k="1", preset="paper"))
    assert "temperature 0.6, top-p 0.95" in capsys.readouterr().out


@pytest.mark.parametrize("changes, sentence", [
    ({"k": "1,300"}, "does not fit --samples 256"), ({"k": "0"}, "1 <= K"), ({"k": "a"}, "whole numbers"),
    ({"samples": 0, "k": "1"}, "1 <= K"), ({"problems": -1}, "at least 0"), ({"slots": 0}, "at least 1"),
    ({"task": "chess"}, "unknown task 'chess'"), ({"models": ("./nowhere",)}, "no model folder ./nowhere"),
    ({"device": "cuda:99"}, "cannot be used here"), ({"temperature": 0.0}, "temperature > 0")])
def test_bad_settings_get_one_sentence(changes, sentence):
    with pytest.raises((ValueError, OSError), match=sentence) as error:
        evaluate(Settings(**({"models": ("base",)} | changes)))
    assert "\n" not in str(error.value)
