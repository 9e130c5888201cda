"""The loop: sample -> reward -> advantage -> (score, shape, loss, step). Read after advantage.py.

`python train.py` trains the embedded model with GRPO and the paper's line; every setting below is a flag. The method is
`train` and `update`, one screen each. `--algo ppo` takes a critic's word for what is usual where GRPO takes the mean.
Departs from the paper: scaled down. 32 prompts x 16 samples and 8 updates per rollout instead of 512 x 8 and 16, responses
of 128 tokens instead of 8K, learning rates for 0.4 M parameters instead of 7 B. As in the paper: the rest of PRESETS. What
the paper does not state is the field's usual: weight decay, gradient clip, value clip, a constant learning rate.
"""

import dataclasses
import json
import math
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from urllib.parse import quote

import torch
from torch import Tensor
from tqdm import tqdm

from advantage import gae, group_advantage, policy_loss, shape_with_entropy, value_loss, whiten
from checkpoint import (append, explained, load_state, open_run, peak_memory, read_lines, resumed, save_run, step_times,
                        stop, summary, whole)
from evaluate import check_numbers, count_solved, flag, parse_flags, pick_device, report
from model import Critic, Transformer, load, opened, save, score
from rollout import Episode, Sampler, collate, draw, micro_batches, per_token, seeded_generator, texts
from scale import MasterAdamW, everyone, join, plan
from task import load_task

PAPER = dict(task="math", template="dapo", prompts=512, samples=8, minibatch=32, lr=1e-6, kappa=2.0, clip_low=0.2,
             clip_high=0.28, entropy_coef=0.0, temperature=1.0, max_new_tokens=8192, dtype="bfloat16", recompute=True,
             slots=64)                          # ours: as many caches of 9K tokens as 7B leaves room for on one card
PRESETS = {"paper-grpo": PAPER | dict(algo="grpo", alpha=0.4),
           "paper-ppo": PAPER | dict(algo="ppo", alpha=0.1, critic_lr=2e-6, critic_warmup=10, gamma=1.0, lam=1.0)}


@dataclasses.dataclass
class Settings:
    name: str = flag("", "the run's folder under --out; by default the settings that differ from the defaults")
    out: str = flag("runs", "where run folders go")
    overwrite: bool = flag(False, "replace an existing run folder of this name")
    resume: str = flag(None, "go on with this run folder, with its settings", type=str)
    dry_run: bool = flag(False, "only one step at the longest lengths; prints its time and memory")
    algo: str = flag("grpo", "where advantages come from: the group (grpo) or a critic (ppo)", choices=("grpo", "ppo"))
    model: str = flag("base", "model to start from: a folder or a hub id")
    preset: str = flag("", "the paper's settings; flags beside it change single ones", choices=("", *PRESETS))
    task: str = flag("countdown", "countdown, countdown-easy, countdown-hard (many or few solutions) or math")
    data: str = flag("", "math: problems to train on, a jsonl, json or parquet file or a hub data set")
    test_data: str = flag("", "math: problems that are kept out of the training")
    template: str = flag("dapo", "math: how a problem is put", choices=("dapo", "qwen-math", "chat", "none"))
    max_prompt_tokens: int = flag(1024, "problems with longer prompts are left out")
    steps: int = flag(100, "rollouts")
    prompts: int = flag(32, "problems per rollout")
    samples: int = flag(16, "answers per problem, the group of GRPO")
    minibatch: int = flag(4, "problems per optimizer step")
    lr: float = flag(2e-4, "AdamW's learning rate, constant")
    weight_decay: float = flag(0.01, "AdamW's weight decay")
    grad_clip: float = flag(1.0, "largest gradient norm")
    alpha: float = flag(None, "weight of the entropy in the line (0: no line); by default 0.4 for grpo, 0.1 for ppo", type=float)
    kappa: float = flag(2.0, "psi is at most |A| / kappa")
    clip_low: float = flag(0.2, "the ratio counts down to 1 - clip_low")
    clip_high: float = flag(0.28, "the ratio counts up to 1 + clip_high (clip-higher)")
    entropy_coef: float = flag(0.0, "weight of the mean entropy in the objective (classical entropy regularisation)")
    critic_lr: float = flag(1.6e-3, "ppo: AdamW's learning rate of the critic")
    critic_warmup: int = flag(10, "ppo: first steps, in which only the critic learns", least=0)
    gamma: float = flag(1.0, "ppo: discount per token")
    lam: float = flag(1.0, "ppo: lambda of generalised advantage estimation")
    value_clip: float = flag(0.5, "ppo: how far a value may move from the old one before its gradient is cut")
    temperature: float = flag(1.0, "of sampling and of scoring alike")
    max_new_tokens: int = flag(128, "longest response, in tokens")
    slots: int = flag(512, "sequences decoded at a time")
    micro_tokens: int = flag(2048, "tokens, with padding, in one forward and backward pass")
    chunk: int = flag(2048, "response tokens whose logits exist at a time")
    recompute: bool = flag(False, "gradient checkpointing: layers are computed again in the backward pass")
    compile: bool = flag(False, "torch.compile the policy's update (needs a C++ compiler)")
    skip_zero: bool = flag(True, "leave sequences with zero advantage out of the forward pass (exact)")
    eval_every: int = flag(25, "steps between validations and between saves")
    eval_problems: int = flag(200, "validation problems")
    eval_samples: int = flag(8, "samples per problem in a validation on the way")
    final_samples: int = flag(64, "samples per problem before the first and after the last step")
    seed: int = flag(0, "of data order and sampling", least=0)
    device: str = flag("auto", "cpu, cuda, cuda:1 ...; auto takes a GPU if there is one")
    dtype: str = flag("float32", "of sampling and scoring", choices=("float32", "bfloat16"))
    weights: str = flag("float32", "of training; bfloat16 has a float32 master in the optimizer", choices=("float32", "bfloat16"))
    decode_dtype: str = flag(None, "of sampling alone, if it is not --dtype", choices=("float32", "bfloat16"), type=str)

    def __post_init__(self) -> None:
        if self.alpha is None:
            self.alpha = {"grpo": 0.4, "ppo": 0.1}[self.algo]


def check(s: Settings) -> None:
    """ValueError, in one sentence, for settings that make no sense."""
    check_numbers(s)
    for name, good, wanted in (
            ("name", s.dry_run or s.resume or len(s.name or run_name(s)) < 240, "given, as these settings make too long a name"),
            ("kappa", s.kappa > 1, "greater than 1, or shaping could flip a sign"),
            ("samples", s.samples > 1 or s.algo == "ppo", "at least 2: a group of one has no baseline to compare with"),
            ("critic_warmup", s.algo == "grpo" or s.critic_warmup < s.steps, "less than --steps, or the policy never moves"),
            ("minibatch", s.prompts % s.minibatch == 0, f"a divisor of --prompts, {s.prompts}"),
            ("minibatch", s.minibatch % int(os.environ.get("WORLD_SIZE", 1)) == 0, "a multiple of the number of processes"),
            ("gamma", s.gamma <= 1, "at most 1"), ("lam", s.lam <= 1, "at most 1"), ("clip_low", s.clip_low < 1, "less than 1"),
            ("grad_clip", s.grad_clip > 0, "positive"), ("temperature", 1e-3 <= s.temperature <= 1e3, "from 0.001 to 1000"),
            ("weights", s.weights in ("float32", s.dtype), "float32, or bfloat16 with --dtype bfloat16")):
        if not good:
            raise ValueError(f"--{name.replace('_', '-')} must be {wanted}; it is {getattr(s, name)}")


def run_name(s: Settings) -> str:
    """The algorithm, and every setting that differs from its default, so that two settings never share a folder."""
    usual = Settings(algo=s.algo)
    parts = [f"{f.name.replace('_', '')}={getattr(s, f.name)}" for f in dataclasses.fields(s)
             if f.name not in ("name", "out", "overwrite", "resume", "dry_run") and getattr(s, f.name) != getattr(usual, f.name)]
    return quote("-".join([s.algo, *parts]), safe="=,-")


def update(model: Transformer, optimizer: torch.optim.Optimizer, episodes: list[Episode], old_logp: Tensor,
           advantage: Tensor, s: Settings) -> Counter:
    """One optimizer step of the policy on a minibatch; old_logp, advantage [N, R], one per response token, 0 beyond.
    Returns policy_loss's sums, those of psi / |A| and of the gap to the sampler, the largest gap and the gradient norm."""
    device, total = model.head.device, Counter()
    denominator = sum(everyone(sum(len(e.response) for e in episodes)))     # of the whole step, whatever is left out below
    everything = not s.skip_zero or s.entropy_coef > 0          # else A = 0 means no gradient and needs no forward pass
    live = [i for i, some in enumerate((advantage != 0).any(1).tolist()) if some or everything]
    for batch in micro_batches([episodes[i] for i in live], s.micro_tokens):
        batch = [live[i] for i in batch]
        tokens, prompt_len, total_len, mask, old, plain = collate([episodes[i] for i in batch], device, old_logp[batch],
                                                                  advantage[batch])     # [B, T], then [B, T-1]
        started = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=s.dtype == "bfloat16"):
            logp, entropy = score(model, tokens, prompt_len, total_len, s.temperature, s.chunk, s.entropy_coef > 0)
        total["score_s"] += time.perf_counter() - started
        shaped = shape_with_entropy(plain, entropy, s.alpha, s.kappa)
        loss, sums = policy_loss(logp, old, shaped, mask, s.clip_low, s.clip_high, denominator)
        # Not the line above by other means: this gradient is the entropy's own and draws the whole distribution
        # towards uniform, right or wrong; psi has none and only scales the push on the token that was sampled.
        loss = loss - s.entropy_coef * torch.where(mask, entropy, 0.0).sum() / denominator
        loss.backward()
        share = torch.where(mask & (plain != 0), (shaped - plain) / plain.abs(), 0.0)               # psi / |A|
        gap, up, down = (logp.detach() - old).abs()[mask], mask & (plain > 0), mask & (plain < 0)
        sums |= {"loss": loss.detach(), "gap": gap.sum(), "shaping": share.sum(), "shaping_up": share[up].sum(), "up": up.sum(),
                 "shaping_down": share[down].sum(), "down": down.sum(), "capped": (share > 0.9999 / s.kappa).sum()}
        total.update({name: float(value) for name, value in sums.items()})
        total["gap_max"] = max(total["gap_max"], float(gap.max()))
    return descend(model, optimizer, total, s)


def update_critic(critic: Critic, optimizer: torch.optim.Optimizer, episodes: list[Episode], value: Tensor, ret: Tensor,
                  s: Settings) -> Counter:
    """One optimizer step of the critic; value, ret [N, R]: the values before it, and what they should have been."""
    total, denominator = Counter(), sum(everyone(sum(len(e.response) for e in episodes)))
    for batch in micro_batches(episodes, s.micro_tokens):
        tokens, _, _, mask, old, target = collate([episodes[i] for i in batch], critic.value.weight.device,
                                                  value[batch], ret[batch])             # [B, T], then [B, T-1]
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=s.dtype == "bfloat16"):
            new = critic(tokens)                                                                    # [B, T-1]
        loss = value_loss(new, old, target, mask, s.value_clip, denominator)
        loss.backward()
        total["loss"] += float(loss.detach())
    return descend(critic, optimizer, total, s)


@torch.no_grad()
def critic_advantage(critic: Critic, episodes: list[Episode], reward: Tensor, counted: Tensor,
                     s: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """reward [N], counted [N, R] -> whitened advantage, value, return, [N, R]. The reward is at the last token."""
    value, at_end = torch.zeros(counted.shape), torch.zeros(counted.shape)
    for batch in micro_batches(episodes, s.micro_tokens):
        tokens, _, _, mask = collate([episodes[i] for i in batch], critic.value.weight.device)
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=s.dtype == "bfloat16"):
            value[batch] = value[batch].masked_scatter(counted[batch], critic(tokens)[mask].cpu())
    at_end[torch.arange(len(reward)), counted.sum(1) - 1] = reward
    advantage, ret = gae(at_end, value, counted, s.gamma, s.lam)
    return whiten(advantage, counted, torch.cat(everyone(advantage[counted]))), value, ret


def descend(module: torch.nn.Module, optimizer: torch.optim.Optimizer, total: Counter, s: Settings) -> Counter:
    """Adds up what all processes have, clips, refuses what is not finite, and steps. Gradients come in zeroed and leave
    so: zeros, not None, because a step without live sequences is a step too."""
    parts = everyone(total)
    for name in set().union(*parts):
        total[name] = (max if name in ("gap_max", "score_s") else sum)(part[name] for part in parts)
    if len(parts) > 1:
        for parameter in module.parameters():
            torch.distributed.all_reduce(parameter.grad)
    total["grad_norm"] = float(torch.nn.utils.clip_grad_norm_(module.parameters(), s.grad_clip))
    if not math.isfinite(total["loss"] + total["grad_norm"]):
        raise FloatingPointError(f"the loss is {total['loss']} and the gradient norm {total['grad_norm']}")
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    return total


def adamw(module: torch.nn.Module, lr: float, s: Settings) -> torch.optim.Optimizer:
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return (MasterAdamW if s.weights == "bfloat16" else torch.optim.AdamW)(module.parameters(), lr, weight_decay=s.weight_decay)


def train(s: Settings) -> Path | None:
    """Runs the command; returns the run's folder (None after a dry run)."""
    check(s)
    device, task = pick_device(s.device), load_task(s.task, s.data, s.test_data, s.template)
    rank, world = join(device)
    (_, config, tokenizer), both = opened(s.model), (task.train, task.validation[:s.eval_problems])
    tokens = {p: len(task.encode(p, tokenizer)) for part in both for p in part}
    problems, validation = ([p for p in part if tokens[p] <= s.max_prompt_tokens] for part in both)
    if not problems or not validation:
        raise ValueError(f"{s.task} has {len(problems)} training and {len(validation)} validation problems; both are needed")
    length = tokens[longest := max([*problems, *validation], key=tokens.get)] + s.max_new_tokens
    rows = min(s.slots, max(s.prompts * s.samples, len(validation) * max(s.eval_samples, s.final_samples)))
    planned = plan(config, s, length, rows, device)
    if rank == 0:
        print(f"{planned}\nleft out: {len(tokens) - len({*problems, *validation})} prompts over {s.max_prompt_tokens} tokens")
    model = load(s.model, device, getattr(torch, s.weights))[0]
    model.recompute = s.recompute
    parts = {"policy": (model, adamw(model, s.lr, s))}
    scorer = torch.compile(model, dynamic=True) if s.compile else model     # not the sampler's, which it would slow down
    if s.algo == "ppo":
        critic = Critic(model)
        parts["critic"] = (critic, adamw(critic, s.critic_lr, s))
    sampler = Sampler(model, s.slots, length, model.eos_ids, getattr(torch, s.decode_dtype or s.dtype))
    if s.dry_run:           # no response ends, the forward pass leaves nothing out, the cache is a validation's
        sampler.eos_ids, problems, s = (-1,), [longest], dataclasses.replace(s, steps=1, skip_zero=False, critic_warmup=0)
        sampler.allocate(rows)
        run, done, log, validated = Path("dry run"), 0, [], []
    else:
        run = Path(s.resume or Path(s.out, s.name or run_name(s)))
        if rank == 0 and not s.resume:
            open_run(s, s.name or run.name)
        everyone(None)                                              # nobody looks before the folder is there
        done = load_state(run, parts)
        log, validated = everyone(rank == 0 and (read_lines(run / "log.jsonl", done, range(1, done + 1)), read_lines(
            run / "validation.jsonl", done, range(0, done, s.eval_every))))[0]
        sampler.sync()
        stop.run, stop.saved = run, done
    mine = s.minibatch // world             # problems that this process has of every minibatch
    group = torch.arange(s.prompts // world).repeat_interleave(s.samples)

    def validate(step: int) -> None:
        if (step % s.eval_every == 0 or step == s.steps) and step not in [v["step"] for v in validated] and not s.dry_run:
            edge, stop.in_steps = step in (0, s.steps), False       # all is saved: a signal may stop this at once
            validated.append({"step": step} | count_solved(
                sampler, tokenizer, task, validation, s.final_samples if edge else s.eval_samples, s.max_new_tokens,
                s.temperature, 1.0, s.seed, step, f"validation, step {step}" if edge and rank == 0 else None))
            if rank == 0:
                append(run / "validation.jsonl", validated[-1])
        stop.in_steps = not s.dry_run

    validate(done)
    bar = tqdm(range(done + 1, s.steps + 1), run.name, s.steps, initial=done, unit="step", disable=True if rank else None)
    for step in bar:
        started = time.perf_counter()
        # sample
        batch = [p for i, p in enumerate(draw(problems, s.prompts, step - 1, s.seed)) if i % s.minibatch // mine == rank]
        random = seeded_generator(s.seed, step, f"rollout {rank}" if rank else "rollout", device)
        episodes = sampler.generate([task.encode(p, tokenizer) for p in batch], s.samples, s.max_new_tokens, s.temperature, random)
        sampler.free()
        rolled_out = time.perf_counter()
        # reward
        reward = torch.tensor([task.reward(batch[e.prompt_index], response, e.finished)
                               for e, response in zip(episodes, texts(tokenizer, episodes))])   # [N]
        rewarded, stop.where = time.perf_counter(), f"step {step}, with a mean reward of {reward.mean():.3f}"
        # advantage
        logp, counted = per_token([e.logp for e in episodes])                               # [N, R]
        if not logp.isfinite().all():
            raise FloatingPointError("a sampled log-probability is not finite")
        if s.algo == "grpo":
            advantage = group_advantage(reward, group)[:, None] * counted                   # [N, R]
        else:
            advantage, value, ret = critic_advantage(critic, episodes, reward, counted, s)  # [N, R]
        # score, shape, loss, step
        size, updates, critic_updates = mine * s.samples, [], []
        for i in range(0, len(episodes), size):
            part = slice(i, i + size)
            if s.algo == "ppo":
                critic_updates.append(update_critic(*parts["critic"], episodes[part], value[part], ret[part], s))
            if s.algo == "grpo" or step > s.critic_warmup:
                updates.append(update(scorer, parts["policy"][1], episodes[part], logp[part], advantage[part], s))
        sampler.sync()
        updated = time.perf_counter()

        line = summary(step, sum(everyone(episodes), []), torch.cat(everyone(reward)), updates, s.samples)
        line["arm"] = f"{s.algo}, alpha {s.alpha}, entropy_coef {s.entropy_coef}, clip_high {s.clip_high}"
        if s.algo == "ppo":
            line |= explained(critic_updates, *(torch.cat(everyone(x[counted])) for x in (value, ret)))
        line |= {"rollout_s": rolled_out - started, "reward_s": rewarded - rolled_out, "update_s": updated - rewarded,
                 "score_s": sum(u["score_s"] for u in updates), "peak_memory_gb": peak_memory(device),
                 "timeouts": sum(everyone(getattr(task, "timeouts", 0)))}
        log.append(line)
        if s.dry_run:
            print(f"{len(episodes)} sequences of {sampler.max_length} tokens, peak memory {line['peak_memory_gb']:.2f} GB; "
                  + step_times(log))
            return None
        asked = any(everyone(stop.asked))       # read once: a signal from here on is for the next step
        if rank == 0:
            append(run / "log.jsonl", line)
            if step % s.eval_every == 0 or step == s.steps or asked:
                save_run(run, step, parts, lambda folder: save(model, tokenizer, folder))
                stop.saved = step
        if asked:
            raise KeyboardInterrupt
        validate(step)
        if s.algo == "grpo" and step % 20 == 0 and all(past["equal_groups"] == 1 for past in log[-20:]):
            tqdm.write("no group had both right and wrong answers in 20 steps, so nothing is learned (mean reward "
                       f"{line['reward']:+.2f}): try more --samples, easier problems or another --template", file=sys.stderr)
        bar.set_postfix(reward=f"{line['reward']:+.2f}", entropy=f"{line['entropy']:.2f}", length=f"{line['length']:.0f}")
    if rank > 0:
        return run
    table, record = report({"base": validated[0], "trained": validated[-1]}, [4 ** i for i in range(5) if 4 ** i <= s.final_samples])
    with whole(run / "validation.json") as fresh:
        fresh.write_text(json.dumps(record) + "\n")
    print(f"\n{s.task} validation: {len(validation)} problems, {s.final_samples} samples each, temperature "
          f"{s.temperature}; 95 % intervals over problems\n{table}\n{step_times(log)}\nsaved in {run}, the model in model/")
    return run


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        settings = parse_flags(Settings, __doc__, presets=PRESETS)
        train(settings if settings.resume is None else resumed(settings.resume, sys.argv[1:], Settings))
    except FloatingPointError as error:
        sys.exit(f"train.py: stopped in {stop.where}: {error}; {stop.way_back()}")
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"train.py: {error}")
    except KeyboardInterrupt:
        sys.exit(f"train.py: stopped{stop.way_on()}")
