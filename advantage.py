"""From rewards to the objective, and the paper's entropy advantage. Read after rollout.py.

Pure functions of tensors; this file imports only torch, so you can lift it into another project as
it is. Where the paper is silent, this follows verl, which its experiments ran in: the unbiased
standard deviation, + 1e-6, whitened advantages in PPO. verl's dual clip (a second bound for A < 0
and large ratios) is left out on purpose: neither the paper nor PPO has it.

    A advantage   H entropy in nats   N answers   B rows, T columns: one per token
"""

import torch
from torch import Tensor


def group_advantage(reward: Tensor, group: Tensor) -> Tensor:
    """GRPO (paper, Section 3): A_i = (r_i - mean(group)) / std(group). reward, group [N] -> [N];
    `group`: any integers.

    A group of equal rewards teaches nothing and gets exactly 0. That is tested by max == min: the
    mean is rounded, which leaves r - mean a little off 0, and the division by an equally small std
    makes up to 1 of it (not for rewards of +-1, whose mean is exact)."""
    # index [N]: the group of each reward, from 0 on; size [groups].
    _, index, size = group.unique(return_inverse=True, return_counts=True)
    zeros = torch.zeros(len(size), dtype=reward.dtype, device=reward.device)
    mean = zeros.index_add(0, index, reward) / size  # [groups]
    centred = reward - mean[index]  # [N]
    squares = zeros.index_add(0, index, centred**2)  # [groups]
    std = (squares / (size - 1).clamp(min=1)).sqrt()  # a group of one is all equal anyway
    # include_self=False: the zeros of the start take no part.
    largest = zeros.scatter_reduce(0, index, reward, "amax", include_self=False)
    smallest = zeros.scatter_reduce(0, index, reward, "amin", include_self=False)
    all_equal = largest == smallest
    return torch.where(all_equal[index], 0.0, centred / (std[index] + 1e-6))


def gae(
    reward: Tensor, value: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016): with
    delta_t = r_t + gamma V_(t+1) - V_t,

        A_t = delta_t + gamma lam A_(t+1),      return_t = A_t + V_t

    All [B, T]; mask True on response tokens, contiguous in a row; value_t is of the state in which
    token t is chosen. Both results are 0 outside the mask. At gamma = lam = 1 (the paper) A_t is
    the reward to come minus V_t.

    After a row's last token V = 0, also if the response was cut at the length limit: the task has
    given it -1, so it is treated as an end. The paper is silent; one could take the critic's value
    of the cut text instead, which would not punish length."""
    advantage = torch.zeros_like(value)
    next_advantage = value.new_zeros(len(value))  # [B]
    next_value = value.new_zeros(len(value))  # [B]
    for t in reversed(range(value.shape[1])):
        inside = mask[:, t]
        delta = reward[:, t] + gamma * next_value - value[:, t]  # [B]
        next_advantage = torch.where(inside, delta + gamma * lam * next_advantage, 0.0)
        next_value = torch.where(inside, value[:, t], 0.0)
        advantage[:, t] = next_advantage
    return advantage, torch.where(mask, advantage + value, 0.0)


def whiten(x: Tensor, mask: Tensor, population: Tensor | None = None) -> Tensor:
    """Zero mean and unit variance (unbiased) where the mask is True; 0 elsewhere. `population`: the
    values that mean and std are taken of, by default x[mask]; of several processes, all values."""
    if population is None:
        population = x[mask]
    std = population.std() if len(population) > 1 else population.new_zeros(())
    return torch.where(mask, (x - population.mean()) / (std + 1e-6), 0.0)


def shape_with_entropy(advantage: Tensor, entropy: Tensor, alpha: float, kappa: float) -> Tensor:
    """The entropy advantage, the paper's one line (Section 3):

        psi(H_t) = min(alpha * H_t.detach(), |A_t| / kappa),      A_t <- A_t + psi(H_t)

    advantage, entropy, result [B, T]; H_t in nats, of the current policy, from the loss's own
    forward pass. So
      - psi carries no gradient: it rescales the push on the token that was sampled, and does not
        push towards higher entropy;
      - psi <= |A| / kappa with kappa > 1, so the sign of A is kept, and A = 0 stays 0;
      - with kappa = 2 the factor on A lies in [1, 1.5] for A > 0 and in [0.5, 1] for A < 0:
        uncertain tokens of right answers are rewarded more, those of wrong answers punished less;
      - a group's advantages no longer sum to 0.
    Out of place: the caller's advantages stay as they are, so that nothing accumulates if they are
    used again.

    >>> advantage = torch.tensor([2.0, 2.0, -1.0, 0.0])
    >>> entropy = torch.tensor([1.0, 9.0, 9.0, 9.0])
    >>> shape_with_entropy(advantage, entropy, alpha=0.4, kappa=2.0)
    tensor([ 2.4000,  3.0000, -0.5000,  0.0000])
    """
    return advantage + torch.minimum(alpha * entropy.detach(), advantage.abs() / kappa)


def policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    mask: Tensor,
    clip_low: float,
    clip_high: float,
    denominator: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped objective with a higher upper bound (clip-higher), summed over tokens and
    divided by `denominator`: the response tokens of the whole optimizer step, also of answers that
    the caller skips because their A is 0, so that the cut into micro-batches changes nothing.

    All [B, T]; mask True on response tokens. The statistics are sums over tokens: tokens;
    clipped_low (A < 0, ratio below 1 - clip_low) and clipped_high (A > 0, ratio above 1 +
    clip_high), where the gradient is cut; kl, which estimates KL(old, new): ratio - 1 - log ratio.
    """
    log_ratio = torch.where(mask, logp - old_logp, 0.0)  # 0 outside, where ratio is 1 and kl 0
    ratio = log_ratio.exp()
    clipped_ratio = ratio.clamp(1 - clip_low, 1 + clip_high)
    objective = torch.min(ratio * advantage, clipped_ratio * advantage)
    loss = -torch.where(mask, objective, 0.0).sum() / denominator
    with torch.no_grad():
        clipped_low = mask & (advantage < 0) & (ratio < 1 - clip_low)
        clipped_high = mask & (advantage > 0) & (ratio > 1 + clip_high)
        statistics = {
            "tokens": mask.sum(),
            "clipped_low": clipped_low.sum(),
            "clipped_high": clipped_high.sum(),
            "kl": (ratio - 1 - log_ratio).sum(),
        }
    return loss, statistics


def value_loss(
    value: Tensor, old_value: Tensor, ret: Tensor, mask: Tensor, clip: float, denominator: float
) -> Tensor:
    """PPO's clipped value loss, with V_kept = V_old + clamp(V - V_old, -clip, clip),

        max((V - return)^2, (V_kept - return)^2) / 2

    summed over tokens and divided as in policy_loss. All [B, T]. No gradient where V has moved more
    than `clip` towards its return."""
    kept = old_value + (value - old_value).clamp(-clip, clip)
    squared = torch.max((value - ret) ** 2, (kept - ret) ** 2)
    return torch.where(mask, squared, 0.0).sum() / 2 / denominator
