"""What `--method` puts in the place of advantage.py's functions. Read it when you add a method; without
the flag, train.py uses its own functions and nothing of this.

The methods are in lab/methods.py, or in a file of yours.
"""

import dataclasses
import importlib
from typing import TYPE_CHECKING, Callable, NamedTuple, Sequence

import torch
from torch import Tensor

from plumbing.distributed import gather, join

if TYPE_CHECKING:  # they import this file, or what imports it
    from plumbing.settings import Settings
    from rollout import Episode

# Each with the arguments and results of its namesake in advantage.py.
GroupAdvantage = Callable[[Tensor, Tensor], Tensor]  # group_advantage
Shape = Callable[[Tensor, Tensor, float, float], Tensor]  # shape_with_entropy
Loss = Callable[..., tuple[Tensor, dict[str, Tensor]]]  # policy_loss


class Step(NamedTuple):
    """All M response tokens of one optimizer step, those of all processes, also of answers that are
    left out of the forward pass: answer after answer, each from its first token to its last.

    Log-probabilities and entropies are the sampler's. In the first update of a rollout they are the
    current policy's too; in the later ones the policy has moved since."""

    advantage: Tensor  # [M], before shaping
    old_logp: Tensor  # [M]
    entropy: Tensor  # [M], in nats
    lengths: Tensor  # int64 [answers], their sum is M
    group: Tensor  # int64 [answers], one number for each group of --samples answers to a problem


class Update(NamedTuple):
    """What an optimizer step works with; `advantage` [N, R] of this process's answers."""

    advantage: Tensor
    denominator: float
    shape: Shape
    loss: Loss
    s: "Settings"


class Method(NamedTuple):
    """A method; what is None stays as in GRPO without the entropy advantage."""

    advantage: GroupAdvantage | None = None
    weigh: Callable[[Step], Tensor] | None = None  # other advantages for a step's tokens, [M]
    shape: Shape | None = None
    loss: Loss | None = None
    loss_of: Callable[[Step], Loss] | None = None  # a loss that must know the whole step
    denominator: Callable[[Step, "Settings"], float] | None = None  # by default M
    every_answer: bool = False  # A = 0 does not mean that there is no gradient
    # The entropies of the log's lines, nats, from step 1 on -> --entropy-coef of the next step.
    entropy_coef: Callable[[Sequence[float]], float] | None = None


def unshaped(advantage: Tensor, entropy: Tensor, alpha: float, kappa: float) -> Tensor:
    return advantage


def find_method(name: str) -> Method | None:
    """The method of this name, None for none. ValueError or FileNotFoundError.

    lab/ lies above this folder and train.py, and is only imported if a method is wanted."""
    if not name:
        return None
    return importlib.import_module("lab.methods").find(name)


def advantage_of(name: str, usual: GroupAdvantage) -> GroupAdvantage:
    """The method's, if it has one of its own."""
    method = find_method(name)
    if method is None or method.advantage is None:
        return usual
    return method.advantage


def by_log(s: "Settings", log: Sequence[dict]) -> "Settings":
    """The settings of the next step, where a method makes some of the log. A resumed run has it."""
    method = find_method(s.method)
    if method is None or method.entropy_coef is None:
        return s
    entropies = [line["entropy"] for line in log]
    return dataclasses.replace(s, entropy_coef=method.entropy_coef(entropies))


def by_method(usual: Update, episodes: Sequence["Episode"], old_logp: Tensor) -> Update:
    """What --method makes of an optimizer step; old_logp [N, R]. All processes must call it."""
    s = usual.s
    method = find_method(s.method)
    if method is None:
        return usual
    lengths = torch.tensor([len(episode.response) for episode in episodes])
    column = torch.arange(usual.advantage.shape[1])
    mask = column < lengths[:, None]  # [N, R]
    entropy = torch.cat([episode.entropy for episode in episodes])
    # A group is --samples neighbours, as in train.training_step. A problem that is drawn twice has
    # two groups.
    assert len(episodes) % s.samples == 0, "these answers are not in groups of --samples"
    rank, world = join()
    group_here = torch.arange(len(episodes)) // s.samples  # [N]
    group = group_here * world + rank  # no other process has it
    mine = Step(usual.advantage[mask], old_logp[mask], entropy, lengths, group)
    parts = gather(mine)
    step = Step(*[torch.cat(tensors) for tensors in zip(*parts)])

    advantage = usual.advantage
    if method.weigh is not None:
        sizes = [len(part.advantage) for part in parts]
        weighed = method.weigh(step).split(sizes)  # [M] -> the tokens of each process
        advantage = torch.zeros_like(advantage).masked_scatter(mask, weighed[rank])
    loss = method.loss or usual.loss
    if method.loss_of is not None:
        loss = method.loss_of(step)
    denominator = usual.denominator
    if method.denominator is not None:
        denominator = method.denominator(step, s)
    if method.every_answer:
        s = dataclasses.replace(s, skip_zero=False)
    return Update(advantage, denominator, method.shape or unshaped, loss, s)
