"""tasks/countdown.py against enumeration with fractions: every verdict, the number of chains, the
splits; and against its tokenizer. The splits' digest is what figures were quoted on."""

import hashlib
import itertools
import random
from fractions import Fraction

import pytest

from lab.pretrain import countdown_tokenizer
from tasks import Problem, load_task
from tasks.countdown import Countdown, apply_operator, count_chains, countdown_solved, numbers_of

SOLUTION = "7 * 8 = 56 / 1 = 56 + 7 = 63 vs 23 wait 1 + 8 = 9 + 7 = 16 + 7 = 23 vs 23 so"


def calculate(total, operator, number):
    """total ∘ number as a fraction; None for a division by zero."""
    if operator == "+":
        return total + number
    if operator == "-":
        return total - number
    if operator == "*":
        return total * number
    return total / number if number != 0 else None


def chain_text(order, operators):
    """The text of one chain and its total, or None where a step is not allowed."""
    total = Fraction(order[0])
    text = str(order[0])
    for operator, number in zip(operators, order[1:]):
        total = calculate(total, operator, number)
        if total is None or total.denominator != 1 or not 0 <= total <= 99:
            return None
        text += f" {operator} {number} = {total}"
    return text, total


def all_solutions(numbers, target):
    """Every text of a last attempt that is right, by enumeration with fractions."""
    solutions = set()
    for order in itertools.permutations(numbers):
        for operators in itertools.product("+-*/", repeat=len(numbers) - 1):
            chain = chain_text(order, operators)
            if chain is not None and chain[1] == target:
                text = chain[0]
                solutions |= {text, f"{text} vs {target}"}
    return solutions


def unchecked(solutions):
    """The solutions without a check: one text for each chain."""
    return [text for text in solutions if "vs" not in text]


def brute_force(solutions, response):
    """The verdict by looking the last attempt up."""
    words = response.split()
    if not words or words[-1] != "so":
        return False
    attempt = " ".join(words[:-1])
    if "wait" in words:
        attempt = attempt.split("wait")[-1]
    return attempt.strip() in solutions


def splits_of(task):
    return [task.train, task.validation, task.test]


VERDICTS = {
    SOLUTION: True,
    # unchecked
    "1 + 8 = 9 + 7 = 16 + 7 = 23 so": True,
    # the check restates another target
    "1 + 8 = 9 + 7 = 16 + 7 = 23 vs 24 so": False,
    # never commits
    "1 + 8 = 9 + 7 = 16 + 7 = 23 vs 23": False,
    "1 + 8 = 9 + 7 = 16 + 7 = 23 vs 23 wait": False,
    "1 + 8 = 9 + 7 = 16 + 7 = 23 so so": False,
    # a wrong step
    "1 + 8 = 9 + 7 = 17 + 7 = 23 so": False,
    # 8 twice, 1 and 7 missing
    "8 + 8 = 16 + 7 = 23 so": False,
    "8 + 7 = 15 + 8 = 23 + 1 = 24 - 1 = 23 so": False,
    # commits to an empty attempt
    "1 + 8 = 9 + 7 = 16 + 7 = 23 wait so": False,
    "1 + 8 = 09 + 7 = 16 + 7 = 23 so": False,
    # int() would read this as 9
    "1 + 8 = ٩ + 7 = 16 + 7 = 23 so": False,
    # the same set of numbers but not as often
    "8 + 8 = 16 - 1 = 15 + 8 = 23 so": False,
    "7 * 7 = 49 so": False,
    "so": False,
    "": False,
    "wait": False,
}


def test_hand_written_verdicts():
    for response, verdict in VERDICTS.items():
        assert countdown_solved([7, 7, 1, 8], 23, response) is verdict, response


def test_division_and_range():
    results = {
        (7, "/", 2): None,
        (8, "/", 2): 4,
        (8, "/", 0): None,
        (3, "-", 4): None,
        (50, "*", 2): None,
        (99, "+", 0): 99,
        (98, "+", 2): None,
        (1, "^", 1): None,
    }
    for step, result in results.items():
        assert apply_operator(*step) == result, step


ODD_WORDS = [
    *("1_0", "007", "-1", "1e9", "٣", "²", "9" * 5000),
    *("(", "__import__('os')", "<eos>", "\x00", "\u202e"),
]
WORDS = [
    *(str(i) for i in range(100)),
    *list("+-*/=") * 5,
    *["vs", "wait", "so", "->", "?"] * 3,
    *ODD_WORDS,
]


def mutated(solutions, i, rng):
    """The i-th response: a solution, soup, or two attempts; most of them with one word replaced,
    dropped or added."""
    text = rng.choice(solutions).split() + ["so"]
    is_soup = i % 4 == 0
    has_two_attempts = i % 4 == 1
    if is_soup:
        text = [rng.choice(WORDS) for _ in range(rng.randrange(40))]
        text += ["so"] * rng.randrange(2)
    if has_two_attempts:
        text = rng.choice(solutions).split() + ["wait"] + text

    always_mutated = i % 4 >= 2
    if always_mutated or rng.random() < 0.5:
        place = rng.randrange(len(text) + 1)
        kind = rng.choice(["drop", "replace", "add"])
        new = [] if kind == "drop" else [rng.choice(WORDS)]
        end = place if kind == "add" else place + 1
        text[place:end] = new
    return " ".join(text)


def test_ten_thousand_mutations_and_random_strings():
    """None raises or hangs, and each verdict equals enumeration's."""
    rng = random.Random(0)
    problems = rng.sample(list(Countdown().validation), 25)
    seen = {True: 0, False: 0}
    for problem in problems:
        numbers = numbers_of(problem.prompt)
        target = int(problem.answer)
        solutions = all_solutions(numbers, target)
        ordered = sorted(solutions)
        for i in range(400):
            response = mutated(ordered, i, rng)
            verdict = countdown_solved(numbers, target, response)
            assert verdict == brute_force(solutions, response), response
            seen[verdict] += 1
    # Both verdicts were really tried.
    assert seen[True] > 500
    assert seen[False] > 5000


def test_every_enumerated_solution_is_accepted():
    for problem in Countdown().test[:20]:
        numbers = numbers_of(problem.prompt)
        target = int(problem.answer)
        solutions = all_solutions(numbers, target)
        assert solutions
        for solution in solutions:
            assert countdown_solved(numbers, target, solution + " so")


def test_the_same_numbers_as_often():
    """8 + 7 + 1 + 1 = 17 has every number of 7 7 1 8 in it, and no other, but not each as often."""
    response = "8 + 7 = 15 + 1 = 16 + 1 = 17 so"
    assert not countdown_solved([7, 7, 1, 8], 17, response)
    assert countdown_solved([7, 1, 1, 8], 17, response)


def test_the_numbers_of_a_prompt():
    """By another road than numbers_of's, which the other tests use."""
    for problem in Countdown().test:
        *numbers, arrow, target, mark = problem.prompt.split(" ")
        assert [arrow, target, mark] == ["->", problem.answer, "?"]
        assert numbers_of(problem.prompt) == [int(number) for number in numbers]


def test_chains_equal_enumeration():
    for numbers in ((1, 2, 3), (9, 9, 9), (2, 5, 7, 8), (1, 7, 7, 8), (1, 1, 1, 1)):
        found = count_chains(numbers)
        expected = {t: len(unchecked(all_solutions(numbers, t))) for t in range(100)}
        assert {t: n for t, n in found.items() if n} == {t: n for t, n in expected.items() if n}


def test_splits_are_disjoint_in_any_order_of_the_numbers_and_complete():
    splits = splits_of(Countdown())
    different = []
    for split in splits:
        keys = {(tuple(sorted(p.prompt.split("->")[0].split())), p.answer) for p in split}
        different.append(keys)
    count = sum(map(len, different))
    assert count == len(different[0] | different[1] | different[2])
    assert [len(split) for split in splits] == [len(keys) for keys in different]
    assert min(map(len, different)) >= 400

    solvable = 0
    for numbers in itertools.combinations_with_replacement(range(1, 10), 4):
        found = count_chains(numbers)
        solvable += sum(found[target] >= 3 for target in range(10, 100))
    assert count == solvable


def test_splits_are_fixed():
    """The problems that figures are quoted on must never change silently."""
    task = load_task("countdown")
    assert [len(split) for split in splits_of(task)] == [9247, 509, 487]
    assert task.validation[0] == Problem("4 1 7 4 -> 25 ?", "25")
    assert task.test[0] == Problem("2 2 9 3 -> 17 ?", "17")
    text = "\n".join(problem.prompt for split in splits_of(task) for problem in split)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "f51114eecef68a14"


def test_template_tokenizer_and_reward():
    task = Countdown()
    tokenizer = countdown_tokenizer()
    problem = Problem("7 7 1 8 -> 23 ?", "23")
    ids = task.encode(problem, tokenizer)
    assert tokenizer.convert_ids_to_tokens(ids) == "7 7 1 8 -> 23 ?".split()

    response = tokenizer.encode(SOLUTION) + [tokenizer.eos_token_id]
    assert len(response) == len(SOLUTION.split()) + 1  # one token per number, operator and word
    assert tokenizer.decode(response, skip_special_tokens=True) == SOLUTION
    assert tokenizer.pad_token_id == tokenizer.eos_token_id

    assert task.reward(problem, SOLUTION, True) == 1.0
    assert task.reward(problem, SOLUTION, False) == -1.0  # cut at the limit
    assert task.reward(problem, "7 so", True) == -1.0


def test_easy_and_hard_problems_are_those_with_many_and_few_solutions():
    fits = {"countdown-easy": lambda n: n >= 12, "countdown-hard": lambda n: n <= 2}
    for name, number_fits in fits.items():
        for problem in random.Random(0).sample(load_task(name).train, 3):
            solutions = all_solutions(numbers_of(problem.prompt), int(problem.answer))
            assert number_fits(len(unchecked(solutions)))

    normal = load_task("countdown")
    easy = load_task("countdown-easy")
    hard = load_task("countdown-hard")
    # A problem's split does not depend on the task.
    assert set(easy.train) <= set(normal.train)
    assert set(easy.test) <= set(normal.test)
    everything = Countdown(least_solutions=1)
    assert len(hard.train) + len(normal.train) == len(everything.train)
    assert normal.test == Countdown().test


def test_what_load_task_refuses():
    names = "countdown, countdown-easy, countdown-hard, which bring their problems"
    known = f"{names}, math, and FILE:CLASS"
    with pytest.raises(ValueError, match=f"^unknown task 'chess'; the tasks are {known}$"):
        load_task("chess")
    for arguments in ({"data": "a.jsonl"}, {"test_data": "a.jsonl"}):
        with pytest.raises(ValueError, match="^--data and --test-data go with --task math; "):
            load_task("countdown", **arguments)
