"""Memory that is known before anything is allocated: a model too large for the card is refused with
numbers, not after an hour."""

import math
import os
import resource
import sys
from pathlib import Path

import torch

from plumbing.pretrained import head_size

GB = 1e9
BYTES = {"float32": 4, "bfloat16": 2}
BYTES_OF_OBJECTS = 2000  # of an answer: the Python objects around its numbers
CONTAINER = Path("/sys/fs/cgroup/memory.max")  # Linux, inside a container
# What torch and its libraries say where memory is lacking, without an exception of its own.
WORDS_FOR_IT = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "bad_alloc",
    "ALLOC_FAILED",
)
MAY_HELP = (
    "what may help: fewer --slots, less --micro-tokens or --chunk, --recompute, "
    "--weights bfloat16 --dtype bfloat16, --algo grpo, a smaller model"
)


def plan(config: dict, parameters: int, s, length: int, rows: int, device: torch.device) -> str:
    """A table in GB for `rows` sequences of `length` tokens, with a policy of `parameters` weights,
    under train.py's settings `s`. Activations are estimated from what a layer keeps; the rest is
    counted. ValueError if that is more than a GPU has free or this machine has."""
    decode_dtype = s.decode_dtype or s.dtype
    models = 2 if s.algo == "ppo" else 1  # the critic is as large as the policy
    weight_bytes = models * parameters * BYTES[s.weights]
    if s.weights == "bfloat16":
        optimizer_bytes = 4 + 2 + 4  # MasterAdamW: float32 master, bfloat16 mean, float32 square
    else:
        optimizer_bytes = 4 + 4  # two float32 moments
    decode_copy = parameters * BYTES[decode_dtype] if decode_dtype != s.weights else 0
    key_value = 2 * config["num_key_value_heads"] * head_size(config)  # numbers a token and layer
    size = {
        "weights": weight_bytes,
        "gradients": weight_bytes,
        "optimizer": models * parameters * optimizer_bytes,
        "decode weights": decode_copy,
        "KV cache": rows * length * config["num_hidden_layers"] * key_value * BYTES[decode_dtype],
        "activations": activations(config, parameters, s, length),
    }
    # The cache is given back before an update, whose activations are gone before a rollout.
    update = sum(size.values()) - size["KV cache"]
    rollout = sum(size.values()) - size["activations"]

    parts = ", ".join(f"{name} {value / GB:.3g}" for name, value in size.items() if value)
    table = (
        f"memory in GB for {parameters / 1e9:.3g} billion weights: {parts}; "
        f"a rollout needs {rollout / GB:.3g}, an update {update / GB:.3g}"
    )
    free = free_bytes(device)
    if max(update, rollout) > free:
        raise ValueError(f"{table}, but there are {free / GB:.3g}; {MAY_HELP}")
    check_host(s, length, device, max(update, rollout))
    return table


def check_host(s, length: int, device: torch.device, on_device: float) -> None:
    """ValueError if this machine's memory is too small for the answers of a rollout, of all
    processes, or of a problem's validation. `on_device`: bytes that the model takes there."""
    answers = max(s.prompts * s.samples, s.eval_samples, s.final_samples)
    # int64 tokens of prompt and response; of a response's tokens log-probability and entropy too,
    # and padded: mask, log-probability, advantage, value, return.
    tokens = length * 8 + s.max_new_tokens * (4 + 4 + 1 + 4 * 4)
    size = answers * (tokens + BYTES_OF_OBJECTS)
    needed = size if device.type == "cuda" else size + on_device
    free = free_bytes(torch.device("cpu"))
    if needed > free:
        raise ValueError(
            f"{answers} answers of up to {length} tokens with their prompts take {size / GB:.3g} GB "
            f"of this machine's memory, which is {free / GB:.3g}; what may help: fewer --prompts or "
            "--samples (and --eval-samples, --final-samples), less --max-new-tokens"
        )


def activations(config: dict, parameters: int, s, length: int) -> int:
    """Bytes that a forward pass of one micro-batch leaves for its backward pass."""
    width = config["hidden_size"]
    layers = config["num_hidden_layers"]
    query = config["num_attention_heads"] * head_size(config)
    key = config["num_key_value_heads"] * head_size(config)
    autocast = s.dtype != s.weights  # float32 weights are used as bfloat16 copies
    # Bytes of the float32 copies that norms keep, per number of the width.
    norm_copies = 0
    if autocast:
        norm_copies = 14
    elif s.weights == "bfloat16":
        norm_copies = 10

    numbers = 6 * width + 3 * query + 2 * key + 4 * config["intermediate_size"]
    # Bytes that a token leaves in a layer.
    per_layer = BYTES[s.dtype] * numbers + width * norm_copies
    # Recomputing keeps one layer, and of the others their inputs.
    per_token = per_layer + 4 * width * layers if s.recompute else per_layer * layers
    tokens = max(s.micro_tokens, length)
    logits = 5 * 4 * s.chunk * config["vocab_size"]
    autocast_weights = 2 * parameters if autocast else 0
    return tokens * per_token + logits + autocast_weights


def free_bytes(device: torch.device) -> int:
    """What a GPU has free; of a machine without one, this process's share of all its memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(physical, limit_of_container()) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def limit_of_container() -> float:
    """Bytes that this process's control group may have; infinite without a limit."""
    limit = CONTAINER.read_text().strip() if CONTAINER.exists() else "max"
    return math.inf if limit == "max" else int(limit)


def out_of_memory(error: Exception, may_help: str = MAY_HELP) -> str:
    """The sentence for an error that says so in one of torch's ways. Any other error is raised
    again: it is a bug, and its traceback is wanted."""
    said = any(words in str(error) for words in WORDS_FOR_IT)
    if not said and not isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        raise error
    numbers = ""
    if torch.cuda.is_initialized():
        allocated = torch.cuda.memory_allocated() / GB
        reserved = torch.cuda.memory_reserved() / GB
        numbers = f", with {allocated:.3g} GB allocated and {reserved:.3g} GB reserved on the GPU"
    return f"out of memory{numbers}; {may_help}"


def peak_memory(device: torch.device) -> float:
    """GB: of the card's allocations on a GPU, else of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GB
    status = Path("/proc/self/status")
    if status.exists():  # Linux: in getrusage a child inherits its parent's peak
        after = status.read_text().partition("VmHWM:")[2].split()
        if after:
            return int(after[0]) * 1024 / GB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GB
