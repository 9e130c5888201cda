"""Memory that is known before anything is allocated: a model too large for the card is refused with
numbers, not after an hour."""

import dataclasses
import math
import os
import resource
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from plumbing.pretrained import head_size
from plumbing.settings import Settings

GB = 1e9
BYTES = {"float32": 4, "bfloat16": 2}
SMALL_THINGS = 100_000  # bytes: a number per sequence, and every block rounded up to 512
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
# rollout.py's: prompt tokens per prefill, and the multiple to which a cache's length is rounded up.
PREFILL_TOKENS = 16384
GROW_BY = {"cpu": 16, "cuda": 128}
# That the tensors of rollout.sample take, by whether it truncates (top-p); counted on a pretended
# device, which does not see what torch's kernels take inside: a cumulative sum in float64 copies its
# input to float64 first (on an H200 7 to 8 bytes a logit were missing).
BYTES_OF_LOGIT = {False: 18, True: 27}
SCRATCH_OF_LOGIT = 8
# cuBLAS keeps 32 MiB on a Hopper card, 8 on others, for every thread and stream that multiplies:
# the program's, the recording of a CUDA graph, the backward pass. On an H200 0.10 GB was missing.
CUDA_WORKSPACES = 3 * 32 * 2**20
# Bytes per number of the largest weight, in a step of torchao's 8-bit AdamW on a CPU, where it is not
# compiled: 56 to 61 were measured.
EAGER_EIGHT_BIT_STEP = 62
EVALUATION_MAY_HELP = "what may help: fewer --slots, less --max-new-tokens, --dtype bfloat16"
MAY_HELP = (
    "what may help: fewer --slots, less --micro-tokens or --chunk, --recompute, "
    "--weights bfloat16 --dtype bfloat16, --algo grpo, --lora-rank 16, more processes with --shard, "
    "a smaller model"
)


@dataclass(frozen=True)
class TrainingMemory:
    """The memory of train.py, in bytes: its settings, a policy of `parameters` weights, and `rows`
    sequences of `length` tokens at a time."""

    config: dict
    parameters: int
    s: Settings
    length: int
    rows: int
    device: torch.device

    def plan(self) -> str:
        """A table in GB. ValueError if that is more than a GPU has free or this machine has."""
        self.check_lora_rank()
        parts = in_gb(self.always() | self.sampling() | self.learning())
        rollout, update = self.needs()
        table = (
            f"memory in GB on {name_of(self.device)} for {self.parameters / 1e9:.3g} billion "
            f"weights: {parts}; a rollout needs {rollout / GB:.3g}, an update {update / GB:.3g}"
            f"{self.saved_by_lora()}"
        )
        on_device = max(update, rollout)
        free = free_bytes(self.device)
        if on_device > free:
            raise ValueError(f"{table}, but there are {free / GB:.3g}; {MAY_HELP}")
        check_host(self.s, self.length, self.device, on_device, self.copied_to_save())
        return table

    def needs(self) -> tuple[float, float]:
        """Bytes of a rollout, and of an update. The cache is given back before an update, whose
        activations are gone before a rollout."""
        in_both = sum(self.always().values())
        rollout = in_both + sum(self.sampling().values())
        update = in_both + sum(self.learning().values())
        return rollout, update

    # ---- What is taken in rollouts and updates.

    def always(self) -> dict[str, float]:
        s = self.s
        if s.lora_rank:
            return self.always_with_lora()
        models = 2 if s.algo == "ppo" else 1  # the critic is as large as the policy
        of_each = models * self.parameters / sharing_processes(s)
        decode_dtype = s.decode_dtype or s.dtype
        own_copy = s.shard or decode_dtype != s.weights
        return {
            "weights": of_each * BYTES[s.weights],
            "gradients": of_each * BYTES[s.weights],
            "optimizer": of_each * bytes_of_moments(s),
            "decode weights": self.parameters * BYTES[decode_dtype] if own_copy else 0,
            "CUDA libraries": workspaces(self.device),
        }

    def always_with_lora(self) -> dict[str, float]:
        """The same where only the float32 A and B of plumbing/lora.py are trained."""
        s = self.s
        models = 2 if s.algo == "ppo" else 1
        adapters = 4 * count_adapters(self.config, s.lora_rank)
        return {
            "weights": models * (self.parameters * BYTES[s.weights] + adapters),
            "gradients": models * adapters,
            "optimizer": models * 2 * adapters,
            # Merged, so always a copy.
            "decode weights": self.parameters * BYTES[s.decode_dtype or s.dtype],
            "CUDA libraries": workspaces(self.device),
        }

    def saved_by_lora(self) -> str:
        """For the table: by how much less memory is taken all the time."""
        if not self.s.lora_rank:
            return ""
        adapters = count_adapters(self.config, self.s.lora_rank)
        without = dataclasses.replace(self, s=dataclasses.replace(self.s, lora_rank=0))
        saved = sum(without.always().values()) - sum(self.always().values())
        effect = f"saves {saved / GB:.3g}" if saved > 0 else f"takes {-saved / GB:.3g} more"
        return f"; LoRA trains {adapters / 1e9:.3g} billion numbers in their place, which {effect}"

    def check_lora_rank(self) -> None:
        """ValueError for a rank with which more would be trained than without LoRA."""
        rank = self.s.lora_rank
        adapters = count_adapters(self.config, rank)
        if adapters >= self.parameters:
            raise ValueError(
                f"--lora-rank must be so small that less is trained than without it; with {rank} it "
                f"is {adapters / 1e9:.3g} billion numbers in place of {self.parameters / 1e9:.3g} "
                "billion"
            )

    # ---- What a rollout takes besides, or a validation, whichever is larger.

    def sampling(self) -> dict[str, float]:
        s = self.s
        decoding = Decoding(
            self.config,
            dtype=s.decode_dtype or s.dtype,
            rows=self.rows,
            length=self.length,
            new=s.max_new_tokens,
            prompts=max(s.prompts, s.eval_problems),
            device=self.device,
            graph=s.graph,
        )
        return {"KV cache": decoding.cache, "sampling": decoding.besides()}

    # ---- What an update takes besides.

    def learning(self) -> dict[str, float]:
        activated = self.activations()
        return {
            "activations": activated,
            "gathered": self.gathered(activated) if self.s.shard else 0,
        }

    def activations(self) -> float:
        """At the fullest: what a micro-batch's forward pass leaves for the backward pass, and what
        that works with."""
        s = self.s
        config = self.config
        width = config["hidden_size"]
        layers = config["num_hidden_layers"]
        inner = config["intermediate_size"]
        table = config["vocab_size"] * width
        tokens = max(s.micro_tokens, self.length)
        autocast = s.dtype != s.weights  # float32 weights are used as bfloat16 copies
        tables = 1 if config.get("tie_word_embeddings") else 2
        copies = 2 * (self.parameters - tables * table) if autocast else 0

        kept = tokens * self.kept_in_layer()
        inputs = tokens * width * BYTES[s.weights] * layers
        logits = 5 * 4 * min(s.chunk, tokens) * config["vocab_size"]
        # It is added up until the last of its parts is there. A frozen head has none, only a copy.
        head_gradient = BYTES[s.weights] * table
        if s.lora_rank:
            head_gradient = 2 * table if autocast else 0
        # In the backward pass of a layer: gradients inside its MLP or attention, and at its two
        # ends, where norms compute in float32.
        query = config["num_attention_heads"] * head_size(config)
        in_layer = tokens * BYTES[s.dtype] * max(4 * inner, 6 * query)
        in_layer += tokens * 4 * 6 * width

        if s.recompute:  # of the layers their inputs are kept, and one is computed again
            # Autocast keeps its copies of what is trained, and makes those of frozen weights again.
            copies_kept = 0 if s.lora_rank else copies
            forward = inputs + copies_kept + logits
            layer_again = inputs + kept + copies // layers + head_gradient + in_layer
            most = max(forward, inputs + head_gradient + logits, layer_again)
        else:
            most = layers * kept + copies + head_gradient + max(logits, in_layer)
        # MasterAdamW's float32 gradient, mean and denominator of the largest weight.
        has_master = s.weights == "bfloat16" and not s.lora_rank
        step = 3 * 4 * table / sharing_processes(s) if has_master else 0
        if s.optimizer == "adamw8bit" and self.device.type == "cpu":
            step = EAGER_EIGHT_BIT_STEP * max(table, width * inner)
        return max(most, step)

    def kept_in_layer(self) -> int:
        """That a token leaves in a layer for the backward pass."""
        s = self.s
        config = self.config
        width = config["hidden_size"]
        query = config["num_attention_heads"] * head_size(config)
        key = config["num_key_value_heads"] * head_size(config)
        has_norm = config["model_type"] == "qwen3"  # of queries and keys
        autocast = s.dtype != s.weights
        numbers = 6 * width + 3 * query + 2 * key + 4 * config["intermediate_size"]
        if has_norm:
            numbers += query + key
        numbers += 7 * s.lora_rank  # between A and B, of seven layers
        if self.device.type == "cuda" and s.dtype == "float32":  # see model.Attention.attend
            numbers += 2 * (query - key)

        # Bytes of the float32 copies that norms keep, per number of the width.
        norm_copies = 0
        if autocast:
            norm_copies = 14
        elif s.weights == "bfloat16":
            norm_copies = 10
        return BYTES[s.dtype] * numbers + width * norm_copies

    def gathered(self, activated: float) -> float:
        """More than `activated` if the weights are sliced: those gathered for a pass, and their
        gradients until they are added up."""
        bytes_of_weight = BYTES[self.s.weights]
        table = self.config["vocab_size"] * self.config["hidden_size"]
        # Embedding and head stay from the forward pass to the end of the backward pass.
        tables = table if self.config.get("tie_word_embeddings") else 2 * table
        layer = (self.parameters - tables) / self.config["num_hidden_layers"]
        # While a layer's backward pass ends: its weights and gradients, the next one's weights on
        # their way, and the gradients of the one before, which are being added up.
        in_layers = activated + bytes_of_weight * (tables + 4 * layer)
        # At the end: embedding and head, their gradients, and another part or copy of these.
        at_end = bytes_of_weight * (2 * tables + table)
        # A save, tensor by tensor, has the slices of the largest and all of it, in float32.
        saving = 2 * 4 * table
        return max(in_layers, at_end, saving) - activated

    # ---- What a save copies into this machine's memory.

    def copied_to_save(self) -> float:
        """Of a model without LoRA its largest weight, from a GPU; of one with it all merged
        weights."""
        if self.s.lora_rank:
            return self.parameters * BYTES[self.s.weights]
        largest = 4 * self.config["vocab_size"] * self.config["hidden_size"]
        return largest if self.device.type == "cuda" else 0


def check_host(s, length: int, device: torch.device, on_device: float, copied: float) -> None:
    """ValueError if this machine's memory is too small for the answers of a rollout, of all
    processes, or of a problem's validation. In bytes: `on_device`, all that is taken there, and
    `copied`, what a save takes besides."""
    rollouts = 1 + s.resample  # what a further round drops stays for the log
    answers = max(s.prompts * s.samples * rollouts, s.eval_samples, s.final_samples)
    # int64 tokens of prompt and response; of a response's tokens log-probability and entropy too,
    # and padded: mask, log-probability, advantage, value, return.
    tokens = length * 8 + s.max_new_tokens * (4 + 4 + 1 + 4 * 4)
    size = answers * (tokens + BYTES_OF_OBJECTS)
    needed = size + copied + (0 if device.type == "cuda" else on_device)
    free = free_bytes(torch.device("cpu"))
    if needed > free:
        raise ValueError(
            f"{answers} answers of up to {length} tokens with their prompts take {size / GB:.3g} GB "
            f"and all together {needed / GB:.3g} of this machine's memory, which is "
            f"{free / GB:.3g}; what may help: fewer --prompts or --samples (and --eval-samples, "
            "--final-samples), less --resample or --max-new-tokens"
        )


def sharing_processes(s) -> int:
    """How many have a slice of a weight."""
    return int(os.environ.get("WORLD_SIZE", 1)) if s.shard else 1


def bytes_of_moments(s) -> float:
    """Of a weight, in the optimizer."""
    if s.optimizer == "adamw8bit":
        return 1 + 1 + 2 * 4 / 256  # codes, and a float32 scale for every 256 of them
    if s.weights == "bfloat16":
        return 4 + 2 + 4  # MasterAdamW: float32 master, bfloat16 mean, float32 square
    return 4 + 4  # two float32 moments


def count_adapters(config: dict, rank: int) -> int:
    """Numbers in A [rank, in] and B [out, rank] of all linear layers of attention and MLP."""
    width = config["hidden_size"]
    inner = config["intermediate_size"]
    query = config["num_attention_heads"] * head_size(config)
    key = config["num_key_value_heads"] * head_size(config)
    queries_and_output = 2 * (width + query)
    keys_and_values = 2 * (width + key)
    mlp = 3 * (width + inner)
    return config["num_hidden_layers"] * rank * (queries_and_output + keys_and_values + mlp)


def workspaces(device: torch.device) -> int:
    return CUDA_WORKSPACES if device.type == "cuda" else 0


def plan_evaluation(
    config: dict,
    parameters: int,
    s,
    length: int,
    rows: int,
    problems: int,
    device: torch.device,
    may_help: str = EVALUATION_MAY_HELP,
) -> None:
    """ValueError if evaluate.py's settings `s` take more memory than a GPU has free or this machine
    has: for `rows` sequences of `length` tokens at a time, answers to so many problems."""
    size = sizes_of_evaluation(config, parameters, s, length, rows, problems, device)
    needed = sum(size.values())
    free = free_bytes(device)
    if needed > free:
        raise ValueError(
            f"sampling takes {needed / GB:.3g} GB of memory for {parameters / 1e9:.3g} billion "
            f"weights ({in_gb(size)}), but there are {free / GB:.3g}; {may_help}"
        )


def sizes_of_evaluation(
    config: dict, parameters: int, s, length: int, rows: int, problems: int, device: torch.device
) -> dict[str, float]:
    """In bytes."""
    decoding = Decoding(
        config,
        dtype=s.dtype,
        rows=rows,
        length=length,
        new=s.max_new_tokens,
        prompts=problems,
        device=device,
        graph=s.graph,
        top_p=s.top_p,
    )
    return {
        "weights": parameters * BYTES[s.dtype],
        "CUDA libraries": workspaces(device),
        "KV cache": decoding.cache,
        "sampling": decoding.besides(),
    }


def name_of(device: torch.device) -> str:
    """The card's name, or the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"


def in_gb(size: dict[str, float]) -> str:
    return ", ".join(f"{name} {value / GB:.3g}" for name, value in size.items() if value)


class Decoding:
    """The memory of a call of rollout.Sampler, besides the weights: `rows` sequences at a time, of
    `length` tokens with their prompts, of which `new` at most are sampled; so many `prompts`."""

    def __init__(
        self,
        config: dict,
        dtype: str,
        rows: int,
        length: int,
        new: int,
        prompts: int,
        device: torch.device,
        graph: bool,
        top_p: float = 1.0,
    ) -> None:
        self.config = config
        self.bytes = BYTES[dtype]
        self.rows = rows
        self.prompt = max(1, length - new)
        self.new = new
        self.prompts = prompts
        self.graph = graph and device.type == "cuda"
        self.ungroups = device.type == "cuda" and dtype == "float32"
        self.top_p = top_p
        block = GROW_BY[device.type]
        self.positions = -(-length // block) * block  # rounded up
        # Of a token, in one layer.
        self.keys_and_values = 2 * config["num_key_value_heads"] * head_size(config) * self.bytes

    @property
    def cache(self) -> int:
        layers = self.config["num_hidden_layers"]
        return self.rows * self.positions * layers * self.keys_and_values

    def besides(self) -> int:
        """What is there all the time, and the largest of what is there in turn."""
        tokens = min(max(PREFILL_TOKENS, self.prompt), self.prompts * self.prompt)
        bank = tokens * self.config["num_hidden_layers"] * self.keys_and_values
        # int64 tokens, float32 log-probabilities and entropies; float64 copies on their way out.
        records = self.rows * (self.new + 1) * (16 + 48)
        # A CUDA graph keeps the memory of the step that it recorded: reserved, not allocated.
        recorded = self.step() if self.graph else 0
        # The rows that a refill takes from the bank; the block that moves to a longer cache.
        refill = self.rows * self.prompt * self.keys_and_values
        lengthened = self.rows * self.positions * self.keys_and_values // 2
        in_turn = max(self.prefill(tokens), self.step(), refill, lengthened)
        return bank + records + recorded + in_turn + SMALL_THINGS

    def prefill(self, tokens: int) -> int:
        """The widest place in a layer: in the MLP, or where queries and keys are rotated."""
        width = self.config["hidden_size"]
        query = self.config["num_attention_heads"] * head_size(self.config)
        key = self.config["num_key_value_heads"] * head_size(self.config)
        in_mlp = 3 * self.config["intermediate_size"]
        in_attention = 4 * (query + key)
        if self.ungroups:  # see model.Attention.attend
            in_attention += 2 * query
        rotation = 6 * head_size(self.config) + 16  # angles, cos, sin; token and position
        numbers = 3 * width + max(in_mlp, in_attention)
        return tokens * (self.bytes * numbers + rotation)

    def step(self) -> int:
        """A decode step: a layer's attention over the cache, or the draw."""
        heads = self.config["num_attention_heads"]
        attention = 2 * heads * self.positions * self.bytes
        of_logit = BYTES_OF_LOGIT[self.top_p < 1] + SCRATCH_OF_LOGIT
        draw = of_logit * self.config["vocab_size"]
        hidden = 8 * self.config["hidden_size"] * self.bytes
        return self.rows * (max(attention, draw) + hidden)


def check_disk(s, parameters: int, adapters: int = 0) -> None:
    """ValueError if the disk has too little room for a save: the model, and the state, which is
    there twice while it is replaced. A dry run saves nothing. adapters: how many numbers --lora-rank
    trains in place of all `parameters`."""
    if s.dry_run:
        return
    model = parameters * BYTES[s.weights]
    models = 2 if s.algo == "ppo" else 1
    state = models * parameters * (BYTES[s.weights] + bytes_of_moments(s))
    if s.lora_rank:
        state = models * adapters * (4 + 4 + 4)
        model += adapters * 4
    needed = 2 * state + model
    folder = Path(s.resume or s.out).absolute()
    saved = [file.stat().st_size for file in folder.rglob("*.safetensors")] if s.resume else []
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free + sum(saved)
    if needed > free:
        raise ValueError(
            f"a save takes {needed / GB:.3g} GB of disk, with the state twice while it is replaced, "
            f"but {folder} has {free / GB:.3g}; what may help: --out on another disk"
        )


def free_bytes(device: torch.device) -> int:
    """What a GPU has free; of a machine without one, this process's share of all its memory."""
    if device.type == "cuda":
        # What torch holds back for reuse, such as a model before this one, is free too.
        held_back = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held_back
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
        # A process works on one card: that on which it has the most.
        card = max(range(torch.cuda.device_count()), key=torch.cuda.memory_allocated)
        allocated = torch.cuda.memory_allocated(card) / GB
        reserved = torch.cuda.memory_reserved(card) / GB
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
