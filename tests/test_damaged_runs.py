"""A run's files, damaged or edited: one sentence each, before anything is changed. The commands are
real ones; a process of its own has each kind of file once."""

import json
import shutil
from pathlib import Path
from typing import Callable

import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from plumbing.settings import Settings
from training_runs import content_of, refusal, run_command, small_run

DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of three steps, with a save and a validation after each."""
    out = tmp_path_factory.mktemp("finished")
    return small_run(out, "run", steps=3, max_new_tokens=16, eval_every=1)[0]


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


Edit = Callable[[list[str]], list[str]]


def replaced(number: int, line: str) -> Edit:
    """Another line in the place of this one, from 1."""
    return lambda lines: [*lines[: number - 1], line, *lines[number:]]


def without(number: int, key: str) -> Edit:
    """The line without a key."""

    def edit(lines: list[str]) -> list[str]:
        record = json.loads(lines[number - 1])
        del record[key]
        return replaced(number, json.dumps(record))(lines)

    return edit


def changed(number: int, key: str, value: object) -> Edit:
    def edit(lines: list[str]) -> list[str]:
        record = json.loads(lines[number - 1]) | {key: value}
        return replaced(number, json.dumps(record))(lines)

    return edit


def doubled(lines: list[str]) -> list[str]:
    return [*lines[:2], *lines[1:]]


def disordered(lines: list[str]) -> list[str]:
    return [lines[1], lines[0], *lines[2:]]


def shortened(lines: list[str]) -> list[str]:
    return lines[:1]


# What becomes of the lines -> what the sentence says after "is damaged".
LINES = [
    (replaced(2, "7"), ": line 2 is no line of a step"),
    (replaced(2, "null"), ": line 2 is no line of a step"),
    (replaced(2, '["step"]'), ": line 2 is no line of a step"),
    (replaced(2, DEEP), " after line 1 (RecursionError)"),
    (replaced(2, '{"step": ' + "9" * 5000 + "}"), " after line 1 (ValueError)"),
    (without(2, "step"), ": line 2 is no line of a step"),
    (changed(2, "step", "2"), ": line 2 is no line of a step"),
    (changed(2, "step", None), ": line 2 is no line of a step"),
    (changed(2, "step", True), ": line 2 is no line of a step"),
    (doubled, ": line 3 is of step "),
    (disordered, ": line 2 is of step "),
    (shortened, ": the saved state is of step 3, but step "),
    (replaced(2, '{"step": '), ": the saved state is of step 3, but step "),
]
LOG = [
    (without(2, "equal_groups"), ": line 2 has no number as its 'equal_groups'"),
    (changed(1, "rollout_s", None), ": line 1 has no number as its 'rollout_s'"),
    (changed(1, "reward", "0.5"), ": line 1 has no number as its 'reward'"),
]
VALIDATION = [
    (without(1, "solved"), ": step 0 has no counts of right answers"),
    (changed(1, "solved", 3), ": step 0 has no counts of right answers"),
    (changed(1, "solved", [1, None, 0, 0, 0]), ": step 0 has no counts of right answers"),
    (changed(1, "solved", [9, 0, 0, 0, 0]), ": step 0 has impossible counts of right answers"),
    (without(1, "samples"), ": line 1 has no number as its 'samples'"),
]
DAMAGED = [
    *[("log.jsonl", edit, sentence) for edit, sentence in [*LINES, *LOG]],
    *[("validation.jsonl", edit, sentence) for edit, sentence in [*LINES, *VALIDATION]],
]


def assert_refused_in_a_sentence(monkeypatch, run: Path) -> str:
    """... and nothing has changed -> the sentence."""
    before = content_of(run.parent)
    sentence = run_command(monkeypatch, "train.py", "--resume", str(run))
    assert isinstance(sentence, str)
    assert sentence.startswith("train.py: ")
    assert "\n" not in sentence
    assert content_of(run.parent) == before
    return sentence


@pytest.mark.parametrize("name, edit, words", DAMAGED)
def test_a_damaged_line_is_refused_in_a_sentence(monkeypatch, run, name, edit, words):
    file = run / name
    damaged = edit(file.read_text().splitlines())
    file.write_text("".join(line + "\n" for line in damaged))
    sentence = assert_refused_in_a_sentence(monkeypatch, run)
    assert sentence.startswith(f"train.py: {file} is damaged{words}")


@pytest.mark.parametrize("name", ["log.jsonl", "validation.jsonl"])
def test_lines_that_are_no_text_are_refused_in_a_sentence(monkeypatch, run, name):
    (run / name).write_bytes(b'{"step": "\xff"}\n')
    sentence = assert_refused_in_a_sentence(monkeypatch, run)
    assert sentence == f"train.py: {run / name} is damaged after line 0 (UnicodeDecodeError)"


def test_a_damaged_validation_leaves_the_log_as_it_is(monkeypatch, run):
    """Also where the log is to be cut, as its last step is not in the state."""
    with open(run / "log.jsonl", "a") as log:
        log.write('{"step": 4, "rew')
    (run / "validation.jsonl").write_text("7\n")
    assert_refused_in_a_sentence(monkeypatch, run)


def test_other_problems_than_before_are_refused_in_a_sentence(monkeypatch, run):
    change_settings(run, {"eval_problems": 4})
    sentence = assert_refused_in_a_sentence(monkeypatch, run)
    assert sentence == (
        f"train.py: {run}/validation.jsonl is of 5 validation problems in step 0, and now there "
        "are 4; has the data changed?"
    )


def change_settings(run: Path, change: dict) -> None:
    file = run / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


def as_integers(state: dict) -> dict:
    return {name: tensor.to(torch.int32) for name, tensor in state.items()}


def as_doubles(state: dict) -> dict:
    return {name: tensor.double() for name, tensor in state.items()}


def as_it_is(state: dict) -> dict:
    return state


@pytest.mark.parametrize(
    "edit, step, words",
    [
        (as_integers, "3", "is not a whole state of this run (ValueError: policy/"),
        (as_doubles, "3", "is of torch.float64, and not of torch.float32)"),
        (as_it_is, "4", "is of step 4, but the run has 3 steps"),
        (as_it_is, "-1", "is of step -1, but the run has 3 steps"),
        (as_it_is, "1" + "0" * 30, "but the run has 3 steps"),
        (as_it_is, "1" + "0" * 9000, "is not a whole state of this run"),
        (as_it_is, "three", "is not a whole state of this run"),
    ],
)
def test_a_damaged_state_is_refused_in_a_sentence(monkeypatch, run, edit, step, words):
    file = run / "state.safetensors"
    save_file(edit(load_file(file)), file, {"step": step})
    sentence = assert_refused_in_a_sentence(monkeypatch, run)
    assert sentence.startswith(f"train.py: {file} is ")
    assert words in sentence


def test_a_huge_step_in_settings_and_state_does_not_hang(monkeypatch, run):
    change_settings(run, {"steps": 10**30})
    file = run / "state.safetensors"
    save_file(load_file(file), file, {"step": str(10**30)})
    sentence = assert_refused_in_a_sentence(monkeypatch, run)
    assert f"the saved state is of step {10**30}, but step 4 is missing" in sentence


@pytest.mark.parametrize(
    "change, words",
    [
        ({"dry_run": True}, "dry_run cannot be True; a dry run leaves no folder"),
        ({"steps": -1}, "--steps must be at least 1; it is -1"),
        ({"steps": 2}, "is of step 3, but the run has 2 steps"),
        ({"lr": float("nan")}, "--lr must be a finite number; it is nan"),
        ({"prompts": 10**9}, "what may help: fewer --prompts"),
        ({"max_new_tokens": 10**30}, "what may help: fewer --slots"),
        ({"name": {}}, "name cannot be {}"),
        ({"model": "\0"}, "there is no model folder"),
        ({"data": "nowhere"}, "--data and --test-data go with --task math"),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used here"),
    ],
)
def test_edited_settings_are_refused_in_a_sentence(monkeypatch, run, change, words):
    change_settings(run, change)
    assert words in assert_refused_in_a_sentence(monkeypatch, run)


@pytest.mark.parametrize(
    "content", [DEEP.encode(), b'{"algo": "\xff"}', b"", b"7", b"{", b'{"lr": ' + b"9" * 5000]
)
def test_settings_that_are_no_object_are_refused_in_a_sentence(monkeypatch, run, content):
    (run / "config.json").write_bytes(content)
    sentence = assert_refused_in_a_sentence(monkeypatch, run)
    assert sentence == f"train.py: {run}/config.json does not hold a JSON object"


def test_a_run_goes_on_where_it_is_whatever_its_settings_call_it(run, tmp_path):
    """Folders may be moved; name and out say where the run was made."""
    other = tmp_path / "other"
    shutil.copytree(run, other)
    change_settings(run, {"name": "other", "out": str(tmp_path), "overwrite": True})
    before = content_of(tmp_path)
    assert train.train(Settings(resume=str(run))) == run
    assert content_of(tmp_path) == before


def damage_log(run: Path) -> None:
    (run / "log.jsonl").write_text(DEEP)


def damage_validation(run: Path) -> None:
    (run / "validation.jsonl").write_text("null\n")


def damage_state(run: Path) -> None:
    file = run / "state.safetensors"
    save_file(as_integers(load_file(file)), file, {"step": "3"})


def damage_settings(run: Path) -> None:
    (run / "config.json").write_text(DEEP)


@pytest.mark.parametrize("damage", [damage_log, damage_validation, damage_state, damage_settings])
def test_each_damaged_file_in_a_process_of_its_own(run, damage):
    damage(run)
    before = content_of(run.parent)
    assert str(run) in refusal("--resume", str(run))
    assert content_of(run.parent) == before
