"""tasks/math_grader.py against verdicts written by hand: where the final answer is, which answers
are equal (test_grading_pairs.py has many more). Real questions against themselves and each other,
with their numbers read by Decimal. Hostile text."""

import json
import random
import time
from decimal import Decimal

import pytest

from questions import SHARED, needs_math_verify, write
from tasks import Problem, grader_process
from tasks.grader_process import graders
from tasks.math_grader import LONGEST, final_answer, math_equal
from tasks.mathematics import TEMPLATES, Math

HANGS = "9^{9^{9^{9}}}"  # math-verify does not come back from it

# ------------------------------------------------------------------------------ the final answer

PLACES = [  # response, dapo, qwen-math and chat, none
    ("Answer: 34", "34", None, "34"),
    ("Answer: 1\nno\nAnswer: 2 \nthanks", "2", None, "2"),
    ("answer : 7", "7", None, "7"),
    ("Answer: 1 Answer: 2", "2", None, "2"),
    ("Answer:\n5", "5", None, "5"),
    ("Answer:\n\n$$\n5\n$$\n", "5", None, "5"),
    ("Answer: 1\nAnswer:\n", None, None, None),
    ("**Answer**: 5", "5", None, "5"),
    ("**Final Answer:** 5", "** 5", None, "** 5"),
    ("Answer：5", "5", None, "5"),
    ("ANSWER: 5", "5", None, "5"),
    ("Nonanswer: 3", None, None, None),
    ("the answer is 5", None, None, None),
    ("\\boxed{3} then\nAnswer: 4", "4", "3", "4"),
    ("Answer: 4, so \\boxed{3}", "4, so \\boxed{3}", "3", "3"),
    ("\\boxed{1} \\boxed{\\frac{1}{2}}.", None, "\\frac{1}{2}", "\\frac{1}{2}"),
    ("\\boxed {2}", None, "2", "2"),
    ("\\\\boxed{2}", None, "2", "2"),
    ("\\boxed{\\boxed{5}}", None, "5", "5"),
    ("\\boxed{4 \\boxed{5}}", None, "4 \\boxed{5}", "4 \\boxed{5}"),
    ("\\textbf{Answer:} 5", "5", None, "5"),
    ("\\boxed{4} \\boxed{ }", None, None, None),
    ("\\boxed{1} and \\boxed{2", None, "1", "1"),
    ("\\boxed{\\{1, 2\\}}", None, "\\{1, 2\\}", "\\{1, 2\\}"),
    ("\\boxed{[0, 1\\}}", None, "[0, 1\\}", "[0, 1\\}"),
    ("} \\boxed{6} {", None, "6", "6"),
    ("\\boxed{}", None, None, None),
    ("\\boxed 5", None, "5", "5"),
    ("so $\\boxed 5$ it is", None, "5", "5"),
    ("\\boxed5.", None, "5.", "5."),
    ("\\boxed \\frac{1}{2}", None, "\\frac{1}{2}", "\\frac{1}{2}"),
    ("\\boxedx 5", None, None, None),
    ("\\fbox{5}", None, "5", "5"),
    ("\\boxed{1} \\BOXED{2}", None, "1", "1"),
    ("\\BOXED{\\boxed{1}} \\boxed{2}", None, "2", "2"),
    (
        "\\boxed{\\text{The answer is } 5}",
        None,
        "\\text{The answer is } 5",
        "\\text{The answer is } 5",
    ),
    ("", None, None, None),
]


def test_where_the_final_answer_is():
    for response, dapo, boxed, none in PLACES:
        expected = {"dapo": dapo, "qwen-math": boxed, "chat": boxed, "none": none}
        found = {template: final_answer(response, template) for template in expected}
        assert found == expected, response


# ------------------------------------------------------------------------------ verdicts

EQUAL = [  # predicted, gold
    # numerals
    ("18", "18"),
    ("18.0", "18"),
    ("27", "27.0"),
    ("25", "025"),
    ("-3", "−3"),
    ("+5", "5"),
    (".5", "0.50"),
    ("$5$.", "5"),
    # separators of thousands
    ("1,000", "1000"),
    ("1{,}000", "1000"),
    ("1,\\!000", "1000"),
    ("10,\\!080", "10080"),
    ("1450000", "1,450,000"),
    # currency and percent
    ("\\$18.90", "18.9"),
    ("$5 dollars", "5"),
    ("32,348", "\\$32,\\!348"),
    ("25\\%", "25"),
    ("12.5%", "12.5"),
    # what may stand around a number
    ("\\boxed{34}", "34"),
    ("**34**", "34"),
    ("\\(34\\)", "34"),
    ("\\[34\\]", "34"),
    ("\\text{34}", "34"),
    # fractions
    ("6/8", "3/4"),
    ("0.75", "\\frac{3}{4}"),
    ("\\dfrac{3}{4}", "\\frac34"),
    ("\\tfrac{3}{4}", "0.75"),
    ("\\frac{9}{5}", "1\\frac{4}{5}"),
    ("275/2", "137 \\frac{1}{2}"),
    ("\\frac{-1}{2}", "-\\frac{1}{2}"),
    # units
    ("90", "90^\\circ"),
    ("90^{\\circ}", "90^\\circ"),
    ("90°", "90^\\circ"),
    ("90 degrees", "90^\\circ"),
    ("5.4", "5.4 \\text{ cents}"),
    ("15\\text{ cm}^2", "15\\mbox{ cm}^2"),
    ("864", "864 \\mbox{ inches}^2"),
    ("5 cm", "5"),
    ("18\\text{ eggs}", "18"),
    ("\\frac{270}{7}", "\\frac{270}7\\text{ degrees}"),
    # intervals
    ("(3, 4]", "(3,4]"),
    ("(3,4]", "3 < x \\le 4"),
    ("x \\in (3,4]", "(3,4]"),
    ("[-2,7]", "x \\in [-2,7]"),
    ("(3,\\infty) \\cup (-\\infty,2)", "(-\\infty, 2) \\cup (3, \\infty)"),
    # several answers
    ("-2,1", "1,-2"),
    ("1 \\text{ and } -2", "1,-2"),
    ("\\{2,1\\}", "\\{1,2\\}"),
    ("(6, 31, -1)", "(6,31,-1)"),
    ("1+\\sqrt{19}, 1-\\sqrt{19}", "1 \\pm \\sqrt{19}"),
    # expressions
    ("5", "x=5"),
    ("x = 5", "5"),
    ("-q + p", "p - q"),
    ("5(3x - 16)", "15x - 80"),
    ("-5i+6", "6 - 5i"),
    ("\\sqrt{242}", "11\\sqrt2"),
    ("y=-2x", "y = -2x"),
    ("2^{10}", "1024"),
    ("\\frac{6\\pi}{12}", "\\frac{\\pi}{2}"),
    ("\\begin{bmatrix} -2 \\\\ -14 \\end{bmatrix}", "\\begin{pmatrix} -2 \\\\ -14 \\end{pmatrix}"),
    # words, letters, bases
    ("Evelyn", "\\text{Evelyn}"),
    ("evelyn.", "\\text{Evelyn}"),
    ("\\mathrm{east}", "\\text{east}"),
    ("C", "\\text{(C)}"),
    ("(C)", "\\text{(C)}"),
    ("\\textbf{(C)}", "\\text{(C)}"),
    ("52_{8}", "52_8"),
    ("52", "52_8"),
]
DIFFERENT = [  # predicted, gold
    # numerals
    ("", "5"),
    ("$", "5"),
    ("19", "18"),
    ("-18", "18"),
    ("18.01", "18"),
    ("0.0000673", ".0000672"),
    # separators and scales
    ("1.000", "1000"),
    ("1e3", "1000"),
    ("1_000", "1000"),
    ("٣", "3"),
    ("3, 500", "3500"),
    ("1,00", "100"),
    ("5x", "5"),
    ("5 million", "5"),
    ("17 or 18", "18"),
    # close by, and fractions
    ("10000000000000000000001", "10000000000000000000000"),
    ("0.333333", "\\frac13"),
    ("0.0", "\\frac{1}{3000000}"),
    ("4/3", "\\frac{3}{4}"),
    ("1/0", "3"),
    ("\\frac{1}{0}", "3"),
    ("\\frac{4}{5}", "1\\frac{4}{5}"),
    # units
    ("91", "90^\\circ"),
    ("5.5\\text{ cents}", "5.4 \\text{ cents}"),
    # intervals
    ("(3,4)", "(3,4]"),
    ("[3,4]", "(3,4]"),
    ("(-2,7)", "x \\in [-2,7]"),
    # several answers
    ("1,-2,3", "1,-2"),
    ("1", "1,-2"),
    ("(2,1)", "(1,2)"),
    ("1+\\sqrt{19}", "1 \\pm \\sqrt{19}"),
    # expressions
    ("x=6", "x=5"),
    ("y=5", "x=5"),
    ("q - p", "p - q"),
    ("15x + 80", "15x - 80"),
    ("6+5i", "6 - 5i"),
    ("2^{10}", "1025"),
    ("\\sqrt{243}", "11\\sqrt2"),
    # words, letters, bases
    ("Navin", "\\text{Evelyn}"),
    ("seat", "east"),
    ("seat", "\\text{east}"),
    ("B", "\\text{(C)}"),
    ("42", "52_8"),
]


@needs_math_verify
@pytest.mark.parametrize(
    "predicted, gold, verdict",
    [(*pair, True) for pair in EQUAL] + [(*pair, False) for pair in DIFFERENT],
)
def test_forms(predicted, gold, verdict):
    assert math_equal(predicted, gold) is verdict


@needs_math_verify
@pytest.mark.parametrize(
    "predicted, gold, right",
    [
        ("-2\\le x\\le 7", "x \\in [-2,7]", True),
        ("x>5", "(5,\\infty)", True),
        ("5 < x < 6", "[5,6]", False),
        ("5\\text{ million}", "5", False),
        ("5\\text{ dozen}", "5", False),
        ("5\\text{ million}", "5\\text{ million}", True),
        ("ACB", "ABC", False),
        ("ABC", "ABC", True),
        ("BA", "AB", False),
    ],
)
def test_what_a_sceptic_found(predicted, gold, right):
    assert math_equal(predicted, gold) is right


REAL = {"aime24": 30, "amc23": 40, "math500": 500, "gsm8k_test": 1319}  # questions in each file


def raw_golds(name):
    """The answers as the file has them, read without tasks/mathematics.py."""
    for line in (SHARED / f"{name}.jsonl").read_text().split("\n"):
        if line:
            yield str(json.loads(line)["answer"]).split("####")[-1].strip()


def decimal(text):
    """The value of a plain number, by another road than the grader's."""
    try:
        value = Decimal(text.replace(",", ""))
    except ArithmeticError:
        return None
    return value if value.is_finite() else None


def as_loaded(gold, name):
    """amc23 has floats, 27.0, which are to be read as 27."""
    is_float = name == "amc23" and "." in gold and decimal(gold) is not None
    return gold.removesuffix(".0") if is_float else gold


@needs_math_verify
@pytest.mark.skipif(not SHARED.is_dir(), reason=f"the real questions are not at {SHARED}")
@pytest.mark.parametrize("name", REAL)
def test_real_questions_grade_right_against_themselves_and_wrong_against_others(name, capsys):
    golds = list(raw_golds(name))
    task = Math("", str(SHARED / f"{name}.jsonl"), "dapo")
    died = task.timeouts

    # The questions are read as the file has them.
    assert len(golds) == REAL[name]
    assert f"{len(task.test)} test" in capsys.readouterr().out
    different_questions = {" ".join(problem.prompt.split()) for problem in task.test}
    assert len(task.test) == len(different_questions) <= REAL[name]
    assert not task.train
    assert not task.validation
    assert {problem.answer for problem in task.test} <= {as_loaded(gold, name) for gold in golds}

    # Each answer is right against itself, however it is put.
    for gold in golds:
        responses = (
            f"Answer: {gold}",
            f"so\n\n**Answer:** ${gold}$.",
            f"Answer: $\\boxed{{{gold}}}$",
        )
        for response in responses:
            assert task.reward(Problem("", gold), response, True) == 1.0, response
        assert math_equal(gold, gold)

    # Each number is wrong against five others.
    numeric = [gold for gold in golds if decimal(gold) is not None]
    refused = 0
    rng = random.Random(0)
    for gold in numeric:
        others = [other for other in numeric if decimal(other) != decimal(gold)]
        for other in rng.sample(others, 5):
            refused += 1
            reward = task.reward(Problem("", gold), f"Answer: {other}", True)
            assert reward == -1.0, (other, gold)

    # Each other answer is wrong against its neighbour, where a look by hand found no equal ones.
    hard = [gold for gold in golds if decimal(gold) is None]
    for gold, other in zip(hard, hard[1:] + hard[:1]):
        if gold != other:
            assert not math_equal(other, gold), (other, gold)

    assert task.timeouts == died
    with capsys.disabled():
        print(
            f"\n{name}: {len(golds)} questions, {len(task.test)} without duplicates, "
            f"{len(numeric)} numeric answers, {refused} wrong ones refused"
        )


def test_reward_needs_the_right_place_and_a_finished_response(tmp_path):
    path = write(tmp_path, "t.jsonl", [{"problem": "2?", "answer": "34"}])
    table = [
        ("dapo", "Answer: $\\boxed{34}$", 1.0),
        ("dapo", "\\boxed{34}", -1.0),
        ("qwen-math", "Answer: 34", -1.0),
        ("chat", "\\boxed{34}", 1.0),
        ("none", "34", -1.0),
        ("none", "Answer: 34", 1.0),
    ]
    for template, response, reward in table:
        task = Math("", path, template)
        assert task.reward(task.test[0], response, True) == reward
        assert task.reward(task.test[0], response, False) == -1.0


# ------------------------------------------------------------------------------ hostile text

MEGABYTE = 10**6
LONG = [
    "{" * MEGABYTE,
    "}" * MEGABYTE,
    "9" * MEGABYTE,
    "\\boxed{" * (MEGABYTE // 7),
    "\\boxed" * (MEGABYTE // 6),
    "Answer:" * (MEGABYTE // 7),
    "\\" * MEGABYTE,
    "\\boxed" + "{" * 100_000 + "}" * 100_000,
    "\\boxed{" + "9" * MEGABYTE + "}",
    "Answer: " + "9" * MEGABYTE,
    "\\boxed" + " " * MEGABYTE,
    "answer" + " " * MEGABYTE,
    "\\boxed {" * 100_000 + "}" * 100_000,
]
SHORT = [  # enough to be read: these reach the process
    HANGS,
    "10^{10^{10}}",
    "{" * 100 + "3" + "}" * 100,
    "(" * 100 + "3" + ")" * 100,
    "(((((((x+1)^2+1)^2+1)^2+1)^2+1)^2+1)^2+1)^2",
    "\ud800\x00x^2",
    "\\sin(" * 40 + "x" + ")" * 40,
    "\\frac{" * 30 + "1" + "}{2}" * 30,
    "1," * 140 + "1",
    "\u202e\\frac{1}{2}",
    "^" * 200,
    "\\text{" * 40,
]
# fmt: off
SOUP = [
    "{", "}", "\\boxed{", "\\boxed", "Answer:", "answer : ", "\\", "\\\\", "$", "^", "_", "9",
    "\\frac", "\\sqrt[", "(", ")", "\x00", "\x1b[2J", "\r", "\n", "\ud800", "\udfff", "\u202e",
    "\u0301", "٣", "\ufeff", ",", ".", "%", "-", "+", "\\text{", "\\left", "\\begin{pmatrix}", "&",
    "=", "x", "!", "🙂", "\\!", "{,}",
]
# fmt: on


def hostile():
    """Responses without end, nearly all different, in the places where every template looks."""
    rng = random.Random(0)
    yield from LONG
    for n in range(30):
        bad = SHORT[n % len(SHORT)]
        yield f"Answer: {bad}\n\\boxed{{{bad}}}"
    for n in range(3000):  # huge powers, too long to be read
        yield f"Answer: {n}" + "^{9" * 150 + "}" * 150
    for _ in range(2000):
        digits = str(rng.randrange(10**40)) * rng.randrange(1, 12)
        yield f"\\boxed{{{digits}}}\nAnswer: {digits}"
    while True:
        soup = "".join(rng.choices(SOUP, k=rng.randrange(150, 400)))
        start = rng.choice(["Answer: ", "\\boxed{", ""])
        yield start + soup + "x" * LONGEST + rng.choice(["}", "", "}}"])


def graded(template, problem, responses, tmp_path):
    """The rewards of a step with these responses, and the seconds that they took."""
    task = Math("", write(tmp_path, "t.jsonl", [vars(problem)]), template)
    started = time.perf_counter()
    rewards = task.rewards([task.test[0]] * len(responses), responses, [True] * len(responses))
    return rewards, time.perf_counter() - started


@needs_math_verify
def test_10_000_hostile_responses_are_wrong_and_take_less_than_a_step_may(tmp_path, capsys):
    problem = Problem("2?", "3\\sqrt{2}")
    responses = [response for _, response in zip(range(10_000), hostile())]
    died = graders.timeouts
    seconds = 0.0
    for i, template in enumerate(TEMPLATES):
        some = responses[i :: len(TEMPLATES)]
        rewards, took = graded(template, problem, some, tmp_path)
        assert rewards == [-1.0] * len(some)
        seconds += took
    assert seconds < grader_process.STEP_SECONDS

    # The next answer is graded.
    assert math_equal("\\sqrt{18}", "3\\sqrt{2}")
    with capsys.disabled():
        killed = graders.timeouts - died
        print(f"\n10,000 hostile responses: {seconds:.1f} s, {killed} given up")


@needs_math_verify
def test_some_hostile_responses_hang_and_are_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(grader_process, "SECONDS", 0.5)
    graders.verdicts.clear()
    died = graders.timeouts
    responses = [f"Answer: {bad}" for bad in SHORT]
    rewards, _ = graded("dapo", Problem("2?", "3\\sqrt{2}"), responses, tmp_path)
    assert rewards == [-1.0] * len(SHORT)
    assert graders.timeouts > died


@needs_math_verify
def test_answers_that_hang_take_no_longer_than_a_step_may(tmp_path, monkeypatch):
    monkeypatch.setattr(grader_process, "SECONDS", 0.5)
    monkeypatch.setattr(grader_process, "STEP_SECONDS", 8.0)
    graders.verdicts.clear()
    died = graders.timeouts
    different = [f"Answer: {n}+{HANGS}" for n in range(500)]
    right = "Answer: \\sqrt{18}"
    rewards, took = graded("dapo", Problem("2?", "3\\sqrt{2}"), [right, *different], tmp_path)
    assert rewards == [1.0] + [-1.0] * 500
    assert graders.timeouts == died + 500  # each once, whether it was asked or not
    assert 4.0 < took < 12.0

    # What was not reached is not remembered as wrong.
    assert len(graders.verdicts) < 200
    assert not graders.given_up
    monkeypatch.undo()
    assert math_equal("\\sqrt{18}+1", "3\\sqrt{2}+1")


def test_the_rewards_of_a_step_are_those_of_its_answers(tmp_path):
    path = write(
        tmp_path, "t.jsonl", [{"problem": "a?", "answer": "5"}, {"problem": "b?", "answer": "6"}]
    )
    task = Math("", path, "dapo")
    problems = [problem for problem in task.test for _ in range(4)]
    responses = ["Answer: 5", "Answer: 6", "6", "Answer: x = 5"] * 2
    finished = [True, True, True, False] * 2
    rewards = task.rewards(problems, responses, finished)
    answers = list(zip(problems, responses, finished))
    assert rewards == [task.reward(*answer) for answer in answers]
    expected = [
        1.0 if done and text == f"Answer: {p.answer}" else -1.0 for p, text, done in answers
    ]
    assert rewards == expected
