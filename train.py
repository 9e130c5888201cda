"""The loop: sample -> reward -> advantage -> (score, shape, loss, step). Read after advantage.py.

`python train.py` trains the embedded base model on countdown with GRPO and the paper's line; every setting
below is a flag. The whole method is `train` and `update`, one screen each.

Departs from the paper: scaled down. 32 prompts x 16 samples and 8 updates per rollout instead of 512 x 8 and
16, responses of 128 tokens instead of 8K, a learning rate for 0.4 M parameters instead of 7 B. As in the
paper: kappa 2, alpha 0.4, clip 0.2 / 0.28, token-level mean, no KL term, no entropy term, reward +1 / -1.
"""

from __future__ import annotations

import dataclasses
import json
import math
import resource
import shutil
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import torch
from torch import Tensor
from tqdm import tqdm

from advantage import group_advantage, policy_loss, shape_with_entropy
from evaluate import count_solved, flag, parse_flags, pick_device, report
from model import Transformer, load, read_json, response_mask, save, score
from rollout import Episode, Sampler, seeded_generator, texts
from task import Problem, load_task


@dataclass
class Settings:
    name: str = flag("", "the run's folder under --out; by default the settings that differ from the defaults")
    out: str = flag("runs", "where run folders go")
    overwrite: bool = flag(False, "replace an existing run folder of this name")
    model: str = flag("base", "model to start from: a folder or a hub id")
    task: str = flag("countdown", "the task")
    steps: int = flag(100, "rollouts")
    prompts: int = flag(32, "problems per rollout")
    samples: int = flag(16, "answers per problem, the group of GRPO")
    minibatch: int = flag(4, "problems per optimizer step")
    lr: float = flag(2e-4, "AdamW's learning rate, constant")
    weight_decay: float = flag(0.01, "AdamW's weight decay")
    grad_clip: float = flag(1.0, "largest gradient norm")
    alpha: float = flag(0.4, "weight of the entropy in the paper's line; 0 is plain GRPO")
    kappa: float = flag(2.0, "psi is at most |A| / kappa")
    clip_low: float = flag(0.2, "the ratio counts down to 1 - clip_low")
    clip_high: float = flag(0.28, "the ratio counts up to 1 + clip_high (clip-higher)")
    temperature: float = flag(1.0, "of sampling and of scoring alike")
    max_new_tokens: int = flag(128, "longest response, in tokens")
    slots: int = flag(512, "sequences decoded at a time")
    micro_tokens: int = flag(4096, "tokens, with padding, in one forward and backward pass")
    chunk: int = flag(2048, "response tokens whose logits exist at a time")
    skip_zero: bool = flag(True, "leave sequences with zero advantage out of the forward pass (exact)")
    eval_every: int = flag(25, "steps between validations and between saves of the model")
    eval_problems: int = flag(200, "validation problems")
    eval_samples: int = flag(8, "samples per problem in a validation on the way")
    final_samples: int = flag(64, "samples per problem before the first and after the last step")
    seed: int = flag(0, "of data order and sampling")
    device: str = flag("auto", "cpu, cuda, cuda:1 ...; auto takes a GPU if there is one")
    dtype: str = flag("float32", "of sampling and scoring; the weights that are trained stay float32",
                      choices=("float32", "bfloat16"))


def check(s: Settings) -> None:
    """ValueError, in one sentence, for settings that make no sense."""
    for name, good, wanted in (
            ("alpha", s.alpha >= 0, "at least 0"), ("kappa", s.kappa > 1, "greater than 1, or shaping could flip a sign"),
            ("samples", s.samples >= 2, "at least 2: a group of one has no baseline to compare with"),
            ("minibatch", s.minibatch >= 1 and s.prompts % s.minibatch == 0, f"a divisor of --prompts, {s.prompts}"),
            ("clip_low", 0 <= s.clip_low < 1, "in [0, 1)"), ("clip_high", s.clip_high >= 0, "at least 0"),
            ("lr", s.lr >= 0, "at least 0"), ("weight_decay", s.weight_decay >= 0, "at least 0"),
            ("temperature", 1e-3 <= s.temperature <= 1e3, "from 0.001 to 1000"), ("grad_clip", s.grad_clip > 0, "positive"),
            *((name, getattr(s, name) >= 1, "at least 1") for name in (
                "prompts", "max_new_tokens", "slots", "micro_tokens", "chunk", "eval_every", "eval_problems",
                "eval_samples", "final_samples", "steps")), ("seed", s.seed >= 0, "at least 0")):
        value = getattr(s, name)
        if not good or not math.isfinite(value):
            wanted = wanted if math.isfinite(value) else "a finite number"
            raise ValueError(f"--{name.replace('_', '-')} must be {wanted}; it is {value}")


def run_name(s: Settings) -> str:
    """grpo, and every setting that differs from its default, so that two settings never share a folder."""
    parts = [f"{f.name.replace('_', '')}={getattr(s, f.name)}" for f in dataclasses.fields(s)
             if f.name not in ("name", "out", "overwrite") and getattr(s, f.name) != f.default]
    return quote("-".join(["grpo", *parts]), safe="=,-")


def draw(problems: list[Problem], count: int, step: int, seed: int) -> list[Problem]:
    """The problems of a step: a new shuffle every epoch, from (seed, epoch) alone."""
    chosen = []
    for i in range(step * count, (step + 1) * count):
        epoch, place = divmod(i, len(problems))
        if not chosen or place == 0:
            order = torch.randperm(len(problems), generator=seeded_generator(seed, epoch, "data"))
        chosen.append(problems[order[place]])
    return chosen


def micro_batches(episodes: list[Episode], budget: int) -> list[list[int]]:
    """Indices of episodes sorted by length, cut so that rows x longest <= budget (one row at least)."""
    length = [len(e.prompt) + len(e.response) for e in episodes]
    batches: list[list[int]] = []
    for i in sorted(range(len(episodes)), key=lambda i: length[i]):
        if not batches or (len(batches[-1]) + 1) * length[i] > budget:
            batches.append([])
        batches[-1].append(i)
    return batches


def collate(episodes: list[Episode], device: torch.device) -> tuple[Tensor, ...]:
    """Pads on the right -> tokens [B, T], prompt_len [B], total_len [B], old_logp [B, T-1]."""
    prompt_len = torch.tensor([len(e.prompt) for e in episodes])
    total_len = prompt_len + torch.tensor([len(e.response) for e in episodes])
    tokens = torch.zeros(len(episodes), int(total_len.max()), dtype=torch.int64)
    old_logp = torch.zeros(tokens.shape[0], tokens.shape[1] - 1)
    for i, e in enumerate(episodes):
        tokens[i, :total_len[i]] = torch.cat((e.prompt, e.response))
        old_logp[i, prompt_len[i] - 1:total_len[i] - 1] = e.logp       # column t speaks of token t+1
    return tuple(x.to(device) for x in (tokens, prompt_len, total_len, old_logp))


def update(model: Transformer, optimizer: torch.optim.Optimizer, episodes: list[Episode], advantage: Tensor,
           s: Settings) -> Counter:
    """One optimizer step on the episodes of a minibatch, whose gradients come in zeroed and leave so. Returns
    policy_loss's sums, the sums of psi / |A| and of the gap to the sampler, the largest gap, the norm, and the
    seconds of scoring."""
    device, total = model.head.device, Counter()
    denominator = sum(len(e.response) for e in episodes)        # of the whole step, whatever is left out below
    # Without a KL or entropy term, A = 0 means no gradient: such sequences need no forward pass.
    live = [i for i in range(len(episodes)) if advantage[i] != 0 or not s.skip_zero]
    for batch in micro_batches([episodes[i] for i in live], s.micro_tokens):
        batch = [live[i] for i in batch]
        tokens, prompt_len, total_len, old_logp = collate([episodes[i] for i in batch], device)
        mask = response_mask(prompt_len, total_len, tokens.shape[1])                        # [B, T-1]
        started = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=s.dtype == "bfloat16"):
            logp, entropy = score(model, tokens, prompt_len, total_len, s.temperature, s.chunk)
        total["score_s"] += time.perf_counter() - started
        plain = advantage[batch].to(device)[:, None].expand_as(logp)                        # [B, T-1]
        shaped = shape_with_entropy(plain, entropy, s.alpha, s.kappa)
        loss, sums = policy_loss(logp, old_logp, shaped, mask, s.clip_low, s.clip_high, denominator)
        loss.backward()

        with torch.no_grad():
            share = torch.where(mask & (plain != 0), (shaped - plain) / plain.abs(), 0.0)           # psi / |A|
            gap = (logp - old_logp).abs()[mask]
            sums |= {"loss": loss.detach(), "shaping": share.sum(), "gap": gap.sum()}
        total.update({name: float(value) for name, value in sums.items()})
        total["gap_max"] = max(total["gap_max"], float(gap.max()))
    total["grad_norm"] = float(torch.nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip))
    if not math.isfinite(total["loss"] + total["grad_norm"]):
        raise FloatingPointError(f"the loss is {total['loss']} and the gradient norm {total['grad_norm']}")
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)          # zeros, not None: a step without live sequences still steps
    return total


def train(s: Settings) -> Path:
    """Runs the command; returns the run's folder."""
    check(s)
    device, task = pick_device(s.device), load_task(s.task)
    model, tokenizer = load(s.model, device)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW(model.parameters(), s.lr, weight_decay=s.weight_decay)
    problems, validation = task.train, task.validation[:s.eval_problems]
    longest = max(len(task.encode(p, tokenizer)) for p in [*problems, *validation])
    sampler = Sampler(model, s.slots, longest + s.max_new_tokens, model.eos_ids, getattr(torch, s.dtype))
    run = open_run(s)
    group = torch.arange(s.prompts).repeat_interleave(s.samples)

    def validate(step: int, samples: int, progress: str | None = None) -> dict:
        return count_solved(sampler, tokenizer, task, validation, samples, s.max_new_tokens, s.temperature, 1.0,
                            s.seed, step, progress)

    results = {"base": validate(0, s.final_samples, "validation, base")}
    bar = tqdm(range(1, s.steps + 1), desc=run.name, unit="step", disable=None)     # None: only on a terminal
    for step in bar:
        started = time.perf_counter()
        # sample
        batch = draw(problems, s.prompts, step - 1, s.seed)
        episodes = sampler.generate([task.encode(p, tokenizer) for p in batch], s.samples, s.max_new_tokens,
                                    s.temperature, seeded_generator(s.seed, step, "rollout", device))
        sampler.free()
        rolled_out = time.perf_counter()
        # reward
        reward = torch.tensor([task.reward(batch[e.prompt_index], response, e.finished)
                               for e, response in zip(episodes, texts(tokenizer, episodes))])   # [N]
        # advantage
        advantage = group_advantage(reward, group)                                          # [N]
        rewarded = time.perf_counter()
        # score, shape, loss, step
        size, updates = s.minibatch * s.samples, []
        try:
            for i in range(0, len(episodes), size):
                updates.append(update(model, optimizer, episodes[i:i + size], advantage[i:i + size], s))
        except FloatingPointError as error:
            raise FloatingPointError(f"step {step} stopped before its optimizer step: {error}; the mean reward was "
                                     f"{reward.mean():.3f}; {run}/model, if there is one, is the last good model") from None
        sampler.sync()
        updated = time.perf_counter()

        line = summary(step, episodes, reward, advantage, updates, s)
        line |= {"rollout_s": rolled_out - started, "reward_s": rewarded - rolled_out,
                 "score_s": sum(u["score_s"] for u in updates), "update_s": updated - rewarded,
                 "rollout_tokens_per_s": line["tokens"] / (rolled_out - started),
                 "update_tokens_per_s": line["tokens"] / (updated - rewarded), "peak_memory_gb": peak_memory(device)}
        if step % s.eval_every == 0 or step == s.steps:
            save(model, tokenizer, run / "model")
        if step == s.steps:
            results["trained"] = validate(step, s.final_samples, "validation, trained")
        elif step % s.eval_every == 0:
            solved = validate(step, s.eval_samples)["solved"]
            line["validation_pass@1"] = sum(solved) / (len(solved) * s.eval_samples)
        line["seconds"] = time.perf_counter() - started
        with open(run / "log.jsonl", "a") as log:
            log.write(json.dumps(line) + "\n")
        bar.set_postfix(reward=f"{line['reward']:+.2f}", entropy=f"{line['entropy']:.2f}", length=f"{line['length']:.0f}")

    table, record = report(results, [k for k in (1, 4, 16, 64, 256) if k <= s.final_samples])
    (run / "validation.json").write_text(json.dumps(record) + "\n")
    print(f"\n{s.task} validation: {len(validation)} problems, {s.final_samples} samples each, temperature "
          f"{s.temperature}; 95 % intervals over problems\n{table}\n{step_times(run)}\nsaved: {run}/model (Hugging Face format), "
          f"{run}/log.jsonl (a line a step), {run}/config.json, {run}/validation.json")
    return run


def summary(step: int, episodes: list[Episode], reward: Tensor, advantage: Tensor, updates: list[Counter],
            s: Settings) -> dict:
    """The log line of a step. The entropy and length are of all sampled tokens; the clip fractions, KL and
    shaping of the scored ones, which are those of mixed groups if skip_zero. The gap between sampler and
    scorer is read in the first update, where both still have the same weights (None if it scored nothing)."""
    measured = updates[0]["tokens"] > 0
    tokens = sum(len(e.response) for e in episodes)
    total = Counter()
    for sums in updates:
        total.update(sums)                      # not sum(): adding Counters drops what is not positive
    mean = lambda sums, name: sums[name] / max(1, sums["tokens"])
    return {"step": step, "reward": float(reward.mean()), "length": tokens / len(episodes),
            "finished": sum(e.finished for e in episodes) / len(episodes),
            "entropy": float(torch.cat([e.entropy for e in episodes]).mean()),
            "equal_groups": float((advantage.view(-1, s.samples) == 0).all(1).float().mean()),
            "shaping": mean(total, "shaping"), "clip_low": mean(total, "clipped_low"),
            "clip_high": mean(total, "clipped_high"), "kl": mean(total, "kl"), "loss": total["loss"] / len(updates),
            "gap_mean": mean(updates[0], "gap") if measured else None,
            "gap_max": updates[0]["gap_max"] if measured else None,
            "grad_norm": sum(u["grad_norm"] for u in updates) / len(updates), "tokens": tokens}


def step_times(run: Path) -> str:
    """Where the time of a step goes, as medians of the log. Scoring is a part of the update; on a GPU its share is
    not exact, since the host does not wait for the card there."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    seconds = {part: statistics.median(line[f"{part}_s"] for line in lines) for part in ("rollout", "reward", "update", "score")}
    return ("median seconds of a step: " + ", ".join(f"{part} {value:.2f}" for part, value in seconds.items() if part != "score")
            + f" (of it {seconds['score']:.2f} scoring, forward)")


def peak_memory(device: torch.device) -> float:
    """GB: of the card's allocations on a GPU, else of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def open_run(s: Settings) -> Path:
    """Makes the run's folder, with the settings in config.json. FileExistsError if there is one; --overwrite
    replaces it only if it is a run, and not the one that the model comes from."""
    name = s.name or run_name(s)
    if name in (".", "..") or name != Path(name).name:
        raise ValueError(f"--name must be the name of a folder in --out, not a path; it is {name!r}")
    run = Path(s.out) / name
    if run.exists():
        if not s.overwrite:
            raise FileExistsError(f"the run folder {run} exists; give another --name, or --overwrite to replace it")
        if not (run / "config.json").exists() or "alpha" not in read_json(run / "config.json"):
            raise FileExistsError(f"{run} is not a run folder, so --overwrite leaves it alone; give another --name")
        if run.resolve() in (Path(s.model).resolve(), *Path(s.model).resolve().parents):
            raise ValueError(f"--overwrite would delete {s.model}, which this run starts from; give another --name")
        shutil.rmtree(run)
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(dataclasses.asdict(s), indent=2) + "\n")
    print(f"{run}: " + ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(s).items() if value != ""))
    return run


if __name__ == "__main__":
    try:
        train(parse_flags(Settings, __doc__))
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"train.py: {error}")
    except KeyboardInterrupt:
        sys.exit("train.py: stopped; the run's folder keeps its log and the last saved model, if any step saved one")
