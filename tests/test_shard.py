"""plumbing/shard.py: two processes that share the weights against two that have them all, in the same
torchrun (two_processes_shard.py)."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model import load
from test_distributed import TWO, lines, run
from training_runs import refusal
from two_processes_shard import RUNS

NORMS = ("grad_norm", "critic_grad_norm")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """What two_processes_shard.py leaves."""
    folder = tmp_path_factory.mktemp("shard")
    done = run(TWO, "tests/two_processes_shard.py", str(folder))
    assert done.returncode == 0, done.stderr
    return folder


def log_of(made: Path, name: str) -> tuple[list[dict], list[float]]:
    """A run's lines without the gradients' norms, and these."""
    log = lines(made / name / "log.jsonl")
    norms = [line.pop(norm) for line in log for norm in NORMS if line.get(norm) is not None]
    return log, norms


@pytest.mark.parametrize("name", RUNS)
def test_two_steps_are_those_of_the_replicas_to_the_bit(made, name):
    """Weights, moments and masters, the saved model, and the log. (The answers of a process are one
    micro-batch, and no gradient is clipped: nothing is added up in another order, but the norm.)"""
    for file in ("state.safetensors", "model/model.safetensors", "model/config.json"):
        wanted = (made / f"{name}-replicas" / file).read_bytes()
        assert (made / f"{name}-sharded" / file).read_bytes() == wanted, file
    wanted, wanted_norms = log_of(made, f"{name}-replicas")
    log, norms = log_of(made, f"{name}-sharded")
    assert log == wanted
    # In bfloat16 a norm is rounded too.
    assert norms == pytest.approx(wanted_norms, rel=1e-2 if "bfloat16" in name else 1e-6)
    assert all(norm > 0 for norm in norms)


def test_a_resumed_run_is_the_same_to_the_bit(made):
    for file in ("state.safetensors", "model/model.safetensors"):
        wanted = (made / "ppo-sharded" / file).read_bytes()
        assert (made / "resumed-sharded" / file).read_bytes() == wanted, file
    assert lines(made / "resumed-sharded/log.jsonl") == lines(made / "ppo-sharded/log.jsonl")


def change_of(made: Path, name: str) -> torch.Tensor:
    """Of all weights, by one update of the embedded model."""
    after = load_file(made / f"{name}.safetensors")
    before, _ = load("base")
    return torch.cat(
        [(after[name] - weight).flatten() for name, weight in before.named_parameters()]
    )


@pytest.mark.parametrize("kind", ["uneven", "second has none", "second has none, gspo", "none"])
def test_processes_with_different_work_make_the_replicas_step(made, kind):
    """3 micro-batches and 2, which are added up in another order; and no answer with an advantage in
    the second process, or in both. A step of SGD is the gradient."""
    wanted = change_of(made, f"{kind}-replicas")
    got = change_of(made, f"{kind}-sharded")
    if kind == "none":
        assert not wanted.any() and not got.any()
        return
    assert wanted.norm() > 0.01
    assert (got - wanted).norm() <= 1e-6 * wanted.norm()
    if kind != "uneven":
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_has_half_of_every_weight(made, rank):
    """Before the first pass, and after a critic's without gradients."""
    assert json.loads((made / f"whole-{rank}.json").read_text()) == []


def test_without_torchrun_there_is_nobody_to_share_with(tmp_path):
    assert "WORLD_SIZE" not in os.environ
    sentence = refusal("--shard", "--out", str(tmp_path))
    assert sentence.startswith("train.py: --shard needs torchrun, which starts the processes")
