"""plumbing/shard.py: two processes that share the weights against two that have them all, in the same
torchrun (two_processes_shard.py)."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model import count_parameters, load
from plumbing import memory
from plumbing.settings import PRESETS, Settings
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


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("how, weights_of_each", [("sharded", 16 / 2 + 4), ("replicas", 16)])
def test_a_process_takes_what_the_plan_says(tmp_path, monkeypatch, how, weights_of_each):
    """The process's memory with 52 million float32 weights. 50 MB are what else it makes meanwhile."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # what is given back is not kept
    done = run(TWO, "tests/two_processes_memory.py", str(tmp_path), how)
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        found = json.loads((tmp_path / f"{how}-{rank}.json").read_text())
        assert found["planned prepared"] == pytest.approx(weights_of_each * 52.46e6, rel=1e-3)
        for what in ("loading", "prepared", "step"):
            planned = found[f"planned {what}"]
            assert 0.97 * planned <= found[what] <= 1.02 * planned + 50e6, (what, found)


def test_without_torchrun_there_is_nobody_to_share_with(tmp_path):
    assert "WORLD_SIZE" not in os.environ
    sentence = refusal("--shard", "--out", str(tmp_path))
    assert sentence.startswith("train.py: --shard needs torchrun, which starts the processes")


# The public configurations. Parameters as the model cards say: 14.8 and 32.8 billion.
QWEN25_14B = dict(
    model_type="qwen2",
    vocab_size=152064,
    hidden_size=5120,
    intermediate_size=13824,
    num_hidden_layers=48,
    num_attention_heads=40,
    num_key_value_heads=8,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
)
QWEN3_32B = QWEN25_14B | dict(
    model_type="qwen3",
    vocab_size=151936,
    intermediate_size=25600,
    num_hidden_layers=64,
    num_attention_heads=64,
    head_dim=128,
)
CUDA = torch.device("cuda")  # planned for, not used
LENGTH = 9216  # tokens of the paper's longest sequence


def plan_of(monkeypatch, config: dict, cards: int, **changes) -> str:
    """For one of the cards, of 80 GB; the machine has enough memory besides."""
    monkeypatch.setenv("WORLD_SIZE", str(cards))
    monkeypatch.setattr(memory, "name_of", lambda device: "a card")
    free = {"cuda": 80e9, "cpu": 1e12}
    monkeypatch.setattr(memory, "free_bytes", lambda device: free[device.type])
    s = Settings(**PRESETS["paper-grpo"] | dict(weights="bfloat16", slots=8) | changes)
    return memory.TrainingMemory(config, count_parameters(config), s, LENGTH, s.slots, CUDA).plan()


def gb_of(sentence: str, what: str) -> float:
    return float(re.search(rf"[:;,] {what} ([\d.]+)", sentence)[1])


def test_14b_on_eight_cards_by_hand(monkeypatch):
    """Of 14.77 billion weights a process has (2 + 2 + 10) / 8 bytes each, and 2 for the sampler's copy;
    196,608 bytes of cache a token. Gathered in a pass: two tables of 152064 x 5120 numbers, and the
    weights and gradients of two layers of 275 million."""
    sentence = plan_of(monkeypatch, QWEN25_14B, 8, shard=True)
    assert (
        gb_of(sentence, "weights") == gb_of(sentence, "gradients") == pytest.approx(3.69, rel=2e-3)
    )
    assert gb_of(sentence, "optimizer") == pytest.approx(18.46, rel=5e-3)
    assert gb_of(sentence, "decode weights") == pytest.approx(29.54, rel=2e-3)
    assert gb_of(sentence, "KV cache") == pytest.approx(196608 * 8 * LENGTH / 1e9, rel=5e-3)
    by_hand = 2 * (2 * 152064 * 5120 + 4 * 275.3e6) / 1e9
    assert gb_of(sentence, "gathered") == pytest.approx(by_hand, rel=5e-3)
    # Replicas, the paper's 64 slots, and a critic of the same size do not fit.
    for changes in (dict(shard=False), dict(shard=True, slots=64), dict(shard=True, algo="ppo")):
        with pytest.raises(ValueError, match="but there are 80; what may help: "):
            plan_of(monkeypatch, QWEN25_14B, 8, **changes)
    with pytest.raises(ValueError, match="a rollout needs 142"):
        plan_of(monkeypatch, QWEN25_14B, 2, shard=True, slots=2)


def test_32b_does_not_fit_cards_of_80_gb(monkeypatch):
    """Of 32.76 billion weights the copy alone takes 65.5 GB, and slices on eight cards 57.3."""
    with pytest.raises(ValueError, match="decode weights 65.5, .*but there are 80") as refused:
        plan_of(monkeypatch, QWEN3_32B, 8, shard=True, slots=1)
    sentence = str(refused.value)
    slices = sum(gb_of(sentence, part) for part in ("weights", "gradients", "optimizer"))
    assert slices == pytest.approx(14 * 32.76 / 8, rel=5e-3)
    # On 64 cards the slices are small, and what a pass needs is still too much.
    with pytest.raises(ValueError, match="a rollout needs 8"):
        plan_of(monkeypatch, QWEN3_32B, 64, shard=True, slots=1)
