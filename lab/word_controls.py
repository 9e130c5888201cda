"""Are exploratory words uncertain, or only rare, or only the first of their sentence?

A reader's first objections to the paper's Section 2: rare words are uncertain, whatever they mean,
and so is every word that opens a sentence or a clause. So a pivotal token, the first token of a
pivotal word, is compared with ever more similar ones:

    other tokens      all that are not pivotal; many are digits, signs and ends of words
    other words       first tokens of words
    as frequent       of words about as frequent in these answers: bins of 1, 2 to 3, 4 to 7 ...
                      occurrences; upper and lower case count as one
    at the same place opening a sentence; after a comma, semicolon, colon or dash; elsewhere
    as frequent, at the same place
    at the same place, in the same answer      because in some answers everything is uncertain
    openers           words that open a sentence, the pivotal ones and the others

Reflective sentences, by the mean over their tokens, are compared with

    other sentences
    as long           in such bins of the length in tokens
    as long, as far into the answer            and of the place of the first token
    opening words     only by the first token of the word that opens the sentence
    after the opening word                     by all but that token

In a match, the difference is taken within each bin and weighted by the number of exploratory ones
in it. Those in a bin without others are left out. Which words are pivotal is fixed, and there are
few, so the intervals, a bootstrap over problems, say what other problems would give with these
words, not what other words would.
"""

import re
from typing import Sequence

import numpy as np

from lab.comparison import Rows, measure, select
from lab.exploration import Kinds, sentence_bounds
from lab.reading import Reading
from lab.resampling import bootstrap_problems

MOST = 12  # single words that are reported
FEWEST = 10  # of both sides; an interval of fewer means nothing
COLUMNS = ("mean", "others", "difference")
ALL = "all"  # the row of all exploratory kinds together

# Not within a longer word, and no LaTeX command.
ANY_WORD = re.compile(r"(?<![\w\\])[^\W\d_]+(?:['’-][^\W\d_]+)*")
# What may stand before the word that opens a sentence: "1. ", "**", a quotation mark.
BEFORE_OPENER = re.compile(r"\W{0,9}(?:\d{1,3}[.)]\W{0,9})?")
AFTER_A_BREAK = re.compile(r"(?:[,;:—–]|--)[\s\"'“(*$]*$")
NEARBY = 12  # characters that it looks at
NO_WORD = 0
OPENER = 1
AFTER_COMMA = 2
ELSEWHERE = 3
PLACES = 4
BITS = 64  # more than there are bins of powers of two

Controls = dict[str, dict[str, dict | None]]  # control -> kind -> comparison, None if too few


def pivotal_controls(readings: Sequence[Reading], kinds: Kinds) -> Controls:
    """Pivotal tokens of English responses beside the others, by control and category."""
    categories = exploratory(kinds.tokens)
    tokens = token_rows(readings)
    words = select(tokens, tokens["place"] != NO_WORD)
    openers = select(words, words["place"] == OPENER)

    place = words["place"]
    frequency = powers_of_two(words["frequency"])
    both = frequency * PLACES + place
    in_answer = words["response"] * PLACES + place
    return {
        "other tokens": by_kind(tokens, categories),
        "other words": by_kind(words, categories),
        "as frequent": by_kind(words, categories, frequency),
        "at the same place": by_kind(words, categories, place),
        "as frequent, at the same place": by_kind(words, categories, both),
        "at the same place, in the same answer": by_kind(words, categories, in_answer),
        "openers": by_kind(openers, categories),
    }


def single_words(readings: Sequence[Reading], kinds: Kinds) -> dict[str, dict | None]:
    """The pivotal words there are most of, each beside the words that are as frequent and at the
    same place; the most frequent first. A phrase goes by its first word."""
    tokens = token_rows(readings)
    words = select(tokens, tokens["place"] != NO_WORD)
    pivotal = np.isin(words["kind"], exploratory(kinds.tokens))
    found, counts = np.unique(words["word"][pivotal], return_counts=True)
    most = [str(found[i]) for i in np.argsort(-counts, kind="stable")[:MOST]]

    # Each of them is a kind of its own; the other pivotal words are on neither side.
    name = np.where(pivotal, words["word"], "")
    compared = ~pivotal | np.isin(name, most)
    rows = select(words | {"kind": name}, compared)
    bins = powers_of_two(rows["frequency"]) * PLACES + rows["place"]
    comparisons = by_kind(rows, most, bins)
    return {word: comparisons[word] for word in most}


def reflective_controls(readings: Sequence[Reading], kinds: Kinds) -> Controls:
    """Reflective sentences of English responses beside the others, by control and kind."""
    reflections = exploratory(kinds.sentences)
    sentences = measure(readings, Reading.sentence_spans)
    if sentences is None:
        return {}

    opening, rest = opening_entropy(readings)
    openers = select(sentences | {"entropy": opening}, np.isfinite(opening))
    rests = select(sentences | {"entropy": rest}, np.isfinite(rest))
    length = powers_of_two(sentences["length in tokens"])
    place = powers_of_two(sentences["position"] + 1)
    both = length * BITS + place
    return {
        "other sentences": by_kind(sentences, reflections),
        "as long": by_kind(sentences, reflections, length),
        "as long, as far into the answer": by_kind(sentences, reflections, both),
        "opening words": by_kind(openers, reflections),
        "after the opening word": by_kind(rests, reflections),
    }


def exploratory(sides: dict[str, bool]) -> list[str]:
    return [kind for kind, is_exploratory in sides.items() if is_exploratory]


def kind_counts(readings: Sequence[Reading], kinds: Kinds) -> dict[str, dict[str, int]]:
    """How many tokens and sentences there are of each kind that is compared, none included."""
    tokens = dict.fromkeys(kinds.tokens, 0)
    sentences = dict.fromkeys(kinds.sentences, 0)
    for reading in readings:
        for kind in tokens:
            tokens[kind] += reading.kinds.count(kind)
        for span in reading.sentences:
            if span.kind in sentences:
                sentences[span.kind] += 1
    return {"tokens": tokens, "sentences": sentences}


def powers_of_two(values: np.ndarray) -> np.ndarray:
    """The bin of each whole number: 1 -> 0, 2 and 3 -> 1, 4 to 7 -> 2 ..."""
    return np.frexp(values)[1] - 1


def token_rows(readings: Sequence[Reading]) -> Rows:
    """`measure` of all tokens, and of the first token of a word the word, how frequent it is in all
    responses (else 0) and where it stands."""
    rows = measure(readings, Reading.token_spans)
    if rows is None:
        raise ValueError("all responses are empty")
    words: list[str] = []
    places: list[int] = []
    for reading in readings:
        found = words_of(reading.pieces)
        for i in range(len(reading.pieces)):
            word, place = found.get(i, ("", NO_WORD))
            words.append(word)
            places.append(place)

    _, which, count = np.unique(words, return_inverse=True, return_counts=True)
    place = np.array(places)
    frequency = np.where(place == NO_WORD, 0, count[which])
    return rows | {"word": np.array(words), "frequency": frequency, "place": place}


def words_of(pieces: Sequence[str]) -> dict[int, tuple[str, int]]:
    """The first token of each word -> the word in small letters, and its place."""
    text = "".join(pieces)
    ends = np.cumsum([len(piece) for piece in pieces], dtype=int)
    begins = [0]  # of each sentence, in characters
    for _, end in sentence_bounds(text, pieces)[:-1]:
        begins.append(int(ends[end - 1]))

    found = {}
    for word in ANY_WORD.finditer(text):
        token = int(np.searchsorted(ends, word.start(), side="right"))
        sentence = int(np.searchsorted(begins, word.start(), side="right")) - 1
        if BEFORE_OPENER.fullmatch(text, begins[sentence], word.start()):
            place = OPENER
        elif AFTER_A_BREAK.search(text[max(0, word.start() - NEARBY) : word.start()]):
            place = AFTER_COMMA
        else:
            place = ELSEWHERE
        found.setdefault(token, (word.group().lower(), place))
    return found


def opening_entropy(readings: Sequence[Reading]) -> tuple[np.ndarray, np.ndarray]:
    """Of each sentence: the entropy of its opening word's first token, and the mean over its other
    tokens. Both are nan if no word opens it, the mean also if there is no other token."""
    openings = []
    rests = []
    for reading in readings:
        words = words_of(reading.pieces)
        openers = {i for i, (_, place) in words.items() if place == OPENER}
        for span in reading.sentences:
            opening = np.nan
            rest = np.nan
            tokens = list(range(span.first, span.end))
            opener = next((i for i in tokens if i in openers), None)
            if opener is not None:
                opening = reading.entropy[opener]
                tokens.remove(opener)
                if tokens:
                    rest = reading.entropy[tokens].mean()
            openings.append(opening)
            rests.append(rest)
    return np.array(openings), np.array(rests)


def by_kind(
    rows: Rows, kinds: Sequence[str], bins: np.ndarray | None = None
) -> dict[str, dict | None]:
    """`compare_within` for all of `kinds` together, then for each, always with what is of none of
    them. Without bins, all is in one."""
    if bins is None:
        bins = np.zeros(len(rows["kind"]), dtype=int)
    others = ~np.isin(rows["kind"], kinds)
    comparisons = {ALL: compare_within(rows, ~others, bins)}
    for kind in kinds:
        of_kind = rows["kind"] == kind
        either = of_kind | others
        comparisons[kind] = compare_within(
            select(rows, either),
            label=of_kind[either],
            bins=bins[either],
        )
    return comparisons


def compare_within(rows: Rows, label: np.ndarray, bins: np.ndarray) -> dict | None:
    """Mean entropy of the labelled rows and of the others, within bins: COLUMNS with intervals, the
    counts, and how many labelled rows are in no bin with others. None if there are too FEW(EST)."""
    shared = np.intersect1d(bins[label], bins[~label])
    matched = np.isin(bins, shared)
    count = int((label & matched).sum())
    others = int((~label & matched).sum())
    if min(count, others) < FEWEST:
        return None

    # Count and sum of both sides in each bin, for each problem: all figures follow from these.
    entropy = rows["entropy"][matched]
    sides = label[matched]
    problem = np.unique(rows["problem"][matched], return_inverse=True)[1]
    place = np.searchsorted(shared, bins[matched])
    cell = problem * len(shared) + place
    shape = (problem.max() + 1, len(shared))
    sums = []
    for side in (sides, ~sides):
        for power in (0, 1):
            flat = np.bincount(cell, side * entropy**power, minlength=shape[0] * shape[1])
            sums.append(flat.reshape(shape))
    totals = np.concatenate(sums, axis=1)  # [problems, 4 * bins]

    figures = bootstrap_problems(matched_means, totals)
    counts = {"n": count, "n others": others, "left out": int(label.sum()) - count}
    return dict(zip(COLUMNS, figures)) | counts


def matched_means(totals: np.ndarray) -> np.ndarray:
    """Counts and sums of both sides in B bins, [4 * B] or [4 * B, N] -> COLUMNS, [3] or [3, N]."""
    n, total, n_other, total_other = totals.reshape(4, -1, *totals.shape[1:])
    # A resample may lack the others of a bin: it does without that bin.
    weight = np.where(n_other > 0, n, 0)
    weights = weight.sum(0)
    mean = np.where(n_other > 0, total, 0).sum(0) / weights
    mean_other = (weight * np.where(n_other > 0, total_other / n_other, 0)).sum(0) / weights
    return np.array([mean, mean_other, mean - mean_other])
