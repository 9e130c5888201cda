"""The work of lab.bench: what both sides get, and how ours does it.

The prompts are countdown's, and the rewards are made up, so that as many groups have equal answers
as the measurement wants.
"""

import itertools
from typing import Callable, Sequence

import torch
from torch import Tensor

import train
from advantage import group_advantage
from model import Transformer, load
from plumbing.batch import pad_responses
from plumbing.optimizer import make_optimizer
from plumbing.pretrained import EMBEDDED, open_pretrained
from plumbing.seeds import seeded_generator
from plumbing.settings import Settings as TrainSettings
from rollout import Episode, Sampler
from tasks import load_task

SAMPLES = 16  # answers per problem
MINIBATCH = 4  # problems per optimizer step
LIMIT = 128  # longest response
ROLLOUT_SLOTS = 512  # sequences sampled at a time in a step


def encoded_prompts(count: int, model: str = EMBEDDED) -> list[list[int]]:
    """Prompts of the task, of one length, so that the peer needs no padding."""
    task = load_task("countdown")
    tokenizer = open_pretrained(model).tokenizer
    prompts: list[list[int]] = []
    for problem in task.train:
        prompt = task.encode(problem, tokenizer)
        if not prompts or len(prompt) == len(prompts[0]):
            prompts.append(prompt)
        if len(prompts) == count:
            break
    return prompts


def rewards(groups: int, equal: float) -> Tensor:
    """Of a rollout, group by group, [groups * SAMPLES]: one answer in four is right, but none in
    the first groups, whose share is `equal`."""
    mixed = torch.arange(groups)[:, None] >= round(equal * groups)  # [groups, 1]
    fourth = torch.arange(SAMPLES) % 4 == 0  # [SAMPLES]
    return torch.where(mixed & fourth, 1.0, -1.0).flatten()


def minibatches(
    episodes: list[Episode], reward: Tensor
) -> list[tuple[list[Episode], Tensor, Tensor]]:
    """For each optimizer step its episodes, with their old log-probabilities and advantages
    [N, R]."""
    logp, mask = pad_responses([episode.logp for episode in episodes])  # [N, R]
    group = torch.arange(len(reward)) // SAMPLES
    advantage = group_advantage(reward, group)[:, None] * mask  # [N, R]
    size = MINIBATCH * SAMPLES
    steps = []
    for first in range(0, len(episodes), size):
        part = slice(first, first + size)
        steps.append((episodes[part], logp[part], advantage[part]))
    return steps


def count_tokens(episodes: Sequence[Episode]) -> int:
    return sum(len(episode.response) for episode in episodes)


def wait_for_device(module: torch.nn.Module) -> None:
    """Reading a weight waits until the device has done all that comes before."""
    float(next(module.parameters()).detach().flatten()[0])


def sample(
    sampler: Sampler, prompts: Sequence[Sequence[int]], samples: int, limit: int, turn: int = 0
) -> list[Episode]:
    random = seeded_generator(0, turn, "bench", sampler.device)
    return sampler.generate(prompts, samples, limit, temperature=1.0, generator=random)


def our_update(
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    episodes: list[Episode],
    reward: Tensor,
    s: TrainSettings,
) -> int:
    """The optimizer steps of a rollout -> its tokens."""
    for part, old_logp, advantage in minibatches(episodes, reward):
        train.update(model, optimizer, part, old_logp, advantage, s)
    wait_for_device(model)
    return count_tokens(episodes)


def our_step(problems: int, equal: float, device: torch.device) -> Callable[[], int]:
    """A GRPO step that can be called again and again: a rollout of so many problems, rewards, the
    optimizer steps. Its responses are drawn anew every time."""
    model = load("base", device)[0]
    prompts = encoded_prompts(problems)
    settings = TrainSettings(lr=0.0)
    turn = itertools.count()
    longest = len(prompts[0]) + LIMIT
    sampler = Sampler(model, ROLLOUT_SLOTS, longest, model.eos_ids)
    optimizer = make_optimizer(model, 0.0, settings)

    def step() -> int:
        episodes = sample(sampler, prompts, SAMPLES, LIMIT, next(turn))
        sampler.free()
        return our_update(model, optimizer, episodes, rewards(problems, equal), settings)

    return step
