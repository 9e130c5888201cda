"""From rewards to the objective, and the paper's line. Read after rollout.py.

Pure functions of tensors; this file imports only torch, so you can lift it into another project as it is.
Departs from the paper: nowhere in what it states. Where it is silent, this follows verl, which its experiments ran in:
the unbiased standard deviation, + 1e-6, whitened advantages in PPO. verl's dual clip (a second bound for A < 0 and
large ratios) is left out on purpose: neither the paper nor PPO has it.
"""

import torch
from torch import Tensor


def group_advantage(reward: Tensor, group: Tensor) -> Tensor:
    """GRPO (paper, Section 3): A_i = (r_i - mean(group)) / std(group). reward, group [N] -> [N]; `group`: any integers.
    A group of equal rewards teaches nothing and gets exactly 0: max == min is tested, because rounding in the mean
    over a std of nearly 0 makes an advantage out of noise."""
    _, index, size = group.unique(return_inverse=True, return_counts=True)
    per_group = torch.zeros(len(size), dtype=reward.dtype, device=reward.device)
    mean = per_group.index_add(0, index, reward) / size                                         # [groups]
    centred = reward - mean[index]                                                              # [N]
    std = (per_group.index_add(0, index, centred ** 2) / (size - 1).clamp(min=1)).sqrt()        # [groups]
    largest = per_group.scatter_reduce(0, index, reward, "amax", include_self=False)
    smallest = per_group.scatter_reduce(0, index, reward, "amin", include_self=False)
    return torch.where((largest == smallest)[index], 0.0, centred / (std[index] + 1e-6))


def gae(reward: Tensor, value: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016): with delta_t = r_t + gamma V_(t+1) - V_t,

        A_t = delta_t + gamma lam A_(t+1),      return_t = A_t + V_t

    All [B, T]; mask True on response tokens, contiguous in a row; value_t is of the state in which token t is chosen.
    Both results are 0 outside the mask. At gamma = lam = 1 (the paper) A_t is the reward to come minus V_t. After a row's
    last token comes nothing: V = 0 there, for a response cut at the length limit too, which the task has given its -1. The
    paper is silent; the alternative takes the critic's value of the cut text, so that length itself is not punished."""
    advantage, later, next_value = torch.zeros_like(value), value.new_zeros(len(value)), value.new_zeros(len(value))
    for t in reversed(range(value.shape[1])):
        delta = reward[:, t] + gamma * next_value - value[:, t]                                 # [B]
        later = torch.where(mask[:, t], delta + gamma * lam * later, 0.0)
        next_value = torch.where(mask[:, t], value[:, t], 0.0)
        advantage[:, t] = later
    return advantage, torch.where(mask, advantage + value, 0.0)


def whiten(x: Tensor, mask: Tensor, chosen: Tensor | None = None) -> Tensor:
    """Zero mean and unit variance (unbiased) over the True places of the mask, or over `chosen` values; 0 elsewhere."""
    chosen = x[mask] if chosen is None else chosen
    spread = chosen.std() if len(chosen) > 1 else chosen.new_zeros(())
    return torch.where(mask, (x - chosen.mean()) / (spread + 1e-6), 0.0)


def shape_with_entropy(advantage: Tensor, entropy: Tensor, alpha: float, kappa: float) -> Tensor:
    """The paper's line (Section 3):

        psi(H_t) = min(alpha * H_t.detach(), |A_t| / kappa),      A_t <- A_t + psi(H_t)

    advantage, entropy, result [B, T]; H_t in nats, of the current policy, from the loss's own forward pass. So
      - psi carries no gradient: it changes how far a token is pushed, not the direction of the objective;
      - psi <= |A| / kappa with kappa > 1, so the sign of A is kept, and A = 0 stays 0;
      - with kappa = 2 the factor on A lies in [1, 1.5] for A > 0 and in [0.5, 1] for A < 0: uncertain tokens of right
        answers are rewarded more, those of wrong answers are punished less;
      - a group's advantages no longer sum to 0.
    Out of place: applied again to the same advantages in a later epoch, it does not accumulate.

    >>> shape_with_entropy(torch.tensor([2., 2., -1., 0.]), torch.tensor([1., 9., 9., 9.]), alpha=0.4, kappa=2.)
    tensor([ 2.4000,  3.0000, -0.5000,  0.0000])
    """
    return advantage + torch.minimum(alpha * entropy.detach(), advantage.abs() / kappa)


def policy_loss(logp: Tensor, old_logp: Tensor, advantage: Tensor, mask: Tensor, clip_low: float,
                clip_high: float, denominator: float) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped objective with a higher upper bound (clip-higher), summed over tokens and divided by `denominator`:
    the response tokens of the whole optimizer step, left-out ones included, so that micro-batches change nothing. All
    [B, T]; mask True on response tokens. The statistics are sums over tokens: tokens; clipped_low (A < 0, ratio below
    1 - clip_low) and clipped_high (A > 0, ratio above 1 + clip_high), where the gradient is cut; kl, of old from new."""
    log_ratio = torch.where(mask, logp - old_logp, 0.0)
    ratio = log_ratio.exp()
    objective = torch.min(ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)
    loss = -torch.where(mask, objective, 0.0).sum() / denominator
    with torch.no_grad():
        statistics = {"tokens": mask.sum(),
                      "clipped_low": (mask & (advantage < 0) & (ratio < 1 - clip_low)).sum(),
                      "clipped_high": (mask & (advantage > 0) & (ratio > 1 + clip_high)).sum(),
                      "kl": (ratio - 1 - log_ratio).sum()}
    return loss, statistics


def value_loss(value: Tensor, old_value: Tensor, ret: Tensor, mask: Tensor, clip: float, denominator: float) -> Tensor:
    """PPO's clipped value loss: the larger of the squared error of the value and that of the value kept within `clip`
    of the old one, halved, summed over tokens and divided as in policy_loss. All [B, T]. A token has no gradient where
    the clipped error is the larger one: the value has moved far enough towards its return."""
    kept = old_value + (value - old_value).clamp(-clip, clip)
    squared = torch.max((value - ret) ** 2, (kept - ret) ** 2)
    return torch.where(mask, squared, 0.0).sum() / 2 / denominator
