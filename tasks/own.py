"""A task of your own, in a file of your own: `--task my_task.py:Mine`.

Mine is a class, or anything else that can be called without arguments and gives a task
(tasks/__init__.py says what that is). `test` and `rewards` may be left out.
"""

import importlib.util
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Iterator, Sequence

from tasks import Problem

NEEDED = ("train", "validation", "encode", "reward")


def load_own_task(name: str):
    """FILE:CLASS -> the task. ValueError or FileNotFoundError say in one sentence what is wrong
    with it."""
    file, _, class_name = name.rpartition(":")
    make = find_in_file("--task", name, "class")
    if not callable(make):
        raise ValueError(f"--task {name}: {class_name} is no class but {make!r}")
    with errors_in_a_sentence(f"--task {name}", file):
        task = make()
        missing = [attribute for attribute in NEEDED if not hasattr(task, attribute)]
        if not missing and not hasattr(task, "test"):
            task.test = []
        if not missing and not hasattr(task, "rewards"):
            task.rewards = one_by_one(task.reward)
    if missing:
        raise ValueError(f"--task {name}: {class_name} lacks {', '.join(missing)}")
    return task


def find_in_file(flag: str, name: str, kind: str):
    """FILE:NAME, as the flag has it -> what the file calls NAME, which is to be of this kind.
    FileNotFoundError, and ValueError for whatever else is wrong."""
    file, _, name_in_it = name.rpartition(":")
    if not Path(file).is_file():
        raise FileNotFoundError(f"{flag} {name}: there is no file {file!r}")
    with errors_in_a_sentence(f"{flag} {name}", file):
        module = run_file(Path(file))
    found = getattr(module, name_in_it, None)
    if found is None:
        raise ValueError(f"{flag} {name}: {file} has no {kind} {name_in_it!r}")
    return found


def run_file(file: Path):
    """The module that a file makes. What it imports may lie beside it; names of this repository go
    first."""
    folder = str(file.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    spec = importlib.util.spec_from_file_location(f"task_of_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their module
    spec.loader.exec_module(module)
    return module


@contextmanager
def errors_in_a_sentence(flag: str, file: str) -> Iterator[None]:
    """Whatever the file raises -> ValueError, which says in which of its lines."""
    try:
        yield
    except (Exception, SystemExit) as error:
        of_the_file = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if Path(frame.filename).resolve() == Path(file).resolve()
        ]
        if isinstance(error, SyntaxError):
            of_the_file.append(error.lineno)
        line = f" in line {of_the_file[-1]}" if of_the_file else ""
        kind = type(error).__name__
        first_line = str(error).partition("\n")[0]
        raise ValueError(f"{flag}: {kind}{line}: {first_line}") from error


def one_by_one(reward: Callable[[Problem, str, bool], float]) -> Callable[..., list[float]]:
    """The `rewards` of a task that only has a `reward`."""

    def rewards(
        problems: Sequence[Problem], responses: Sequence[str], finished: Sequence[bool]
    ) -> list[float]:
        return [reward(*answer) for answer in zip(problems, responses, finished)]

    return rewards
