"""plumbing/memory.py: the planner against sums by hand, from the published shapes of Qwen2.5, and
against the tensors that a forward pass kept; and what is said when memory is short all the same."""

import dataclasses
import math
import os
import sys

import pytest
import torch

from lab.analyze import Settings as AnalysisSettings
from lab.analyze import check_memory
from model import Transformer, count_parameters
from plumbing import memory
from plumbing.memory import (
    free_bytes,
    limit_of_container,
    out_of_memory,
    plan_evaluation,
)
from plumbing.settings import PRESETS, EvaluationSettings, Settings
from training_runs import content_of, finish, refusal, start

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
    """The plan's sentence as numbers: {"weights": 15.2, ..., "a rollout needs": ..., ...}"""
    sentence = memory.TrainingMemory(config, count_parameters(config), s, length, rows, CPU).plan()
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
        patch.setattr(memory, "limit_of_container", lambda: math.inf)
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
    of_rollout = table["KV cache"] + table["sampling"]
    assert table["a rollout needs"] == pytest.approx(106.6 + of_rollout, rel=5e-3)


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


FLOAT32 = dict()
AUTOCAST = dict(dtype="bfloat16")
BFLOAT16 = dict(dtype="bfloat16", weights="bfloat16")


@pytest.mark.parametrize("mode", [FLOAT32, AUTOCAST, BFLOAT16])
def test_planned_activations_are_those_that_a_forward_pass_keeps(mode):
    """Recomputing, and what the backward pass needs besides: tests/test_memory_plan.py."""
    s = Settings(micro_tokens=4096, chunk=1, **mode)
    model = Transformer(SMALL).to(getattr(torch, s.weights))
    training = memory.TrainingMemory(SMALL, count_parameters(SMALL), s, 512, 8, CPU)
    layers = 4096 * SMALL["num_hidden_layers"] * training.kept_in_layer()
    copies = 2 * count_parameters(SMALL) if mode == AUTOCAST else 0
    assert layers + copies == pytest.approx(bytes_kept(model, mode == AUTOCAST), rel=0.12)


def test_the_answers_of_a_rollout_by_hand():
    """4096 answers of 8192 tokens, after prompts of 1024: 8 bytes a token of both; and of a response
    4 for the log-probability and 4 for the entropy, then 17 padded. 1.1 GB in all."""
    s = Settings(**PRESETS["paper-grpo"])
    needed = 4096 * (9216 * 8 + 8192 * 25 + 2000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "free_bytes", lambda device: needed + 1000)
        memory.check_host(s, LENGTH, CPU, on_device=1000, copied=0)
        cuda = torch.device("cuda")
        memory.check_host(s, LENGTH, cuda, on_device=1e12, copied=1000)  # there, not here
        sentence = "4096 answers of up to 9216 tokens with their prompts take 1.15 GB"
        for device, on_device, copied in ((CPU, 1001, 0), (cuda, 0, 1001)):
            with pytest.raises(ValueError, match=sentence):
                memory.check_host(s, LENGTH, device, on_device, copied)


class Disk:
    def __init__(self, free: int) -> None:
        self.free = free


def test_the_disk_of_a_7b_run_by_hand(tmp_path, monkeypatch):
    """A state of 12 bytes a weight (float32: weight, mean, square) is there twice, beside the model's
    4: 28 bytes for each of a billion weights. What the run has saved already makes room."""
    billion = 10**9
    s = Settings(out=str(tmp_path / "runs"))
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda folder: Disk(28 * billion))
    memory.check_disk(s, billion)
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda folder: Disk(28 * billion - 1000))
    sentence = f"a save takes 28 GB of disk, .* but {tmp_path} has 28"
    with pytest.raises(ValueError, match=sentence):
        memory.check_disk(s, billion)
    memory.check_disk(dataclasses.replace(s, dry_run=True), billion)

    run = tmp_path / "run"
    run.mkdir()
    (run / "state.safetensors").write_bytes(bytes(1000))
    memory.check_disk(dataclasses.replace(s, resume=str(run)), billion)


def test_an_evaluation_of_7b_by_hand(monkeypatch):
    """512 sequences of 1024 tokens, 512 of them new, in float32: 30.5 GB of weights, a cache of 2 x
    57,344 bytes a token, and prompts of 16,384 tokens prefilled. In bfloat16 half of it."""
    s = EvaluationSettings(max_new_tokens=512)
    parameters = count_parameters(QWEN_7B)
    size = memory.sizes_of_evaluation(QWEN_7B, parameters, s, 1024, 512, 200, CPU)
    assert size["weights"] == pytest.approx(30.46 * GB, rel=2e-3)
    assert size["KV cache"] == 2 * 57344 * 512 * 1024
    assert size["sampling"] > 2 * 2 * 57344 * 16384 + 512 * 18 * 152064

    half = dataclasses.replace(s, dtype="bfloat16")
    in_bfloat16 = memory.sizes_of_evaluation(QWEN_7B, parameters, half, 1024, 512, 200, CPU)
    assert in_bfloat16["weights"] == size["weights"] / 2
    assert in_bfloat16["KV cache"] == size["KV cache"] / 2

    monkeypatch.setattr(memory, "free_bytes", lambda device: 80 * GB)
    plan_evaluation(QWEN_7B, parameters, half, 1024, 512, 200, CPU)
    with pytest.raises(
        ValueError, match=r"sampling takes 9\d.*but there are 80; .*--dtype bfloat16"
    ):
        plan_evaluation(QWEN_7B, parameters, s, 1024, 512, 200, CPU)


def test_an_analysis_is_refused_before_a_model_is_loaded(monkeypatch):
    """lab.analyze's default settings: 256 sequences of 4 layers' keys and values, 2 heads of 24
    float32 numbers each, so 1,536 bytes a token; of at least 128 positions."""
    monkeypatch.setattr(memory, "free_bytes", lambda device: 0.03 * GB)
    with pytest.raises(ValueError, match="sampling takes 0.*but there are 0.03.*--dtype") as error:
        check_memory("base", AnalysisSettings())
    cache = float(str(error.value).partition("KV cache ")[2].partition(",")[0])
    assert cache > 256 * 128 * 1536 / GB
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1 * GB)
    check_memory("base", AnalysisSettings())


def test_a_billion_prompts_are_refused_before_anything_is_made(tmp_path):
    out = tmp_path / "runs"
    sentence = refusal("--prompts", "1000000000", "--out", str(out))
    assert "what may help: fewer --prompts or --samples" in sentence
    assert not out.exists()


def test_a_container_may_have_less_than_the_machine(tmp_path, monkeypatch):
    file = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "CONTAINER", file)
    assert limit_of_container() == math.inf
    file.write_text("max\n")
    assert limit_of_container() == math.inf
    file.write_text("2000000000\n")
    assert limit_of_container() == 2e9
    assert memory.free_bytes(CPU) <= 2e9


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
        RuntimeError("std::bad_alloc"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
    ],
)
def test_memory_errors_are_a_sentence(error, monkeypatch):
    assert out_of_memory(error, "less") == "out of memory; less"
    assert "fewer --slots" in out_of_memory(error)

    # All of it is on the second of three cards.
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "memory_allocated", [0, 70 * 10**9, 0].__getitem__)
    monkeypatch.setattr(torch.cuda, "memory_reserved", [0, 75 * 10**9, 0].__getitem__)
    assert out_of_memory(error, "less") == (
        "out of memory, with 70 GB allocated and 75 GB reserved on the GPU; less"
    )


def test_what_torch_holds_back_for_reuse_is_free(monkeypatch):
    """Of 80 GB a model takes 20; 30 more are those of the model before it, and 30 nobody's."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30 * 10**9, 80 * 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50 * 10**9)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20 * 10**9)
    assert free_bytes(torch.device("cuda")) == 60 * 10**9


def test_other_errors_keep_their_traceback():
    with pytest.raises(RuntimeError, match="shapes"):
        out_of_memory(RuntimeError("shapes do not fit"))


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_a_machine_with_too_little_memory_is_told_so_in_a_sentence(tmp_path):
    """400 MB, where the cache of 4096 sequences takes 1 GB. Nothing of the run is lost."""
    flags = (
        "400 train.py --steps 1 --prompts 512 --samples 8 --minibatch 512 --eval-problems 2 "
        "--eval-samples 1 --final-samples 1 --slots 4096 --name run --out"
    ).split()
    process = start(*flags, str(tmp_path), script="tests/with_little_memory.py")
    code, sentence = finish(process)
    assert code == 1
    assert sentence.startswith("train.py: out of memory; what may help: fewer --slots")
    run = tmp_path / "run"
    assert sentence.endswith(f"; go on from step 0 with: python train.py --resume {run}")
    assert {file.name for file in content_of(tmp_path)} == {"config.json", "validation.jsonl"}


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_an_evaluation_with_too_little_memory():
    flags = "300 evaluate.py base --problems 200 --samples 64 --slots 12000 --k 1".split()
    code, sentence = finish(start(*flags, script="tests/with_little_memory.py"))
    assert code == 1
    assert sentence.startswith("evaluate.py: out of memory; what may help: fewer --slots")
