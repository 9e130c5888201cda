"""checkpoint.py: runs that are killed, filled up, interrupted and broken, and go on as if nothing had happened."""

import json
import random
import resource
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file

FLAGS = ("--steps 6 --prompts 4 --samples 4 --minibatch 2 --eval-problems 4 --eval-samples 2 --final-samples 4 --slots 8 "
         "--max-new-tokens 48 --no-skip-zero --critic-warmup 2").split()
TIMES = {"rollout_s", "reward_s", "score_s", "update_s", "rollout_tokens_per_s", "update_tokens_per_s", "peak_memory_gb"}
KILLED_IN_REPLACE = """
import os, runpy, signal, sys
left, replace = int(sys.argv.pop(1)), os.replace
def deadly(*arguments):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*arguments)
os.replace = deadly
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
"""


def start(*arguments, program=("train.py",), **options):
    return subprocess.Popen([sys.executable, *program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def finish(process):
    """-> (exit code, last line of what it said of an error)"""
    error = process.communicate()[1]
    assert "Traceback" not in error, error
    return process.returncode, error.strip().splitlines()[-1] if error.strip() else ""


def lines(file):
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in file.read_text().splitlines()]


def assert_equal_runs(a, b, validated=(0, 6)):
    """Bit for bit: weights, critic, moments; log and validations but for times and memory."""
    first, second = load_file(a / "state.safetensors"), load_file(b / "state.safetensors")
    assert set(first) == set(second) and any(name.endswith("exp_avg_sq") for name in first)
    assert all(first[name].equal(second[name]) for name in first)
    for run in (a, b):
        assert load_file(run / "model/model.safetensors")["model.norm.weight"].equal(first["policy/norm.weight/weight"])
    assert lines(a / "log.jsonl") == lines(b / "log.jsonl")
    assert [line["step"] for line in lines(a / "log.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines(b / "validation.jsonl")] == list(validated)
    assert (a / "validation.json").read_text() == (b / "validation.json").read_text()


GRPO = pytest.mark.parametrize("whole", ["grpo"], indirect=True)            # where the algorithm makes no difference


@pytest.fixture(scope="module", params=["grpo", "ppo"])
def whole(request, tmp_path_factory):
    """A run of six steps in one go, saved once at the end: -> (its folder, the flags of its algorithm)"""
    out = tmp_path_factory.mktemp(request.param)
    flags = [*FLAGS, "--algo", request.param, "--out", str(out)]
    assert finish(start(*flags, "--name", "whole"))[0] == 0
    return out / "whole", flags


def test_six_steps_are_three_and_three(whole):
    folder, flags = whole
    process = start(*flags, "--name", "halves", "--eval-every", "3")
    log = folder.parent / "halves/log.jsonl"
    while process.poll() is None and not (log.exists() and len(log.read_text().splitlines()) >= 4):
        time.sleep(0.01)                                                    # in step 5: step 4 will be done again
    process.kill()
    process.communicate()
    halves = folder.parent / "halves"
    assert process.returncode == -signal.SIGKILL and (halves / "state.safetensors").exists()
    assert finish(start("--resume", str(halves)))[0] == 0
    assert_equal_runs(folder, halves, (0, 3, 6))


def test_kill_9_at_random_moments(whole):
    """Until it is through; saves after every step, so that some kills fall into a save."""
    folder, flags = whole
    run, moment = folder.parent / "killed", random.Random(len(flags[-3]))
    arguments, kills = [*flags, "--name", "killed", "--eval-every", "1"], 0
    while True:
        process = start(*arguments)
        log = run / "log.jsonl"
        before = log.stat().st_mtime_ns if log.exists() else 0
        while process.poll() is None and (not log.exists() or log.stat().st_mtime_ns == before):
            time.sleep(0.01)                                                # until it is at work
        if kills < 3:
            time.sleep(moment.random() * 0.6)
            process.kill()
            kills += 1
        process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL
        if (run / "config.json").exists():
            arguments = ["--resume", str(run)]
    assert kills == 3
    assert_equal_runs(folder, run, range(7))


@pytest.mark.parametrize("call", [2, 3])
def test_kill_9_inside_a_save(whole, call, tmp_path):
    """os.replace puts the weights of model/ (odd calls) and the state (even calls) of a step into place."""
    folder, flags = whole
    run = folder.parent / f"inside-{call}"
    process = start(str(call), *flags, "--name", run.name, "--eval-every", "3", program=("-c", KILLED_IN_REPLACE))
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert (run / "state.safetensors").exists() == (call > 2)
    assert finish(start("--resume", str(run)))[0] == 0
    assert_equal_runs(folder, run, (0, 3, 6))
    assert not [file.name for file in run.rglob("*.tmp") if file.is_file()]


@GRPO
def test_a_full_disk_loses_nothing(whole):
    """A limit on the size of files, below that of the weights: the save fails as it would on a full disk."""
    folder, flags = whole
    run = folder.parent / "full"
    process = start(*flags, "--name", "full", "--eval-every", "1")
    while process.poll() is None and not (run / "state.safetensors").exists():
        time.sleep(0.01)
    process.kill()
    process.communicate()
    before = (run / "state.safetensors").read_bytes()
    limited = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
    code, error = finish(start("--resume", str(run), preexec_fn=limited))
    assert code == 1 and error.startswith("train.py: ") and "could not be written" in error
    assert (run / "state.safetensors").read_bytes() == before
    assert finish(start("--resume", str(run)))[0] == 0
    assert_equal_runs(folder, run, range(7))


@GRPO
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_step_be_saved_and_says_how_to_go_on(whole, number):
    folder, flags = whole
    run = folder.parent / f"stopped-{number.name}"
    process = start(*flags, "--name", run.name)
    while process.poll() is None and not ((run / "log.jsonl").exists() and (run / "log.jsonl").read_text()):
        time.sleep(0.01)
    process.send_signal(number)
    code, error = finish(process)
    assert code == 1 and error == f"train.py: stopped; go on with: python train.py --resume {run}"
    if (run / "state.safetensors").exists():                                # it was in a step, not between two
        assert load_file(run / "model/model.safetensors")["model.norm.weight"].equal(
            load_file(run / "state.safetensors")["policy/norm.weight/weight"])
    assert finish(start("--resume", str(run)))[0] == 0
    assert_equal_runs(folder, run)


@GRPO
def test_a_finished_run_prints_its_table_again_and_changes_nothing(whole):
    folder, _ = whole
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    process = start("--resume", str(folder))
    assert "trained - base" in process.communicate()[0]
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


@GRPO
def test_what_cannot_be_resumed(whole, tmp_path):
    folder, _ = whole
    said = lambda *arguments: finish(start(*arguments))
    assert said("--resume", str(tmp_path / "nowhere")) == (1, f"train.py: there is no run {tmp_path}/nowhere: it has no config.json")
    assert "no other flag goes with it" in said("--resume", str(folder), "--lr", "1")[1]
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"beta": 1}))
    assert "not of this version" in said("--resume", str(tmp_path))[1]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "state.safetensors").write_bytes(b"torn")
    assert "not a readable safetensors file" in said("--resume", str(tmp_path))[1]
