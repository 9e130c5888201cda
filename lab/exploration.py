"""What counts as exploratory, and how a response is taken apart into tokens and sentences.

The paper's Section 2 names pivotal tokens and reflective actions, and a few words of each. Most of
the words below are ours, and so is the splitter; both err: "since 2019" counts as causal, "wrong
answers" as reflection. (Its rare behaviours need a model: see lab/comparison.py.)

On countdown the pivotal tokens are the operators, and the operands there is a choice of. The others
are `=`, results, and an operand when only one is left, whose entropy is near 0 by construction.
Checks (`vs 23`, taught by lab/pretrain.py) and attempts after `wait` are reflective, first attempts
are not. `wait` and `so`, two outcomes of one decision, are on neither side.
"""

import itertools
import re
from typing import Iterator, NamedTuple, Sequence

import numpy as np

from tasks.countdown import NUMBER, OPERATORS, numbers_of


class Span(NamedTuple):
    """A stretch of a response, in tokens."""

    first: int
    end: int  # the token after the last
    kind: str


class Kinds(NamedTuple):
    """Kinds of tokens and of sentences: exploratory (True), or compared with those (False). A kind
    that is not in here is on neither side."""

    tokens: dict[str, bool]
    sentences: dict[str, bool]


PIVOTAL = {
    "causal": (
        "because, therefore, thus, hence, since, so, consequently, accordingly, as a result, due to"
    ),
    "contrastive": (
        "however, although, though, but, yet, instead, whereas, nevertheless, nonetheless, "
        "otherwise, unless, despite, conversely, on the other hand, in contrast"
    ),
    "sequential": (
        "first, firstly, second, secondly, third, thirdly, then, next, finally, lastly, "
        "afterwards, subsequently"
    ),
    "reasoning verbs": (
        "suggest, suggests, demonstrate, demonstrates, recall, assume, assuming, suppose, "
        "consider, imply, implies, conclude, deduce, infer, observe, notice, note, show, shows, "
        "prove, proves"
    ),
}

# Some of these are none where they count or name a thing: "the first day", "one third", "a note";
# nor is "so" in "so many", or "yet" in "not yet".
ALSO_NOUNS = ("first", "second", "third", "next", "note", "notice", "show", "shows")
BEFORE_NOUN = re.compile(
    r"(?:\b(?:the|an?|th(?:is|at|[eo]se)|its|his|her|their|our|my|your|each|every|any|per|very"
    r"|one|two|three|four|five|six|seven|eight|nine|ten)|\d|['’]s)[^\S\n]$",
    re.IGNORECASE,
)
SO_MUCH = re.compile(r"\s(?:far|many|much|long|few|little)\b", re.IGNORECASE)
NOT_YET = re.compile(r"\bnot\s$", re.IGNORECASE)
NEARBY = 12  # characters that these look at

# In the order in which they are looked for: a sentence is of the first kind that it has a word of.
REFLECTIVE_WORDS = {
    "verify": (
        r"(?:re-?|double[- ])?verif(?:y|ies|ied|ying|ication)"
        # Not those of hotels and of banks.
        r"|(?:re-?|double[- ])?check(?:s|ed|ing)?"
        r"(?!\s(?:in|into|out|each|per|from|for\s\$|to\s(?!see|make|be|ensure|confirm|verify)))"
        r"|(?:re-?)?confirm(?:s|ing)?"
        r"|make\ssure"
        r"|(?:plug|substitut)(?:e|ed|ged|ging|ing)?(?:\s\S{1,20}){0,3}\sback"
    ),
    "correct": (
        r"mistakes?|mistaken|incorrect(?:ly)?|wrong|an\serror"
        r"|correct(?:ed|ing|ion)|(?:me|to)\scorrect"
        r"|(?:(?:but|oh|no)\s|(?<![a-z]\s))wait(?=\s?(?:[,.!:…—]|--))|hold\son|hmm+|actually(?=,)"
    ),
    "start again": (
        r"(?:try|start|begin)\s(?:again|over)"
        r"|re-?(?:consider|examine|evaluate|think|do)|backtrack|go\sback"
        r"|alternatively|(?:another|different)\s(?:approach|way|method)"
    ),
}


def pivotal_pattern() -> re.Pattern:
    r"""Finds pivotal words, with a group per category. Not within a longer or a hyphenated word
    ("so-called"), nor in a LaTeX command (\implies)."""
    categories = []
    for words in PIVOTAL.values():
        alternatives = words.replace(", ", "|").replace(" ", r"\s")
        categories.append(f"({alternatives})")
    any_category = "|".join(categories)
    return re.compile(rf"(?<![\w\\])(?<!\w-)(?:{any_category})(?!-?\w)", re.IGNORECASE)


def whole_words(words: str) -> re.Pattern:
    return re.compile(rf"(?<![\w\\])(?:{words})(?!\w)", re.IGNORECASE)


WORD = pivotal_pattern()
REFLECTIVE = {kind: whole_words(words) for kind, words in REFLECTIVE_WORDS.items()}

# Where a sentence ends. All repetitions are bounded, so that no text makes a search explode.
BREAK = re.compile(
    # A stop, though not that of an abbreviation or a numbered line (see ends_sentence) ...
    r"[.!?]"
    # ... with what closes behind it, before a capital, a number or a formula.
    r"(?:\$\$?|\\[)\]]|[\"')\]”*]){0,3}(?=\s{1,9}(?:[\"“(*]{0,3}[A-Z0-9$\\(]|\[asy))"
    # The end of a line, unless the next goes on in small letters or is a formula.
    r"|\n(?=\s{0,9}(?:[A-Z#*]|\[asy|-\s|\d{1,3}[.)]\s))"
)

ABBREVIATION = re.compile(r"\b(?:e\.g|i\.e|cf|vs|Mrs?|Ms|Dr|St|Fig|Eq|approx)$")
# "1" of "1." or "**10" of "**10." at the start of a line.
LINE_NUMBER = re.compile(r"[ \t>#*-]{0,8}\d{1,3}")

TEXT = Kinds(
    tokens={**dict.fromkeys(PIVOTAL, True), "other": False, "within a word": False},
    sentences={**dict.fromkeys(REFLECTIVE, True), "other": False},
)
COUNTDOWN = Kinds(
    tokens={
        "operand": True,
        "operator": True,
        "last operand": False,
        "=": False,
        "result": False,
    },
    sentences={"check": True, "attempt after wait": True, "first attempt": False},
)

CHAIN = ("operand", "operator", "operand", "=", "result")  # an attempt: n, then (op n = r) again
AFTER_RESULT = 1  # the place in CHAIN that follows the last


def dissect_text(pieces: Sequence[str]) -> tuple[list[str], list[Span]]:
    """English mathematics, given the text of each token -> the tokens' kinds, and the sentences."""
    text = "".join(pieces)
    sentences = []
    for first, end in sentence_bounds(text, pieces):
        sentence = "".join(pieces[first:end])
        has_words = any(character.isalnum() for character in sentence)  # a blank line has none
        if has_words:
            sentences.append(Span(first, end, reflection_of(sentence)))
    return token_kinds(text, pieces), sentences


def token_kinds(text: str, pieces: Sequence[str]) -> list[str]:
    """A pivotal word counts as its first token."""
    kinds = []
    for before, piece in zip(["", *pieces], pieces):
        within_word = before[-1:].isalnum() and piece[:1].isalnum()
        kinds.append("within a word" if within_word else "other")

    categories = list(PIVOTAL)
    ends = np.cumsum([len(piece) for piece in pieces], dtype=int)
    for word in pivotal_words(text):
        token = int(np.searchsorted(ends, word.start(), side="right"))
        kinds[token] = categories[word.lastindex - 1]
    return kinds


def pivotal_words(text: str) -> Iterator[re.Match]:
    """Those of WORD that mean what their category says."""
    for found in WORD.finditer(text):
        word = found.group().lower()
        before = text[max(0, found.start() - NEARBY) : found.start()]
        after = text[found.end() : found.end() + NEARBY]
        is_noun = word in ALSO_NOUNS and BEFORE_NOUN.search(before)
        is_degree = word == "so" and SO_MUCH.match(after)
        is_time = word == "yet" and NOT_YET.search(before)
        if not (is_noun or is_degree or is_time):
            yield found


def sentence_bounds(text: str, pieces: Sequence[str]) -> list[tuple[int, int]]:
    """First token, and the one after the last, of everything between two breaks."""
    breaks = sentence_ends(text)

    # A token belongs to the sentence of its first character that is no space: " Then" opens one.
    begins = []
    end = 0
    for piece in pieces:
        end += len(piece)
        begins.append(end - len(piece.lstrip() or piece))
    number = np.searchsorted(breaks, begins, side="right").tolist()  # of its sentence, per token
    return stretches(number)


def sentence_ends(text: str) -> list[int]:
    """The place behind each sentence but the last."""
    return [found.end() for found in BREAK.finditer(text) if ends_sentence(text, found)]


def ends_sentence(text: str, found: re.Match) -> bool:
    if not found.group().startswith("."):
        return True
    before = text[max(0, found.start() - NEARBY) : found.start()]
    line_so_far = before.rpartition("\n")[2]
    return not (ABBREVIATION.search(before) or LINE_NUMBER.fullmatch(line_so_far))


def reflection_of(sentence: str) -> str:
    for kind, words in REFLECTIVE.items():
        if words.search(sentence):
            return kind
    return "other"


def stretches(labels: Sequence) -> list[tuple[int, int]]:
    """First index, and the one after the last, of each stretch of equal labels."""
    bounds = []
    first = 0
    for _, members in itertools.groupby(labels):
        end = first + len(list(members))
        bounds.append((first, end))
        first = end
    return bounds


def dissect_countdown(prompt: str, words: Sequence[str]) -> tuple[list[str], list[Span]]:
    """The same for countdown, where every word is a token. Never raises on a malformed response."""
    kinds = []
    parts = []  # the kind of sentence that a word is in
    attempt = "first attempt"
    place = 0  # in CHAIN
    checking = False
    left = numbers_of(prompt)  # numbers that the attempt has not used

    for word in words:
        if word in ("wait", "so"):
            kinds.append(word)
            parts.append(word)
            # An attempt of its own begins, with all numbers.
            attempt = f"attempt after {word}"
            place = 0
            checking = False
            left = numbers_of(prompt)
        elif word == "vs" or checking:
            kinds.append("vs" if word == "vs" else "target")
            parts.append("check")
            checking = True
        else:
            kinds.append(kind_in_chain(CHAIN[place], word, left))
            parts.append(attempt)
            if CHAIN[place] == "operand" and NUMBER.get(word) in left:
                left.remove(NUMBER[word])
            place = place + 1 if place + 1 < len(CHAIN) else AFTER_RESULT

    sentences = [Span(first, end, parts[first]) for first, end in stretches(parts)]
    return kinds, sentences


def kind_in_chain(expected: str, word: str, left: Sequence[int]) -> str:
    if expected == "operator":
        fits = word in OPERATORS
    elif expected == "=":
        fits = word == "="
    else:
        fits = word in NUMBER
    if not fits:
        return "malformed"

    no_choice = len(set(left)) <= 1  # one is left, or equal ones
    if expected == "operand" and no_choice:
        return "last operand"
    return expected
