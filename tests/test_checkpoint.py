"""plumbing/checkpoint.py: runs that are killed, filled up, interrupted and broken go on as if
nothing had happened: each is held, bit for bit, against a run that was left alone."""

import random
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import load
from plumbing.checkpoint import (
    append_line,
    keep_lines,
    load_state,
    read_lines,
    save_state,
    write_tensors,
)
from plumbing.optimizer import make_optimizer
from plumbing.pretrained import save
from plumbing.settings import Settings
from train import Trained
from training_runs import content_of, finish, read_jsonl, start, wait_for_lines

FLAGS = (
    "--steps 6 --prompts 4 --samples 4 --minibatch 2 --eval-problems 4 --eval-samples 2 "
    "--final-samples 4 --slots 8 --max-new-tokens 48 --no-skip-zero --critic-warmup 2"
).split()
# What two equal runs do not share.
MEASURED = {"rollout_s", "reward_s", "score_s", "update_s", "peak_memory_gb"}
FILES = {
    "config.json",
    "log.jsonl",
    "validation.jsonl",
    "validation.json",
    "state.safetensors",
    "model",
}


def lines(file: Path) -> list[dict]:
    """Without what is measured."""
    return [
        {key: value for key, value in line.items() if key not in MEASURED}
        for line in read_jsonl(file)
    ]


def assert_whole_and_nothing_left_over(run: Path) -> None:
    assert {file.name for file in run.iterdir()} == FILES
    assert not list((run / "model").glob(".*"))
    state = load_file(run / "state.safetensors")
    model = load_file(run / "model/model.safetensors")
    assert model["model.norm.weight"].equal(state["policy/norm.weight/weight"])


def assert_equal_runs(a: Path, b: Path, validated=(0, 6)) -> None:
    """Bit for bit: weights, critic, moments; log and validations but for times and memory.
    `validated`: the steps of b's validations."""
    first = load_file(a / "state.safetensors")
    second = load_file(b / "state.safetensors")
    assert set(first) == set(second)
    assert any(name.endswith("exp_avg_sq") for name in first)
    for name in first:
        assert first[name].equal(second[name])
    assert_whole_and_nothing_left_over(a)
    assert_whole_and_nothing_left_over(b)

    assert lines(a / "log.jsonl") == lines(b / "log.jsonl")
    assert [line["step"] for line in lines(a / "log.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines(b / "validation.jsonl")] == list(validated)
    assert (a / "validation.json").read_text() == (b / "validation.json").read_text()


# Where the algorithm makes no difference.
GRPO = pytest.mark.parametrize("whole", ["grpo"], indirect=True)


@pytest.fixture(scope="module", params=["grpo", "ppo"])
def whole(request, tmp_path_factory) -> tuple[Path, list[str]]:
    """A run of six steps in one go, saved once at the end -> its folder, its algorithm's flags."""
    out = tmp_path_factory.mktemp(request.param)
    flags = [*FLAGS, "--algo", request.param, "--out", str(out)]
    code, error = finish(start(*flags, "--name", "whole"))
    assert code == 0, error
    return out / "whole", flags


def resume(run: Path) -> None:
    code, error = finish(start("--resume", str(run)))
    assert code == 0, error


def kill(process) -> None:
    process.kill()
    process.communicate()


def test_six_steps_are_three_and_three(whole):
    folder, flags = whole
    halves = folder.parent / "halves"
    process = start(*flags, "--name", "halves", "--eval-every", "3")
    wait_for_lines(process, halves / "log.jsonl", 4)  # in step 5: step 4 will be done again
    kill(process)
    assert process.returncode == -signal.SIGKILL
    assert (halves / "state.safetensors").exists()
    resume(halves)
    assert_equal_runs(folder, halves, (0, 3, 6))


def test_kill_9_at_random_moments(whole):
    """Up to five times, and then until it is through; a save after every step."""
    folder, flags = whole
    run = folder.parent / "killed"
    log = run / "log.jsonl"
    seed = time.time_ns()
    moment = random.Random(seed)
    kills = 0
    arguments = [*flags, "--name", "killed", "--eval-every", "1"]
    while True:
        process = start(*arguments)
        before = len(log.read_text().splitlines()) if log.exists() else 0
        wait_for_lines(process, log, before + 1)  # it is at work
        if kills < 5:
            time.sleep(moment.random() * 0.8)
            process.kill()
        _, error = process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, f"random seed {seed}: {error}"
        kills += 1
        arguments = ["--resume", str(run)]
    assert kills > 0
    assert_equal_runs(folder, run, range(7))


@pytest.mark.parametrize(
    "whole, call", [("grpo", 3), ("grpo", 7), ("grpo", 8), ("ppo", 8)], indirect=["whole"]
)
def test_kill_9_inside_a_save(whole, call):
    """The first save writes the model (1), renames it (2), writes the state (3) and renames it (4);
    the second writes the model (5), moves the old one away (6), renames the new one (7), writes the
    state (8) and renames it (9)."""
    folder, flags = whole
    run = folder.parent / f"inside-{call}"
    process = start(
        str(call),
        *flags,
        "--name",
        run.name,
        "--eval-every",
        "3",
        script="tests/killed_in_a_save.py",
    )
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    in_second_save = call > 4
    assert (run / "state.safetensors").exists() == in_second_save
    if call == 7:
        assert (run / ".model.old/config.json").exists()
        assert not (run / "model").exists()
    else:
        files = [path for path in run.rglob("*") if path.is_file()]
        assert bytes(1000) in [path.read_bytes() for path in files]  # one is half written
    resume(run)
    assert_equal_runs(folder, run, (0, 3, 6))


@GRPO
def test_a_full_disk_loses_nothing(whole):
    """A limit on the size of files fails a save as a full disk would: below the size of the model,
    then between it and that of the state."""
    folder, flags = whole
    run = folder.parent / "full"
    state = run / "state.safetensors"
    process = start(*flags, "--name", "full", "--eval-every", "1")
    while process.poll() is None and not state.exists():
        time.sleep(0.01)
    kill(process)
    before = state.read_bytes()

    for limit, file in ((1_000_000, "model"), (3_000_000, "state.safetensors")):

        def limit_files() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        code, error = finish(start("--resume", str(run), preexec_fn=limit_files))
        assert code == 1
        assert error.startswith(f"train.py: {run}/{file} could not be written (")
        assert state.read_bytes() == before
        assert not list(run.glob("*.tmp"))
    resume(run)
    assert_equal_runs(folder, run, range(7))


def test_a_full_disk_fails_a_log_line_in_a_sentence():
    sentence = "/dev/full could not be written .No space left on device"
    with pytest.raises(OSError, match=sentence):
        append_line(Path("/dev/full"), {})


class TokenizerOnAFullDisk:
    def save_pretrained(self, folder):
        # What the tokenizers library raises there: no OSError.
        raise Exception("No space left on device (os error 28)")


def test_a_full_disk_leaves_the_model_that_was_there(tmp_path):
    model, tokenizer = load("base")
    save(model, tokenizer, tmp_path / "model")
    with pytest.raises(OSError, match="model could not be written .No space left"):
        save(model, TokenizerOnAFullDisk(), tmp_path / "model")
    load(str(tmp_path / "model"))
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


@GRPO
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_step_be_saved_and_says_how_to_go_on(whole, number):
    folder, flags = whole
    run = folder.parent / f"stopped-{number.name}"
    process = start(*flags, "--name", run.name)  # without a signal, only step 6 is saved
    wait_for_lines(process, run / "log.jsonl")
    process.send_signal(number)
    code, error = finish(process)
    done = len(lines(run / "log.jsonl"))
    assert code == 1
    assert error == (
        f"train.py: stopped; go on from step {done} with: python train.py --resume {run}"
    )
    assert load_state(run, untrained_parts()) == done >= 1
    resume(run)
    assert_equal_runs(folder, run)


@GRPO
def test_a_finished_run_prints_its_table_again_and_changes_nothing(whole):
    folder, _ = whole
    before = content_of(folder)
    printed, _ = start("--resume", str(folder)).communicate()
    assert "trained - base" in printed
    assert content_of(folder) == before


def test_weights_that_are_not_finite_stop_the_run_and_are_not_saved(tmp_path):
    """An absurd learning rate; the groups may all be equal then, and no loss be there to look
    at."""
    absurd = "--skip-zero --lr 1e30 --eval-every 1 --name run".split()
    run = tmp_path / "run"
    code, error = finish(start(*FLAGS, *absurd, "--out", str(tmp_path)))
    assert code == 1
    assert error.startswith("train.py: stopped in step ")
    assert "finite" in error or "nan" in error.lower()
    saved = (run / "state.safetensors").exists()
    assert (f"--model {run}/model" in error) == saved == (run / "model").exists()
    assert ("nothing was saved yet" in error) != saved
    for file in tmp_path.rglob("*.safetensors"):
        for tensor in load_file(file).values():
            assert tensor.isfinite().all()


def untrained_parts() -> dict[str, Trained]:
    model, _ = load("base")
    return {"policy": Trained(model, make_optimizer(model, 0.1, Settings()))}


def without(tensors: dict, name: str) -> dict:
    return {key: tensor for key, tensor in tensors.items() if key != name}


@GRPO
def test_a_damaged_state_is_refused_in_a_sentence(whole, tmp_path):
    folder, _ = whole
    good = load_file(folder / "state.safetensors")
    step = {"step": "6"}
    assert load_state(folder, untrained_parts()) == 6
    weight = "policy/norm.weight/weight"
    nan = {weight: torch.full((96,), torch.nan)}
    other_shape = {weight: torch.ones(5)}
    other_algorithm = {"critic/value.bias/weight": torch.ones(1)}
    # Tensors and metadata -> what the sentence says of them.
    damaged = [
        (without(good, weight), step, ""),
        (without(good, "policy/norm.weight/exp_avg"), step, ""),
        (good | nan, step, ".*holds NaN"),
        (good | other_shape, step, ".*belongs to another model"),
        (good | other_algorithm, step, ".*or algorithm"),
        (good, None, ""),
        (good, {"step": "x"}, ""),
    ]
    for tensors, metadata, what in damaged:
        save_file(tensors, tmp_path / "state.safetensors", metadata=metadata)
        with pytest.raises(ValueError, match="is not a whole state of this run" + what):
            load_state(tmp_path, untrained_parts())


@GRPO
def test_half_a_state_is_refused_in_a_sentence(whole, tmp_path):
    folder, _ = whole
    half = (folder / "state.safetensors").read_bytes()[:100_000]
    (tmp_path / "state.safetensors").write_bytes(half)
    with pytest.raises(ValueError, match="is not a whole state"):
        load_state(tmp_path, untrained_parts())


def test_a_run_without_a_state_is_at_step_0(tmp_path):
    assert load_state(tmp_path, untrained_parts()) == 0


def test_a_file_is_written_as_safetensors_writes_it(tmp_path):
    """Byte for byte: both types, no dimension, no numbers, a transposed tensor, a strange name."""
    tensors = {
        "b/weight": torch.randn(3, 5),
        "a/é": torch.randn(7).bfloat16(),
        "step": torch.tensor(3.0),
        "none": torch.zeros(0, 4),
        "turned": torch.randn(4, 6).t(),
    }
    metadata = {"step": "6"}
    write_tensors(tensors, tmp_path / "ours", metadata)
    in_order = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(in_order, tmp_path / "theirs", metadata=metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_what_is_not_finite_is_never_saved(tmp_path):
    parts = untrained_parts()
    with torch.no_grad():
        parts["policy"].module.norm.weight[0] = torch.inf
    with pytest.raises(FloatingPointError, match="policy/norm.weight/weight holds NaN or infinity"):
        save_state(tmp_path / "new", 1, parts, None)
    assert not (tmp_path / "new").exists()


def test_a_log_is_cut_where_the_state_ends(tmp_path):
    file = tmp_path / "log.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "rew')
    records = read_lines(file, 2, range(1, 3))
    assert records == [{"step": 1}, {"step": 2}]
    keep_lines(file, records)
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_damaged_log_is_left_alone(tmp_path):
    file = tmp_path / "log.jsonl"
    torn = '{"step": 1}\n{"st\n{"step": 3}\n'
    file.write_text(torn)
    with pytest.raises(ValueError, match="the saved state is of step 3, but step 2 is missing"):
        read_lines(file, 3, range(1, 4))
    assert file.read_text() == torn


def test_a_log_may_be_missing_only_where_no_line_of_it_is_wanted(tmp_path):
    assert read_lines(tmp_path / "none", 0, range(0)) == []
    with pytest.raises(ValueError, match="step 0 is missing"):
        read_lines(tmp_path / "none", 3, range(0, 3, 3))
