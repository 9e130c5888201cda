r"""Whether an answer to a question of mathematics is right, in three steps: find the final answer
in the response, reduce it and the known answer to a number or a plain text, compare the two.

No text may hang the loop or stop it. One pass finds the answer; one of more than LONGEST characters
is wrong unread; numbers and words are compared here. The rest goes to math-verify, in a process of
its own: 9^{9^{9^9}} hangs in C code, which no exception ends, so the process sets itself an alarm
whose action is death. Then the answer is wrong, and `timeouts` counts it.

The paper does not say how it grades. Here units (in \text{} or known to math-verify), `%`, `x =`
and a numeral's base are ignored.

Run as a script, this file is that process; so it imports nothing of this repository.
"""

import functools
import json
import re
import signal
import sys
from fractions import Fraction
from subprocess import DEVNULL, PIPE, Popen

LONGEST = 300  # characters of an answer
SECONDS = 5.0  # of math-verify for an answer, without its start

# Each pattern takes time linear in the text, or meets no more than LONGEST characters.
# Where an answer may start or end.
PLACE = re.compile(
    r"\\boxed\s*\{"  # opens a box
    r"|\\(?!\\boxed)."  # an escaped character, because `\{` is no brace
    r"|[{}]"  # closes a box, or has to be told from what does
    r"|answer[ \t]*:",
    re.DOTALL | re.IGNORECASE,
)
# Math delimiters, thin spaces, currency.
NOISE = re.compile(r"(?<!\\)\\(?:!\s*|[,()\[\]$])|\$|\bdollars?\b")
# A text all of which is in \text{} or the like.
WRAPPED = re.compile(r"\A\\(?:text\w*|mathrm|mathbf|mbox)\s*\{([^{}]*)\}\Z")
# Words that change the number before them.
SCALE = re.compile(r"hundred|thousand|million|billion|trillion|dozen|feet")
NUMERAL = re.compile(
    r"[+-]?"
    r"(?:"
    r"\d+/0*[1-9]\d*"  # 3/4, with a denominator that is not zero
    r"|(?=\.?\d)"  # 18, 1,000, 0.5, .5: at least one digit
    r"(?:\d{1,3}(?:,\d{3})+|\d*)"
    r"(?:\.\d+)?"
    r")",
    re.ASCII,
)


def final_answer(response: str, template: str) -> str | None:
    r"""What follows the last `Answer:` in its line (dapo), what the last balanced \boxed{} holds
    (qwen-math, chat), or whichever of the two starts last (none). None without one."""
    reads_answer_lines = template in ("dapo", "none")
    reads_boxes = template != "dapo"
    start = -1  # of the last answer so far
    end = -1  # of a box; an answer line ends where its line does

    # One pass with a stack of open braces: linear in the text, however deep they are nested.
    open_braces: list[re.Match] = []
    for match in PLACE.finditer(response):
        token = match[0]
        if token == "{" or token.startswith("\\boxed"):
            open_braces.append(match)
        elif token == "}":
            if not open_braces:
                continue
            opened = open_braces.pop()
            is_box = opened[0] != "{"
            starts_later = opened.end() > start  # else a box around the last one
            if reads_boxes and is_box and starts_later:
                start = opened.end()
                end = match.start()
        elif token.startswith("\\"):
            continue  # an escaped character
        elif reads_answer_lines:
            start = match.end()
            end = -1

    if start < 0:
        return None
    if end < 0:
        answer = response[start:].partition("\n")[0]
    else:
        answer = response[start:end]
    return answer.strip() or None


def plain(text: str) -> Fraction | str:
    """A number, or the text without what does not change an answer, down to the last period and
    percent sign."""
    text = final_answer(text, "chat") or text
    text = " ".join(text.split())
    text = text.replace("{,}", ",").replace("−", "-")
    text = NOISE.sub("", text)
    for _ in range(4):  # layers, as in **\text{(C)}.**
        text = text.strip(" *").removesuffix(".").removesuffix("%").removesuffix("\\")
        text = WRAPPED.sub(r"\1", text)

    if NUMERAL.fullmatch(text):
        return Fraction(text.replace(",", ""))
    return text


def is_word(text: str) -> bool:
    """Whether a text is compared letter by letter, like a name. math-verify would take it for a
    product, and find east = seat."""
    has_letters_only = text.replace(" ", "").isalpha()
    shortest = 2 if text.isupper() else 4  # AB is a word; x and xyz are products
    return has_letters_only and len(text) >= shortest


def math_equal(predicted: str, gold: str) -> bool:
    """Whether an answer is the known one. Never hangs and never raises, whatever `predicted` is."""
    if not 0 < len(predicted) <= LONGEST:
        return False
    # 5 million is not 5.
    if set(SCALE.findall(predicted)) - set(SCALE.findall(gold)):
        return False

    a = plain(predicted)
    b = plain(gold)
    are_numbers = isinstance(a, Fraction) and isinstance(b, Fraction)
    is_about_words = isinstance(b, str) and is_word(b)
    # Two equal texts, two numbers, or a word need no math-verify.
    if a == b or are_numbers or is_about_words:
        return str(a).casefold() == str(b).casefold() != ""
    return verified(str(a), str(b))


class Grader:
    """A process that asks math-verify. It is started when there is none, also after a death."""

    def __init__(self) -> None:
        self.process: Popen | None = None
        self.timeouts = 0  # answers over which a process died

    def start(self) -> None:
        """Starts a process, unless one runs."""
        if self.process is not None and self.process.poll() is None:
            return
        self.process = Popen(
            [sys.executable, __file__],
            stdin=PIPE,
            stdout=PIPE,
            stderr=DEVNULL,
            text=True,
            start_new_session=True,  # where Ctrl-C does not reach it
        )

    def ask(self, predicted: str, gold: str) -> bool:
        """The process's verdict: a line of JSON there, a line with 1 or 0 back. An answer over
        which it dies is wrong."""
        self.start()
        reply = ""
        try:
            print(json.dumps([SECONDS, gold, predicted]), file=self.process.stdin, flush=True)
            reply = self.process.stdout.readline()
        except OSError:  # it died between two answers
            pass
        finally:  # also on Ctrl-C: the next answer must not get the reply to this one
            if not reply:
                self.timeouts += 1
                self.kill()
        return reply == "1\n"

    def kill(self) -> None:
        """Ends the process and its pipes."""
        self.process.kill()
        self.process.communicate()


grader = Grader()


@functools.lru_cache(maxsize=2**16)
def verified(predicted: str, gold: str) -> bool:
    """The word of math-verify. Remembered, so that no answer can hang a process twice."""
    return grader.ask(predicted, gold)


def verdict_of_math_verify(gold: str, predicted: str, seconds: float) -> bool:
    """Runs in the process. An error is a wrong answer; more than `seconds` is death."""
    try:
        from math_verify import parse, verify  # here, off the clock; without it everything is wrong

        signal.setitimer(signal.ITIMER_REAL, seconds)
        # Limits of its own are off, because they use the same alarm.
        parsed_gold = parse(f"${gold}$", parsing_timeout=None)
        parsed_prediction = parse(f"${predicted}$", parsing_timeout=None)
        return verify(
            parsed_gold,
            parsed_prediction,
            allow_set_relation_comp=True,
            timeout_seconds=None,
        )
    except Exception:
        return False
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    # Grades line after line, until its parent ends.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for line in sys.stdin:
        seconds, gold, predicted = json.loads(line)
        right = verdict_of_math_verify(gold, predicted, seconds)
        print(int(right), flush=True)
