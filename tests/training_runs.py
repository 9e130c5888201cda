"""What the tests of training share: small runs, their files, and commands that run in a process of
their own."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train
from plumbing.settings import Settings

ROOT = Path(__file__).parents[1]

# Two steps of two updates each: a few seconds on one core.
SMALL = dict(
    steps=2,
    prompts=4,
    samples=4,
    minibatch=2,
    eval_problems=5,
    eval_samples=2,
    final_samples=4,
    slots=8,
)


def small_run(out: Path, name: str, **changes) -> tuple[Path, list[dict]]:
    """Trains -> (the run's folder, its log)."""
    torch.manual_seed(len(name))  # global randomness must not matter
    folder = train.train(Settings(out=str(out), name=name, **(SMALL | changes)))
    return folder, read_jsonl(folder / "log.jsonl")


def read_jsonl(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def replace_reward(monkeypatch, reward) -> None:
    """Has Countdown's answers graded by reward(problem, response, finished)."""

    def graded(self, problem, response: str, finished: bool) -> float:
        return reward(problem, response, finished)

    monkeypatch.setattr(type(train.load_task("countdown")), "reward", graded)


def reward_by_length(problem, response: str, finished: bool) -> float:
    """A third of the answers is right, so that almost every group teaches something."""
    return 1.0 if len(response) % 3 == 0 else -1.0


def reward_none(problem, response: str, finished: bool) -> float:
    return -1.0


def run_command(monkeypatch, script: str, *arguments: str) -> str | int:
    """Runs a script as a command, in this process, until it exits -> its exit code, or the message
    that it exits with."""
    signals = (signal.SIGINT, signal.SIGTERM)
    handlers = {number: signal.getsignal(number) for number in signals}
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(script, run_name="__main__")
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return stop.value.code


def environment() -> dict[str, str]:
    """Of the processes that tests start: one thread, and this repository's modules."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def start(
    *arguments: str, script: str = "train.py", variables: dict[str, str] | None = None, **options
) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, script, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment() | (variables or {}),
        **options,
    )


def finish(process: subprocess.Popen) -> tuple[int, str]:
    """-> (exit code, the last line of what it said of an error)."""
    error = process.communicate()[1]
    assert "Traceback" not in error, error
    assert "Exception ignored" not in error, error
    said = error.strip().splitlines()
    return process.returncode, said[-1] if said else ""


def refusal(*arguments: str, **options) -> str:
    """The one sentence with which train.py, in a process of its own, refuses to start."""
    process = start(*arguments, **options)
    code, sentence = finish(process)
    assert code == 1, sentence
    assert sentence.startswith("train.py: ")
    return sentence


def content_of(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def wait_for_lines(process: subprocess.Popen, file: Path, count: int = 1) -> None:
    """Until the process has written that many lines, or has ended."""
    while process.poll() is None:
        if file.exists() and len(file.read_text().splitlines()) >= count:
            return
        time.sleep(0.01)


def wait_for_words(process: subprocess.Popen, words: str) -> None:
    """Until the process has said these words on stderr, or has ended."""
    for line in process.stderr:
        if words in line:
            return
