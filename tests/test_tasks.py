"""`--task my_task.py:Mine`: a class in a file, trained on, resumed and evaluated without an edit,
and what is said of one that cannot be."""

import json
import re
import sys

import pytest

import evaluate
import train
from conftest import ROOT
from plumbing.settings import EvaluationSettings, Settings
from tasks import Problem, load_task
from training_runs import finish, read_jsonl, start

# Nothing but what a task must have. A right answer begins with the second number of the prompt.
SECOND = """
from dataclasses import dataclass

from tasks import Problem
from words import first_word

@dataclass
class Second:
    train = [Problem(f"{a} {b} 1 8 -> 23 ?", str(b)) for a in (3, 5, 7) for b in (2, 4, 6)]
    validation = [Problem("9 7 1 8 -> 23 ?", "7"), Problem("9 8 1 8 -> 23 ?", "8")]

    def encode(self, problem, tokenizer):
        return tokenizer.encode(problem.prompt)

    def reward(self, problem, response, finished):
        return 1.0 if first_word(response) == problem.answer else -1.0
"""
BESIDE = """
def first_word(text):
    return text.split()[0] if text.split() else ""
"""
SMALL = dict(
    prompts=4,
    samples=4,
    minibatch=4,
    max_new_tokens=8,
    eval_samples=2,
    final_samples=4,
)


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A file with a task, and beside it one that it imports; what loading it changes in this
    process is undone."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "words.py").write_text(BESIDE)
    file = tmp_path / "my task.py"
    file.write_text(SECOND)
    yield file
    sys.modules.pop("words", None)


def test_a_class_with_only_what_is_needed(file):
    task = load_task(f"{file}:Second")
    assert [len(split) for split in (task.train, task.validation, task.test)] == [9, 2, 0]
    problems = [Problem("9 7 1 8 -> 23 ?", "7")] * 3
    responses = ["7 + 1", "1 + 7", ""]
    want = [1.0, -1.0, -1.0]
    assert task.rewards(problems, responses, [True] * 3) == want
    assert [task.reward(problems[0], response, True) for response in responses] == want


def test_the_task_of_the_page(tmp_path):
    """docs/fork.md's, by the words of its docstring: the larger of two numbers comes first."""
    [source] = re.findall(r"```python\n(.*?)```", (ROOT / "docs/fork.md").read_text(), re.S)
    (tmp_path / "my_task.py").write_text(source)
    task = load_task(f"{tmp_path}/my_task.py:Mine")
    assert len(task.train) == 80 and len(task.validation) == 20
    assert not set(task.train) & set(task.validation)
    [problem] = [p for p in task.train if p.prompt.startswith("3 7 ")]
    responses = ["7", "7 - 3", "3 7", "77", ""]
    assert task.rewards([problem] * 5, responses, [False] * 5) == [1.0, 1.0, -1.0, -1.0, -1.0]


def test_what_the_class_has_is_not_replaced(file):
    more = "    test = [1]\n    rewards = staticmethod(lambda *of_all: [0.5])\n"
    file.write_text(SECOND + more)
    task = load_task(f"{file}:Second")
    assert task.test == [1]
    assert task.rewards([], [], []) == [0.5]


def test_the_file_comes_after_the_modules_of_this_repository(file, monkeypatch):
    """A file beside it that has the name of one of ours does not take its place."""
    (file.parent / "advantage.py").write_text("raise ValueError")
    load_task(f"{file}:Second")
    monkeypatch.delitem(sys.modules, "advantage", raising=False)
    import advantage

    assert advantage.__file__ == str(ROOT / "advantage.py")


@pytest.mark.parametrize(
    ("source", "class_name", "sentence"),
    [
        (None, "Second", "there is no file '{file}'"),
        ("", "Second", "{file} has no class 'Second'"),
        ("", "", "{file} has no class ''"),
        ("Second = 3", "Second", "Second is no class but 3"),
        ("class Second: train = validation = []", "Second", "Second lacks encode, reward"),
        ("class Second: encode = reward = 1", "Second", "Second lacks train, validation"),
        ("\nimport nowhere", "Second", "ModuleNotFoundError in line 2: No module named 'nowhere'"),
        ("class Second:\n  x = = 1", "Second", "SyntaxError in line 2: invalid syntax"),
        ("def Second():\n  x = 1\n  x / 0", "Second", "ZeroDivisionError in line 3: division by "),
        ("import sys\nsys.exit(0)", "Second", "SystemExit in line 2: 0"),
        ("class Second:\n  @property\n  def train(self): 1 / 0", "Second", "ZeroDivisionError in "),
        ("def Second(x): ...", "Second", "TypeError: Second() missing 1 required positional "),
    ],
)
def test_what_is_refused(file, source, class_name, sentence):
    """Each in one sentence, which names the flag."""
    if source is None:
        file.unlink()
    else:
        file.write_text(source)
    name = f"{file}:{class_name}"
    with pytest.raises((ValueError, FileNotFoundError)) as refusal:
        load_task(name)
    said = str(refusal.value)
    assert said.startswith(f"--task {name}: " + sentence.replace("{file}", str(file)))
    assert "\n" not in said


def test_math_has_data_and_a_file_has_not(file):
    with pytest.raises(ValueError, match="^--data and --test-data go with --task math; .*:Second "):
        load_task(f"{file}:Second", data="a.jsonl")


def test_training_resuming_and_evaluating(file, tmp_path, monkeypatch):
    """By a relative path, resumed by a process in another working directory: the rewards are those
    of the class, and the run is that of two steps at once."""
    file.rename(tmp_path / "second.py")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(tmp_path)
    folder = train.train(Settings(task="second.py:Second", steps=1, **SMALL))
    assert folder.name.startswith("grpo-task=second.py%3ASecond-")
    config = json.loads((folder / "config.json").read_text())
    assert config["task"] == f"{tmp_path}/second.py:Second"

    flags = ["--resume", str(tmp_path / folder), "--steps", "2"]
    process = start(*flags, script=str(ROOT / "train.py"), cwd=elsewhere)
    assert finish(process) == (0, "")
    two = train.train(Settings(task="second.py:Second", steps=2, name="two", **SMALL))
    resumed, at_once = (rewards_and_losses(run) for run in (folder, two))
    assert resumed == at_once
    # Countdown's rewards of eight tokens are -1 throughout.
    assert len(resumed) == 2 and any(reward > -1 for reward, _ in resumed)

    evaluation = EvaluationSettings(("base",), task="second.py:Second", samples=4, k="1")
    record = evaluate.evaluate(evaluation)
    assert len(record["models"]["base"]["solved"]) == 2


def rewards_and_losses(run):
    return [(line["reward"], line["loss"]) for line in read_jsonl(run / "log.jsonl")]


def test_a_file_without_a_class_is_an_unknown_task(file):
    with pytest.raises(ValueError, match="^unknown task .*, math, and FILE:CLASS$"):
        load_task(str(file))
