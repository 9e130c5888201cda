"""lab/comparison.py, lab/response_figures.py and lab/resampling.py: statistics against figures by
hand, full enumeration, brute force and a slow loop."""

import itertools

import numpy as np
import pytest
import torch
from readings import make_reading

from lab.comparison import compare, compare_kinds, compare_rare, nearest
from lab.exploration import TEXT
from lab.reading import Reading
from lab.resampling import bootstrap_problems, permutation_p
from lab.response_figures import response_figures


def make_rows(values, group, **columns):
    """Rows as `compare` takes them: every response a problem of its own."""
    rows = {
        "entropy": np.array(values, dtype=float),
        "problem": np.array(group),
        "response": np.array(group),
    }
    return rows | columns


def random_vectors(count):
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, 7, dtype=torch.float64, generator=generator)


def mean_distance(vector, others, k):
    distances = []
    for other in others.tolist():
        distances.append(sum((x - y) ** 2 for x, y in zip(vector, other)) ** 0.5)
    return sum(sorted(distances)[:k]) / k


def test_nearest_equals_brute_force():
    vectors = random_vectors(300)
    others = random_vectors(40)
    for k, got in (
        (5, nearest(vectors, others)),
        (1, nearest(vectors, others, 1)),
        (40, nearest(vectors, others, 99)),
    ):
        want = [mean_distance(vector, others, k) for vector in vectors[:20].tolist()]
        assert got[:20].tolist() == pytest.approx(want, abs=1e-7)


def by_enumeration(values, label, group):
    """Every arrangement of the labels within the groups, the difference of means of each -> share
    of those at least as extreme."""

    def difference(labels):
        return values[labels].mean() - values[~labels].mean()

    choices = []
    for g in np.unique(group):
        members = np.flatnonzero(group == g)
        choices.append(list(itertools.combinations(members, label[members].sum())))
    every = []
    for arrangement in itertools.product(*choices):
        labels = np.zeros(len(values), dtype=bool)
        labels[[i for chosen in arrangement for i in chosen]] = True
        every.append(difference(labels))
    centre = np.mean(every)
    observed = abs(difference(label) - centre)
    return np.mean(np.abs(np.array(every) - centre) >= observed - 1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_permutation_test_equals_full_enumeration(seed):
    rng = np.random.default_rng(seed)
    group = np.sort(rng.integers(0, 3, 9))
    label = rng.random(9) < 0.4
    label[np.flatnonzero(group == group[0])[0]] = True
    values = rng.integers(0, 4, 9) + 1.0 * label  # ties, which must count as extreme
    if not any(0 < label[group == g].sum() < (group == g).sum() for g in range(3)):
        return
    want = by_enumeration(values, label, group)
    assert permutation_p(values, label, group, 10**6) == pytest.approx(want)


def test_random_permutations_come_close_to_enumeration():
    rng = np.random.default_rng(1)
    group = np.repeat([0, 1], 7)
    label = np.tile([True, True, False, False, True, False, False], 2)
    values = rng.normal(size=14) + 0.8 * label
    got = permutation_p(values, label, group, 1224)  # there are 35 * 35 = 1225 arrangements
    assert got == pytest.approx(by_enumeration(values, label, group), abs=0.05)


def test_permutations_stay_within_groups():
    """A difference between groups alone is none within them."""
    group = np.repeat([0, 1], 50)
    values = np.repeat([0.0, 5.0], 50)
    label = np.r_[np.arange(50) < 5, np.arange(50) < 45]
    assert permutation_p(values, label, group, 200) == 1.0
    assert np.isnan(permutation_p(values, group == 0, group, 200))


def test_comparison_by_hand():
    values = np.array([1.0, 3.0, 2.0, 0.0, 4.0, 2.0])
    group = np.array([0, 0, 0, 1, 1, 1])
    label = np.array([True, True, False, False, True, False])
    got = compare(make_rows(values, group), label)
    labelled = values[label]  # 1 3 4
    others = values[~label]  # 2 0 2
    assert got["mean"]["mean"] == pytest.approx(8 / 3)
    assert got["others"]["mean"] == pytest.approx(4 / 3)
    assert got["difference"]["mean"] == pytest.approx(4 / 3)
    assert (got["n"], got["n others"]) == (3, 3)
    pooled = np.sqrt((labelled.var(ddof=1) + others.var(ddof=1)) / 2)
    assert got["d"]["mean"] == pytest.approx(4 / 3 / pooled)
    assert got["p"] == pytest.approx(by_enumeration(values, label, group))


def test_one_alone_has_no_spread_to_compare():
    rows = make_rows([1.0, 3.0, 2.0, 0.0, 4.0, 2.0], [0, 0, 0, 1, 1, 1])
    assert compare(rows, np.arange(6) == 0) is None


def test_intervals_are_over_problems():
    """Not over tokens, and not over responses: here the eight responses to a problem say the
    same."""
    rng = np.random.default_rng(0)
    problem = np.repeat(np.arange(40), 80)
    response = np.repeat(np.arange(320), 10)
    values = rng.normal(size=40)[problem] + 0.01 * rng.normal(size=3200)
    rows = make_rows(values, problem, response=response)
    got = compare(rows, np.arange(3200) % 2 == 0)

    low, high = got["mean"]["interval"]
    spread = np.std([values[problem == g].mean() for g in range(40)]) / np.sqrt(40)
    assert high - low == pytest.approx(2 * 1.96 * spread, rel=0.15)
    # Both kinds are in every problem: what they share cancels.
    low, high = got["difference"]["interval"]
    assert high - low < 0.01


def ratio(totals):
    return totals[:1] / totals[1:]


def test_the_bootstrap_is_a_slow_loop_over_problems():
    totals = np.array([[2.0, 1], [4, 2], [6, 1], [0, 0], [1, 3]])
    (got,) = bootstrap_problems(ratio, totals)
    rng = np.random.default_rng(1)
    many = []
    for _ in range(20_000):
        numerator, denominator = totals[rng.integers(0, 5, 5)].sum(0)
        if denominator:
            many.append(numerator / denominator)
    assert got["mean"] == pytest.approx(13 / 7)
    assert got["interval"] == pytest.approx(np.percentile(many, [2.5, 97.5]), rel=0.1)


def test_what_no_resample_has_gets_no_interval():
    (got,) = bootstrap_problems(ratio, np.zeros((2, 2)))
    assert np.isnan(got["interval"]).all()


def test_a_confounder_is_seen_within_its_bins():
    """Only the position matters, and pivotal words prefer the front."""
    rng = np.random.default_rng(0)
    readings = []
    for i in range(30):
        pivotal = rng.random(20) < np.repeat([0.8, 0.2], 10)
        text = " ".join("so" if p else "x" for p in pivotal)
        entropy = (np.arange(20) < 10) + 0.1 * rng.normal(size=20)
        readings.append(make_reading(text, entropy, problem=i, difficulty=float(i % 2)))
    got = compare_kinds(readings, Reading.token_spans, TEXT.tokens)
    assert list(got) == [
        "all",
        "position 0 to 4",
        "position 5 to 9",
        "position 10 to 14",
        "position 15 to 19",
        "difficulty 0 to 0",
        "difficulty 1 to 1",
        "kind causal",
        "kind other",
    ]
    assert got["all"]["difference"]["mean"] > 0.5 and got["all"] == got["kind causal"]
    for name, comparison in got.items():
        if name.startswith("position"):
            assert abs(comparison["difference"]["mean"]) < 0.06
    causal = []
    for reading in readings:
        for entropy, kind in zip(reading.entropy[5:10], reading.kinds[5:10]):
            if kind == "causal":
                causal.append(entropy)
    assert got["position 5 to 9"]["mean"]["mean"] == pytest.approx(np.mean(causal))


def test_rare_sentences_are_the_furthest_tenth():
    readings = []
    for i in range(4):
        entropy = np.repeat(np.arange(10.0) + i, 2)
        readings.append(make_reading("A b. " * 10, entropy, problem=i))
    distance = np.tile([9.0] * 9 + [1.0], 4)
    distance[[3, 17]] = 50.0
    distance[[5, 25]] = 40.0
    got = compare_rare(readings, distance)
    assert (got["all"]["n"], got["all"]["n others"]) == (4, 36)
    assert got["all"]["mean"]["mean"] == pytest.approx((3 + (7 + 1) + 5 + (5 + 2)) / 4)


def test_without_responses_there_is_nothing_to_compare():
    assert compare_kinds([], Reading.sentence_spans, {}) == {"all": None}
    assert compare_rare([], np.array([])) == {"all": None}


def test_what_responses_do_by_hand():
    long = make_reading(
        "So a b c d. So a b c d. Wait, check.",
        [2.0] + [0.0] * 5 + [4.0] + [0.0] * 3 + [1.0, 3.0],
        ids=[1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 6, 7],
    )
    short = make_reading("x", [2.0], problem=1, ids=[1])
    figures = response_figures([long, short], TEXT).values()
    assert [round(figure["mean"], 6) for figure in figures] == [
        13 / 2,
        round(2 / 9, 6),
        1,
        round(200 / 13, 6),
        0.5,
        round(12 / 13, 6),
        1,
        2,
    ]
