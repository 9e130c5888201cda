"""task.py against brute force: every verdict, the splits, the template, the tokenizer."""

import hashlib
import itertools
import random
from fractions import Fraction

from lab.pretrain import countdown_tokenizer
from task import Countdown, Problem, apply_operator, chains, countdown_solved, load_task

SOLUTION = "7 * 8 = 56 / 1 = 56 + 7 = 63 vs 23 wait 1 + 8 = 9 + 7 = 16 + 7 = 23 vs 23 so"


def all_solutions(numbers, target):
    """Every text of a last attempt that is right, by enumeration with fractions."""
    solutions = set()
    for order in itertools.permutations(numbers):
        for operators in itertools.product("+-*/", repeat=len(numbers) - 1):
            total, text = Fraction(order[0]), str(order[0])
            for operator, n in zip(operators, order[1:]):
                if operator == "/" and n == 0:
                    break
                total = {"+": total + n, "-": total - n, "*": total * n, "/": total / n if n else total}[operator]
                if total.denominator != 1 or not 0 <= total <= 99:
                    break
                text += f" {operator} {n} = {total}"
            else:
                if total == target:
                    solutions |= {text, f"{text} vs {target}"}
    return solutions


def brute_force(solutions, response):
    words = response.split()
    if not words or words[-1] != "so":
        return False
    attempt = " ".join(words[:-1]).split("wait")[-1] if "wait" in words else " ".join(words[:-1])
    return attempt.strip() in solutions


def test_hand_written_verdicts():
    numbers, target = [7, 7, 1, 8], 23
    table = {
        SOLUTION: True,
        "1 + 8 = 9 + 7 = 16 + 7 = 23 so": True,                             # unchecked
        "1 + 8 = 9 + 7 = 16 + 7 = 23 vs 24 so": False,                      # the check restates another target
        "1 + 8 = 9 + 7 = 16 + 7 = 23 vs 23": False,                         # never commits
        "1 + 8 = 9 + 7 = 16 + 7 = 23 vs 23 wait": False,
        "1 + 8 = 9 + 7 = 16 + 7 = 23 so so": False,
        "1 + 8 = 9 + 7 = 17 + 7 = 23 so": False,                            # a wrong step
        "8 + 8 = 16 + 7 = 23 so": False,                                    # 8 twice, 1 and 7 missing
        "8 + 7 = 15 + 8 = 23 + 1 = 24 - 1 = 23 so": False,
        "1 + 8 = 9 + 7 = 16 + 7 = 23 wait so": False,                       # commits to an empty attempt
        "1 + 8 = 09 + 7 = 16 + 7 = 23 so": False,
        "1 + 8 = ٩ + 7 = 16 + 7 = 23 so": False,                            # int() would read this as 9
        "8 + 8 = 16 - 1 = 15 + 8 = 23 so": False,                           # the same set of numbers but not as often
        "7 * 7 = 49 so": False, "so": False, "": False, "wait": False,
    }
    for response, verdict in table.items():
        assert countdown_solved(numbers, target, response) is verdict, response


def test_division_and_range():
    assert [apply_operator(*x) for x in ((7, "/", 2), (8, "/", 2), (8, "/", 0), (3, "-", 4), (50, "*", 2), (99, "+", 0),
                                         (98, "+", 2), (1, "^", 1))] == [None, 4, None, None, None, 99, None, None]


def test_ten_thousand_mutations_and_random_strings():
    """None raises or hangs, and each verdict equals enumeration's."""
    rng = random.Random(0)
    words = [str(i) for i in range(100)] + list("+-*/=") * 5 + ["vs", "wait", "so", "->", "?"] * 3 + [
        "1_0", "007", "-1", "1e9", "٣", "²", "9" * 5000, "(", "__import__('os')", "<eos>", "\x00", "\u202e"]
    problems = rng.sample(list(Countdown().validation), 25)
    seen = {True: 0, False: 0}
    for problem in problems:
        numbers = [int(w) for w in problem.prompt.split("->")[0].split()]
        target = int(problem.answer)
        solutions = all_solutions(numbers, target)
        ordered = sorted(solutions)
        for i in range(400):
            text = rng.choice(ordered).split() + ["so"]
            if i % 4 == 0:
                text = [rng.choice(words) for _ in range(rng.randrange(40))] + ["so"] * rng.randrange(2)
            if i % 4 == 1:
                text = rng.choice(ordered).split() + ["wait"] + text
            if i % 4 >= 2 or rng.random() < 0.5:                            # one token replaced, dropped or added
                place, kind = rng.randrange(len(text) + 1), rng.randrange(3)
                text[place:place + (kind < 2)] = [] if kind == 0 else [rng.choice(words)]
            response = " ".join(text)
            verdict = countdown_solved(numbers, target, response)
            assert verdict == brute_force(solutions, response), response
            seen[verdict] += 1
    assert seen[True] > 500 and seen[False] > 5000                          # both verdicts were really tried


def test_every_enumerated_solution_is_accepted():
    for problem in Countdown().test[:20]:
        numbers, target = [int(w) for w in problem.prompt.split("->")[0].split()], int(problem.answer)
        solutions = all_solutions(numbers, target)
        assert solutions and all(countdown_solved(numbers, target, s + " so") for s in solutions)


def test_the_same_numbers_as_often():
    """8 + 7 + 1 + 1 = 17 has every number of 7 7 1 8 in it, and no other, but not each as often."""
    assert not countdown_solved([7, 7, 1, 8], 17, "8 + 7 = 15 + 1 = 16 + 1 = 17 so")
    assert countdown_solved([7, 1, 1, 8], 17, "8 + 7 = 15 + 1 = 16 + 1 = 17 so")


def test_chains_equal_enumeration():
    for numbers in ((1, 2, 3), (9, 9, 9), (2, 5, 7, 8), (1, 7, 7, 8), (1, 1, 1, 1)):
        found = chains(numbers)
        assert {t: n for t, n in found.items() if n} == {
            t: n for t in range(100) if (n := sum("vs" not in text for text in all_solutions(numbers, t)))}


def test_splits_are_disjoint_in_any_order_of_the_numbers_and_complete():
    task = Countdown()
    key = lambda p: (tuple(sorted(p.prompt.split("->")[0].split())), p.answer)
    splits = [{key(p) for p in part} for part in (task.train, task.validation, task.test)]
    assert sum(map(len, splits)) == len(splits[0] | splits[1] | splits[2])
    assert [len(part) for part in (task.train, task.validation, task.test)] == [len(s) for s in splits]
    assert min(map(len, splits)) >= 400
    solvable = [chains(numbers) for numbers in itertools.combinations_with_replacement(range(1, 10), 4)]
    assert sum(map(len, splits)) == sum(found[t] >= 3 for found in solvable for t in range(10, 100))


def test_splits_are_fixed():
    """The problems that figures are quoted on must never change silently."""
    task = load_task("countdown")
    assert (len(task.train), len(task.validation), len(task.test)) == (9247, 509, 487)
    assert task.validation[0] == Problem("4 1 7 4 -> 25 ?", "25") and task.test[0] == Problem("2 2 9 3 -> 17 ?", "17")
    text = "\n".join(p.prompt for part in (task.train, task.validation, task.test) for p in part)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "f51114eecef68a14"


def test_template_tokenizer_and_reward():
    task, tokenizer = Countdown(), countdown_tokenizer()
    ids = task.encode(Problem("7 7 1 8 -> 23 ?", "23"), tokenizer)
    assert tokenizer.convert_ids_to_tokens(ids) == "7 7 1 8 -> 23 ?".split()
    response = tokenizer.encode(SOLUTION) + [tokenizer.eos_token_id]
    assert len(response) == len(SOLUTION.split()) + 1                       # one token per number, operator and word
    assert tokenizer.decode(response, skip_special_tokens=True) == SOLUTION
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    problem = Problem("7 7 1 8 -> 23 ?", "23")
    assert task.reward(problem, SOLUTION, True) == 1.0
    assert task.reward(problem, SOLUTION, False) == -1.0                    # cut at the limit
    assert task.reward(problem, "7 so", True) == -1.0


def test_easy_and_hard_problems_are_those_with_many_and_few_solutions():
    for name, fits, other in (("countdown-easy", lambda n: n >= 12, "countdown"), ("countdown-hard", lambda n: n <= 2, None)):
        task = load_task(name)
        for problem in random.Random(0).sample(task.train, 3):
            asked = [int(n) for n in problem.prompt.split(" ->")[0].split()]
            assert fits(len({s.split(" vs")[0] for s in all_solutions(asked, int(problem.answer))}))
        if other:                                                           # a problem's split does not depend on the task
            assert set(task.train) <= set(load_task(other).train) and set(task.test) <= set(load_task(other).test)
    everything = Countdown(solutions=1)
    assert len(load_task("countdown-hard").train) + len(load_task("countdown").train) == len(everything.train)
    assert load_task("countdown").test == Countdown().test
