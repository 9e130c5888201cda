"""lab/exploration.py: words and sentences against forty-six sentences and two texts checked by hand, an
independent count in real solutions, and searches that no text makes explode."""

import json
import time
from pathlib import Path

import pytest
from readings import SENTENCES, WORDS, C, Q

from lab.exploration import (
    PIVOTAL,
    dissect_countdown,
    dissect_text,
    pivotal_words,
    sentence_ends,
)

DATA = Path(__file__).parents[1].parent / "shared" / "data"
PROMPT = "7 7 1 8 -> 23 ?"


def test_there_are_forty_six_sentences_checked_by_hand():
    assert len(SENTENCES) == 46


@pytest.mark.parametrize("sentence,pivotal,reflection", SENTENCES)
def test_sentence_checked_by_hand(sentence, pivotal, reflection):
    kinds, sentences = dissect_text(WORDS.findall(sentence))
    assert [kind for kind in kinds if kind != "other"] == pivotal
    assert [span.kind for span in sentences] == [reflection]


def test_words_in_disguise_are_found_and_nothing_raises():
    """Case is ignored as Unicode does: a long s is an s, a dotless i an i."""
    kinds, _ = dissect_text(WORDS.findall("\u017fo F\u0131rst SINCE x, as\na result"))
    assert kinds == [C, Q, C, "other", C, "other", "other"]


def test_a_number_before_the_end_of_a_line_counts_nothing():
    """ "15 first" would count, but a new line begins a sentence."""
    kinds, _ = dissect_text(WORDS.findall("It is 15\nFirst, add 15 first ones."))
    assert [kind for kind in kinds if kind != "other"] == [Q]


def split(text):
    """The sentences of `text`, without those that are blank."""
    ends = [0, *sentence_ends(text), len(text)]
    between = [text[first:end].strip() for first, end in zip(ends, ends[1:])]
    return [sentence for sentence in between if sentence]


def test_sentences_end_where_a_reader_ends_them():
    text = (
        "We have $x = 3.$ Also, i.e. by symmetry, $y = 3.5. z$ holds. Is it so? Yes (cf. Fig. 2)!\n"
        "1. Add them.\nHence\n\\[a = b.\nc = d\\]\nfor all $n$. It costs $5. She pays $6 more.\n\n"
        "$n$ is odd.\n[asy]\ndraw((0,0)--(3.5,0));\ndot((0,3), red);\n[/asy]\n\n"
        "Therefore, done\n- first\n# Next"
    )
    sentences = [
        "We have $x = 3.$",
        "Also, i.e. by symmetry, $y = 3.5. z$ holds.",
        "Is it so?",
        "Yes (cf. Fig. 2)!",
        "1. Add them.",
        "Hence\n\\[a = b.\nc = d\\]\nfor all $n$.",
        "It costs $5.",
        "She pays $6 more.",
        "$n$ is odd.",
        "[asy]\ndraw((0,0)--(3.5,0));\ndot((0,3), red);\n[/asy]",
        "Therefore, done",
        "- first",
        "# Next",
    ]
    assert split(text) == sentences

    # The same sentences, in whole tokens.
    pieces = WORDS.findall(text)
    _, spans = dissect_text(pieces)
    in_tokens = [" ".join("".join(pieces[span.first : span.end]).split()) for span in spans]
    assert in_tokens[:3] == sentences[:3]


def test_sentences_of_a_small_model_end_where_a_reader_ends_them():
    """As SmolLM2-135M-Instruct writes answers to GSM8K: numbered lists from the first character on,
    bold heads, sums that open a sentence, titles, decimal points."""
    text = (
        "1. Set up the equation:\nLet x be 3.5 gallons. 16 - 3 = 13. She has 9 left.\n"
        "   2. Mr. Smith pays $2.50 vs. Mrs. Lee's .75 dollars! **So** he saves.\n\n"
        "**10. Find the sum.** Then:\n100 + 20 = 120\n3) Add them"
    )
    assert split(text) == [
        "1. Set up the equation:",
        "Let x be 3.5 gallons.",
        "16 - 3 = 13.",
        "She has 9 left.",
        "2. Mr. Smith pays $2.50 vs. Mrs. Lee's .75 dollars!",
        "**So** he saves.",
        "**10. Find the sum.**",
        "Then:\n100 + 20 = 120",
        "3) Add them",
    ]


EXPLOSIVE = [
    "$",
    "\\[",
    "$x. ",
    "plug a a a ",
    "\\begin{a}",
    "[asy]",
    "as a ",
    "hmm",
    "re-",
    "!?.",
    "\n",
    "a",
    " ",
    "\\",
    "1.",
    "(",
    "\n 1",
    "wait ",
    "$$",
]


@pytest.mark.parametrize("unit", EXPLOSIVE)
def test_no_text_makes_the_searches_explode(unit):
    text = unit * (200_000 // len(unit))
    start = time.perf_counter()
    dissect_text([text[i : i + 4] for i in range(0, len(text), 4)])
    assert time.perf_counter() - start < 10  # an explosion would take hours


def test_real_solutions():
    file = DATA / "math500.jsonl"
    if not file.exists():
        pytest.skip(f"{file} is not there")
    solutions = [json.loads(line)["solution"] for line in file.open()]
    found = [dissect_text(WORDS.findall(text)) for text in solutions]

    count = {}
    for category in PIVOTAL:
        count[category] = sum(kinds.count(category) for kinds, _ in found)
    kinds_of_sentences = [span.kind for _, sentences in found for span in sentences]
    reflection = {
        kind: kinds_of_sentences.count(kind)
        for kind in ("verify", "correct", "start again", "other")
    }
    print(count, reflection)  # pytest -s
    assert min(count.values()) >= 50 and count[C] > 500
    assert reflection["verify"] >= 10 and reflection["other"] > 2000

    # An independent count of one word: between characters that are no letters.
    alone = 0
    for text in solutions:
        parts = text.lower().split("therefore")
        for before, after in zip(parts, parts[1:]):
            alone += not (before[-1:].isalpha() or after[:1].isalpha())
    assert alone > 100
    words = [word.group().lower() for text in solutions for word in pivotal_words(text)]
    assert words.count("therefore") == alone

    # Every word is in a sentence, but for lone signs.
    for text, (_, sentences) in zip(solutions, found):
        pieces = WORDS.findall(text)
        inside = "".join("".join(pieces[span.first : span.end]) for span in sentences)
        assert sorted(filter(str.isalnum, inside)) == sorted(filter(str.isalnum, text))


def test_countdown_is_taken_apart():
    words = "7 * 8 = 56 / 1 = 56 + 7 = 63 vs 23 wait 1 + 8 = 9 + x so".split()
    kinds, sentences = dissect_countdown(PROMPT, words)
    first_attempt = [
        *("operand", "operator", "operand", "=", "result"),
        *("operator", "operand", "=", "result"),
        *("operator", "last operand", "=", "result"),
    ]
    second_attempt = ["operand", "operator", "operand", "=", "result", "operator", "malformed"]
    assert kinds == [*first_attempt, "vs", "target", "wait", *second_attempt, "so"]
    assert kinds[18] == "operand"  # after 1: 7, 7 and 8 are left
    assert sentences == [
        (0, 13, "first attempt"),
        (13, 15, "check"),
        (15, 16, "wait"),
        (16, 23, "attempt after wait"),
        (23, 24, "so"),
    ]


def test_an_operand_among_equal_ones_is_no_choice():
    kinds, _ = dissect_countdown(PROMPT, "1 + 8 = 9 + 7 = 16 + 7 = 23".split())
    assert kinds[6] == kinds[10] == "last operand"  # two sevens are left


def test_nothing_is_taken_apart_into_nothing():
    assert dissect_countdown(PROMPT, []) == dissect_text([]) == ([], [])


@pytest.mark.parametrize(
    "response",
    [
        "vs so wait = ? -> x 007 + +",
        "so so 1 2 3",
        "= = =",
        "vs vs 1 + 2",
        "1 + 2 = 3 + 4 = 7 + 5 = 12 + 6 = 18 + 7",
    ],
)
def test_every_word_of_a_malformed_countdown_is_somewhere(response):
    words = response.split()
    kinds, sentences = dissect_countdown(PROMPT, words)
    assert len(kinds) == len(words) == sentences[-1].end
    for one, next_one in zip(sentences, sentences[1:]):
        assert one.end == next_one.first
