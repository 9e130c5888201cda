"""The processes that ask math-verify, and what is said to them.

9^{9^{9^9}} hangs in C code, which no exception ends. So formulas are compared in processes that can
be killed, several side by side (symbolic.py). Three clocks run:

    SECONDS       of CPU time for an answer, kept by the process itself; on a busy machine an answer
                  takes longer, but does not become wrong
    PATIENCE      of real time, kept here, for a process that was stopped or that no clock ends
    STEP_SECONDS  of real time for all answers of a training step

An answer over which a process used up its CPU time is wrong, and stays so. One that was lost for a
reason outside, such as a signal, is asked again. `timeouts` counts what was given up.
"""

import json
import math
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen

SECONDS = 1.0  # of CPU time
PATIENCE = 30.0
START_PATIENCE = 120.0  # math-verify imports sympy
STEP_SECONDS = 120.0
TRIES = 3
PROCESSES = min(4, os.cpu_count() or 1)
MEMORY = 2**16  # verdicts that are kept

SCRIPT = Path(__file__).with_name("symbolic.py")

Question = tuple[str, str]  # two formulas: predicted, gold


class Grader:
    """A process, and the question that it is busy with."""

    def __init__(self) -> None:
        self.process = Popen(
            [sys.executable, SCRIPT],
            stdin=PIPE,
            stdout=PIPE,
            stderr=DEVNULL,
            start_new_session=True,  # where Ctrl-C does not reach it
        )
        self.received = b""
        self.number = 0  # of the question
        self.question: Question | None = None
        self.patience = START_PATIENCE
        self.overdue = math.inf

    def fileno(self) -> int:
        return self.process.stdout.fileno()

    def send(self, number: int, question: Question) -> None:
        predicted, gold = question
        line = json.dumps([number, SECONDS, predicted, gold]) + "\n"
        self.number = number
        self.question = question
        self.overdue = time.monotonic() + self.patience
        try:
            self.process.stdin.write(line.encode())
            self.process.stdin.flush()
        except OSError:
            pass  # it is dead, which `receive` will see

    def receive(self) -> str:
        """What the process has to say of its question: "right", "wrong", "timeout"; "lost" if it or
        its question is no more, "" if it said nothing. A line with another number is no reply."""
        said = os.read(self.fileno(), 4096)
        if not said:
            return "lost"
        *lines, self.received = (self.received + said).split(b"\n")
        replies = {
            b"%d right" % self.number: "right",
            b"%d wrong" % self.number: "wrong",
            b"died %d" % signal.SIGPROF: "timeout",
        }
        for line in lines:
            if line in replies:
                self.patience = PATIENCE
                return replies[line]
            if line.startswith(b"died "):
                return "lost"
        return ""

    def kill(self) -> None:
        """Ends the process, its child and its pipes."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.communicate()


class Graders:
    """The processes, started as they are needed, and what they have said."""

    def __init__(self) -> None:
        self.idle: list[Grader] = []
        self.busy: list[Grader] = []
        self.asked = 0  # questions so far
        self.timeouts = 0  # questions given up
        self.verdicts: dict[Question, bool] = {}
        self.given_up: set[Question] = set()  # in this step
        self.end_of_step = math.inf

    @contextmanager
    def step(self) -> Iterator[None]:
        """Within it, all questions together take no longer than STEP_SECONDS."""
        self.end_of_step = time.monotonic() + STEP_SECONDS
        try:
            yield
        finally:
            self.end_of_step = math.inf
            self.given_up.clear()

    def equal(self, predicted: str, gold: str) -> bool:
        """Whether math-verify finds two formulas equal. Remembered, so that nothing hangs twice."""
        question = (predicted, gold)
        if self.end_of_step == math.inf:
            self.given_up.clear()
        if question not in self.verdicts and question not in self.given_up:
            self.ask([question])
        return self.verdicts.get(question, False)

    def ask(self, questions: Sequence[Question]) -> None:
        """Finds the verdicts of all questions, or gives them up."""
        if len(self.verdicts) > MEMORY:
            self.verdicts.clear()
        unknown = [
            question for question in dict.fromkeys(questions) if question not in self.verdicts
        ]
        tries = dict.fromkeys(unknown, 0)
        waiting = deque(unknown)
        try:
            while (waiting or self.busy) and time.monotonic() < self.end_of_step:
                while waiting and len(self.busy) < PROCESSES:
                    self.hand_out(waiting.popleft())
                for question in self.collect():
                    tries[question] += 1
                    if tries[question] < TRIES:
                        waiting.append(question)
        finally:  # also on Ctrl-C
            for grader in self.busy:
                grader.kill()
            self.busy.clear()

        left = [question for question in unknown if question not in self.verdicts]
        self.given_up.update(left)
        self.timeouts += len(left)

    def hand_out(self, question: Question) -> None:
        grader = self.idle.pop() if self.idle else Grader()
        self.busy.append(grader)
        self.asked += 1
        grader.send(self.asked, question)

    def collect(self) -> list[Question]:
        """Waits for replies and notes them. Returns the questions that were lost."""
        now = time.monotonic()
        nearest = min(self.end_of_step, *[grader.overdue for grader in self.busy])
        ready = wait(self.busy, timeout=max(0.0, nearest - now))
        lost = []
        for grader in list(self.busy):
            said = grader.receive() if grader in ready else ""
            if not said and time.monotonic() > grader.overdue:
                said = "lost"
            if not said:
                continue

            self.busy.remove(grader)
            if said == "lost":
                grader.kill()
                lost.append(grader.question)
                continue
            self.idle.append(grader)
            self.verdicts[grader.question] = said == "right"
            if said == "timeout":
                self.timeouts += 1
        return lost


graders = Graders()
