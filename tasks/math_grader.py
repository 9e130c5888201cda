r"""Whether an answer to a question of mathematics is right: find the final answer in the response,
write it in one way (normalise.py), and compare it with the known one.

The rule: an answer is wrong unless the whole of it was understood. A reward for a wrong answer is
worse than a missed right one, because a policy learns to write what is rewarded. docs/grading.md
lists what is understood, and what is refused on purpose.

Choices, times, words and plain numbers are compared here. The rest goes to math-verify, in
processes of its own (grader_process.py). No text may hang the loop or stop it: one pass finds the
answer, one of more than LONGEST characters is wrong unread, and nothing is calculated here beyond
the value of a numeral.

The paper does not say how it grades. Here a unit, `%` and the name in `x = 7` are ignored where only
one side has them; and the base of a numeral where only the known answer has it.
"""

import re

from tasks.answer_kinds import (
    Statement,
    based_numeral,
    choice,
    has_words,
    listed_words,
    number,
    ratio,
    same_choice,
    same_time,
    statement,
    time_of_day,
    without_unit,
)
from tasks.formula import formula
from tasks.grader_process import Question, graders
from tasks.normalise import normalise

LONGEST = 300  # characters of an answer

# ------------------------------------------------------------------------------ the final answer

# Where an answer may start or end. Each alternative takes time linear in the text.
PLACE = re.compile(
    r"\\(?:boxed|fbox)\s*\{"  # opens a box
    r"|\\boxed(?![a-zA-Z])\s*(?=[^\s{])"  # a box without braces: \boxed 5
    r"|\\(?!\\(?:boxed|fbox))."  # an escaped character, because `\{` is no brace
    r"|[{}]"  # closes a box, or has to be told from what does
    r"|(?<![a-zA-Z])(?i:answer)[ \t*}]*[:：](?:[ \t]*\})?",  # also \textbf{Answer:}
    re.DOTALL,
)

WORD_END = re.compile(r"[\s$]|\Z")


def final_answer(response: str, template: str) -> str | None:
    r"""What follows the last `Answer:` in its line or else the next (dapo), what the last balanced
    \boxed{} holds (qwen-math, chat), or whichever of the two starts last (none). None without
    one."""
    reads_answer_lines = template in ("dapo", "none")
    reads_boxes = template != "dapo"
    start = -1  # of the last answer so far
    end = -1  # of a box; an answer line ends where its line does
    is_bare = False  # \boxed without braces; its word is looked for once, because it may be long
    place = (-1, -1)  # of its box, or of the word `Answer:`

    # One pass with a stack of open braces: linear in the text, however deep they are nested.
    open_braces: list[re.Match] = []
    for match in PLACE.finditer(response):
        token = match[0]
        if token.endswith("{") and token != r"\{":
            open_braces.append(match)
        elif token == "}":
            if not open_braces:
                continue
            opened = open_braces.pop()
            is_box = opened[0] != "{"
            if not (reads_boxes and is_box):
                continue
            # A box around a box is the same answer if it holds nothing else.
            around = response[opened.end() : place[0]] + response[place[1] : match.start()]
            is_around_last = opened.end() <= start and not around.strip()
            if not is_around_last:
                start = opened.end()
                end = match.start()
                is_bare = False
            place = (opened.start(), match.end())
        elif token.startswith(r"\boxed"):
            if reads_boxes:
                start = match.end()
                is_bare = True
                place = match.span()
        elif token.startswith("\\"):
            continue  # an escaped character
        else:
            if "}" in token and open_braces:
                open_braces.pop()
            if reads_answer_lines:
                start = match.end()
                end = -1
                is_bare = False
                place = match.span()

    if start < 0:
        return None
    if is_bare:
        end = WORD_END.search(response, start).start()
    answer = response[start:end] if end >= 0 else first_line(response[start:])
    return answer.strip() or None


def first_line(text: str) -> str:
    """The first line with more in it than spaces and marks of formulas, code or bold type."""
    for line in text.split("\n"):
        if line.strip(" \t\r*$`\\[]()-"):
            return line
    return ""


# ------------------------------------------------------------------------------ comparing

NO_TIME = re.compile(r": ?\d(?!\d)")  # minutes have two digits
NEEDLESS_SPACE = re.compile(r"\s(?!\w)|(?<!\w)\s")  # one that parts nothing


def math_equal(predicted: str, gold: str) -> bool:
    """Whether an answer is the known one. Never hangs and never raises, whatever `predicted` is."""
    questions = open_questions(predicted, gold)
    if questions is None:
        return False
    return all(graders.equal(*question) for question in questions)


def open_questions(predicted: str, gold: str) -> list[Question] | None:
    """What math-verify has to confirm for the answer to be right; nothing, if it is right without.
    None if it is wrong."""
    if not 0 < len(predicted) <= LONGEST:
        return None
    a = normalise(predicted)
    b = normalise(gold)
    if a and same_text(a, b):
        return []

    # A choice or a time is compared with its like only.
    known_choice = choice(b)
    if known_choice and (choice(a) or known_choice.is_sure):
        return [] if same_choice(choice(a), known_choice) else None
    are_ratios = ratio(a) and ratio(b) and NO_TIME.search(b)  # 4:10 for 2:5
    if not are_ratios and (time_of_day(a) or time_of_day(b)):
        return [] if same_time(time_of_day(a), time_of_day(b)) else None

    questions: list[Question] = []
    for value, known_value in values_to_compare(statement(a), statement(b)):
        question = compare_values(value, known_value)
        if question is False:
            return None
        if question is not True:
            questions.append(question)
    return questions


def is_number(text: str) -> bool:
    """Whether an answer is a plain number, which is compared without math-verify."""
    return number(normalise(text)) is not None


def same_text(a: str, b: str) -> bool:
    """Equal but for spaces that part nothing; of words, also but for capital letters."""
    if has_words(b):
        a = a.casefold()
        b = b.casefold()
    return NEEDLESS_SPACE.sub("", a) == NEEDLESS_SPACE.sub("", b)


def values_to_compare(mine: Statement, known: Statement) -> list[tuple[str, str]]:
    """The pairs of values that all have to be equal. A name counts only where both sides have one:
    y = 5 is not x = 5, but 5 is. Of a chain, S = 3 + 4 = 7, every part has to be right."""
    same_name = mine.name == known.name != ""
    both_are_equations = mine.has_equals and known.has_equals
    if both_are_equations and not same_name:
        return [(mine.text, known.text)]
    values = list(mine.values)
    if not known.name:
        values += known.values[:-1]  # x^2 = 9 is not 9, but 4 + 5 = 9 is
    return [(value, known.values[-1]) for value in values]


def compare_values(a: str, b: str) -> bool | Question:
    """Whether two values are the same, or what to ask math-verify."""
    a, unit = without_unit(a)
    b, known_unit = without_unit(b)
    if unit and known_unit and unit != known_unit:
        return False

    digits, base = based_numeral(a)
    known_digits, known_base = based_numeral(b)
    if base or known_base:
        return digits == known_digits and (base or known_base) == (known_base or "10")
    if number(a) is not None and number(b) is not None:
        return number(a) == number(b)
    if ratio(a) and ratio(b):
        return ratio(a) == ratio(b)

    mine = formula(a)
    known = formula(b)
    if mine is not None and known is not None:
        return mine, known
    return has_words(b) and listed_words(a) == listed_words(b)
