"""Whether two formulas are equal, by math-verify. Run as a script, this file is a process that
grader_process.py asks such questions; so it imports nothing of this repository.

Only what the library's parser accepts to the last character counts. None of its searches for a
number in a text is used, and none of its normalisations, which drop words.
"""

import json
import os
import signal
import sys

PRECISION = 400  # digits, for what no rule decides
WARM_UP = r"\frac{x+1}{\sqrt{2}}"


def parse(text: str):
    """The formula as sympy has it. An exception if the text is more or less than one."""
    from latex2sympy2_extended import latex2sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig
    from math_verify.grader import should_treat_as_complex
    from sympy import I

    parsed = latex2sympy(
        text,
        is_real=not should_treat_as_complex(text),
        normalization_config=None,
        conversion_config=ConversionConfig(lowercase_symbols=False),
    )
    return parsed.subs({symbol: I for symbol in parsed.free_symbols if symbol.name == "i"})


def read(text: str):
    r"""A formula; or, of relations joined by \lor or \land, the set of what fulfils them."""
    from sympy import Intersection, Set, Union

    for word, join in ((r"\lor", Union), (r"\land", Intersection)):
        parts = text.split(word)
        if len(parts) > 1:
            sets = [read(part) for part in parts]
            return join(*[each if isinstance(each, Set) else each.as_set() for each in sets])
    return parse(text)


def equal(predicted: str, gold: str) -> bool:
    """Whether two formulas are equal."""
    from math_verify import verify
    from sympy import Eq, Expr

    a = read(predicted)
    b = read(gold)
    if bool(a.atoms(Eq)) != bool(b.atoms(Eq)):
        return False  # math-verify would take the right side of x^2 = 7
    are_expressions = isinstance(a, Expr) and isinstance(b, Expr)
    if are_expressions:
        a = a.doit()  # 1/2^55 becomes a number, and numbers are compared exactly
        b = b.doit()
    same = verify(
        b,
        a,
        numeric_precision=PRECISION,
        allow_set_relation_comp=True,
        timeout_seconds=None,  # the process has a clock of its own
    )
    return same and not (are_expressions and differ(a, b))


def differ(a, b) -> bool:
    """Whether two numbers are seen to differ in proportion to their size. math-verify rounds off a
    difference that is small in itself, as between pi / 2^1400 and pi / 2^1500."""
    if a == b or a.free_symbols or b.free_symbols:
        return False
    size = max(abs(a.evalf(30)), abs(b.evalf(30)))
    return size > 0 and abs((a - b).evalf(30)) > size * 10**-25


def verdict(predicted: str, gold: str) -> str:
    """right or wrong; an error, also that of a missing library, is wrong."""
    try:
        return "right" if equal(predicted, gold) else "wrong"
    except Exception:
        return "wrong"


def answer_questions(replies) -> None:
    """A line of JSON for a question, a line with its number and the verdict for the reply."""
    for line in sys.stdin:
        number, seconds, predicted, gold = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, seconds)  # of CPU time; then the process dies
        reply = verdict(predicted, gold)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(number, reply, file=replies, flush=True)


def main() -> None:
    """Lets a child answer, until there are no more questions. When it dies, says so and replaces
    it, which takes no second import."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no reply
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    verdict(WARM_UP, WARM_UP + "+0")  # imports, off the clock

    while True:
        child = os.fork()
        if child == 0:
            answer_questions(replies)
            return
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            return
        print("died", os.WTERMSIG(status), file=replies, flush=True)


if __name__ == "__main__":
    main()
