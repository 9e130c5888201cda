"""plumbing/run.py: what a run's folder must never lack, never lose and never replace; how a run
that gets a signal says where it stands."""

import dataclasses
import datetime
import json
import os
import shlex
import signal
import time

import pytest

import train
from plumbing.pretrained import find_folder
from plumbing.run import claim, open_run, settings_of_run, store_longer
from plumbing.settings import Settings, check, parse_flags, run_name
from plumbing.stop import Stop
from training_runs import (
    ROOT,
    SMALL,
    content_of,
    finish,
    read_jsonl,
    replace_reward,
    reward_by_length,
    run_command,
    small_run,
    start,
    wait_for_lines,
    wait_for_words,
)


def raise_keyboard_interrupt(*_) -> None:
    raise KeyboardInterrupt


def test_a_run_folder_never_lacks_its_settings(tmp_path, monkeypatch):
    s = Settings(out=str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", raise_keyboard_interrupt)
        with pytest.raises(KeyboardInterrupt):
            open_run(s, "run")
    assert not (tmp_path / "run").exists()

    folder = open_run(s, "run")
    assert json.loads((folder / "config.json").read_text()) == dataclasses.asdict(s)
    assert [file.name for file in tmp_path.iterdir()] == ["run"]
    with pytest.raises(FileExistsError, match="--resume"):
        open_run(s, "run")


def test_an_existing_run_is_not_overwritten(monkeypatch, tmp_path):
    log = tmp_path / "grpo" / "log.jsonl"
    log.parent.mkdir()
    log.write_text("precious")
    message = run_command(monkeypatch, "train.py", "--out", str(tmp_path), "--name", "grpo")
    assert "exists" in message
    assert "--overwrite" in message
    assert log.read_text() == "precious"


def overwrite(monkeypatch, out, name: str, *flags: str) -> str:
    """-> the message that the command exits with."""
    return run_command(
        monkeypatch, "train.py", "--out", str(out), "--name", name, "--overwrite", *flags
    )


def test_overwrite_replaces_nothing_but_runs(monkeypatch, tmp_path):
    chapter = tmp_path / "thesis" / "chapter.tex"
    chapter.parent.mkdir()
    chapter.write_text("precious")
    refusals = {
        "thesis": "is no run folder",
        ".": "not a path",
        "..": "not a path",
        "a/b": "not a path",
        str(tmp_path / "thesis"): "not a path",
    }
    for name, sentence in refusals.items():
        assert sentence in overwrite(monkeypatch, tmp_path, name)
        assert chapter.read_text() == "precious"


def test_overwrite_replaces_a_run_but_not_the_one_that_the_model_comes_from(monkeypatch, tmp_path):
    folder, _ = small_run(tmp_path, "a", steps=1)
    for model in (folder, folder / "model"):
        message = overwrite(monkeypatch, tmp_path, "a", "--model", str(model))
        assert "would delete" in message
        assert (folder / "model" / "config.json").exists()
    folder, log = small_run(tmp_path, "a", overwrite=True)
    assert len(log) == SMALL["steps"] == 2  # of the new run alone


def test_a_run_folder_that_cannot_be_made(monkeypatch, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    message = run_command(monkeypatch, "train.py", "--out", str(file))
    assert message.startswith("train.py: ")
    assert "\n" not in message


def test_a_folder_without_settings_cannot_be_resumed(tmp_path):
    for missing in (str(tmp_path / "nowhere"), ""):
        with pytest.raises(FileNotFoundError, match="there is no run .*: it has no config.json"):
            settings_of_run(missing, ["--resume", missing])


# Values that are their flags' defaults are refused too.
@pytest.mark.parametrize(
    "flags", [["--lr", "1"], ["--algo=grpo"], ["--overwrite"], ["--steps", "9", "--seed", "0"]]
)
def test_no_other_flag_goes_with_resume(tmp_path, flags):
    folder = str(open_run(Settings(out=str(tmp_path)), "run"))
    with pytest.raises(ValueError, match="no other flag goes with it"):
        settings_of_run(folder, ["--resume", folder, *flags])


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"beta": 1}, "another version of train.py: the two differ in beta"),
        ({"steps": "6"}, "steps cannot be '6'"),
        ({"prompts": 2.0}, "prompts cannot be 2.0"),
        ({"algo": "dapo"}, "algo cannot be 'dapo'"),
        ({"lr": None}, "lr cannot be None"),
    ],
)
def test_settings_that_this_version_does_not_know_cannot_be_resumed(tmp_path, change, sentence):
    folder = open_run(Settings(out=str(tmp_path)), "run")
    change_settings(folder, change)
    with pytest.raises(ValueError, match=sentence):
        settings_of_run(str(folder))


def test_a_whole_number_is_a_number(tmp_path):
    folder = open_run(Settings(out=str(tmp_path)), "run")
    change_settings(folder, {"lr": 1})
    assert settings_of_run(str(folder)).lr == 1


def change_settings(folder, change: dict) -> None:
    file = folder / "config.json"
    saved = json.loads(file.read_text())
    file.write_text(json.dumps(saved | change))


def test_a_second_signal_stops_at_once(tmp_path):
    flags = "--name run --eval-problems 1 --final-samples 1 --steps 1".split()
    process = start("--out", str(tmp_path), *flags)
    wait_for_lines(process, tmp_path / "run/validation.jsonl")
    time.sleep(0.2)  # now it is in the first step, of 512 sequences
    process.send_signal(signal.SIGINT)
    # Two signals within one long operation of torch would be one to Python.
    wait_for_words(process, "once more stops at once")
    process.send_signal(signal.SIGINT)
    code, error = finish(process)
    assert code == 1
    assert error == (
        f"train.py: stopped; go on from step 0 with: python train.py --resume {tmp_path}/run"
    )
    assert not (tmp_path / "run/log.jsonl").exists()


def longer(run, steps: int, **options) -> None:
    """`train.py --resume run --steps steps`, in a process of its own."""
    script = str(ROOT / "train.py")
    flags = ["--resume", str(run), "--steps", str(steps)]
    code, error = finish(start(*flags, script=script, **options))
    assert code == 0, error


MEASURED = ("_s", "memory_gb")  # ends of the log's keys for times and memory


def comparable(file) -> list[dict]:
    """The lines of a log, but for times and memory."""
    return [
        {key: value for key, value in line.items() if not key.endswith(MEASURED)}
        for line in read_jsonl(file)
    ]


@pytest.mark.parametrize("algo", ["grpo", "ppo"])
def test_a_finished_run_that_goes_on_is_a_longer_run_from_the_start(tmp_path, monkeypatch, algo):
    """Bit for bit: weights, optimizer, log and validations, but for the validation at the old end,
    which is kept."""
    replace_reward(monkeypatch, reward_by_length)
    changes = {"algo": algo, "critic_warmup": 1, "eval_every": 2, "max_new_tokens": 24}
    whole, log = small_run(tmp_path, "whole", **changes, steps=5)
    assert len({line["reward"] for line in log}) > 1
    run, _ = small_run(tmp_path, "run", **changes, steps=3)
    run = train.train(Settings(resume=str(run), steps=5))

    assert (run / "state.safetensors").read_bytes() == (whole / "state.safetensors").read_bytes()
    for name in ("model.safetensors", "config.json"):
        assert (run / "model" / name).read_bytes() == (whole / "model" / name).read_bytes()
    assert comparable(run / "log.jsonl") == comparable(whole / "log.jsonl")
    validations = read_jsonl(run / "validation.jsonl")
    assert [line["step"] for line in validations] == [0, 2, 3, 4, 5]
    assert [line for line in validations if line["step"] != 3] == read_jsonl(
        whole / "validation.jsonl"
    )
    assert (run / "validation.json").read_bytes() == (whole / "validation.json").read_bytes()
    # From now on the run has five steps.
    settings = settings_of_run(str(run))
    assert settings.steps == 5
    assert train.train(settings) == run
    assert comparable(run / "log.jsonl") == comparable(whole / "log.jsonl")


def test_a_run_cannot_become_shorter(monkeypatch, tmp_path):
    run = open_run(Settings(out=str(tmp_path), steps=7), "run")
    before = content_of(run)
    sentence = run_command(monkeypatch, "train.py", "--resume", str(run), "--steps", "6")
    assert sentence == (
        f"train.py: --steps must be at least 7 here, those of the run {run}; it is 6"
    )
    assert content_of(run) == before


def test_a_longer_run_that_dies_at_once_is_longer_and_not_finished(tmp_path, monkeypatch):
    """Its old final table is gone before the new number of steps is there, so nothing takes the one
    for the other's."""
    run, _ = small_run(tmp_path, "run")
    assert (run / "validation.json").exists()
    with claim(Settings(resume=str(run), steps=4), rank=0) as s:
        assert s.steps == 4
        assert settings_of_run(str(run)).steps == 2  # it may still be refused
        with monkeypatch.context() as patch:
            patch.setattr("plumbing.run.atomic_write", raise_keyboard_interrupt)
            with pytest.raises(KeyboardInterrupt):
                store_longer(run, s)
        assert settings_of_run(str(run)).steps == 2
        assert not (run / "validation.json").exists()
        store_longer(run, s)
    assert settings_of_run(str(run)).steps == 4


def test_a_refused_longer_run_is_as_it_was(tmp_path, monkeypatch):
    """Two problems per minibatch cannot be shared by three processes."""
    run, _ = small_run(tmp_path, "run")
    before = {file: file.read_bytes() for file in run.iterdir() if file.is_file()}
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="number of processes"):
        with claim(Settings(resume=str(run), steps=4), rank=0) as s:
            check(s)
    assert {file: file.read_bytes() for file in run.iterdir() if file.is_file()} == before


def test_the_steps_of_a_run_that_is_resumed_are_its_own(tmp_path):
    """Also where they are not the default."""
    run = open_run(Settings(out=str(tmp_path), steps=7), "run")
    s = parse_flags(Settings, "train", ["--resume", str(run)])
    with claim(s, rank=0) as s:
        assert s.steps == 7
    s = parse_flags(Settings, "train", ["--resume", str(run), "--steps", "100"])
    with claim(s, rank=0) as s:
        assert s.steps == 100
    assert parse_flags(Settings, "train", []).steps == Settings().steps == 100


def test_the_day_of_the_start_is_kept(tmp_path, monkeypatch):
    """For chat templates that tell today's date; it is in no run's name."""

    class Day(datetime.date):
        @classmethod
        def today(cls):
            return cls(2024, 2, 29)

    with monkeypatch.context() as patch:
        patch.setattr(datetime, "date", Day)
        s = Settings(out=str(tmp_path))
        run = open_run(s, "run")
    assert run_name(s) == "grpo"
    assert settings_of_run(str(run)).date == "2024-02-29"
    assert Settings().date != "2024-02-29"


def test_a_run_goes_on_from_any_folder(tmp_path, qwen2):
    """--model, --data, --test-data and --out were said in another one, without their full paths."""
    rows = [{"problem": f"1 + {i} = ?", "answer": str(i + 1)} for i in range(9)]
    here = tmp_path / "here"
    elsewhere = tmp_path / "elsewhere"
    for folder in (here, elsewhere):
        folder.mkdir()
    qwen2(name="here/model")
    for name in ("train.jsonl", "test.jsonl"):
        (here / name).write_text("".join(json.dumps(row) + "\n" for row in rows[: len(name)]))
        rows = rows[5:]
    flags = (
        "--task math --model model --data ./train.jsonl --test-data test.jsonl --template none "
        "--steps 1 --prompts 2 --samples 2 --minibatch 2 --max-new-tokens 4 --eval-problems 1 "
        "--eval-samples 1 --final-samples 1 --slots 4 --out runs"
    ).split()
    script = str(ROOT / "train.py")
    code, error = finish(start(*flags, script=script, cwd=here))
    assert code == 0, error
    [run] = (here / "runs").iterdir()
    assert run.name == run_name(parse_flags(Settings, "train", flags))  # of what was typed
    saved = json.loads((run / "config.json").read_text())
    assert saved["model"] == str(here / "model")
    assert saved["data"] == str(here / "train.jsonl")
    assert saved["test_data"] == str(here / "test.jsonl")

    longer(f"../here/runs/{run.name}", 2, cwd=elsewhere)
    assert len((run / "log.jsonl").read_text().splitlines()) == 2
    assert list(elsewhere.iterdir()) == []


def test_base_is_the_embedded_model_wherever_one_is(tmp_path, monkeypatch):
    """Also where there is another folder of that name, when a run is resumed there."""
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find_folder("base") == ROOT / "base"
    run = open_run(Settings(out="runs"), "run")
    assert settings_of_run(str(run)).model == "base"


def test_hub_ids_are_stored_as_they_are(tmp_path):
    s = Settings(out=str(tmp_path), model="Qwen/Qwen3-8B", task="math", data="owner/name")
    saved = settings_of_run(str(open_run(s, "run")))
    assert (saved.model, saved.data, saved.test_data) == ("Qwen/Qwen3-8B", "owner/name", "")


def test_how_to_go_on_is_a_command_of_a_shell(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["/my code/train.py"])
    ending = Stop()
    assert ending.how_to_resume() == ""
    ending.run = tmp_path / "it's a run"
    ending.saved = 3
    command = ending.how_to_resume().removeprefix("; go on from step 3 with: ")
    assert shlex.split(command) == ["python", "/my code/train.py", "--resume", str(ending.run)]
