"""What a model's countdown responses do: attempts taken apart, and counted.

lab/pretrain.py judges the base model by these figures, lab/study.py the trained ones.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Sequence

from rollout import Episode
from tasks import Problem
from tasks.countdown import NUMBER, apply_operator, numbers_of


@dataclass(frozen=True)
class Attempt:
    """One chain `n op n = r op n = r ...` of a response, with its check if it has one."""

    steps: int  # results that it states
    wrong: int  # steps whose result is not what the operator gives
    operands: bool  # whether they are the numbers of the prompt
    checked: bool  # whether `vs` and a number follow the chain
    hit: bool  # whether the stated total is the target
    then: str  # "wait", "so", or "" where the response was cut


def attempts(prompt: str, response: str) -> list[Attempt]:
    """Takes a response apart. Never raises, whatever the response is."""
    numbers = numbers_of(prompt)
    target = prompt.split()[-2]
    found: list[Attempt] = []
    words: list[str] = []
    for word in [*response.split(), ""]:
        ends_attempt = word in ("wait", "so", "")
        if not ends_attempt:
            words.append(word)
            continue
        if words:
            found.append(read_attempt(words, numbers, target, then=word))
        words = []
    return found


def read_attempt(words: Sequence[str], numbers: Sequence[int], target: str, then: str) -> Attempt:
    """words: an attempt and its check, without the `wait` or `so` that ends it."""
    checked = len(words) > 2 and words[-2] == "vs"
    chain = words[:-2] if checked else words

    # n, then op n = r again and again: each of the three is every fourth word.
    operators = chain[1::4]
    operands = [NUMBER.get(word) for word in [chain[0], *chain[2::4]]]
    results = [NUMBER.get(word) for word in chain[4::4]]

    totals = [operands[0], *results]
    wrong = 0
    for before, operator, number, result in zip(totals, operators, operands[1:], results):
        readable = None not in (before, number, result)
        if not readable or apply_operator(before, operator, number) != result:
            wrong += 1

    reached = totals[-1] is not None and str(totals[-1]) == target
    return Attempt(
        steps=len(results),
        wrong=wrong,
        operands=None not in operands and sorted(operands) == sorted(numbers),
        checked=checked,
        hit=reached and len(operands) == len(numbers),
        then=then,
    )


class Behaviour(Counter):
    """Counts what responses do; its `watch` goes to evaluate.count_solved."""

    def watch(self, problem: Problem, response: str, episode: Episode) -> None:
        self["responses"] += 1
        self["tokens"] += len(episode.response)
        self["entropy"] += float(episode.entropy.sum())
        self["cut"] += int(not episode.finished)
        for attempt in attempts(problem.prompt, response):
            if attempt.then:  # one that was cut off says nothing
                self.count_attempt(attempt)

    def count_attempt(self, attempt: Attempt) -> None:
        self["attempts"] += 1
        self["steps"] += attempt.steps
        self["wrong steps"] += attempt.wrong
        self["wrong operands"] += int(not attempt.operands)
        self["hits"] += int(attempt.hit)

        check = "checked" if attempt.checked else "unchecked"
        outcome = "hit" if attempt.hit else "miss"
        self[check, outcome] += 1
        self[check, outcome, "so"] += int(attempt.then == "so")

    def figures(self) -> dict[str, float]:
        checked = self["checked", "hit"] + self["checked", "miss"]
        unchecked = self["unchecked", "hit"] + self["unchecked", "miss"]
        so_unchecked = self["unchecked", "hit", "so"] + self["unchecked", "miss", "so"]
        shares = {
            "steps with wrong arithmetic": (self["wrong steps"], self["steps"]),
            "attempts with wrong operands": (self["wrong operands"], self["attempts"]),
            "so after a checked hit": (self["checked", "hit", "so"], self["checked", "hit"]),
            "so after a checked miss": (self["checked", "miss", "so"], self["checked", "miss"]),
            "so after an unchecked attempt": (so_unchecked, unchecked),
            "attempts that hit": (self["hits"], self["attempts"]),
            "attempts per response": (self["attempts"], self["responses"]),
            "checks per response": (checked, self["responses"]),
            "responses cut at the limit": (self["cut"], self["responses"]),
            "tokens per response": (self["tokens"], self["responses"]),
            "entropy in nats": (self["entropy"], self["tokens"]),
        }
        return {name: part / max(1, whole) for name, (part, whole) in shares.items()}
