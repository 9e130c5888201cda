"""plumbing/lock.py: two processes never work on one run. Real processes: the first is held still
while others try, and what it then makes is held against a run that was left alone."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from plumbing.lock import lock, workplace
from training_runs import (
    environment,
    finish,
    read_jsonl,
    refusal,
    start,
    wait_for_lines,
)

FLAGS = (
    "--steps 4 --prompts 4 --samples 4 --minibatch 2 --eval-problems 3 --eval-samples 2 "
    "--final-samples 2 --slots 8 --max-new-tokens 32 --eval-every 2 --no-skip-zero"
).split()


def assert_same_result(a: Path, b: Path) -> None:
    """Weights and moments bit for bit, and each step and validation once."""
    first = load_file(a / "state.safetensors")
    second = load_file(b / "state.safetensors")
    assert set(first) == set(second)
    for name in first:
        assert first[name].equal(second[name])
    assert [line["step"] for line in read_jsonl(b / "log.jsonl")] == [1, 2, 3, 4]
    assert [line["step"] for line in read_jsonl(b / "validation.jsonl")] == [0, 2, 4]
    rewards = [[line["reward"] for line in read_jsonl(run / "log.jsonl")] for run in (a, b)]
    assert rewards[0] == rewards[1]


def wait_for_holder(process: subprocess.Popen, run: Path) -> None:
    file = workplace(run) / "lock"
    while process.poll() is None:
        if file.exists() and str(process.pid) in file.read_text():
            return
        time.sleep(0.01)


def test_a_run_that_is_alive_is_nobody_elses(tmp_path):
    """Two resumes at once, and an --overwrite, a new run and a resume by other spellings of the
    path meanwhile. The first is held still, so that all of them meet it."""
    flags = [*FLAGS, "--out", str(tmp_path)]
    code, error = finish(start(*flags, "--name", "whole"))
    assert code == 0, error

    run = tmp_path / "run"
    killed = start(*flags, "--name", "run")
    wait_for_lines(killed, run / "log.jsonl", 3)
    killed.kill()
    killed.communicate()

    first = start("--resume", str(run))
    wait_for_holder(first, run)
    first.send_signal(signal.SIGSTOP)
    holder = f"{run} is in use by process {first.pid} on {os.uname().nodename} since 20"
    sentence = refusal("--resume", str(run))
    assert sentence.startswith(f"train.py: {holder}")
    assert sentence.endswith("; wait until it is through, or stop it")
    (tmp_path / "link").symlink_to(run)
    script = str(Path("train.py").resolve())
    sentence = refusal("--resume", "whole/../link/", script=script, cwd=tmp_path)
    assert f"is in use by process {first.pid}" in sentence
    assert holder in refusal(*flags, "--name", "run", "--overwrite")

    first.send_signal(signal.SIGCONT)
    code, error = finish(first)
    assert code == 0, error
    assert_same_result(tmp_path / "whole", run)
    assert {file.name for file in tmp_path.iterdir()} == {"whole", "run", "link"}


def test_two_new_runs_of_one_name(tmp_path):
    """The folder is not there when both start."""
    flags = [*FLAGS, "--out", str(tmp_path / "new" / "out"), "--name", "run"]
    run = tmp_path / "new" / "out" / "run"
    first = start(*flags)
    wait_for_holder(first, run)
    first.send_signal(signal.SIGSTOP)
    assert f"is in use by process {first.pid}" in refusal(*flags)
    first.send_signal(signal.SIGCONT)
    code, error = finish(first)
    assert code == 0, error
    assert len(read_jsonl(run / "log.jsonl")) == 4


def python(code: str, *arguments: str, **options) -> subprocess.Popen:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, env=environment(), text=True, **options)


HOLD_WITH_A_CHILD = """
import subprocess, sys, time
from pathlib import Path
from plumbing.lock import lock
with lock(Path(sys.argv[1])):
    child = subprocess.Popen(["sleep", "60"])
    print(child.pid, flush=True)
    time.sleep(60)
"""


def test_a_lock_dies_with_its_holder_whose_children_do_not_have_it(tmp_path):
    holder = python(HOLD_WITH_A_CHILD, str(tmp_path / "run"), stdout=subprocess.PIPE)
    child = int(holder.stdout.readline())
    try:
        with pytest.raises(BlockingIOError, match=f"in use by process {holder.pid} on "):
            with lock(tmp_path / "run"):
                pass
        holder.kill()
        holder.wait()
        with lock(tmp_path / "run"):
            os.kill(child, 0)  # it is alive
    finally:
        os.kill(child, signal.SIGKILL)
    assert not list(tmp_path.iterdir())


COUNT = """
import sys
from pathlib import Path
from plumbing.lock import lock
counter = Path(sys.argv[1], "counter")
done = 0
while done < 200:
    try:
        with lock(Path(sys.argv[1], "deep", "run")):
            counter.write_text(str(int(counter.read_text()) + 1))
    except BlockingIOError:
        continue
    done += 1
"""


def test_no_two_hold_a_lock_that_comes_and_goes(tmp_path):
    """Each end removes the file and the folders that the next one makes again."""
    (tmp_path / "counter").write_text("0")
    processes = [python(COUNT, str(tmp_path)) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert (tmp_path / "counter").read_text() == "600"
    assert not list(tmp_path.rglob(".run.work"))


def test_a_lock_leaves_no_trace_but_what_was_put_beside_it(tmp_path):
    with lock(tmp_path / "a" / "b" / "run"):
        pass
    assert not list(tmp_path.iterdir())
    with lock(tmp_path / "a" / "b" / "run"):
        (tmp_path / "a" / "other").write_text("kept")
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["other"]
