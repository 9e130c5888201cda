"""Speed and memory beside what a user would pick instead: `python -m lab.bench decode refill update step memory growth`.

    decode   equal lengths: our sampler against transformers' generate, dynamic and static cache
    refill   natural lengths, four times as many sequences as slots, against generate in static
             batches
    update   the policy's update at equal tokens, against the same loss written over transformers'
             model
    step     a GRPO step against TRL's GRPOTrainer (pip install trl datasets), at a real run's equal
             groups and at none
    memory   the peak resident memory of such a step, and what it was before, each side in a process
             of its own
    growth   our decode and update time against batch, length and share of equal groups

Both sides get the same weights, prompts and numbers of samples, and work in turn in one process, so
that whatever else the machine does meets both; the first turn warms up and does not count. A ratio
is the peer's seconds over ours in that turn. The learning rate is 0: every turn has the same
weights. No gradient checkpointing; bf16 only where it says so.

`--model FOLDER` has another model decode, refill and update than the embedded one. One of 135 M
parameters takes minutes on two cores with `--dtype fp32 --slots 16 --prompts 4 --new-tokens 32
--turns 3`. OMP_NUM_THREADS=1 in front is one thread.

On a GPU transformers compiles generate's forward pass for a static cache, which takes minutes and
needs a C compiler. It does so in the turns that do not count; `--warm-up 2` makes sure that nothing
is left to compile or to capture in those that do.

Not equal: our sampler records log-probabilities and entropies and keeps its cache between turns,
generate does neither. Natural lengths are drawn anew every turn. TRL has no entropy advantage and
scores a rollout again, where we trust the sampler.

The work is in lab/bench_work.py, the peers in lab/bench_transformers.py and lab/bench_trl.py, the
clock and the tables in lab/bench_turns.py.
"""

import dataclasses
import itertools
import json
import platform
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Sequence

import torch

from lab.bench_turns import Turns, alternate, growth_table, table
from lab.bench_work import (
    LIMIT,
    MINIBATCH,
    ROLLOUT_SLOTS,
    SAMPLES,
    count_tokens,
    encoded_prompts,
    our_step,
    our_update,
    rewards,
    sample,
)
from model import load
from plumbing.batch import micro_batches
from plumbing.memory import peak_memory
from plumbing.optimizer import make_optimizer
from plumbing.pretrained import EMBEDDED
from plumbing.seeds import seeded_generator
from plumbing.settings import Settings as TrainSettings
from plumbing.settings import check_numbers, flag, parse_flags, pick_device
from rollout import Episode, Sampler

# The peers are imported where they are needed: the memory of our side must not hold their libraries.

COMMANDS = ("decode", "refill", "update", "step", "memory", "growth")
OF_ANY_MODEL = COMMANDS[:3]
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
PROMPT = 16  # decode: tokens of a made-up prompt
NEVER = (-1,)  # end tokens of responses that go on to the limit
SHAPE = (128, 32)  # growth: the smallest shape, sequences and tokens
AT_ONCE = {"trl-16-at-a-time": 16, "trl-64-at-a-time": 64}  # memory: sequences in one pass of TRL
SIDES = ("ours", *AT_ONCE)


@dataclasses.dataclass
class Settings:
    commands: tuple = flag(
        (), "what to measure: " + ", ".join(COMMANDS), nargs="+", type=str, choices=COMMANDS
    )
    model: str = flag(EMBEDDED, "decode, refill, update: of a folder or a hub id")
    device: str = flag("auto", "cpu, cuda, cuda:1 ...; auto takes a GPU if there is one")
    dtype: str = flag("", "decode, refill: by default both", choices=("", *PRECISIONS))
    turns: int = flag(7, "timed turns")
    warm_up: int = flag(1, "decode, refill, update: turns before that, which do not count")
    slots: int = flag(512, "decode, refill: sequences at a time")
    new_tokens: int = flag(LIMIT, "decode, refill, update: tokens per sequence, at most")
    prompts: int = flag(32, f"update, step, memory: problems of a rollout, {SAMPLES} answers each")
    equal: float = flag(
        0.23,
        "step, memory: share of groups whose answers are all wrong; 0.23 is the default run's",
    )
    json: str = flag("", "also write the figures, with every turn, to this file")


def check(s: Settings) -> None:
    """ValueError, in one sentence, for settings that make no sense."""
    check_numbers(s)
    if s.slots % SAMPLES:
        raise ValueError(f"--slots must be a multiple of {SAMPLES}; it is {s.slots}")
    if s.prompts % MINIBATCH:
        raise ValueError(f"--prompts must be a multiple of {MINIBATCH}; it is {s.prompts}")
    if s.equal > 1:
        raise ValueError(f"--equal must be a share from 0 to 1; it is {s.equal}")
    for command in s.commands:
        if s.model != EMBEDDED and command not in OF_ANY_MODEL:
            raise ValueError(f"--model goes with {', '.join(OF_ANY_MODEL)}; not with {command}")


def precisions(s: Settings) -> dict[str, torch.dtype]:
    return {name: dtype for name, dtype in PRECISIONS.items() if s.dtype in ("", name)}


def decode(s: Settings, device: torch.device) -> Turns:
    from lab.bench_transformers import peer_generate, peer_model

    model = load(s.model, device)[0]
    # Any tokens will do as prompts, because no response ends before the limit.
    random = seeded_generator(0, 0, "bench")
    prompts = torch.randint(1, len(model.head), (s.slots, PROMPT), generator=random).tolist()
    sides = {}
    for name, dtype in precisions(s).items():
        sampler = Sampler(model, s.slots, PROMPT + s.new_tokens, NEVER, dtype)
        peer = peer_model(model, dtype)
        generate = partial(peer_generate, peer, prompts, s.new_tokens, eos=None)
        sides[f"ours, {name}"] = partial(our_decode, sampler, prompts, s.new_tokens)
        sides[f"generate, {name}"] = generate
        sides[f"generate, {name}, static cache"] = partial(generate, cache="static")
    return alternate(sides, s.turns, s.warm_up)


def our_decode(sampler: Sampler, prompts: Sequence[Sequence[int]], new_tokens: int) -> int:
    return count_tokens(sample(sampler, prompts, 1, new_tokens))


def refill(s: Settings, device: torch.device) -> Turns:
    from lab.bench_transformers import peer_generate_batches, peer_model

    model = load(s.model, device)[0]
    # Four times as many sequences as slots.
    prompts = encoded_prompts(4 * s.slots // SAMPLES, s.model)
    turn = itertools.count()

    def our_refill(sampler: Sampler) -> int:
        return count_tokens(sample(sampler, prompts, SAMPLES, s.new_tokens, next(turn)))

    sides = {}
    for name, dtype in precisions(s).items():
        sampler = Sampler(model, s.slots, len(prompts[0]) + s.new_tokens, model.eos_ids, dtype)
        sides[f"ours, {name}"] = partial(our_refill, sampler)
        sides[f"generate, {name}, static batches"] = partial(
            peer_generate_batches,
            peer_model(model, dtype),
            prompts,
            samples=SAMPLES,
            slots=s.slots,
            new_tokens=s.new_tokens,
            eos=model.eos_ids[0],
        )
    return alternate(sides, s.turns, s.warm_up)


def update(s: Settings, device: torch.device) -> Turns:
    """Every sequence has an advantage, so ours leaves none out: equal tokens."""
    from lab.bench_transformers import peer_model, peer_update

    model = load(s.model, device)[0]
    peer = peer_model(model)
    settings = TrainSettings(lr=0.0)
    prompts = encoded_prompts(s.prompts, s.model)
    sampler = Sampler(model, ROLLOUT_SLOTS, len(prompts[0]) + s.new_tokens, model.eos_ids)
    episodes = sample(sampler, prompts, SAMPLES, s.new_tokens)
    reward = rewards(s.prompts, equal=0.0)
    optimizer = make_optimizer(model, 0.0, settings)
    peer_optimizer = torch.optim.AdamW(peer.parameters(), 0.0, weight_decay=0.01)

    def ours() -> int:
        return our_update(model, optimizer, episodes, reward, settings)

    def theirs(cut) -> int:
        return peer_update(peer, peer_optimizer, episodes, reward, settings, cut)

    def in_order(part: Sequence[Episode]) -> list[list[int]]:
        """As a minibatch is usually cut."""
        return [list(range(first, first + 32)) for first in range(0, len(part), 32)]

    def like_ours(part: Sequence[Episode]) -> list[list[int]]:
        """Sorted by length, and cut by tokens."""
        return micro_batches(part, settings.micro_tokens)

    sides = {
        "ours": ours,
        "transformers, 32 at a time": partial(theirs, in_order),
        "transformers, our micro-batches": partial(theirs, like_ours),
    }
    return alternate(sides, s.turns, s.warm_up)


def step(s: Settings, device: torch.device, equal: float) -> Turns:
    from lab.bench_trl import trl_steps

    ours = our_step(s.prompts, equal, device)
    return trl_steps(s.prompts, s.turns, equal, device, between=ours)


def memory(s: Settings) -> dict[str, list[float]]:
    """GB before the first step and at the peak, of the sides in processes of their own."""
    device = str(pick_device(s.device))
    found = {}
    for side in SIDES:
        call = f"memory_of(Settings(**{vars(s)}), torch.device({device!r}), {side!r})"
        code = f"import torch; from lab.bench import Settings, memory_of; {call}"
        printed = subprocess.check_output([sys.executable, "-c", code], text=True)
        before, peak = printed.split()[-2:]
        found[side] = [float(before), float(peak)]
    return found


def memory_of(s: Settings, device: torch.device, side: str) -> None:
    """Runs one side alone, and prints GB before its first step and at the peak."""
    if side == "ours":
        ours = our_step(s.prompts, s.equal, device)
        before = peak_memory(device)
        alternate({"ours": ours}, s.turns)
    else:
        from lab.bench_transformers import peer_model
        from lab.bench_trl import trl_steps  # with all that TRL imports

        peer_model(load("base", device)[0])
        before = peak_memory(device)
        trl_steps(s.prompts, s.turns, s.equal, device, at_once=AT_ONCE[side])
    print(before, peak_memory(device))


def growth(s: Settings, device: torch.device) -> dict[str, Turns]:
    """One thing varied at a time: the number of sequences, their length, the share of equal
    groups."""
    model = load("base", device)[0]
    settings = TrainSettings(lr=0.0)
    optimizer = make_optimizer(model, 0.0, settings)
    count, length = SHAPE
    prompts = encoded_prompts(4 * count // SAMPLES)
    sampler = Sampler(model, 4 * count, len(prompts[0]) + 4 * length, NEVER)
    # More sequences, then longer ones.
    shapes = [(count * factor, length) for factor in (1, 2, 4)]
    shapes += [(2 * count, length * factor) for factor in (2, 4)]

    def draw(sequences: int, tokens: int) -> list[Episode]:
        return sample(sampler, prompts[: sequences // SAMPLES], SAMPLES, tokens)

    def decode_shape(sequences: int, tokens: int) -> int:
        return count_tokens(draw(sequences, tokens))

    def update_shape(sequences: int, tokens: int, equal: float) -> partial:
        episodes = draw(sequences, tokens)  # here: sampling is no part of what is timed
        reward = rewards(sequences // SAMPLES, equal)
        return partial(our_update, model, optimizer, episodes, reward, settings)

    decodes = {}
    updates = {}
    for sequences, tokens in shapes:
        name = f"{sequences} sequences of {tokens} tokens"
        decodes[name] = partial(decode_shape, sequences, tokens)
        updates[name] = update_shape(sequences, tokens, equal=0.0)
    for equal in (0.25, 0.5, 0.75):
        name = f"{count} sequences of {length} tokens, {equal:.0%} of the groups equal"
        updates[name] = update_shape(count, length, equal)
    return {"decode": alternate(decodes, s.turns), "update": alternate(updates, s.turns)}


def bench(s: Settings) -> dict:
    """Runs the commands; returns what they measured, for JSON."""
    check(s)
    device = pick_device(s.device)
    record = {"machine": machine(device), "settings": dataclasses.asdict(s)}
    turns = f"median [quartiles] of {s.turns} turns"
    print(record["machine"], vars(s), turns, sep="; ")

    for command in s.commands:
        if command == "memory":
            record["memory"] = memory(s)
            print(f"\nmemory: {memory_line(record['memory'])}")
        elif command == "growth":
            record["growth"] = growth(s, device)
            for part, taken in record["growth"].items():
                print(f"\ngrowth: {part}\n\n{growth_table(taken)}")
        elif command == "step":
            for equal in dict.fromkeys((s.equal, 0.0)):
                taken = step(s, device, equal)
                record[f"step, {equal:.0%} equal"] = taken
                print(f"\nstep, {equal:.0%} of the groups equal\n\n{table(taken)}")
        else:
            measure = {"decode": decode, "refill": refill, "update": update}[command]
            record[command] = measure(s, device)
            print(f"\n{command}\n\n{table(record[command])}")

    if s.json:
        Path(s.json).write_text(json.dumps(record) + "\n")
    return record


def memory_line(found: dict[str, list[float]]) -> str:
    sides = [
        f"{side} {peak:.2f} GB ({before:.2f} before)" for side, (before, peak) in found.items()
    ]
    return "peak of a GRPO step's process: " + ", ".join(sides)


def machine(device: torch.device) -> str:
    """What the figures were measured on."""
    processor = processor_name()
    threads = torch.get_num_threads()
    return f"{processor}, {threads} threads, torch {torch.__version__}, {device}"


def processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        after = cpuinfo.read_text().partition("model name\t: ")[2]
        name = after.partition("\n")[0]
        if name:
            return name
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    try:
        bench(parse_flags(Settings, __doc__))
    except (ValueError, OSError, ImportError, KeyboardInterrupt) as error:
        sys.exit(f"lab.bench: {str(error) or 'stopped'}")
