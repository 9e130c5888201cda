"""tasks/grader_process.py and the script that it starts, against faults done to real processes: an
answer that hangs, signals from outside, a forged reply, a busy machine, Ctrl-C, the parent's death,
math-verify missing."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from questions import ROOT, needs_math_verify, write
from tasks import grader_process
from tasks.grader_process import Grader, graders
from tasks.math_grader import math_equal
from tasks.mathematics import Math

HANGS = "9^{9^{9^{9}}}"  # math-verify does not come back from it


@pytest.fixture
def fresh():
    """No process and no verdict is left from before."""
    for grader in graders.idle:
        grader.kill()
    graders.idle.clear()
    graders.verdicts.clear()
    yield
    graders.verdicts.clear()


def only_process():
    """The one that is idle."""
    [grader] = graders.idle
    return grader.process


def child_of(pid):
    """The process that does the work."""
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/task").is_dir(), reason="children are looked up in /proc"
)

# ------------------------------------------------------------------------------ an answer that hangs


@needs_math_verify
def test_an_answer_that_hangs_is_wrong_and_counted_and_the_next_is_graded(fresh, monkeypatch):
    assert math_equal("\\frac{10}{4}", "2\\frac12")
    process = only_process()
    died = graders.timeouts
    monkeypatch.setattr(grader_process, "SECONDS", 0.5)
    assert not math_equal(HANGS, "7\\sqrt2")
    assert graders.timeouts == died + 1
    assert not math_equal(HANGS, "7\\sqrt2")
    assert graders.timeouts == died + 1  # remembered

    monkeypatch.undo()
    assert math_equal("\\sqrt{98}", "7\\sqrt2")
    assert not math_equal("\\sqrt{99}", "7\\sqrt2")
    assert graders.timeouts == died + 1
    assert only_process() is process  # its child was replaced, without another import


@needs_math_verify
def test_the_clock_is_stopped_after_an_answer(fresh, monkeypatch):
    monkeypatch.setattr(grader_process, "SECONDS", 0.4)
    died = graders.timeouts
    for n in range(60):  # more than 0.4 s of CPU time together
        assert math_equal(f"\\sqrt{{{n * n * 2 + 2}}}+{n}x", f"{n}x+\\sqrt{{{n * n * 2 + 2}}}+0y")
    assert graders.timeouts == died


@needs_math_verify
def test_the_clock_counts_work_and_not_waiting(fresh, monkeypatch):
    """On a busy machine an answer takes longer, but is not wrong."""
    monkeypatch.setattr(grader_process, "SECONDS", 1.0)
    assert math_equal("\\sqrt{8}", "2\\sqrt2")
    pid = child_of(only_process().pid)
    died = graders.timeouts

    # Stopped for most of three seconds while it is asked.
    script = (
        "import os, signal, sys, time\n"
        "for _ in range(15):\n"
        "    os.kill(int(sys.argv[1]), signal.SIGSTOP)\n"
        "    time.sleep(0.2)\n"
        "    os.kill(int(sys.argv[1]), signal.SIGCONT)\n"
        "    time.sleep(0.01)\n"
    )
    slow_down = subprocess.Popen([sys.executable, "-c", script, str(pid)])
    started = time.perf_counter()
    while slow_down.poll() is None:
        n = time.perf_counter_ns()
        assert math_equal(f"\\sqrt{{8}}+{n}", f"2\\sqrt2+{n}")
    assert time.perf_counter() - started > 2.5
    assert graders.timeouts == died


@needs_math_verify
def test_several_processes_work_side_by_side(fresh, monkeypatch):
    monkeypatch.setattr(grader_process, "PROCESSES", 3)
    monkeypatch.setattr(grader_process, "SECONDS", 0.5)
    died = graders.timeouts
    hanging = [(f"{n}+{HANGS}", "\\sqrt{2}") for n in range(3)]
    right = [(f"\\sqrt{{2}}+{n}", f"{n}+\\sqrt{{2}}") for n in range(20)]
    wrong = [(f"\\sqrt{{2}}+{n}", f"{n}+\\sqrt{{3}}") for n in range(20)]
    graders.ask([*hanging, *right, *wrong, *right])
    assert len(graders.idle) == 3
    assert [graders.verdicts[question] for question in hanging] == [False] * 3
    assert [graders.verdicts[question] for question in right] == [True] * 20
    assert [graders.verdicts[question] for question in wrong] == [False] * 20
    assert graders.timeouts == died + 3


# ------------------------------------------------------------------------------ faults from outside


@needs_math_verify
@pytest.mark.parametrize("whom", ["process", "child", "both"])
@needs_proc
def test_a_grader_that_is_stopped_does_not_hang_the_run(fresh, monkeypatch, whom):
    monkeypatch.setattr(grader_process, "PATIENCE", 1.0)
    assert math_equal("\\sqrt{8}", "2\\sqrt2")
    process = only_process()
    child = child_of(process.pid)
    died = graders.timeouts
    for pid in {"process": [process.pid], "child": [child], "both": [process.pid, child]}[whom]:
        os.kill(pid, signal.SIGSTOP)

    started = time.perf_counter()
    assert math_equal("\\sqrt{18}", "3\\sqrt2")  # it is no fault of the answer's
    assert not math_equal("\\sqrt{19}", "3\\sqrt2")
    assert time.perf_counter() - started < 20
    assert graders.timeouts == died
    if whom != "process":
        assert only_process() is not process
        assert process.returncode == -signal.SIGKILL


@needs_math_verify
@pytest.mark.parametrize("whom", ["process", "child", "both"])
@needs_proc
def test_a_grader_that_is_killed_is_replaced(fresh, whom):
    assert math_equal("\\sqrt{8}", "2\\sqrt2")
    process = only_process()
    child = child_of(process.pid)
    died = graders.timeouts
    for pid in {"process": [process.pid], "child": [child], "both": [process.pid, child]}[whom]:
        os.kill(pid, signal.SIGKILL)
    assert math_equal("\\sqrt{12}", "2\\sqrt3")
    assert not math_equal("\\sqrt{13}", "2\\sqrt3")
    assert graders.timeouts == died


@needs_math_verify
def test_what_is_lost_again_and_again_is_wrong_counted_and_not_remembered(
    fresh, monkeypatch, tmp_path
):
    dies = tmp_path / "dies.py"
    dies.write_text("import sys\nsys.stdin.readline()\n")
    died = graders.timeouts
    with monkeypatch.context() as patch:
        patch.setattr(grader_process, "SCRIPT", dies)
        assert not math_equal("\\sqrt{8}", "2\\sqrt2")
    assert graders.timeouts == died + 1
    assert math_equal("\\sqrt{8}", "2\\sqrt2")


def test_a_grader_that_says_nothing_is_given_up(fresh, monkeypatch, tmp_path):
    sleeps = tmp_path / "sleeps.py"
    sleeps.write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(grader_process, "SCRIPT", sleeps)
    monkeypatch.setattr(grader_process, "START_PATIENCE", 0.5)
    died = graders.timeouts
    started = time.perf_counter()
    assert not math_equal("\\sqrt{8}", "2\\sqrt2")
    assert time.perf_counter() - started < 10
    assert graders.timeouts == died + 1
    assert not graders.busy


FORGER = """
import json, sys
for line in sys.stdin:
    number = json.loads(line)[0]
    print("1")
    print("right")
    print(number - 1, "right")
    print(number + 1, "right")
    print("x", number, "right")
    print(number, "right now")
    print(number, "wrong", flush=True)
"""


def test_a_forged_reply_makes_no_answer_right(fresh, monkeypatch, tmp_path):
    forger = tmp_path / "forger.py"
    forger.write_text(FORGER)
    monkeypatch.setattr(grader_process, "SCRIPT", forger)
    for n in range(20):
        assert not math_equal(f"\\sqrt{{{n}}}", "x+y")
    for grader in graders.idle:
        grader.kill()
    graders.idle.clear()


@needs_math_verify
def test_a_stray_line_in_the_pipe_makes_no_answer_right(fresh):
    grader = Grader()
    grader.received = b"1\n1 right\n2 right\n"  # as if it had come before
    graders.idle.append(grader)
    graders.asked = 2
    assert not math_equal("\\sqrt{7}", "2\\sqrt2")
    assert math_equal("\\sqrt{8}", "2\\sqrt2")


def test_what_a_library_prints_is_no_reply(fresh, monkeypatch, tmp_path):
    """A math_verify that prints a right verdict for every question, and then fails."""
    (tmp_path / "math_verify").mkdir()
    (tmp_path / "math_verify" / "__init__.py").write_text(
        "for number in range(100_000):\n    print(number, 'right', flush=True)\nraise ImportError"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert not math_equal("\\sqrt{8}", "2\\sqrt2")
    graders.idle.pop().kill()


# ------------------------------------------------------------------------------ the parent


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
def test_ctrl_c_while_an_answer_is_graded_leaves_no_reply_behind(fresh, ctrl_c, monkeypatch):
    assert math_equal("\\sqrt{8}", "2\\sqrt2")
    monkeypatch.setattr(grader_process, "SECONDS", 60.0)
    ctrl_c(0.3)
    with pytest.raises(KeyboardInterrupt):
        math_equal(HANGS, "5\\sqrt2")
    assert not graders.busy
    assert math_equal("\\sqrt{50}", "5\\sqrt2")
    assert not math_equal("\\sqrt{51}", "5\\sqrt2")


PARENT = r"""
import os, sys
from tasks.grader_process import graders
from tasks.math_grader import math_equal

assert math_equal("\\sqrt{8}", "2\\sqrt2")
pid = graders.idle[0].process.pid
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
@needs_proc
def test_the_process_has_a_session_of_its_own_and_ends_with_its_parent():
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    pid = int(parent.stdout.readline())
    child = child_of(pid)
    for each in (pid, child):
        os.kill(each, 0)  # raises if it does not run
    parent.kill()
    parent.communicate()
    for _ in range(600):
        if has_ended(pid) and has_ended(child):
            return
        time.sleep(0.05)
    pytest.fail("the grading process lives on")


@pytest.fixture
def without_math_verify(fresh, tmp_path, monkeypatch):
    """A new process that really fails to import it: a module of that name which raises stands
    before it on the path."""
    (tmp_path / "math_verify.py").write_text("raise ImportError('no')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    yield
    for grader in graders.idle:
        grader.kill()
    graders.idle.clear()


def test_without_math_verify(without_math_verify, tmp_path, capsys):
    # Numbers are graded without it, all else is wrong, and a line says so.
    rows = [{"problem": "a?", "answer": "1,000"}, {"problem": "b?", "answer": 0.5}]
    task = Math("", write(tmp_path, "n.jsonl", rows), "dapo")
    second_line = capsys.readouterr().out.splitlines()[1]
    assert "count as wrong without pip install math-verify==0.9.0" in second_line
    problem = next(problem for problem in task.test if problem.prompt == "b?")
    process = only_process()
    rewards = {"0.50": 1.0, "1/2": 1.0, "\\frac12": -1.0, "\\frac13": -1.0}
    for answer, reward in rewards.items():
        assert task.reward(problem, f"Answer: {answer}", True) == reward
    assert only_process() is process
    assert process.poll() is None  # one process says no to all, none is started again

    # Known answers that are no numbers need it.
    rows = [{"problem": "a?", "answer": 1}, {"problem": "b?", "answer": "\\frac{1}{2}"}]
    mixed = write(tmp_path, "m.jsonl", rows)
    for data, test_data in ((mixed, ""), ("", mixed)):
        message = "1 answers, such as .frac.1..2., need pip install math-verify"
        with pytest.raises(ValueError, match=message):
            Math(data, test_data, "dapo")
