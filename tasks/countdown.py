"""Countdown: reach a target from four numbers by a left-to-right chain of operations.

    prompt    7 7 1 8 -> 23 ?
    response  7 * 8 = 56 / 1 = 56 + 7 = 63 vs 23 wait 1 + 8 = 9 + 7 = 16 + 7 = 23 vs 23 so

There is one token per number, operator and word. A response is a chain of attempts. `vs 23`
restates the target: an explicit check, which the model may make or skip. `wait` drops the attempt
and starts another. `so` commits to the last one.

These are, in small, the three kinds of exploratory action of the paper's Section 2: which operand
and operator to take is a *pivotal* choice, checks and restarts are *reflective* actions, unusual
expressions are *rare* behaviours.

Departs from the paper: it trains on mathematics; this needs no download, and its verifier is exact.
"""

import hashlib
import itertools
from collections import Counter
from functools import cache
from typing import Iterator, Sequence

from tasks import Problem

Numbers = tuple[int, ...]

NUMBERS_PER_PROBLEM = 4
LARGEST = 99  # results and targets have one token each: 0..99
OPERATORS = ("+", "-", "*", "/")
NUMBER = {str(i): i for i in range(LARGEST + 1)}  # not int(): "007", "1_0", "٣" are no numbers


def numbers_of(prompt: str) -> list[int]:
    """The numbers that a prompt gives, in its order."""
    before_the_arrow = prompt.split("->")[0]
    return [int(word) for word in before_the_arrow.split()]


def apply_operator(total: int, operator: str, number: int) -> int | None:
    """total ∘ number, or None where the task forbids it: no such operator, an inexact division,
    a result outside 0..99."""
    result = None
    if operator == "+":
        result = total + number
    if operator == "-":
        result = total - number
    if operator == "*":
        result = total * number
    if operator == "/" and number != 0 and total % number == 0:
        result = total // number

    if result is None or not 0 <= result <= LARGEST:
        return None
    return result


def countdown_solved(numbers: Sequence[int], target: int, response: str) -> bool:
    """Whether `response` commits, with a final `so`, to a last attempt that uses each number
    exactly once, has every step right and ends at the target. A check after the total is optional;
    one of another number makes the attempt wrong."""
    # Words are only compared and looked up. No eval, no regular expression, no number above 99:
    # no text can hang this.
    words = response.split()
    if not words or words[-1] != "so":
        return False

    last_attempt = []
    for word in words[:-1]:
        if word == "wait":
            last_attempt = []
        else:
            last_attempt.append(word)

    # A chain is a number, then a step of four words for each further number. A check may follow.
    chain_length = 1 + 4 * (len(numbers) - 1)
    chain = last_attempt[:chain_length]
    check = last_attempt[chain_length:]
    if len(chain) != chain_length:
        return False
    if check not in ([], ["vs", str(target)]):
        return False

    first = NUMBER.get(chain[0])
    steps = [chain[i : i + 4] for i in range(1, chain_length, 4)]  # operator, number, "=", result
    used = [first] + [NUMBER.get(number) for _, number, _, _ in steps]
    if None in used or sorted(used) != sorted(numbers):
        return False

    total = first
    for operator, number, equals, result in steps:
        total = apply_operator(total, operator, NUMBER[number])
        if total is None or equals != "=" or NUMBER.get(result) != total:
            return False
    return total == target


def pick_one(numbers: Numbers) -> Iterator[tuple[int, Numbers]]:
    """Each number with the others. Of equal numbers only one, because they make the same chains."""
    for i, number in enumerate(numbers):
        if number not in numbers[:i]:
            yield number, numbers[:i] + numbers[i + 1 :]


def count_chains(numbers: Numbers) -> Counter[int]:
    """How many different left-to-right chains of all `numbers` end at each total."""

    @cache
    def count_from(total: int, rest: Numbers) -> Counter[int]:
        if not rest:
            return Counter([total])
        found: Counter[int] = Counter()
        for number, others in pick_one(rest):
            for operator in OPERATORS:
                result = apply_operator(total, operator, number)
                if result is not None:
                    found.update(count_from(result, others))
        return found

    found: Counter[int] = Counter()
    for first, others in pick_one(numbers):
        found.update(count_from(first, others))
    return found


class Countdown:
    """All problems with four numbers from 1 to 9 and a target from 10 to 99 that `least_solutions`
    to `most_solutions` chains solve: 90 % train, 5 % validation, 5 % test.

    At least three solutions, because blind search almost never finds the only one. A hash of
    (sorted numbers, target) chooses the split, so no problem is in two splits in any order of its
    numbers. The order of a split, and of the numbers in a prompt, is the hash's too, so the first
    200 test problems are the same 200 everywhere."""

    def __init__(self, least_solutions: int = 3, most_solutions: int | None = None) -> None:
        found = []  # (hash, numbers, target); all of it takes a third of a second
        for numbers in itertools.combinations_with_replacement(range(1, 10), NUMBERS_PER_PROBLEM):
            solutions = count_chains(numbers)
            for target in range(10, LARGEST + 1):
                enough = solutions[target] >= least_solutions
                few_enough = most_solutions is None or solutions[target] <= most_solutions
                if enough and few_enough:
                    name = f"{numbers} {target}"
                    digest = hashlib.sha256(name.encode()).digest()
                    found.append((digest, numbers, target))

        # Three parts of the hash, so that one choice says nothing of the others: bytes 0-3 choose
        # the split, 4-7 the order of the numbers, 12-31 the order of the problems.
        found.sort(key=lambda row: row[0][12:])
        train, validation, test = [], [], []
        for digest, numbers, target in found:
            order = sorted(range(NUMBERS_PER_PROBLEM), key=lambda i: digest[4 + i])
            shuffled = " ".join(str(numbers[i]) for i in order)
            problem = Problem(prompt=f"{shuffled} -> {target} ?", answer=str(target))

            twentieth = int.from_bytes(digest[:4], "big") % 20
            if twentieth == 0:
                validation.append(problem)
            elif twentieth == 1:
                test.append(problem)
            else:
                train.append(problem)

        self.train = train
        self.validation = validation
        self.test = test

    def encode(self, problem: Problem, tokenizer) -> list[int]:
        """Token ids of the prompt. The template is the prompt itself; this tokenizer has no BOS."""
        return tokenizer.encode(problem.prompt, add_special_tokens=False)

    def reward(self, problem: Problem, response: str, finished: bool) -> float:
        """+1.0 if solved, else -1.0. A response cut at the length limit (not `finished`) is
        wrong."""
        numbers = numbers_of(problem.prompt)
        target = int(problem.answer)
        solved = finished and countdown_solved(numbers, target, response)
        return 1.0 if solved else -1.0

    def rewards(
        self, problems: Sequence[Problem], responses: Sequence[str], finished: Sequence[bool]
    ) -> list[float]:
        """The reward of each answer."""
        return [self.reward(*answer) for answer in zip(problems, responses, finished)]
