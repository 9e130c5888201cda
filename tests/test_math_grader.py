"""tasks/math_grader.py against verdicts written by hand: where the final answer is, which answers
are equal. Real questions against themselves and each other, with their numbers read by Decimal.
Hostile text. The process that asks math-verify."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from decimal import Decimal
from pathlib import Path

import pytest

from questions import ROOT, SHARED, needs_math_verify, write
from tasks import Problem, math_grader
from tasks.math_grader import LONGEST, final_answer, grader, math_equal, verified
from tasks.mathematics import TEMPLATES, Math

HANGS = "9^{9^{9^{9}}}"  # math-verify does not come back from it

# ------------------------------------------------------------------------------ the final answer

PLACES = [  # response, dapo, qwen-math and chat, none
    ("Answer: 34", "34", None, "34"),
    ("Answer: 1\nno\nAnswer: 2 \nthanks", "2", None, "2"),
    ("answer : 7", "7", None, "7"),
    ("Answer: 1 Answer: 2", "2", None, "2"),
    ("Answer:\n5", None, None, None),
    ("the answer is 5", None, None, None),
    ("\\boxed{3} then\nAnswer: 4", "4", "3", "4"),
    ("Answer: 4, so \\boxed{3}", "4, so \\boxed{3}", "3", "3"),
    ("\\boxed{1} \\boxed{\\frac{1}{2}}.", None, "\\frac{1}{2}", "\\frac{1}{2}"),
    ("\\boxed {2}", None, "2", "2"),
    ("\\\\boxed{2}", None, "2", "2"),
    ("\\boxed{\\boxed{5}}", None, "5", "5"),
    ("\\boxed{1} and \\boxed{2", None, "1", "1"),
    ("\\boxed{\\{1, 2\\}}", None, "\\{1, 2\\}", "\\{1, 2\\}"),
    ("\\boxed{[0, 1\\}}", None, "[0, 1\\}", "[0, 1\\}"),
    ("} \\boxed{6} {", None, "6", "6"),
    ("\\boxed{}", None, None, None),
    ("\\boxed 5", None, None, None),
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


@needs_math_verify
def test_10_000_hostile_responses(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(math_grader, "SECONDS", 0.5)
    path = write(tmp_path, "t.jsonl", [{"problem": "2?", "answer": "3\\sqrt{2}"}])
    tasks = [Math("", path, template) for template in TEMPLATES]
    problem = tasks[0].test[0]
    died = grader.timeouts
    started = time.perf_counter()
    for i, response in zip(range(10_000), hostile()):
        assert tasks[i % 4].reward(problem, response, True) == -1.0, response[:100]
    took = time.perf_counter() - started

    # Some of it did reach the process and hung there, and the next answer is graded.
    assert grader.timeouts > died
    monkeypatch.undo()
    assert math_equal("\\sqrt{18}", "3\\sqrt{2}")
    with capsys.disabled():
        killed = grader.timeouts - died
        print(f"\n10,000 hostile responses: {took:.1f} s, {killed} processes killed")


# ------------------------------------------------------------------------------ the process


@pytest.fixture
def nothing_remembered():
    """So that the process is really asked."""
    verified.cache_clear()


@needs_math_verify
def test_a_timeout_is_death_and_counted_and_the_next_answer_is_graded(
    nothing_remembered, monkeypatch
):
    assert math_equal("\\frac{10}{4}", "2\\frac12")
    first = grader.process
    died = grader.timeouts
    monkeypatch.setattr(math_grader, "SECONDS", 0.5)
    assert not math_equal(HANGS, "7\\sqrt2")
    assert grader.timeouts == died + 1
    assert first.returncode == -signal.SIGALRM
    assert not math_equal(HANGS, "7\\sqrt2")
    assert grader.timeouts == died + 1  # remembered

    monkeypatch.undo()
    assert math_equal("\\sqrt{98}", "7\\sqrt2")
    assert not math_equal("\\sqrt{99}", "7\\sqrt2")
    assert grader.process.pid != first.pid
    assert grader.timeouts == died + 1


@needs_math_verify
def test_the_process_outlives_an_alarm_that_was_cleared(nothing_remembered, monkeypatch):
    assert math_equal("\\sqrt{18}", "3\\sqrt2")  # starts it, if need be
    monkeypatch.setattr(math_grader, "SECONDS", 2.0)
    assert math_equal("\\sqrt{8}", "2\\sqrt2")
    pid = grader.process.pid
    time.sleep(2.5)
    assert math_equal("\\sqrt{12}", "2\\sqrt3")
    assert grader.process.pid == pid


@needs_math_verify
def test_a_killed_process_is_replaced(nothing_remembered):
    assert math_equal("\\sqrt{8}", "2\\sqrt2")
    os.kill(grader.process.pid, signal.SIGKILL)
    grader.process.wait()
    assert math_equal("\\sqrt{12}", "2\\sqrt3")


@needs_math_verify
def test_a_grader_that_dies_between_two_answers_is_replaced(monkeypatch):
    assert math_equal("\\frac{2}{7}", "2/7")
    dead = grader.process
    dead.kill()
    dead.wait()
    with monkeypatch.context() as patch:
        # As if it had been asked a moment before.
        patch.setattr(dead, "poll", lambda: None)
        assert not math_equal("\\frac{3}{8}+x", "x+y")
    assert math_equal("x+\\frac{1}{2}", "\\frac12+x")
    assert grader.process is not dead


@pytest.fixture
def ctrl_c():
    """ctrl_c(seconds): a KeyboardInterrupt after these."""

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@needs_math_verify
def test_ctrl_c_while_an_answer_is_graded_leaves_no_reply_behind(nothing_remembered, ctrl_c):
    assert math_equal("\\sqrt{8}", "2\\sqrt2")
    ctrl_c(0.3)
    with pytest.raises(KeyboardInterrupt):
        math_equal(HANGS, "5\\sqrt2")
    assert math_equal("\\sqrt{50}", "5\\sqrt2")
    assert not math_equal("\\sqrt{51}", "5\\sqrt2")


PARENT = r"""
import os, sys
from tasks.math_grader import grader, math_equal

assert math_equal("\\sqrt{8}", "2\\sqrt2")
pid = grader.process.pid
assert os.getsid(pid) == pid != os.getsid(0)
print(pid, flush=True)
sys.stdin.read()
"""


def has_ended(pid):
    try:
        os.kill(pid, 0)  # raises if it does not run
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0]
    except (ProcessLookupError, FileNotFoundError):
        return True
    return state == "Z"  # dead; its new parent has not looked yet


@needs_math_verify
def test_the_process_has_a_session_of_its_own_and_ends_with_its_parent():
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    pid = int(parent.stdout.readline())
    os.kill(pid, 0)  # raises if it does not run
    parent.kill()
    parent.communicate()
    for _ in range(600):
        if has_ended(pid):
            return
        time.sleep(0.05)
    pytest.fail("the grading process lives on")


@pytest.fixture
def without_math_verify(tmp_path, monkeypatch):
    """A new process that really fails to import it: a module of that name which raises stands
    before it on the path."""
    (tmp_path / "math_verify.py").write_text("raise ImportError('no')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(grader, "process", None)
    verified.cache_clear()
    yield
    grader.kill()
    verified.cache_clear()


def test_without_math_verify(without_math_verify, tmp_path, capsys):
    # Numbers are graded without it, all else is wrong, and a line says so.
    rows = [{"problem": "a?", "answer": "1,000"}, {"problem": "b?", "answer": 0.5}]
    task = Math("", write(tmp_path, "n.jsonl", rows), "dapo")
    second_line = capsys.readouterr().out.splitlines()[1]
    assert "count as wrong without pip install math-verify==0.9.0" in second_line
    problem = next(problem for problem in task.test if problem.prompt == "b?")
    rewards = {"0.50": 1.0, "1/2": 1.0, "\\frac12": -1.0, "\\frac13": -1.0}
    for answer, reward in rewards.items():
        assert task.reward(problem, f"Answer: {answer}", True) == reward
    assert grader.process.poll() is None  # one process says no to all, none is started again

    # Known answers that are no numbers need it.
    rows = [{"problem": "a?", "answer": 1}, {"problem": "b?", "answer": "\\frac{1}{2}"}]
    mixed = write(tmp_path, "m.jsonl", rows)
    for data, test_data in ((mixed, ""), ("", mixed)):
        message = "1 answers, such as .frac.1..2., need pip install math-verify"
        with pytest.raises(ValueError, match=message):
            Math(data, test_data, "dapo")
