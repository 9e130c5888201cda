"""A task for tests: `--task tests/by_length.py:ByLength`. A third of Countdown's answers is right, so
that almost every group teaches something."""

from tasks import Problem
from tasks.countdown import Countdown


class ByLength(Countdown):
    def __init__(self) -> None:
        super().__init__()
        self.train = self.train[:40]
        self.validation = self.validation[:5]

    def reward(self, problem: Problem, response: str, finished: bool) -> float:
        return 1.0 if len(response) % 3 == 0 else -1.0
