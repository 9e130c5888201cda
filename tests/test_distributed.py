"""plumbing/distributed.py: two processes against one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model import load
from training_runs import environment, read_jsonl

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


def test_what_two_processes_refuse(tmp_path):
    out = tmp_path / "runs"
    done = run(TWO, "train.py", "--minibatch", "1", "--out", str(out))
    assert done.returncode != 0
    sentence = "train.py: --minibatch must be a multiple of the number of processes; it is 1"
    assert sentence in done.stderr
    assert not out.exists()
