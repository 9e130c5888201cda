"""What a problem is, and what counts as solved. Read first.

The embedded task is *countdown*: reach a target from four numbers by a left-to-right chain,

    prompt    7 7 1 8 -> 23 ?
    response  7 * 8 = 56 / 1 = 56 + 7 = 63 vs 23 wait 1 + 8 = 9 + 7 = 16 + 7 = 23 vs 23 so

one token per number, operator and word. A response is a chain of attempts. `vs 23` restates the target: an explicit
check, which the model may make or skip. `wait` drops the attempt and starts another. `so` commits to the last one.
These are, in small, the three kinds of exploratory action of the paper's Section 2: which operand and operator to take
is a *pivotal* choice, checks and restarts are *reflective* actions, unusual expressions are *rare* behaviours.
Departs from the paper: it trains on mathematics; this needs no download, and its verifier is exact. Reward: +1 or -1.
"""

import hashlib
import itertools
from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import Sequence

LARGEST = 99                                    # results and targets have one token each: 0..99
OPERATORS = ("+", "-", "*", "/")
NUMBER = {str(i): i for i in range(LARGEST + 1)}   # a lookup, not int(): "007", "1_0", "٣" are no numbers


@dataclass(frozen=True)
class Problem:
    prompt: str     # "7 7 1 8 -> 23 ?"
    answer: str     # the target; the numbers are in the prompt


def numbers_of(prompt: str) -> list[int]:
    """The numbers that a prompt gives, in its order."""
    return [int(word) for word in prompt.split("->")[0].split()]


def apply_operator(total: int, operator: str, number: int) -> int | None:
    """total ∘ number, or None where the task forbids it: a result outside 0..99, an inexact division."""
    results = {"+": total + number, "-": total - number, "*": total * number}
    if number != 0 and total % number == 0:
        results["/"] = total // number
    result = results.get(operator, -1)
    return result if 0 <= result <= LARGEST else None


def countdown_solved(numbers: Sequence[int], target: int, response: str) -> bool:
    """True only if `response` commits with a final `so` and its last attempt (after the last `wait`) uses each number
    exactly once, has every step right and ends at the target. A check after the total is optional; one of another
    number makes the attempt wrong. No eval, no regular expression, no number above 99: no text can hang it."""
    words = response.split()
    if not words or words.pop() != "so":
        return False
    if "wait" in words:
        words = words[len(words) - words[::-1].index("wait"):]
    length = 1 + 4 * (len(numbers) - 1)         # n (∘ n = r), once for every further number
    if words[length:] not in ([], ["vs", str(target)]):
        return False
    words = words[:length]
    used = [NUMBER.get(word) for word in [*words[:1], *words[2::4]]]
    if len(words) != length or None in used or sorted(used) != sorted(numbers):
        return False
    total = used[0]
    for operator, number, equals, result in zip(words[1::4], used[1:], words[3::4], words[4::4]):
        total = apply_operator(total, operator, number)
        if total is None or equals != "=" or NUMBER.get(result) != total:
            return False
    return total == target


def chains(numbers: tuple[int, ...]) -> Counter[int]:
    """How many different left-to-right chains of all `numbers` end at each total."""
    @cache
    def ends(total: int, rest: tuple[int, ...]) -> Counter[int]:
        if not rest:
            return Counter([total])
        found: Counter[int] = Counter()
        for i, number in enumerate(rest):
            if number not in rest[:i]:                  # equal numbers make the same chain
                for operator in OPERATORS:
                    if (result := apply_operator(total, operator, number)) is not None:
                        found.update(ends(result, rest[:i] + rest[i + 1:]))
        return found

    return sum((ends(n, numbers[:i] + numbers[i + 1:]) for i, n in enumerate(numbers) if n not in numbers[:i]), Counter())


class Countdown:
    """All problems with `count` numbers from 1 to 9 and a target from 10 to 99 that `solutions` to `most` chains solve
    (at least three, because blind search almost never finds the only one), split by a hash of (sorted numbers, target):
    90 % train, 5 % validation, 5 % test. No problem is in two splits in any order of its numbers. The order of a split,
    and of the numbers in a prompt, is the hash's too, so the first 200 test problems are the same 200 everywhere."""

    def __init__(self, count: int = 4, solutions: int = 3, most: int = 10 ** 9) -> None:
        found = []                                      # all of it takes a third of a second
        for numbers in itertools.combinations_with_replacement(range(1, 10), count):
            ways = chains(numbers)
            for target in (t for t in range(10, LARGEST + 1) if solutions <= ways[t] <= most):
                found.append((hashlib.sha256(f"{numbers} {target}".encode()).digest(), numbers, target))
        train, validation, test = [], [], []
        for digest, numbers, target in sorted(found, key=lambda row: row[0][12:]):
            split = {0: validation, 1: test}.get(int.from_bytes(digest[:4], "big") % 20, train)
            order = sorted(range(count), key=lambda i: digest[4 + i])
            split.append(Problem(f"{' '.join(str(numbers[i]) for i in order)} -> {target} ?", str(target)))
        self.train, self.validation, self.test = train, validation, test

    def encode(self, problem: Problem, tokenizer) -> list[int]:
        """Token ids of the prompt. The template is the prompt itself; this tokenizer has no BOS."""
        return tokenizer.encode(problem.prompt, add_special_tokens=False)

    def reward(self, problem: Problem, response: str, finished: bool) -> float:
        """+1.0 if solved, else -1.0. A response cut at the length limit (not `finished`) is wrong."""
        return 1.0 if finished and countdown_solved(numbers_of(problem.prompt), int(problem.answer), response) else -1.0


def load_task(name: str, data: str = "", test_data: str = "", template: str = "dapo"):
    """The task called `name`; the rest is for math. countdown-easy and -hard: 12 or more solutions, and 1 or 2. ValueError."""
    if name == "math":
        from math_task import Math                      # here, because countdown needs nothing of it
        return Math(data, test_data, template)
    if name not in (kinds := {"countdown": (4, 3), "countdown-easy": (4, 12), "countdown-hard": (4, 1, 2)}) or data or test_data:
        raise ValueError(f"unknown task {name!r}; the tasks are {', '.join(kinds)}, which bring their problems, and math")
    return Countdown(*kinds[name])
