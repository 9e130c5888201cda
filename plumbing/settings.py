"""Every setting of train.py and evaluate.py: one flat dataclass each, a field a flag, a line of
documentation a field. The paper's values are presets; the defaults are scaled down to the embedded
model and two CPU cores."""

import argparse
import dataclasses
import datetime
import importlib.util
import math
import os
import sys
from typing import NoReturn, Sequence
from urllib.parse import quote

import torch

from plumbing.distributed import is_first_to_speak
from plumbing.method import find_method

TEMPLATE_NAMES = ("dapo", "qwen-math", "chat", "none")
DTYPES = ("float32", "bfloat16")
ALGORITHMS = ("grpo", "ppo")
OPTIMIZERS = ("adamw", "adamw8bit")
PAPER_ALPHA = {"grpo": 0.4, "ppo": 0.1}

PAPER = dict(
    task="math",
    template="dapo",
    prompts=512,
    samples=8,
    minibatch=32,
    lr=1e-6,
    kappa=2.0,
    clip_low=0.2,
    clip_high=0.28,
    entropy_coef=0.0,
    temperature=1.0,
    max_new_tokens=8192,
    dtype="bfloat16",
    # Ours, for one card: as many caches of 9K tokens as 7B leaves room for.
    recompute=True,
    slots=64,
)
PAPER_CRITIC = dict(critic_lr=2e-6, critic_warmup=10, gamma=1.0, lam=1.0)
PRESETS = {
    "paper-grpo": PAPER | dict(algo="grpo", alpha=PAPER_ALPHA["grpo"]),
    "paper-ppo": PAPER | PAPER_CRITIC | dict(algo="ppo", alpha=PAPER_ALPHA["ppo"]),
    # Where GRPO gives up problems for a higher Pass@1 (lab/narrow.py).
    "narrow": dict(task="countdown-easy", max_new_tokens=24, steps=200),
}
EVALUATION_PRESETS = {"paper": dict(temperature=0.6, top_p=0.95)}

# Settings that were made later than some runs, whose config.json lacks them: the values with which
# such a run goes on as it began.
ADDED_LATER = dict(
    graph=True,
    date="",
    method="",
    resample=0,
    optimizer="adamw",
    shard=False,
    lora_rank=0,
    lora_alpha=32,
)
# Tokens of a micro-batch unless they are given: a GPU is fast only with much work at a time.
MICRO_TOKENS = {"cpu": 2048, "cuda": 8192}


def flag(default, help: str, **options):
    """A field of a settings dataclass: its default, its one line of documentation, argparse's
    extras, and `least`, the smallest number allowed."""
    return dataclasses.field(default=default, metadata={"help": help} | options)


@dataclasses.dataclass
class Settings:
    """train.py's."""

    # Where the run goes.
    name: str = flag("", "the run's folder under --out; by default the settings that differ")
    out: str = flag("runs", "where run folders go")
    overwrite: bool = flag(False, "replace an existing run folder of this name")
    resume: str = flag(
        None,
        "go on with this run folder, with its settings; only a larger --steps may go with it",
        type=str,
    )
    dry_run: bool = flag(False, "only one step at the longest lengths; prints its time and memory")
    # What is trained, and on what.
    algo: str = flag(
        "grpo",
        "where advantages come from: the group (grpo) or a critic (ppo)",
        choices=ALGORITHMS,
    )
    method: str = flag(
        "",
        "instead of the entropy advantage a relative of it, such as clip-cov (docs/methods.md), or "
        "my_method.py:mine, a Method in a file",
    )
    model: str = flag("base", "model to start from: a folder or a hub id")
    lora_rank: int = flag(
        0,
        "train two matrices of this rank beside each linear layer instead of the weights "
        "(plumbing/lora.py); 0: all weights",
        least=0,
    )
    lora_alpha: int = flag(32, "LoRA: what the two matrices add is scaled by this over the rank")
    preset: str = flag(
        "",
        "the paper's settings, or narrow, where GRPO gives up problems; flags beside it change "
        "single ones",
        choices=("", *PRESETS),
    )
    task: str = flag(
        "countdown",
        "countdown, countdown-easy, countdown-hard (many or few solutions), math, or "
        "my_task.py:Mine, a class in a file",
    )
    data: str = flag(
        "", "math: problems to train on, a jsonl, json, csv or parquet file or a hub data set"
    )
    test_data: str = flag("", "math: problems that are kept out of the training")
    template: str = flag("dapo", "math: how a problem is put", choices=TEMPLATE_NAMES)
    date: str = flag(
        "", "math: today, for chat templates that tell it; by default the day the run started"
    )
    max_prompt_tokens: int = flag(1024, "problems with longer prompts are left out")
    # How much, in which portions.
    steps: int = flag(None, "rollouts; by default 100, or as many as a resumed run has", type=int)
    prompts: int = flag(32, "problems per rollout")
    samples: int = flag(16, "answers per problem, the group of GRPO")
    minibatch: int = flag(4, "problems per optimizer step")
    resample: int = flag(
        0, "rounds in which groups of equal rewards give place to other problems (DAPO)", least=0
    )
    # The objective.
    lr: float = flag(2e-4, "AdamW's learning rate, constant")
    weight_decay: float = flag(0.01, "AdamW's weight decay")
    grad_clip: float = flag(1.0, "largest gradient norm")
    alpha: float = flag(
        None,
        "weight of the entropy in the entropy advantage (0: none); by default 0.4 for grpo, "
        "0.1 for ppo",
        type=float,
    )
    kappa: float = flag(2.0, "psi is at most |A| / kappa")
    clip_low: float = flag(0.2, "the ratio is clipped at 1 - clip_low")
    clip_high: float = flag(0.28, "the ratio is clipped at 1 + clip_high (clip-higher)")
    entropy_coef: float = flag(
        0.0, "weight of the mean entropy in the objective (classical entropy regularisation)"
    )
    critic_lr: float = flag(1.6e-3, "ppo: AdamW's learning rate of the critic")
    critic_warmup: int = flag(10, "ppo: first steps, in which only the critic learns", least=0)
    gamma: float = flag(1.0, "ppo: discount per token")
    lam: float = flag(1.0, "ppo: lambda of generalised advantage estimation")
    value_clip: float = flag(
        0.5, "ppo: how far a value may move from the old one before its gradient is cut"
    )
    # Sampling.
    temperature: float = flag(1.0, "of sampling and of scoring alike")
    max_new_tokens: int = flag(128, "longest response, in tokens")
    slots: int = flag(512, "sequences decoded at a time")
    # Memory and speed.
    micro_tokens: int = flag(
        None,
        "tokens, with padding, in one forward and backward pass; by default 2048, on a GPU 8192",
        type=int,
    )
    shard: bool = flag(
        False, "under torchrun: a slice of every weight, gradient and moment in each process"
    )
    chunk: int = flag(2048, "response tokens whose logits exist at a time")
    recompute: bool = flag(
        False, "gradient checkpointing: layers are computed again in the backward pass"
    )
    skip_zero: bool = flag(
        True, "leave sequences with zero advantage out of the forward pass (exact)"
    )
    graph: bool = flag(True, "on a GPU, decode steps as CUDA graphs: fewer launches")
    # Validation and saves.
    eval_every: int = flag(25, "steps between validations and between saves")
    eval_problems: int = flag(200, "validation problems")
    eval_samples: int = flag(8, "samples per problem in a validation on the way")
    final_samples: int = flag(64, "samples per problem before the first and after the last step")
    # The machine.
    seed: int = flag(0, "of data order and sampling", least=0)
    device: str = flag("auto", "cpu, cuda, cuda:1 ...; auto takes a GPU if there is one")
    dtype: str = flag("float32", "of the arithmetic of sampling and scoring", choices=DTYPES)
    weights: str = flag(
        "float32",
        "in which weights are stored; bfloat16 has a float32 master in the optimizer",
        choices=DTYPES,
    )
    optimizer: str = flag(
        "adamw",
        "adamw8bit, of torchao: moments of 8 bits and no float32 master, for --weights bfloat16",
        choices=OPTIMIZERS,
    )
    decode_dtype: str = flag(
        None, "of the sampler's copy of the weights, if not --dtype", choices=DTYPES, type=str
    )

    def __post_init__(self) -> None:
        if self.alpha is None:
            self.alpha = PAPER_ALPHA[self.algo]
        if self.steps is None and self.resume is None:
            self.steps = 100
        if not self.date:
            self.date = datetime.date.today().isoformat()
        if self.micro_tokens is None:
            self.micro_tokens = usual_micro_tokens(self.device)


def usual_micro_tokens(device: str) -> int:
    """Of --device: cpu, cuda:1, auto ..."""
    on_gpu = torch.cuda.is_available() if device == "auto" else device.startswith("cuda")
    return MICRO_TOKENS["cuda" if on_gpu else "cpu"]


@dataclasses.dataclass
class EvaluationSettings:
    """evaluate.py's."""

    models: tuple = flag(
        (),
        "folders or hub ids of models; the others are compared with the first",
        nargs="+",
        type=str,
    )
    task: str = flag(
        "countdown",
        "countdown, countdown-easy, countdown-hard, math, or my_task.py:Mine, a class in a file",
    )
    data: str = flag("", "math: the training data, whose splits are train and validation")
    test_data: str = flag("", "math: the test data")
    template: str = flag("dapo", "math: how a problem is put", choices=TEMPLATE_NAMES)
    split: str = flag(
        "validation",
        "keep test for the day when all is frozen",
        choices=("train", "validation", "test"),
    )
    problems: int = flag(200, "how many problems, from the start of the split (0: all)", least=0)
    samples: int = flag(256, "samples per problem, the n of Pass@K")
    k: str = flag(
        "",
        "the K of Pass@K, separated by commas; by default 1,4,16,64,256 as far as --samples goes",
    )
    temperature: float = flag(1.0, "sampling temperature")
    top_p: float = flag(1.0, "nucleus sampling; 1 samples the whole distribution")
    preset: str = flag(
        "", "paper: temperature 0.6 and top-p 0.95", choices=("", *EVALUATION_PRESETS)
    )
    max_new_tokens: int = flag(128, "longest response, in tokens")
    slots: int = flag(512, "sequences decoded at a time")
    seed: int = flag(0, "seed of the samples", least=0)
    device: str = flag("auto", "cpu, cuda, cuda:1 ...; auto takes a GPU if there is one")
    dtype: str = flag("float32", "in which the weights are loaded and sampled", choices=DTYPES)
    graph: bool = flag(True, "on a GPU, decode steps as CUDA graphs: fewer launches")
    json: str = flag("", "also write the table, with the counts of every problem, to this file")


class Parser(argparse.ArgumentParser):
    """Of several processes, which all have the same flags, one says what is wrong with them."""

    def error(self, message: str) -> NoReturn:
        if not is_first_to_speak():
            sys.exit(2)
        super().error(message)


def parse_flags(
    settings_class,
    description: str,
    arguments: Sequence[str] | None = None,
    presets: dict | None = None,
):
    """Turns a dataclass of `flag` fields into --flags and returns it filled in. A --preset changes
    the defaults."""
    parser = Parser(
        description=description.splitlines()[0],
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for field in dataclasses.fields(settings_class):
        add_flag(parser, field)
    if presets:  # parsed once to learn which, then again over its values
        chosen = parser.parse_args(arguments).preset
        parser.set_defaults(**presets.get(chosen, {}))
    return settings_class(**vars(parser.parse_args(arguments)))


def add_flag(parser: argparse.ArgumentParser, field: dataclasses.Field) -> None:
    options = {key: value for key, value in field.metadata.items() if key != "least"}
    if isinstance(field.default, bool):
        options["action"] = argparse.BooleanOptionalAction
    else:
        options.setdefault("type", type(field.default))

    positional = bool(options.get("nargs"))
    if positional:
        parser.add_argument(field.name, **options)
    else:
        parser.add_argument(flag_name(field.name), default=field.default, **options)


def flag_name(field_name: str) -> str:
    return "--" + field_name.replace("_", "-")


def check_numbers(s) -> None:
    """ValueError for a number that is not finite or less than its flag's `least`: by default 1 if
    it is whole, else 0."""
    for field in dataclasses.fields(s):
        value = getattr(s, field.name)
        if type(value) not in (int, float):
            continue
        default_least = 1 if type(value) is int else 0
        least = field.metadata.get("least", default_least)
        if not math.isfinite(value):
            raise ValueError(f"{flag_name(field.name)} must be a finite number; it is {value}")
        if value < least:
            raise ValueError(f"{flag_name(field.name)} must be at least {least}; it is {value}")


def check_text(s) -> None:
    """ValueError for text that cannot be written: not as a file's name, or not on the screen. Bytes
    that are no text in the locale's encoding come from the command line as such."""
    for field in dataclasses.fields(s):
        value = getattr(s, field.name)
        if not isinstance(value, str):
            continue
        try:
            value.encode(sys.getfilesystemencoding())
            value.encode(sys.stdout.encoding or "utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{flag_name(field.name)} cannot be written in this locale's encoding, "
                f"{error.encoding}; it is {ascii(value)}"
            ) from None


def check(s: Settings) -> None:
    """ValueError, in one sentence, for settings of train.py that make no sense."""
    check_text(s)
    check_numbers(s)
    find_method(s.method)
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if s.shard and "WORLD_SIZE" not in os.environ:
        raise ValueError(
            "--shard needs torchrun, which starts the processes that share the weights"
        )

    def demand(good: bool, name: str, wanted: str) -> None:
        if not good:
            raise ValueError(f"{flag_name(name)} must be {wanted}; it is {getattr(s, name)}")

    demand(s.kappa > 1, "kappa", "greater than 1, or shaping could flip a sign")
    demand(
        s.samples > 1 or s.algo == "ppo",
        "samples",
        "at least 2: a group of one has no baseline to compare with",
    )
    demand(
        s.critic_warmup < s.steps or s.algo == "grpo",
        "critic_warmup",
        "less than --steps, or the policy never moves",
    )
    demand(not s.method or s.algo == "grpo", "method", "left out with --algo ppo")
    demand(not s.resample or s.algo == "grpo", "resample", "0 with --algo ppo, which has no groups")
    demand(s.prompts % s.minibatch == 0, "minibatch", f"a divisor of --prompts, {s.prompts}")
    demand(s.minibatch % processes == 0, "minibatch", "a multiple of the number of processes")
    demand(s.gamma <= 1, "gamma", "at most 1")
    demand(s.lam <= 1, "lam", "at most 1")
    demand(s.clip_low < 1, "clip_low", "less than 1")
    demand(s.grad_clip > 0, "grad_clip", "positive")
    demand(1e-3 <= s.temperature <= 1e3, "temperature", "from 0.001 to 1000")
    demand(
        s.weights in ("float32", s.dtype), "weights", "float32, or bfloat16 with --dtype bfloat16"
    )
    eight_bit = s.optimizer == "adamw8bit"
    demand(
        not eight_bit or s.weights == "bfloat16", "optimizer", "adamw without --weights bfloat16"
    )
    demand(not (eight_bit and s.shard), "optimizer", "adamw with --shard")
    demand(
        not (eight_bit and s.lora_rank),
        "optimizer",
        "adamw with --lora-rank, whose matrices are float32",
    )
    demand(not (s.lora_rank and s.shard), "lora_rank", "0 with --shard")
    if eight_bit and importlib.util.find_spec("torchao") is None:
        raise ValueError("--optimizer adamw8bit needs torchao: pip install torchao==0.18.0")


def run_name(s: Settings) -> str:
    """The algorithm, and every setting that differs from its default, so that two settings never
    share a folder."""
    usual = Settings(algo=s.algo)
    usual.micro_tokens = usual_micro_tokens(s.device)
    not_in_the_name = ("name", "out", "overwrite", "resume", "dry_run", "date")
    parts = [s.algo]
    for field in dataclasses.fields(s):
        value = getattr(s, field.name)
        if field.name not in not_in_the_name and value != getattr(usual, field.name):
            parts.append(f"{field.name.replace('_', '')}={value}")
    return quote("-".join(parts), safe="=,-")


def pick_device(name: str) -> torch.device:
    """The device of this name; auto is the GPU if there is one, and without a number each process of
    torchrun takes its own. ValueError for one that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        if torch.device(name).type not in ("cpu", "cuda"):
            raise RuntimeError("only cpu and cuda devices are supported")
        device = torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used here: {reason}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)  # CUDA graphs are recorded on the current one
    return device
