"""Speed and memory beside what a user would pick instead: `python -m lab.bench decode refill update step memory growth`.

    decode   equal lengths: our sampler against transformers' generate, dynamic and static cache
    refill   natural lengths, four times as many sequences as slots, against generate in static batches
    update   the policy's update at equal tokens, against the same loss written over transformers' model
    step     a GRPO step against TRL's GRPOTrainer (pip install trl datasets), at a real run's equal groups and at none
    memory   the peak resident memory of such a step, and what it was before, each side in a process of its own
    growth   our decode and update time against batch, length and share of equal groups

Both sides get the same weights, prompts and numbers of samples, and work in turn in one process, so that whatever else
the machine does meets both; the first turn warms up and does not count. A ratio is the peer's seconds over ours in that
turn. The learning rate is 0: every turn has the same weights. No gradient checkpointing; bf16 only where it says so.

Not equal: our sampler records log-probabilities and entropies and keeps its cache between turns, generate does neither.
Natural lengths are drawn anew every turn. TRL has no entropy line and scores a rollout again, where we trust the sampler.
"""

import dataclasses
import itertools
import json
import platform
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Callable, Sequence

import numpy as np
import torch

import train
from advantage import group_advantage, policy_loss, shape_with_entropy
from evaluate import check_numbers, flag, parse_flags, pick_device
from model import Transformer, load
from rollout import Episode, Sampler, collate, micro_batches, per_token, seeded_generator
from task import load_task

COMMANDS = ("decode", "refill", "update", "step", "memory", "growth")
SAMPLES, MINIBATCH, LIMIT = 16, 4, 128          # answers per problem, problems per optimizer step, longest response
SHAPE = (128, 32)                               # growth: the smallest shape, sequences and tokens
SIDES = ("ours", "trl-16-at-a-time", "trl-64-at-a-time")       # memory
settle = lambda module: float(next(module.parameters()).detach().flatten()[0])     # waits until the device has done all
tokens_of = lambda episodes: sum(len(e.response) for e in episodes)
Turns = dict[str, list[tuple[float, int]]]      # side -> seconds and tokens of every turn


@dataclasses.dataclass
class Settings:
    commands: tuple = flag((), "what to measure: " + ", ".join(COMMANDS), nargs="+", type=str, choices=COMMANDS)
    device: str = flag("auto", "cpu, cuda, cuda:1 ...; auto takes a GPU if there is one")
    turns: int = flag(7, "timed turns")
    slots: int = flag(512, "decode, refill: sequences at a time")
    new_tokens: int = flag(LIMIT, "decode: tokens per sequence")
    prompts: int = flag(32, f"update, step, memory: problems of a rollout, {SAMPLES} answers each")
    equal: float = flag(0.23, "step, memory: share of groups whose answers are all wrong; 0.23 is the default run's")
    json: str = flag("", "also write the figures, with every turn, to this file")


def alternate(sides: dict[str, Callable[[], int]], turns: int) -> Turns:
    """Runs the sides in turn, first backwards; each returns how many tokens it dealt with, once the device is done."""
    taken: Turns = {name: [] for name in sides}
    for turn in range(turns + 1):
        for name in list(sides)[::1 if turn % 2 else -1]:
            started = time.perf_counter()
            tokens = sides[name]()
            taken[name].append((time.perf_counter() - started, tokens))
    return {name: runs[1:] for name, runs in taken.items()}


def quartiles(values: Sequence[float]) -> str:
    return "{1:.3g} [{0:.3g}, {2:.3g}]".format(*np.percentile(values, [25, 50, 75]))


def table(taken: Turns, growth: bool = False) -> str:
    """Rows "ours ...": their ratio to each of the other rows, turn by turn. Of growth, the time per token."""
    ours, peers = ([name for name in taken if name.startswith("ours") == mine and not growth] for mine in (True, False))
    heads = ["seconds", "microseconds per token" if growth else "tokens per second", *(f"times {peer}" for peer in peers)]
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (1 + len(heads)) + "|"]
    for name, runs in taken.items():
        seconds, tokens = np.array(runs).T
        rate = f"{np.median(1e6 * seconds / tokens):.1f}" if growth else f"{np.median(tokens / seconds):.0f}"
        ratios = [quartiles(np.array(taken[peer])[:, 0] / seconds) if name in ours else "" for peer in peers]
        lines.append("| " + " | ".join([name, quartiles(seconds), rate, *ratios]) + " |")
    return "\n".join(lines)


def peer_model(model: Transformer, dtype: torch.dtype = torch.float32):
    """transformers' model of the same weights."""
    from transformers import Qwen2Config, Qwen2ForCausalLM
    peer = Qwen2ForCausalLM(Qwen2Config.from_dict(model.config))
    names = {name if name.startswith("lm_head") else "model." + name: t for name, t in model.state_dict().items()}
    peer.load_state_dict({"lm_head.weight": model.head} | names)
    peer.tie_weights()
    return peer.to(model.head.device, dtype)


def peer_generate(peer, prompts: Sequence[Sequence[int]], new_tokens: int, eos: int | None, cache=None) -> int:
    """Samples a response per prompt, all of one length, in a static batch -> tokens up to each one's first end token."""
    ids = torch.tensor(prompts, device=peer.device)
    peer.generation_config.eos_token_id, peer.generation_config.pad_token_id = eos, 0
    made = peer.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                         max_new_tokens=new_tokens, cache_implementation=cache)[:, ids.shape[1]:].cpu()      # [B, R]
    return made.numel() if eos is None else int((made == eos).int().cumsum(1).eq(0).sum() + (made == eos).any(1).sum())


def sample(sampler: Sampler, prompts: Sequence[Sequence[int]], each: int, new_tokens: int, turn: int = 0) -> list[Episode]:
    return sampler.generate(prompts, each, new_tokens, 1.0, seeded_generator(0, turn, "bench", sampler.device))


def decode(s: Settings, device: torch.device) -> Turns:
    model, sides = load("base", device)[0], {}
    prompts = torch.randint(1, len(model.head), (s.slots, 16), generator=seeded_generator(0, 0, "bench")).tolist()
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        sampler, peer = Sampler(model, s.slots, 16 + s.new_tokens, (-1,), dtype), peer_model(model, dtype)
        sides[f"ours, {name}"] = lambda sampler=sampler: tokens_of(sample(sampler, prompts, 1, s.new_tokens))
        sides[f"generate, {name}"] = partial(peer_generate, peer, prompts, s.new_tokens, None)
        sides[f"generate, {name}, static cache"] = partial(peer_generate, peer, prompts, s.new_tokens, None, "static")
    return alternate(sides, s.turns)


def refill(s: Settings, device: torch.device) -> Turns:
    model, prompts = load("base", device)[0], encoded(4 * s.slots // SAMPLES)
    each, sides, turn = s.slots // SAMPLES, {}, itertools.count()
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        sampler, peer = Sampler(model, s.slots, len(prompts[0]) + LIMIT, model.eos_ids, dtype), peer_model(model, dtype)
        sides[f"ours, {name}"] = lambda sampler=sampler: tokens_of(sample(sampler, prompts, SAMPLES, LIMIT, next(turn)))
        sides[f"generate, {name}, static batches"] = lambda peer=peer: sum(
            peer_generate(peer, [p for p in prompts[i:i + each] for _ in range(SAMPLES)], LIMIT, model.eos_ids[0])
            for i in range(0, len(prompts), each))
    return alternate(sides, s.turns)


def encoded(count: int) -> list[list[int]]:
    """Prompts of the task, of one length, so that the peer needs no padding."""
    task, tokenizer = load_task("countdown"), load("base")[1]
    prompts = [task.encode(p, tokenizer) for p in task.train[:4 * count]]
    return [p for p in prompts if len(p) == len(prompts[0])][:count]


def rewards(groups: int, equal: float) -> torch.Tensor:
    """Of a rollout, group by group, [groups * SAMPLES]: one answer in four right, none in the first groups."""
    right = (torch.arange(groups)[:, None] >= round(equal * groups)) & (torch.arange(SAMPLES) % 4 == 0)
    return torch.where(right, 1.0, -1.0).flatten()


def with_advantage(episodes: list[Episode], reward: torch.Tensor) -> list[tuple]:
    """For each optimizer step its episodes, with their old log-probabilities and advantages [N, R]."""
    logp, counted = per_token([e.logp for e in episodes])
    advantage = group_advantage(reward, torch.arange(len(reward)) // SAMPLES)[:, None] * counted
    parts = [slice(i, i + MINIBATCH * SAMPLES) for i in range(0, len(episodes), MINIBATCH * SAMPLES)]
    return [(episodes[part], logp[part], advantage[part]) for part in parts]


def our_update(model: Transformer, optimizer, episodes: list[Episode], reward: torch.Tensor, s: train.Settings) -> int:
    for part in with_advantage(episodes, reward):
        train.update(model, optimizer, *part, s)
    settle(model)
    return tokens_of(episodes)


def peer_update(peer, optimizer, episodes: list[Episode], reward: torch.Tensor, s: train.Settings, cut: Callable) -> int:
    """The same over transformers' model, with all logits at once of each micro-batch that `cut` makes of a step."""
    for part, logp, advantage in with_advantage(episodes, reward):
        for rows in cut(part):
            tokens, _, length, mask, old, plain = collate([part[i] for i in rows], peer.device, logp[rows], advantage[rows])
            attention = torch.arange(tokens.shape[1], device=peer.device) < length[:, None]
            z = peer(input_ids=tokens, attention_mask=attention, use_cache=False).logits[:, :-1].float() / s.temperature
            logps = z.log_softmax(-1)                                                           # [B, T-1, V]
            new, entropy = logps.gather(2, tokens[:, 1:, None])[..., 0], -(logps.detach().exp() * logps.detach()).sum(-1)
            shaped = shape_with_entropy(plain, entropy, s.alpha, s.kappa)
            policy_loss(new, old, shaped, mask, s.clip_low, s.clip_high, tokens_of(part))[0].backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), s.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
    settle(peer)
    return tokens_of(episodes)


def update(s: Settings, device: torch.device) -> Turns:
    """Every sequence has an advantage, so ours leaves none out: equal tokens."""
    model, settings = load("base", device)[0], train.Settings(lr=0.0)
    peer, reward = peer_model(model), rewards(s.prompts, 0.0)
    episodes = sample(Sampler(model, 512, 256, model.eos_ids), encoded(s.prompts), SAMPLES, LIMIT)
    ours, theirs = train.adamw(model, 0.0, settings), torch.optim.AdamW(peer.parameters(), 0.0, weight_decay=0.01)
    cuts = {"transformers, 32 at a time": lambda part: [list(range(i, i + 32)) for i in range(0, len(part), 32)],
            "transformers, our micro-batches": lambda part: micro_batches(part, settings.micro_tokens)}
    return alternate({"ours": partial(our_update, model, ours, episodes, reward, settings)} | {
        name: partial(peer_update, peer, theirs, episodes, reward, settings, cut) for name, cut in cuts.items()}, s.turns)


def our_step(s: Settings, device: torch.device, equal: float) -> Callable[[], int]:
    model, prompts, settings, turn = load("base", device)[0], encoded(s.prompts), train.Settings(lr=0.0), itertools.count()
    sampler, optimizer = Sampler(model, 512, len(prompts[0]) + LIMIT, model.eos_ids), train.adamw(model, 0.0, settings)
    def step() -> int:
        episodes = sample(sampler, prompts, SAMPLES, LIMIT, next(turn))
        sampler.free()
        return our_update(model, optimizer, episodes, rewards(s.prompts, equal), settings)
    return step


def trl_steps(s: Settings, device: torch.device, equal: float, between: Callable | None = None, at_once=SAMPLES) -> Turns:
    """TRL's trainer owns its loop, so our step runs in a callback of it, after each of its rollouts. It takes `at_once`
    sequences in one forward and backward pass, and as many of those per optimizer step as ours does."""
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    tokenizer, updates, passes, tokens = load("base")[1], s.prompts // MINIBATCH, MINIBATCH * SAMPLES // at_once, [0]
    tokenizer.padding_side = "left"
    taken: Turns = {"ours": [], "TRL": []}

    class Clock(TrainerCallback):
        def on_step_begin(self, arguments, state, control, **_):
            if state.global_step % updates == 0:                        # a rollout and its first update come now
                self.started = time.perf_counter()

        def on_step_end(self, arguments, state, control, **_):
            if state.global_step % updates == 0:
                settle(trainer.model)
                taken["TRL"].append((time.perf_counter() - self.started, tokens[0]))
                if between:
                    started = time.perf_counter()
                    made = between()
                    taken["ours"].append((time.perf_counter() - started, made))

    def reward(completion_ids, **_) -> list[float]:
        tokens[0] = sum(map(len, completion_ids))
        return rewards(s.prompts, equal).tolist()

    with tempfile.TemporaryDirectory() as folder:
        settings = GRPOConfig(
            folder, use_cpu=device.type == "cpu", max_steps=updates * (s.turns + 1), per_device_train_batch_size=at_once,
            gradient_accumulation_steps=passes, steps_per_generation=updates * passes, num_generations=SAMPLES,
            max_completion_length=LIMIT, temperature=1.0, top_p=1.0, top_k=0, beta=0.0, epsilon=0.2, epsilon_high=0.28,
            loss_type="dapo", learning_rate=0.0, lr_scheduler_type="constant", weight_decay=0.01, bf16=False,
            gradient_checkpointing=False, report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True)
        prompts = Dataset.from_list([{"prompt": tokenizer.decode(p)} for p in encoded(s.prompts)])
        trainer = GRPOTrainer(peer_model(load("base", device)[0]), reward, settings, prompts, processing_class=tokenizer,
                              callbacks=[Clock()])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return {name: runs[1:] for name, runs in taken.items() if runs}


def memory(s: Settings) -> dict[str, list[float]]:
    """GB before the first step and at the peak, of the sides in processes of their own."""
    code = f"from lab.bench import *; alone(Settings(**{vars(s)}), torch.device('{pick_device(s.device)}'), "
    printed = lambda side: subprocess.check_output([sys.executable, "-c", f"{code}'{side}')"], text=True)
    return {side: [float(gb) for gb in printed(side).split()[-2:]] for side in SIDES}


def alone(s: Settings, device: torch.device, side: str) -> None:
    if side == SIDES[0]:
        step = our_step(s, device, s.equal)
        before = train.peak_memory(device)
        alternate({"ours": step}, s.turns)
    else:
        from trl import GRPOTrainer             # noqa: F401, with all that it imports
        peer_model(load("base", device)[0])
        before = train.peak_memory(device)
        trl_steps(s, device, s.equal, at_once=MINIBATCH * SAMPLES if side == SIDES[2] else SAMPLES)
    print(before, train.peak_memory(device))


def growth(s: Settings, device: torch.device) -> dict[str, Turns]:
    """One thing varied at a time."""
    model, settings, (count, length) = load("base", device)[0], train.Settings(lr=0.0), SHAPE
    optimizer, prompts = train.adamw(model, 0.0, settings), encoded(4 * count // SAMPLES)
    sampler = Sampler(model, 4 * count, len(prompts[0]) + 4 * length, (-1,))
    draw = lambda n, length: sample(sampler, prompts[:n // SAMPLES], SAMPLES, length)
    shapes = [(count * f, length) for f in (1, 2, 4)] + [(2 * count, length * f) for f in (2, 4)]
    decode, updates = {f"{n} sequences of {r} tokens": lambda n=n, r=r: tokens_of(draw(n, r)) for n, r in shapes}, {}
    for n, r, equal in [(*shape, 0.0) for shape in shapes] + [(count, length, share) for share in (0.25, 0.5, 0.75)]:
        name = f"{n} sequences of {r} tokens" + f", {equal:.0%} of the groups equal" * (equal > 0)
        updates[name] = partial(our_update, model, optimizer, draw(n, r), rewards(n // SAMPLES, equal), settings)
    return {"decode": alternate(decode, s.turns), "update": alternate(updates, s.turns)}


def bench(s: Settings) -> dict:
    """Runs the commands; returns what they measured, for JSON."""
    check_numbers(s)
    if s.slots % SAMPLES or s.prompts % MINIBATCH or s.equal > 1:
        raise ValueError(f"--slots must be a multiple of {SAMPLES}, --prompts of {MINIBATCH}, --equal a share from 0 to 1")
    device = pick_device(s.device)
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    processor = cpuinfo.partition("model name\t: ")[2].partition("\n")[0] or platform.processor() or platform.machine()
    record = {"machine": f"{processor}, {torch.get_num_threads()} threads, torch {torch.__version__}, {device}",
              "settings": dataclasses.asdict(s)}
    print(record["machine"], f"{vars(s)}", f"median [quartiles] of {s.turns} turns", sep="; ")
    for command in s.commands:
        if command == "memory":
            record["memory"] = memory(s)
            print("\nmemory: peak of a GRPO step's process: " + ", ".join(
                f"{side} {peak:.2f} GB ({before:.2f} before)" for side, (before, peak) in record["memory"].items()))
        elif command == "growth":
            record["growth"] = growth(s, device)
            for part, taken in record["growth"].items():
                print(f"\ngrowth: {part}\n\n{table(taken, growth=True)}")
        elif command == "step":
            for equal in dict.fromkeys((s.equal, 0.0)):
                taken = record[f"step, {equal:.0%} equal"] = trl_steps(s, device, equal, our_step(s, device, equal))
                print(f"\nstep, {equal:.0%} of the groups equal\n\n{table(taken)}")
        else:
            record[command] = {"decode": decode, "refill": refill, "update": update}[command](s, device)
            print(f"\n{command}\n\n{table(record[command])}")
    if s.json:
        Path(s.json).write_text(json.dumps(record) + "\n")
    return record


if __name__ == "__main__":
    try:
        bench(parse_flags(Settings, __doc__))
    except (ValueError, OSError, ImportError, KeyboardInterrupt) as error:
        sys.exit(f"lab.bench: {str(error) or 'stopped'}")
