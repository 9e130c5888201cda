"""plumbing/memory.py: the planner against sums by hand, from the published shapes of Qwen2.5, and
against the tensors that a forward pass kept."""

import dataclasses
import os

import pytest
import torch

from model import Transformer, count_parameters
from plumbing.memory import plan
from plumbing.settings import PRESETS, Settings

QWEN_7B = dict(
    model_type="qwen2",
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
)
QWEN_1_5B = QWEN_7B | dict(
    vocab_size=151936,
    hidden_size=1536,
    intermediate_size=8960,
    num_attention_heads=12,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)
SMALL = dict(
    model_type="qwen2",
    vocab_size=64,
    hidden_size=256,
    intermediate_size=900,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=2,
    rms_norm_eps=1e-6,
)
CARD = 139 * 2**30
CPU = torch.device("cpu")
GB = 1e9
# Of the longest sequences and as many slots as the paper's preset has.
LENGTH = 9216
ROWS = 64


def table_of(config: dict, s: Settings, length: int, rows: int) -> dict[str, float]:
    """plan's sentence as numbers: {"weights": 15.2, ..., "a rollout needs": ..., ...}"""
    sentence = plan(config, count_parameters(config), s, length, rows, CPU)
    _, _, entries = sentence.partition(": ")
    table = {}
    for entry in entries.replace(";", ",").split(", "):
        *words, number = entry.split()
        table[" ".join(words)] = float(number)
    return table


def planned(config: dict, free: float = 1e15, **changes) -> dict[str, float]:
    """The table of the paper's preset, on a machine with so many bytes of memory."""
    machine = {"SC_PHYS_PAGES": int(free) // 4096, "SC_PAGE_SIZE": 4096}
    s = Settings(**PRESETS["paper-grpo"] | changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "sysconf", machine.get)
        return table_of(config, s, LENGTH, ROWS)


# 7.616 billion weights, as the model card of 7B says; 57,344 bytes of cache per token in bfloat16.
CACHE_7B = 57344 * ROWS * LENGTH / GB


def test_the_plan_of_7b_in_bfloat16_by_hand():
    table = planned(QWEN_7B, weights="bfloat16")
    assert table["weights"] == table["gradients"] == pytest.approx(15.23, rel=2e-3)
    assert table["optimizer"] == pytest.approx(76.16, rel=2e-3)
    assert "decode weights" not in table
    assert table["KV cache"] == pytest.approx(CACHE_7B, rel=5e-3)
    assert table["an update"] == pytest.approx(106.6 + table["activations"], rel=5e-3)
    assert table["a rollout needs"] == pytest.approx(106.6 + table["KV cache"], rel=5e-3)


def test_the_plan_of_7b_in_float32_by_hand():
    table = planned(QWEN_7B)
    assert table["weights"] == pytest.approx(30.46, rel=2e-3)
    assert table["optimizer"] == pytest.approx(60.93, rel=2e-3)
    assert table["decode weights"] == pytest.approx(15.23, rel=2e-3)


def test_the_cache_of_1_5b_by_hand():
    cache = 28672 * ROWS * LENGTH / GB
    assert planned(QWEN_1_5B)["KV cache"] == pytest.approx(cache, rel=5e-3)


def test_a_critic_doubles_the_optimizer():
    table = planned(QWEN_7B, weights="bfloat16", algo="ppo")
    assert table["optimizer"] == pytest.approx(2 * 76.16, rel=5e-3)


def test_what_fits_is_not_refused():
    assert planned(QWEN_7B, CARD, weights="bfloat16", dtype="bfloat16")


def test_what_cannot_fit_is_refused_with_numbers_and_advice():
    with_critic = r"optimizer 152.*but there are 149; what may help: fewer --slots.*--algo grpo"
    with pytest.raises(ValueError, match=with_critic):
        planned(QWEN_7B, CARD, weights="bfloat16", algo="ppo")
    with pytest.raises(ValueError, match=r"a rollout needs 1\d\d.*--weights bfloat16"):
        planned(QWEN_7B, CARD)
    with pytest.raises(ValueError, match="--recompute"):
        planned(QWEN_1_5B, CARD / 2, recompute=False, micro_tokens=32768)


def bytes_kept(model: Transformer, autocast: bool) -> int:
    """The tensors that autograd holds at the end of a forward pass of 8 x 512 tokens, each storage
    once, without the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}  # address -> a tensor that lives there: kept, so that no other takes its place

    def keep(tensor):
        address = tensor.untyped_storage().data_ptr()
        if address not in weights:
            kept[address] = tensor
        return tensor

    def give_back(tensor):
        return tensor

    tokens = torch.zeros(8, 512, dtype=torch.int64)
    position = torch.arange(512).expand(8, 512)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, give_back),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        hidden = model(tokens, position)
    assert hidden.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def activations(s: Settings, **changes) -> float:
    return table_of(SMALL | changes, s, 512, 8)["activations"]


def activations_of_a_layer(s: Settings) -> float:
    """What the planner adds for the one layer that is recomputed: a layer's activations without
    recomputing."""
    keeps_all = dataclasses.replace(s, recompute=False)
    one = activations(keeps_all, num_hidden_layers=1, vocab_size=1)
    two = activations(keeps_all, num_hidden_layers=2, vocab_size=1)
    return two - one


FLOAT32 = dict()
AUTOCAST = dict(dtype="bfloat16")
BFLOAT16 = dict(dtype="bfloat16", weights="bfloat16")


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("mode", [FLOAT32, AUTOCAST, BFLOAT16])
def test_planned_activations_are_those_that_a_forward_pass_keeps(mode, recompute):
    s = Settings(recompute=recompute, micro_tokens=4096, chunk=1, **mode)
    model = Transformer(SMALL).to(getattr(torch, s.weights))
    model.recompute = recompute
    want = bytes_kept(model, autocast=mode == AUTOCAST) / GB
    if recompute:
        want += activations_of_a_layer(s)  # made again later, in the backward pass
    assert activations(s) == pytest.approx(want, rel=0.12)
