"""What is measured while training: every key of log.jsonl and its meaning, in one place.

An update adds up *sums* over its micro-batches (and over processes); means are taken only here, at
the end of the step, so that no micro-batch weighs more than its tokens. None stands for "there was
nothing to measure", never 0.
"""

import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Sequence

import torch
from torch import Tensor

from plumbing.distributed import gather
from plumbing.memory import peak_memory

if TYPE_CHECKING:
    from plumbing.resample import Resampled
    from rollout import Episode

# Over processes the largest of these counts, not the sum.
MAXIMA = ("gap_max", "grad_norm", "score_s")


class Stopwatch:
    """Seconds since it was made, or since the last lap."""

    def __init__(self) -> None:
        self.started = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        seconds = now - self.started
        self.started = now
        return seconds


@dataclass
class StepRecord:
    """What a training step leaves to be logged: this process's part of it."""

    clock: Stopwatch = field(default_factory=Stopwatch)
    seconds: dict[str, float] = field(default_factory=dict)
    # All that was sampled, also what --resample drops.
    episodes: list["Episode"] = field(default_factory=list)
    reward: Tensor | None = None  # [N]
    resampled: "Resampled | None" = None  # with --resample alone: what was learned from
    updates: list[Counter] = field(default_factory=list)
    # With a critic alone: its updates, and [tokens] before them.
    critic_updates: list[Counter] = field(default_factory=list)
    value: Tensor | None = None
    ret: Tensor | None = None

    def lap(self, name: str) -> None:
        """Notes the seconds since the last lap, besides those that it has of this name."""
        self.seconds[name] = self.seconds.get(name, 0.0) + self.clock.lap()


class UpdateSums:
    """What an update adds up over its micro-batches. The numbers stay on the device until `total`
    asks for all of them: for these, a GPU is waited for once."""

    def __init__(self) -> None:
        self.score_s = 0.0
        self.names: list[str] = []
        self.numbers: list[Tensor] = []  # [] each

    def add(self, sums: dict[str, Tensor]) -> None:
        self.names += sums.keys()
        self.numbers += sums.values()

    def total(self) -> Counter:
        """Of all processes."""
        mine = Counter(score_s=self.score_s)
        for name, number in zip(self.names, torch.stack(self.numbers).tolist()):
            mine[name] = max(mine[name], number) if name in MAXIMA else mine[name] + number
        return add_over_processes(gather(mine))


def sum_where(mask: Tensor, values: Tensor) -> Tensor:
    """The sum of the values that the mask selects. On a GPU without selecting them, because it
    would be waited for to say how many they are."""
    if values.is_cuda:
        return torch.where(mask, values, 0.0).sum()
    return values[mask].sum()


def log_line(
    step: int, record: StepRecord, s, device: torch.device, tokenizer, timeouts: int
) -> dict:
    """A step's line of log.jsonl, of all processes together; all of them must call it."""
    episodes = sum(gather(record.episodes), [])
    reward = torch.cat(gather(record.reward))
    line = policy_metrics(step, episodes, reward, record.updates, s.samples)
    # What lab/study.py calls an arm: the settings that tell its methods apart.
    line["arm"] = (
        f"{s.algo}, alpha {s.alpha}, entropy_coef {s.entropy_coef}, clip_high {s.clip_high}"
    )
    if s.method:
        line["arm"] = f"{s.method}, {line['arm']}"
    if s.resample:
        line["arm"] += f", resample {s.resample}"
        kept = torch.cat(gather(record.resampled.reward))
        line |= resampling_metrics(reward, kept, record.resampled.rounds, s.samples)
    if s.algo == "ppo":
        value = torch.cat(gather(record.value))
        ret = torch.cat(gather(record.ret))
        line |= critic_metrics(record.critic_updates, value, ret)
    line |= record.seconds  # rollout_s, reward_s, update_s, of this process
    line["score_s"] = sum(sums["score_s"] for sums in record.updates)  # forward passes of updates
    line["peak_memory_gb"] = peak_memory(device)
    line["timeouts"] = sum(gather(timeouts))  # answers whose grading was stopped, since the start
    line["unknown_tokens"] = count_unknown(episodes, tokenizer)
    return line


def count_unknown(episodes: Sequence["Episode"], tokenizer) -> int:
    """Response tokens whose ids the tokenizer does not know: a model may have more words than its
    tokenizer. They vanish from the text that is graded."""
    responses = torch.cat([episode.response for episode in episodes])
    ids, counts = responses.unique(return_counts=True)
    words = tokenizer.convert_ids_to_tokens(ids.tolist())
    return sum(count for word, count in zip(words, counts.tolist()) if word is None)


def shaping_sums(plain: Tensor, shaped: Tensor, mask: Tensor, kappa: float) -> dict[str, Tensor]:
    """What the entropy advantage adds, psi, relative to |A|: sums over tokens, also of those with
    A > 0 (up) and A < 0 (down) alone, and how many reach the cap 1 / kappa. All [B, T-1]."""
    share = torch.where(mask & (plain != 0), (shaped - plain) / plain.abs(), 0.0)
    up = mask & (plain > 0)
    down = mask & (plain < 0)
    at_cap = share > 0.9999 / kappa  # not 1 / kappa: that is rounded
    return {
        "shaping": share.sum(),
        "shaping_up": sum_where(up, share),
        "up": up.sum(),
        "shaping_down": sum_where(down, share),
        "down": down.sum(),
        "capped": at_cap.sum(),
    }


def add_over_processes(parts: Sequence[Counter]) -> Counter:
    """One process's sums each -> those of all."""
    total: Counter = Counter()
    for name in set().union(*parts):
        values = [part[name] for part in parts]
        total[name] = max(values) if name in MAXIMA else sum(values)
    return total


def mean_per_update(updates: list[Counter], name: str) -> float | None:
    if not updates:
        return None
    return sum(sums[name] for sums in updates) / len(updates)


def mean_per(count_name: str, updates: list[Counter], name: str) -> float | None:
    """The sums called `name` divided by what was counted as `count_name`."""
    count = sum(sums[count_name] for sums in updates)
    if not count:
        return None
    return sum(sums[name] for sums in updates) / count


def policy_metrics(
    step: int,
    episodes: Sequence["Episode"],
    reward: Tensor,
    updates: list[Counter],
    samples: int,
) -> dict:
    """The policy's part of a step's log line; reward [N], `samples` of each problem in turn."""
    tokens = sum(len(episode.response) for episode in episodes)
    entropy = torch.cat([episode.entropy for episode in episodes])  # [tokens]
    # Only in the first update have sampler and scorer the same weights. (None of it may be scored.)
    first_update = updates[:1]
    gaps = [sums["gap_max"] for sums in first_update if sums["tokens"]]
    return {
        "step": step,
        # Of all answers that were sampled; with --resample that is more than was learned from.
        "reward": float(reward.mean()),
        "length": tokens / len(episodes),  # response tokens
        "finished": sum(episode.finished for episode in episodes) / len(episodes),
        "entropy": float(entropy.mean()),  # nats per token, of the distribution sampled from
        "equal_groups": equal_groups(reward, samples),  # share of problems that teach nothing
        # Of the tokens that were scored, over all updates: psi / |A|, and the clips.
        "shaping": mean_per("tokens", updates, "shaping"),
        "shaping_up": mean_per("up", updates, "shaping_up"),
        "shaping_down": mean_per("down", updates, "shaping_down"),
        "capped": mean_per("tokens", updates, "capped"),  # share where psi = |A| / kappa
        "clip_low": mean_per("tokens", updates, "clipped_low"),
        "clip_high": mean_per("tokens", updates, "clipped_high"),
        "kl": mean_per("tokens", updates, "kl"),  # estimated KL(policy that sampled, current one)
        # Of the updates.
        "loss": mean_per_update(updates, "loss"),
        "grad_norm": mean_per_update(updates, "grad_norm"),  # before it is clipped
        # Of the first update: |log-probability by the sampler - by the scorer|.
        "gap_max": max(gaps, default=None),
        "gap_mean": mean_per("tokens", first_update, "gap"),
        "tokens": tokens,
    }


def equal_groups(reward: Tensor, samples: int) -> float:
    """The share of groups whose rewards are all equal; reward [N]."""
    groups = reward.view(-1, samples)  # [problems, samples]
    equal = (groups == groups[:, :1]).all(dim=1)
    return float(equal.float().mean())


def resampling_metrics(reward: Tensor, kept: Tensor, rounds: int, samples: int) -> dict:
    """What --resample adds to a log line: rewards [N] of all answers that were sampled, and of
    those that were learned from."""
    return {
        "drawn": len(reward) // samples,  # problems, the step's own and further ones
        "rounds": rounds,  # that were used
        # Of the answers that were learned from.
        "kept_reward": float(kept.mean()),
        "kept_equal_groups": equal_groups(kept, samples),  # places that stayed open
    }


def critic_metrics(updates: list[Counter], value: Tensor, ret: Tensor) -> dict:
    """The critic's part of a log line; value, ret [tokens], before the critic's updates."""
    variance = float(ret.var()) if len(ret) > 1 else 0.0
    explained = None  # equal returns leave no variance to explain
    if variance > 1e-8:
        explained = 1 - float((ret - value).var()) / variance
    return {
        "value_loss": mean_per_update(updates, "loss"),
        "critic_grad_norm": mean_per_update(updates, "grad_norm"),
        "explained_variance": explained,  # 0: says the same of everything; 1: knows the outcome
    }


def step_times(log: list[dict]) -> str:
    """Where the time of a step goes. On a GPU the share of scoring is not exact: nobody waits for
    the card there."""
    keys = ("rollout_s", "reward_s", "update_s", "score_s")
    median = {key: statistics.median(line[key] for line in log) for key in keys}
    return (
        f"median seconds of a step: rollout {median['rollout_s']:.2f}, "
        f"reward {median['reward_s']:.2f}, update {median['update_s']:.2f} "
        f"(of it {median['score_s']:.2f} scoring, forward)"
    )
