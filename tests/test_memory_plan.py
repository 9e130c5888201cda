"""The plan of plumbing/memory.py against the bytes that were allocated on a pretended GPU, and the
order in which they are allocated against the bookkeeping of CUDA's allocator."""

import importlib.util
import json

import pytest
import torch

import rollout
from lab.gpu_shapes import SHAPES, config_of
from lab.gpu_tables import read_record
from model import count_parameters
from plumbing import memory
from plumbing.settings import EvaluationSettings
from pretended import ROOT, TOOL, pretended_python

TRAINING = (
    "float32",
    "autocast",
    "bfloat16 weights",
    "recompute",
    "autocast, recompute",
    "bfloat16 weights, recompute",
    "ppo",
    "ppo, bfloat16 weights",
    "refill",
    "decode weights of their own",
    "untied head",
    "qwen3",
    "lora",
    "lora, autocast",
    "lora, bfloat16 weights",
    "lora, autocast, recompute",
    "lora, ppo",
)
MEASURED = "sys.path.append('tests'); import memory_peaks; memory_peaks.main()"
CUDA = torch.device("cuda")  # planned for, not used
SCALE = 1000  # megabytes as gigabytes: the allocator treats blocks below 10 MB in another way


@pytest.fixture(scope="module")
def measured() -> dict:
    return json.loads(pretended_python(MEASURED))


@pytest.mark.parametrize("phase", ["rollout", "update"])
@pytest.mark.parametrize("setting", TRAINING)
def test_training_takes_what_the_plan_says_and_not_more(measured, setting, phase):
    found = measured[setting]
    assert found[phase] <= found[f"planned {phase}"] <= 1.1 * found[phase]


@pytest.mark.parametrize("setting", ["top-p", "no top-p", "prefills"])
def test_an_evaluation_takes_what_the_plan_says_and_not_more(measured, setting):
    found = measured[setting]
    assert found["evaluation"] <= found["planned evaluation"] <= 1.1 * found["evaluation"]


@pytest.mark.parametrize("slots", [64, 512])
@pytest.mark.parametrize("name", ["embedded", "135M", "1.5B", "7B"])
def test_the_plan_of_a_rollout_is_what_an_h200_allocated(name, slots):
    """The peaks that lab.gpu noted with three digits, of samplers without graphs and nothing else on
    the card; here with what CUDA's libraries and kernels take."""
    [row] = [
        row
        for row in read_record(ROOT / "lab/results/gpu-h200.json.gz")["rows"]
        if (row["shape"], row["what"]) == (name, f"decode, {slots} slots, eager")
    ]
    allocated = float(row["note"].partition("peak ")[2].split()[0])
    shape = SHAPES[name]
    config = config_of(shape)
    longest = max(shape.new_tokens, *shape.steady)
    s = EvaluationSettings(
        max_new_tokens=longest, dtype=str(shape.dtype).removeprefix("torch."), graph=False
    )
    size = memory.sizes_of_evaluation(
        config, count_parameters(config), s, shape.prompt + longest, slots, slots, CUDA
    )
    assert sum(size.values()) / 1e9 == pytest.approx(allocated, rel=0.02)


def test_the_plan_knows_the_numbers_of_the_rollout():
    assert memory.PREFILL_TOKENS == rollout.PREFILL_TOKENS
    assert memory.GROW_BY == {"cpu": rollout.GROW_BY, "cuda": rollout.GROW_BY_ON_GPU}


def load_allocator():
    """The tool's replay of CUDA's caching allocator, which needs no device."""
    spec = importlib.util.spec_from_file_location("allocator", TOOL / "allocator.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def replay(allocator, trace: list, total: float = 1e15) -> float:
    """Makes and gives back the blocks of a trace on a card of `total` bytes -> the bytes in use at
    most."""
    card = allocator.Caching(total)
    most = 0.0
    for number, size in trace:
        if size:
            card.malloc(number, size * SCALE)
            most = max(most, card.used)
        elif number in card.where:
            card.free_(number)
    return most


def test_moments_that_are_made_first_leave_room_for_the_second_rollout(measured):
    """On a card with a fifth more memory than is ever in use. Made in AdamW's first step they lie
    where the first rollout's cache was, and the second finds no room in one piece."""
    allocator = load_allocator()
    in_use = replay(allocator, measured["moments first"])
    assert replay(allocator, measured["moments later"]) == pytest.approx(in_use, rel=0.01)

    replay(allocator, measured["moments first"], total=1.2 * in_use)
    with pytest.raises(allocator.OutOfMemory):
        replay(allocator, measured["moments later"], total=1.2 * in_use)
