"""plumbing/folder.py: --overwrite takes nothing away but a run, and no sooner than the new one has
done a step; and what killed processes leave is mended at the next start."""

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import pytest

import train
from plumbing.folder import MODEL_FILES, new_place, old_place
from plumbing.lock import workplace
from plumbing.settings import Settings
from training_runs import (
    SMALL,
    content_of,
    finish,
    read_jsonl,
    refusal,
    run_command,
    small_run,
    start,
    wait_for_lines,
)

FLAGS = [
    word for name, value in SMALL.items() for word in ("--" + name.replace("_", "-"), str(value))
]
FLAGS += ["--max-new-tokens", "16", "--eval-every", "1"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run that is through."""
    out = tmp_path_factory.mktemp("finished")
    return small_run(out, "run", max_new_tokens=16, eval_every=1)[0]


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "out" / "run"))


def overwriting(run: Path) -> list[str]:
    return [*FLAGS, "--out", str(run.parent), "--name", run.name, "--overwrite"]


def test_what_a_run_writes_is_all_its_own(finished):
    """So it can be replaced; and a model has no file that is not listed."""
    names = {file.name for file in (finished / "model").iterdir()}
    assert names <= set(MODEL_FILES)


def nested_run(run: Path) -> None:
    shutil.copytree(run, run / "better")


def data_inside(run: Path) -> None:
    (run / "train.jsonl").write_text("precious")


def data_in_the_model(run: Path) -> None:
    (run / "model" / "notes.txt").write_text("precious")


def folder_with_a_files_name(run: Path) -> None:
    (run / "validation.json").unlink()
    (run / "validation.json").mkdir()
    (run / "validation.json" / "precious").write_text("")


def link_to_a_state(run: Path) -> None:
    elsewhere = run.parent / "state"
    (run / "state.safetensors").rename(elsewhere)
    (run / "state.safetensors").symlink_to(elsewhere)


STRANGERS = {
    nested_run: "better, which is no file of a run",
    data_inside: "train.jsonl, which is no file of a run",
    data_in_the_model: "model/notes.txt, which is no file of a run",
    folder_with_a_files_name: "validation.json, which is no file of a run",
    link_to_a_state: "state.safetensors, which is no file of a run",
}


@pytest.mark.parametrize("put_inside", STRANGERS)
def test_a_run_with_something_else_inside_is_not_replaced(run, put_inside):
    put_inside(run)
    before = content_of(run.parent)
    sentence = refusal(*overwriting(run))
    assert sentence == f"train.py: --overwrite would delete {run}/{STRANGERS[put_inside]}"
    assert content_of(run.parent) == before


def test_a_link_is_not_replaced(run):
    elsewhere = run.rename(run.parent / "elsewhere")
    run.symlink_to(elsewhere)
    assert refusal(*overwriting(run)).endswith(f"would delete {run}, which is a link")
    assert (elsewhere / "state.safetensors").exists()


def test_a_folder_that_is_no_run_is_not_replaced(monkeypatch, tmp_path):
    """A LoRA adapter has an alpha too. A run of another version has other settings."""
    adapter = {"alpha": 16, "r": 8, "peft_type": "LORA"}
    other_version = dataclasses.asdict(Settings()) | {"beta": 1.0}
    for config in (adapter, other_version, {}, []):
        folder = tmp_path / "folder"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
        before = content_of(folder)
        sentence = run_command(monkeypatch, "train.py", *overwriting(folder))
        assert sentence == (
            f"train.py: --overwrite would delete {folder}, which is no run folder of this version "
            "of train.py"
        )
        assert content_of(folder) == before


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ("--model ./nowhere", "there is no model folder"),
        ("--task math --data nowhere.jsonl", "neither a file nor"),
        ("--prompts 3", "a divisor of --prompts"),
        ("--prompts 100000000", "what may help: fewer --prompts"),
    ],
)
def test_a_failed_start_leaves_the_old_run(monkeypatch, run, flags, sentence):
    before = content_of(run.parent)
    message = run_command(monkeypatch, "train.py", *overwriting(run), *flags.split())
    assert sentence in message
    assert content_of(run.parent) == before
    assert list(run.parent.iterdir()) == [run]


def test_the_old_run_stays_until_the_new_one_has_done_a_step(run):
    """Killed before that: the old one is whole, and goes on. The next --overwrite is through."""
    before = content_of(run)
    new = new_place(run)
    slow = ["--prompts", "64", "--samples", "64", "--max-new-tokens", "128"]
    process = start(*overwriting(run), *slow)
    wait_for_lines(process, new / "validation.jsonl")
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert (new / "validation.jsonl").exists()
    assert not (new / "log.jsonl").exists()
    assert content_of(run) == before

    code, error = finish(start("--resume", str(run)))
    assert code == 0, error
    assert content_of(run) == before
    assert list(run.parent.iterdir()) == [run]

    code, error = finish(start(*overwriting(run), "--lr", "0.01"))
    assert code == 0, error
    assert len(read_jsonl(run / "log.jsonl")) == SMALL["steps"]
    assert json.loads((run / "config.json").read_text())["lr"] == 0.01
    assert content_of(run)[run / "state.safetensors"] != before[run / "state.safetensors"]
    assert list(run.parent.iterdir()) == [run]


def test_stopped_before_the_first_step_the_old_run_is_as_it_was(run):
    before = content_of(run.parent)
    slow = ["--eval-problems", "200", "--final-samples", "64"]
    process = start(*overwriting(run), *slow)
    wait_for_lines(process, new_place(run) / "config.json")
    process.send_signal(signal.SIGTERM)
    assert finish(process) == (1, "train.py: stopped")
    assert content_of(run.parent) == before


def test_killed_between_the_two_renames_nothing_is_lost(run):
    before = content_of(run)
    workplace(run).mkdir()
    shutil.copytree(run, new_place(run))
    (new_place(run) / "state.safetensors").unlink()
    os.rename(run, old_place(run))

    assert train.train(Settings(resume=str(run))) == run
    assert content_of(run) == before
    assert list(run.parent.iterdir()) == [run]


def test_what_was_put_into_the_old_run_meanwhile_is_not_deleted(run):
    slow = ["--prompts", "16", "--samples", "16"]
    process = start(*overwriting(run), *slow)
    wait_for_lines(process, new_place(run) / "config.json")
    (run / "notes.txt").write_text("precious")
    code, error = finish(process)
    assert code == 1
    assert error == f"train.py: --overwrite would delete {run}/notes.txt, which is no file of a run"
    assert (run / "notes.txt").exists()
    assert list(run.parent.iterdir()) == [run]


def test_leftovers_of_killed_saves_are_removed_at_the_next_start(run):
    """The model's earlier folder goes back where no new one took its place."""
    before = content_of(run)
    (run / ".state.safetensors.tmp").mkdir()
    (run / ".state.safetensors.tmp" / "state.safetensors").write_text("half")
    (run / ".log.jsonl.tmp").write_text("a file")
    (run / ".model.tmp" / "model").mkdir(parents=True)
    (run / "model").rename(run / ".model.old")
    code, error = finish(start("--resume", str(run)))
    assert code == 0, error
    assert content_of(run) == before
    assert not list(run.glob(".*"))

    shutil.copytree(run / "model", run / ".model.old")
    train.train(Settings(resume=str(run)))
    assert content_of(run) == before


def test_leftovers_do_not_keep_a_run_from_being_replaced(run):
    (run / ".model.tmp" / "model").mkdir(parents=True)
    (run / ".model.tmp" / "model" / "half").write_text("")
    small_run(run.parent, "run", overwrite=True, max_new_tokens=16)
    assert not list(run.glob(".*"))


def test_a_run_with_a_name_like_a_workplace_does_not_vanish(run):
    """Nor can one be made."""
    others = [run.with_name(f".G.{end}") for end in ("tmp", "old", "new", "work")]
    for other in others:
        shutil.copytree(run, other)
    before = content_of(run.parent)
    small_run(run.parent, "G", max_new_tokens=16)
    small_run(run.parent, "G", max_new_tokens=16, overwrite=True)
    after = content_of(run.parent)
    assert before.items() <= after.items()

    assert refusal(*FLAGS, "--out", str(run.parent), "--name", ".G.tmp", "--overwrite") == (
        "train.py: --name must not begin with a dot, as what is not finished does; it is '.G.tmp'"
    )
