"""plumbing/distributed.py: two processes against one."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import load_file

from model import load
from plumbing.distributed import own_gpu
from plumbing.lock import lock
from training_runs import content_of, environment, read_jsonl, small_run, wait_for_lines

ONE = [sys.executable]
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def run(command: list[str], *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment())


@pytest.mark.parametrize("second_half", [1, 0])
def test_two_processes_make_the_gradient_of_one(tmp_path, second_half):
    """Also where all sequences of the second one have zero advantage, so that it has nothing to
    score."""
    for command in (ONE, TWO):
        done = run(command, "tests/two_processes_step.py", str(tmp_path), str(second_half))
        assert done.returncode == 0, done.stderr
    one = load_file(tmp_path / "1-0.safetensors")
    first = load_file(tmp_path / "2-0.safetensors")
    second = load_file(tmp_path / "2-1.safetensors")

    # PPO's advantages are whitened over both; each alone does not have a mean of 0.
    of_both = torch.cat((first["whitened"], second["whitened"]))
    assert torch.allclose(of_both, one["whitened"], atol=1e-5)
    assert abs(float(one["whitened"].mean())) < 1e-5
    assert abs(float(first["whitened"].mean())) > 1e-3

    for name, before in load("base")[0].named_parameters():
        want = one[name] - before
        # A bias of the keys moves all scores of a query alike, and has no gradient.
        assert want.abs().max() > 0 or "k_proj.bias" in name
        for got in (first, second):
            assert (got[name] - one[name]).norm() <= 1e-5 * want.norm() + 1e-9, name
        assert torch.equal(first[name], second[name])
    assert torch.allclose(first["sums"], one["sums"], rtol=1e-4, atol=1e-5)
    assert torch.equal(first["sums"], second["sums"])


def lines(file: Path) -> list[dict]:
    """Without times and memory."""
    return [
        {key: value for key, value in line.items() if not key.endswith(("_s", "_gb"))}
        for line in read_jsonl(file)
    ]


FLAGS = (
    "--algo ppo --critic-warmup 1 --steps 4 --prompts 4 --samples 4 --minibatch 2 "
    "--eval-problems 3 --eval-samples 1 --final-samples 2 --slots 8 --max-new-tokens 24 "
    "--eval-every 2 --out"
).split()


def test_two_processes_train_save_once_and_resume(tmp_path):
    """PPO, whose advantages are whitened over both; then the resumed half of the run is the same,
    bit for bit."""
    done = run(TWO, "train.py", *FLAGS, str(tmp_path), "--name", "a")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trained - base") == 1
    assert done.stdout.count("memory in GB") == 1
    log = lines(tmp_path / "a/log.jsonl")
    assert [line["step"] for line in log] == [1, 2, 3, 4]
    validations = lines(tmp_path / "a/validation.jsonl")
    assert [line["step"] for line in validations] == [0, 2, 4]

    # A run of two steps that is then to have four.
    run(TWO, "train.py", *FLAGS, str(tmp_path), "--name", "b", "--steps", "2")
    settings = tmp_path / "b/config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"steps": 4}))
    done = run(TWO, "train.py", "--resume", str(tmp_path / "b"))
    assert done.returncode == 0, done.stderr
    want = load_file(tmp_path / "a/state.safetensors")
    got = load_file(tmp_path / "b/state.safetensors")
    assert set(got) == set(want)
    for name in want:
        assert torch.equal(got[name], want[name])
    assert lines(tmp_path / "b/log.jsonl") == log


def sentences_of(error: str) -> list[str]:
    """What our processes said on stderr; torchrun has a report of its own after that, in which
    there must be no line of ours."""
    assert 'train.py", line' not in error, error
    assert "/plumbing/" not in error, error
    return re.findall(r"^train\.py: .*", error, re.M)


def test_what_two_processes_refuse(tmp_path):
    out = tmp_path / "runs"
    done = run(TWO, "train.py", "--minibatch", "1", "--out", str(out))
    assert done.returncode != 0
    sentence = "train.py: --minibatch must be a multiple of the number of processes; it is 1"
    assert sentence in done.stderr
    assert sentences_of(done.stderr) == [sentence]
    assert not out.exists()


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("finished")
    return small_run(out, "run", steps=1, max_new_tokens=8)[0]


@pytest.mark.parametrize(
    "flags, words",
    [
        ("", "exists; give another --name"),
        ("--overwrite --prompts 1000000000", "what may help: fewer --prompts"),
        ("--overwrite --task math --data nowhere.jsonl", "nowhere.jsonl is neither a file nor"),
        ("--nonsense 1", ""),
    ],
)
def test_a_refusal_is_one_sentence_whoever_has_it(finished, flags, words):
    """Two processes; the first alone looks for the folder, both for the data and at the flags."""
    before = content_of(finished.parent)
    arguments = ["--out", str(finished.parent), "--name", "run", *flags.split()]
    done = run(TWO, "train.py", *arguments)
    assert done.returncode != 0
    if words:
        [sentence] = sentences_of(done.stderr)
        assert words in sentence
    else:
        assert done.stderr.count("unrecognized arguments: --nonsense 1") == 1
    assert content_of(finished.parent) == before


def test_two_processes_do_not_touch_a_run_that_is_alive(finished):
    with lock(finished):
        begun = time.time()
        done = run(TWO, "train.py", "--resume", str(finished))
    assert done.returncode != 0
    [sentence] = sentences_of(done.stderr)
    assert sentence.startswith(f"train.py: {finished} is in use by process {os.getpid()} on ")
    # torchrun would kill the second one, if it waited for the first, after 30 seconds.
    assert time.time() - begun < 30


def long_run(out: Path, eval_every: int, *more: str) -> subprocess.Popen:
    """Two processes, a hundred steps."""
    flags = ["--steps", "100", "--eval-every", str(eval_every), *more]
    return subprocess.Popen(
        [*TWO, "train.py", *FLAGS, str(out), "--name", "a", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )


def children_of(process: subprocess.Popen) -> list[int]:
    """Process ids, in the order of ranks."""
    file = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return sorted(int(child) for child in file.read_text().split())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("rank, flags", [(0, []), (1, []), (0, ["--shard"])])
def test_one_of_two_processes_is_killed(tmp_path, rank, flags):
    """The other does not wait for it forever, and says where to go on; also in the middle of a pass
    over weights that both have."""
    process = long_run(tmp_path, 3, *flags)
    wait_for_lines(process, tmp_path / "a/log.jsonl", 4)  # it is in step 5
    begun = time.time()
    os.kill(children_of(process)[rank], signal.SIGKILL)
    _, error = process.communicate()
    assert process.returncode != 0
    assert time.time() - begun < 30
    [sentence] = sentences_of(error)
    assert sentence.endswith(
        f"; go on from step 3 with: torchrun --nproc-per-node 2 train.py --resume {tmp_path}/a"
    )


def test_a_signal_to_two_processes_is_answered_once(tmp_path):
    """And the step that it names is the one that is saved."""
    process = long_run(tmp_path, eval_every=50)
    wait_for_lines(process, tmp_path / "a/log.jsonl", 2)
    process.send_signal(signal.SIGTERM)  # torchrun hands it on
    _, error = process.communicate()
    step = len(read_jsonl(tmp_path / "a/log.jsonl"))
    assert sentences_of(error) == [
        f"train.py: stopped; go on from step {step} with: torchrun --nproc-per-node 2 train.py --resume {tmp_path}/a"
    ]
    assert error.count("finishing this step and saving") == 1
    with safetensors.safe_open(tmp_path / "a/state.safetensors", "pt") as state:
        assert state.metadata() == {"step": str(step)}


def test_a_process_of_torchrun_has_a_gpu_of_its_own(monkeypatch):
    """The second of two on a machine with two GPUs; on one with one GPU it has none of its own."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    for gpus, device in ((2, torch.device("cuda:1")), (1, None)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        assert own_gpu() == device
    assert chosen == [1]
