"""lab/word_controls.py: words and their places against a text taken apart by hand, matched differences
against a slow loop, and worlds made up so that only one thing matters."""

import numpy as np
import pytest
from readings import make_reading

from lab.exploration import TEXT, dissect_text
from lab.word_controls import (
    AFTER_COMMA,
    ELSEWHERE,
    OPENER,
    compare_within,
    kind_counts,
    pivotal_controls,
    powers_of_two,
    reflective_controls,
    single_words,
    words_of,
)

# Tokens of a text as a byte-pair vocabulary might cut it.
PIECES = [
    *("1", ".", " First", ",", " Mr", ".", " S", "mith", " pays", " $", "2", ".", "5", " so"),
    *(",", " he", "'s", " poor", ".", "\n\n", "**", "Then", "**", " ", "1", "6", " egg", "s"),
    *(" \\", "frac", "{", "a", "}", ":", "\n", "So", " (", "the", " rest", ")", " is"),
]
WORDS_BY_HAND = {
    2: ("first", OPENER),
    4: ("mr", AFTER_COMMA),
    6: ("smith", ELSEWHERE),
    8: ("pays", ELSEWHERE),
    13: ("so", ELSEWHERE),
    15: ("he's", AFTER_COMMA),
    17: ("poor", ELSEWHERE),
    21: ("then", OPENER),
    26: ("eggs", ELSEWHERE),
    31: ("a", ELSEWHERE),
    35: ("so", OPENER),
    37: ("the", ELSEWHERE),
    38: ("rest", ELSEWHERE),
    40: ("is", ELSEWHERE),
}


def test_words_and_their_places_are_those_by_hand():
    assert words_of(PIECES) == WORDS_BY_HAND


def test_pivotal_tokens_are_first_tokens_of_words():
    kinds, _ = dissect_text(PIECES)
    pivotal = [i for i, kind in enumerate(kinds) if TEXT.tokens[kind]]
    assert pivotal == [2, 13, 21, 35]
    assert set(pivotal) <= set(words_of(PIECES))


def test_bins_are_powers_of_two():
    values = np.array([1, 2, 3, 4, 7, 8, 1023, 1024])
    assert powers_of_two(values).tolist() == [0, 1, 1, 2, 2, 3, 9, 10]


def random_rows(seed, count=400, problems=12):
    """Rows, label and bins; a higher bin has more entropy and more of the label, and the last has
    nothing else."""
    rng = np.random.default_rng(seed)
    bins = rng.integers(0, 6, count)
    label = rng.random(count) < 0.05 + 0.1 * bins
    label[bins == 5] = True
    rows = {
        "entropy": rng.random(count) + bins + 0.3 * label,
        "problem": rng.integers(0, problems, count),
    }
    return rows, label, bins


def by_slow_loop(entropy, label, bins):
    """The mean over labelled values of each less the mean of the others in its bin; their number."""
    differences = []
    for i in np.flatnonzero(label):
        alike = entropy[~label & (bins == bins[i])]
        if len(alike):
            differences.append(entropy[i] - sum(alike) / len(alike))
    return sum(differences) / len(differences), len(differences)


@pytest.mark.parametrize("seed", range(3))
def test_a_matched_difference_is_that_of_a_slow_loop(seed):
    rows, label, bins = random_rows(seed)
    got = compare_within(rows, label, bins)
    want, count = by_slow_loop(rows["entropy"], label, bins)
    assert got["difference"]["mean"] == pytest.approx(want)
    assert (got["n"], got["left out"]) == (count, label.sum() - count)
    mean = rows["entropy"][label & (bins != 5)].mean()
    assert got["mean"]["mean"] == pytest.approx(mean)
    assert got["others"]["mean"] == pytest.approx(mean - want)


def test_the_interval_is_that_of_drawing_problems_anew():
    rows, label, bins = random_rows(3, count=120)
    got = compare_within(rows, label, bins)
    rng = np.random.default_rng(1)
    many = []
    for _ in range(2000):
        chosen = [np.flatnonzero(rows["problem"] == p) for p in rng.integers(0, 12, 12)]
        drawn = np.concatenate(chosen)
        many.append(by_slow_loop(rows["entropy"][drawn], label[drawn], bins[drawn])[0])
    want = np.percentile(many, [2.5, 97.5])
    width = want[1] - want[0]
    assert got["difference"]["interval"] == pytest.approx(want, abs=0.1 * width)


def test_fewer_than_ten_are_too_few():
    rows, _, _ = random_rows(0)
    one_bin = np.zeros(400)
    label = np.arange(400) < 9
    assert compare_within(rows, label, one_bin) is None
    assert compare_within(rows, ~label, one_bin) is None
    # Ten are enough, unless one of them is in a bin without others.
    label[9] = True
    assert compare_within(rows, label, one_bin)["n"] == 10
    with_one_alone = np.zeros(400)
    with_one_alone[9] = 1
    assert compare_within(rows, label, with_one_alone) is None


# Four sentences to an answer have a twin without a pivotal word: "so" is as frequent as "cat",
# "however" as rare as "zebra", "Then" as frequent as "Now".
ANSWER = 16 * "Then a so a. Now a cat a. " + 2 * "Then a however a. Now a zebra a. "


def made_up_answers(entropy_of):
    """Ten answers; the entropy of each word by the function."""
    readings = []
    for problem in range(10):
        words = [word.strip(".") for word in ANSWER.split()]
        entropy = [entropy_of(word) for word in words]
        readings.append(make_reading(ANSWER.strip(), entropy, problem=problem))
    return readings


def made_up_world(entropy_of):
    return pivotal_controls(made_up_answers(entropy_of), TEXT)


def differences(controls, kind):
    found = {}
    for control, kinds in controls.items():
        if kinds[kind] is not None:
            found[control] = round(kinds[kind]["difference"]["mean"], 9)
    return found


def test_where_only_frequency_matters_words_as_frequent_show_nothing():
    controls = made_up_world(lambda word: 5.0 if word in ("however", "zebra") else 1.0)
    found = differences(controls, "contrastive")
    assert found["other tokens"] > 3 and found["other words"] > 3
    assert found["at the same place"] > 3
    assert found["as frequent"] == found["as frequent, at the same place"] == 0


def test_where_only_the_place_matters_words_at_the_same_place_show_nothing():
    controls = made_up_world(lambda word: 5.0 if word in ("Then", "Now") else 1.0)
    found = differences(controls, "sequential")
    assert found["other words"] > 3
    assert found["at the same place"] == found["openers"] == 0
    assert found["at the same place, in the same answer"] == 0


def test_where_the_meaning_matters_no_control_hides_it():
    controls = made_up_world(lambda word: 5.0 if word in ("so", "however", "Then") else 1.0)
    found = differences(controls, "all")
    assert list(found) == list(controls)
    assert set(found.values()) == {4.0}


def test_single_words_are_compared_with_their_twins():
    entropy = {"so": 5.0, "cat": 2.0, "however": 1.0, "zebra": 3.0, "Then": 4.0, "Now": 4.0}
    readings = made_up_answers(lambda word: entropy.get(word, 0.0))
    found = single_words(readings, TEXT)
    got = {word: (one["n"], one["difference"]["mean"]) for word, one in found.items()}
    assert list(got) == ["then", "so", "however"]  # the most frequent first
    assert got["then"] == (180, 0.0)
    assert got["so"] == (160, 3.0)
    assert got["however"] == (20, -2.0)


def test_reflective_sentences_by_hand():
    """Checks are long and open with an uncertain word; behind it they are certain."""
    readings = []
    for problem in range(10):
        entropy = [8.0, 1.0, 1.0, 1.0] + [2.0, 3.0] + [2.0, 3.0] + [4.0, 2.0, 2.0, 2.0]
        text = "Check it once more. It is. So be. Add a few more."
        readings.append(make_reading(text, entropy, problem=problem))

    counts = kind_counts(readings, TEXT)
    assert counts["sentences"] == {"verify": 10, "correct": 0, "start again": 0, "other": 30}
    assert counts["tokens"]["causal"] == 10 and counts["tokens"]["other"] == 110

    found = differences(reflective_controls(readings, TEXT), "verify")
    assert found == {
        "other sentences": 11 / 4 - 2.5,
        "as long": 11 / 4 - 2.5,  # only the last sentence is
        "opening words": round(8 - (2 + 2 + 4) / 3, 9),
        "after the opening word": round(1 - (3 + 3 + 2) / 3, 9),
        # No other sentence stands where the first does.
    }
