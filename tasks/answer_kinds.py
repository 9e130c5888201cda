r"""Answers that are no formulas, each with what a reader takes it for: a number with a unit, a
choice, a time, a ratio, a numeral with a base, words; and the names in `x = 7`. All texts here are
as normalise.py writes them.
"""

import re
from fractions import Fraction
from math import gcd
from typing import NamedTuple

# ------------------------------------------------------------------------------ numbers

NUMERAL = re.compile(r"([+-]?) ?(\d+ ?/ ?0*[1-9]\d*|\d+\.?\d*|\.\d+)", re.ASCII)
BASES = "two three four five six seven eight nine ten eleven twelve".split()
BASED = re.compile(
    r"([0-9A-Z]*[0-9][0-9A-Z]*|[A-Z]{2,})_\{?\s*(\d{1,2}|" + "|".join(BASES) + r")\s*\}?"
)


def number(text: str) -> Fraction | None:
    """The value of a plain numeral: 18, -3/4, 0.5, .5."""
    match = NUMERAL.fullmatch(text)
    if match is None:
        return None
    return Fraction(match[1] + match[2].replace(" ", ""))


def based_numeral(text: str) -> tuple[str, str]:
    r"""Digits and base: 1A_{16} -> ("1A", "16"). The base is empty where there is none."""
    match = BASED.fullmatch(text)
    if match is None:
        return text, ""
    digits, base = match.groups()
    if base in BASES:
        base = str(2 + BASES.index(base))
    return digits, base


# ------------------------------------------------------------------------------ words

VOWEL = re.compile("[aeiouy]")
RUN_OF_LETTERS = re.compile(r"\\(?:begin|end)\s*\{[a-z]+\}|\\[a-zA-Z]+|[a-zA-Z]+")
MONTHS = (
    "january february march april may june july august september october november december".split()
)
MONTH = re.compile(r"\b(?:" + "|".join(MONTHS) + r")\b")


def is_word(letters: str) -> bool:
    """Whether letters are compared as a word. math-verify would take east for a product of four
    variables, and find it equal to seat."""
    if len(letters) < 2 or letters.startswith("\\"):
        return False  # x, \frac
    if not letters.islower() or "o" in letters:
        return True  # Ann, AB, no
    if len(letters) == 2:
        return False  # xy
    is_sorted = list(letters) == sorted(set(letters))
    is_product = is_sorted or not VOWEL.search(letters)  # abc, xyz
    return len(letters) > 3 or not is_product


def has_words(text: str) -> bool:
    return any(is_word(run) for run in RUN_OF_LETTERS.findall(text))


def listed_words(text: str) -> list[str]:
    """What a text of words lists, in any order: II and III -> ["ii", "iii"]. So with a date."""
    text = text.casefold()
    if MONTH.search(text):
        text = re.sub(r"(?<=\d)(?:st|nd|rd|th)\b", "", text).replace(" ", ",")
    parts = re.split(r"[,;]|\band\b", text)
    return sorted(part.strip() for part in parts if part.strip())


# ------------------------------------------------------------------------------ choices

CHOICE = re.compile(
    r"(?i:(?:the )?(?:option|choice) )?(?P<mark>[(\[]?)(?P<letter>[a-zA-Z])"
    r"(?P<end>[)\]]?[.:]?)(?P<rest>.*)"
)
ANOTHER_CHOICE = re.compile(
    r"\b(?:[A-H]|or|and|not|nor|but|is|isn|wrong|incorrect|false)\b|^[(=+*/^_-]"
)


class Choice(NamedTuple):
    letter: str
    value: str  # what stands behind it
    is_sure: bool  # no variable


def choice(text: str) -> Choice | None:
    """The letter of a choice and what stands behind it, as in `(B) 12`. None for anything else."""
    match = CHOICE.fullmatch(text)
    if match is None or (match["mark"] and not match["end"]):
        return None
    letter = match["letter"]
    value = match["rest"].strip()
    if value and (letter not in "ABCDEFGHabcdefgh" or not match["end"]):
        return None
    if ANOTHER_CHOICE.search(value):
        return None
    return Choice(letter.casefold(), value, letter.isupper())


def same_choice(mine: Choice | None, known: Choice) -> bool:
    """Equal letters, and equal values where both have one."""
    if mine is None or mine.letter != known.letter:
        return False
    return mine.value == known.value or not (mine.value and known.value)


# ------------------------------------------------------------------------------ times and ratios

TIME = re.compile(r"(\d{1,2}):([0-5]\d)(?::([0-5]\d))? ?([ap]m)?|(\d{1,2}) ?([ap]m)")
RATIO = re.compile(r"\d+(?: ?: ?\d+)+")


class Time(NamedTuple):
    parts: list[int]  # hours, minutes, seconds
    half: str  # am, pm or nothing


def time_of_day(text: str) -> Time | None:
    """9:05 or 3 pm. None for 4:60 and 3:2."""
    match = TIME.fullmatch(re.sub(r"([ap])\. ?m\.?$", r"\1m", text.casefold()))
    if match is None:
        return None
    hours, minutes, seconds, half, hours_alone, half_alone = match.groups()
    parts = [hours or hours_alone, minutes or 0, seconds or 0]
    return Time([int(part) for part in parts], half or half_alone or "")


def same_time(mine: Time | None, known: Time | None) -> bool:
    if mine is None or known is None or mine.parts != known.parts:
        return False
    return mine.half == known.half or not (mine.half and known.half)


def ratio(text: str) -> list[int] | None:
    """The terms without their common divisor: 2:4 -> [1, 2]."""
    if not RATIO.fullmatch(text):
        return None
    terms = [int(term) for term in text.split(":")]
    divisor = gcd(*terms) or 1
    return [term // divisor for term in terms]


# ------------------------------------------------------------------------------ units

# Short units, and spellings of the others. Any longer word may be a unit too, but these have to agree
# where both answers have one.
SPELLINGS = {
    "millimeter": "mm millimetre",
    "centimeter": "cm centimetre",
    "meter": "m metre",
    "kilometer": "km kilometre",
    "inch": "in inche",
    "foot": "ft feet",
    "yard": "yd",
    "mile": "mi",
    "milligram": "mg",
    "gram": "g",
    "kilogram": "kg kilo",
    "pound": "lb",
    "ounce": "oz",
    "milliliter": "ml millilitre",
    "liter": "l litre",
    "gallon": "gal",
    "second": "s sec",
    "minute": "min",
    "hour": "h hr",
    "day": "",
    "week": "wk",
    "month": "",
    "year": "yr",
    "mile hour": "mph",
    "kilometer hour": "kmh kph",
    "dollar": "usd buck",
    "cent": "",
    "euro": "eur",
    "pound sterling": "gbp",
    "rupee": "rs",
    "square": "sq",
    "cubic": "cu",
    "degree": "deg",
    "radian": "rad",
    "cup": "",
}
UNITS = {
    spelling: name for name, others in SPELLINGS.items() for spelling in [name, *others.split()]
}

# Words that change the number beside them, or say that there is more than a number and a unit:
# numerals, multipliers, operators, comparisons. Units are without end, but these words are not.
NO_UNIT = set(
    """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
    sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety
    hundred thousand million billion trillion quadrillion dozen score gross lakh crore myriad
    mil mill mln bn mn grand googol tenth hundredth thousandth millionth billionth
    half halve third fourth fifth sixth seventh eighth ninth quarter double twice thrice triple
    quadruple fold times time squared cubed square-root root factorial power exponent inverse
    reciprocal recurring repeating repeated mod modulo modulus base remainder plus minus negative
    divided multiplied over by into
    and or nor not but if else then than to from between at least most less fewer under above below
    within without with except excluding including until up upto is are was equals equal
    unless though maybe perhaps possibly probably about around nearly almost roughly approximately
    either neither both all any none no non never unknown undefined infinity infinite
    nothing yes wrong incorrect false always whereas upwards onwards afterwards
    """.split()
    + MONTHS
)
MULTIPLIER = re.compile(
    r"hundred|thousand|[a-z]*illion|[a-z]+(?:fold|times)$|(?:[a-z]+ie|[a-z]+teen|eleven|twelf)ths?$"
)
# More than one of a thing is in the plural: 8 pencils, but not 8 doubled.
PLURAL = re.compile(
    r"[a-z]+(?<![isu])s|people|[a-z]*(?:children|men|feet|teeth|mice|geese|fish)|sheep|deer|dice|more"
)
UNIT_WORD = r"[a-zA-Z]+\.?(?:\^\{?-?[1-4]\}?)?"
WITH_UNIT = re.compile(
    r"(?P<value>.*(?:[\d)}\]|!]|\\pi))(?P<gap> ?)"
    rf"(?P<unit>{UNIT_WORD}(?:[ /-]{{1,3}}{UNIT_WORD}){{0,4}})"
)


def bare(word: str) -> str:
    """A word of a unit without its power and its period: cm^2 -> cm."""
    return re.sub(r"[.^{}\d-]", "", word)


def unit_name(word: str) -> str:
    """The name of a known unit: lbs and pounds -> pound. Empty for others, such as M, which is a
    million."""
    word = bare(word)
    is_spelled_so = word.islower() or word in ("L", "mL", "USD", "EUR", "GBP") or word.istitle()
    if not is_spelled_so or (len(word) == 1 and word not in "ghlmsL"):
        return ""
    word = word.casefold()
    return UNITS.get(word) or UNITS.get(word.removesuffix("s"), "")


def may_be_unit(word: str) -> bool:
    """Whether a word says what is counted, and nothing of how many there are."""
    word = bare(word).casefold()
    stems = {word, word.removesuffix("s"), word.removesuffix("es")}
    changes_the_number = stems & NO_UNIT or MULTIPLIER.match(word)
    return len(word) > 2 and is_word(word) and bool(VOWEL.search(word)) and not changes_the_number


def without_unit(text: str) -> tuple[str, str]:
    """5 square feet -> ("5", "foot"): the value, and what is known of its unit. A text that is more
    than one number and a unit stays as it is; so does 5 doubled, where nothing is counted."""
    match = WITH_UNIT.fullmatch(text)
    if match is None:
        return text, ""
    words = re.split("[ /]+|(?<=[a-zA-Z])-", match["unit"])
    names = [unit_name(word) for word in words]
    value = match["value"]
    is_glued = not match["gap"]
    for word, name in zip(words, names):
        is_short = len(word) == 1
        is_known = name or word in ("of", "per")
        if is_known and not (is_short and is_glued):
            continue
        if is_glued or not may_be_unit(word):
            return text, ""
    unit = " ".join(name for name in names if name not in ("", "square", "cubic"))
    has_plural = any(PLURAL.fullmatch(bare(word).casefold()) for word in words)
    is_at_most_one = abs(number(value) or 2) <= 1
    if not (unit or has_plural or is_at_most_one):
        return text, ""
    return value, unit


# ------------------------------------------------------------------------------ names

GREEK = "alpha|beta|gamma|delta|epsilon|theta|lambda|mu|phi|varphi|rho|sigma|tau|omega|ell"
NAME = re.compile(
    rf"(?:[a-zA-Z]|\\(?:{GREEK})|\|?[A-Z]{{2}}\|?|\\angle ?[A-Z]{{1,3}})(?:_\{{?\w+\}}?)?"  # x, AB
    r"|\\overline\s*\{[A-Z]{2}\}"
    r"|[fghpqACEFGHNPQSTV](?:_\{?\w+\}?|\^\{-1\}|'{1,2})?"
    r"\s?\([\w, =|+-]{1,20}\)"  # f(x), P(A)
    r"|\((?:[a-zA-Z](?:_\{?\w\}?)?, ?){1,3}[a-zA-Z](?:_\{?\w\}?)?\)"  # (x, y)
    r"|[a-zA-Z]{3,}(?: [a-zA-Z]+){0,4}"  # Area of the triangle
)
EQUALS = re.compile(r"(?<![<>!:=])=(?!=)|\\approx(?![a-zA-Z])")
MEMBER = re.compile(r"\\in(?![a-zA-Z])")
# In a name, these make something else of what they name: sec x, the square of x.
FUNCTION = re.compile(
    r"\b(?:square|cube|opposite|log|logarithm) of\b"
    r"|^(?:sec|csc|cot|arc\w+|sinh|cosh|tanh|abs|floor|ceil)\b"
)
SEPARATOR = re.compile(r"[,;]?\s*\b(?:and|or)\b|[,;]")


class Statement(NamedTuple):
    """A text, the name that it gives to something, and what it says that is: several values in a
    chain of equations."""

    text: str
    name: str
    values: list[str]
    has_equals: bool


def is_name(text: str) -> bool:
    """Whether a text names something, and says nothing about it."""
    if not NAME.fullmatch(text):
        return False
    if text.startswith("("):
        names = re.findall(r"\w+", text)
        return in_order(names) in (None, [*range(len(names))])  # not (y, x)
    words = text.split()
    is_phrase = words[0].isalpha() and len(words[0]) > 2
    if not is_phrase:
        return True
    changes_the_value = NO_UNIT & set(text.casefold().split()) or FUNCTION.search(text.casefold())
    return is_word(words[0]) and not changes_the_value


def in_order(names: list[str]) -> list[int] | None:
    """The order in which a reader puts the values of several names into a tuple: that of the
    alphabet. None for b = 2, a = 3, which may be either pair; but x, y and z have their places."""
    order = sorted(range(len(names)), key=lambda i: names[i].strip("\\"))
    has_order = order == sorted(order) or set(names) <= {"x", "y", "z"}
    return order if has_order else None


def split_outside(separator: re.Pattern, text: str) -> list[str]:
    """The parts between the separators that stand outside all brackets."""
    parts = []
    start = 0
    for match in separator.finditer(text):
        before = text[: match.start()]
        opened = sum(before.count(bracket) for bracket in "([{")
        closed = sum(before.count(bracket) for bracket in ")]}")
        if opened == closed:
            parts.append(text[start : match.start()].strip())
            start = match.end()
    return [*parts, text[start:].strip()]


def statement(text: str) -> Statement:
    """What a text says of a name. Of x = 3 or x = 5: that x is 3, 5. Of x = 1, y = 2: that (x, y) is
    (1, 2). Of S = 3 + 4 = 7: that S is 3 + 4, and that it is 7. The order of a tuple is that of the
    alphabet, so that y = 2, x = 1 says (1, 2)."""
    items = [item for item in split_outside(SEPARATOR, text) if item]
    if len(items) == 1 or not EQUALS.search(text):
        return one_statement(text)

    said = [one_statement(item) for item in items]
    names = [each.name for each in said if each.name]
    values = [each.values[-1] for each in said]
    has_chain = any(len(each.values) > 1 for each in said)
    if names and not has_chain and len(set(names)) == 1 and said[0].name:
        return Statement(text, names[0], [", ".join(values)], True)
    order = in_order(names)
    if not has_chain and len(set(names)) == len(said) and order:
        names = [names[i] for i in order]
        values = [values[i] for i in order]
        return Statement(text, f"({', '.join(names)})", [f"({', '.join(values)})"], True)
    return Statement(text, "", [text], True)


def one_statement(text: str) -> Statement:
    """Of a text that is no list."""
    parts = split_outside(EQUALS, text)
    if len(parts) == 1:
        member = split_outside(MEMBER, text)
        if len(member) == 2 and is_name(member[0]) and number(member[1]) is None:
            return Statement(text, member[0], member[1:], True)
        name, _, value = text.partition(" is ")
        if value and is_name(name):
            return Statement(text, name, [value], True)
        return Statement(text, "", [text], False)
    if is_name(parts[0]):
        return Statement(text, parts[0], parts[1:], True)
    if is_name(parts[-1]):
        return Statement(text, parts[-1], parts[:-1], True)
    return Statement(text, "", parts, True)
