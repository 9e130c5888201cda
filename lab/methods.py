"""The published relatives of the entropy advantage: `python train.py --method clip-cov`. One page about
them all is docs/methods.md.

Each is a function of tensors, and a line of METHODS says whose place it takes (plumbing/method.py).
So does a method of your own, here or in a file:

    def tilted(advantage, entropy, alpha, kappa):   # my_method.py
        return advantage * entropy.detach()

    mine = Method(shape=tilted)                     # --method my_method.py:mine

What concerns a whole optimizer step (quantiles, covariances) is taken of all its tokens, in all
processes, before the first forward pass: a `Step`. There H and log pi are the sampler's. That is the
current policy's in the first update of a rollout; in the later ones the policy has moved, and the
papers' code takes what it has moved to, in each micro-batch by itself.

    A advantage   H entropy in nats   M response tokens of the optimizer step   rho ratio pi / pi_old
    N answers   B rows, T columns: one per token
"""

import functools
from typing import Sequence

import torch
from torch import Tensor

from advantage import policy_loss, whiten
from lab.difficulty import weighted_group_advantage
from plumbing.method import Loss, Method, Step
from plumbing.settings import Settings
from tasks.own import find_in_file

# ---- Advantages of answers: reward, group [N] -> [N].


def group_mean(values: Tensor, group: Tensor) -> Tensor:
    """[N], [N] -> [N]: for each answer the mean of its group."""
    _, index, size = group.unique(return_inverse=True, return_counts=True)
    total = torch.zeros(len(size), dtype=values.dtype, device=values.device)
    mean = total.index_add(0, index, values) / size  # [groups]
    return mean[index]


def centred(reward: Tensor, group: Tensor) -> Tensor:
    """Dr. GRPO (2503.20783): A_i = r_i - mean(group), not divided by the standard
    deviation. [N], [N] -> [N]. Its loss is divided by a constant, see `most_tokens`."""
    return reward - group_mean(reward, group)


def leave_one_out(reward: Tensor, group: Tensor) -> Tensor:
    """RLOO (2402.14740): the baseline is the mean of the *others* of the group,

        A_i = r_i - mean(r_j, j != i) = (r_i - mean(group)) n / (n - 1)

    for a group of n >= 2. [N], [N] -> [N]."""
    ones = torch.ones_like(reward)
    _, index, size = group.unique(return_inverse=True, return_counts=True)
    n = ones * size[index]  # [N]
    return centred(reward, group) * n / (n - 1)


def maximum_likelihood(reward: Tensor, group: Tensor) -> Tensor:
    """MaxRL (2602.02710): with c_i = 1 for a right answer, else 0, and p = mean(c) of the group,

        A_i = (c_i - p) / p,      0 if nothing is right

    [N], [N] -> [N]; right is what has a reward > 0. For n answers this is in expectation
    (1 + (1-P) + ... + (1-P)^(n-2)) times the gradient of P, the chance of a right answer: for large
    n that of log P."""
    right = (reward > 0).to(reward.dtype)
    share = group_mean(right, group)  # [N]
    none_right = share == 0
    return torch.where(none_right, 0.0, (right - share) / share)


# ---- Advantages of tokens, of a whole step: Step -> [M].


def whitened(step: Step) -> Tensor:
    """REINFORCE++ with baseline (2501.03262): after the group's mean is taken off (`centred`),

        A_t <- (A_t - mean(A over M)) / std(A over M)

    so groups share one scale. -> [M]. A group of equal rewards does not stay exactly 0: the mean is
    over tokens, and longer answers weigh more in it."""
    everywhere = torch.ones_like(step.advantage, dtype=torch.bool)
    return whiten(step.advantage, everywhere)


def top_entropy(step: Step, share: float = 0.2) -> Tensor:
    """80/20 (2506.01939): only the tokens of highest entropy learn,

        A_t <- A_t if H_t >= the (1 - share) quantile of H over M, else 0

    -> [M]. The loss is still divided by all M tokens."""
    threshold = step.entropy.quantile(1 - share)
    return torch.where(step.entropy >= threshold, step.advantage, 0.0)


def covariance(advantage: Tensor, logp: Tensor, step: Step) -> Tensor:
    """Of tokens of any shape, their part of the covariance over M (2505.22617):

    C_t = (A_t - mean(A over M)) (log pi_t - mean(log pi over M))
    """
    return (advantage - step.advantage.mean()) * (logp - step.old_logp.mean())


def clip_cov(
    step: Step,
    share: float = 2e-4,
    low: float = 1.0,
    high: float = 5.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Clip-Cov (2505.22617): of the tokens with low < C_t < high (`covariance`), which
    drive entropy down, max(1, floor(share M)) are drawn at random and have no gradient: A_t <- 0.
    -> [M]. Without a generator the draw is a function of the step's log-probabilities, so that all
    processes, and a resumed run, draw the same."""
    found = covariance(step.advantage, step.old_logp, step)
    between = ((found > low) & (found < high)).nonzero().flatten()
    count = max(1, int(share * len(found)))
    if generator is None:
        bits = step.old_logp.view(torch.int32).sum().item()
        generator = torch.Generator().manual_seed(bits % 2**31)
    drawn = torch.randperm(len(between), generator=generator)[:count]
    clipped = step.advantage.clone()
    clipped[between[drawn]] = 0.0
    return clipped


def side_of_group(step: Step) -> Tensor:
    """-> [M]: one number for all tokens of the right answers to a problem, and one for those of the
    wrong ones. Right is what has A > 0, which in a group of unequal rewards is the higher one."""
    problem = step.group.repeat_interleave(step.lengths)
    return torch.where(step.advantage > 0, 2 * problem + 1, 2 * problem)


def entropy_weighted_reward(step: Step, base: float, bonus: float) -> Tensor:
    """GTPO's reward of a token (2508.04349, equations 3 and 5), at place t of an answer:

        r_t =   base + bonus H_t / mean(H at place t of the right ones)            in a right answer
        r_t = - base - bonus (1 / H_t) / mean(1 / H at place t of the wrong ones)  in a wrong one

    means over the answers to the same problem that are that long. So a right answer is praised most
    where it was unsure beside other right ones, a wrong one blamed most where it was sure.
    -> [M], float64."""
    answer = torch.arange(len(step.lengths)).repeat_interleave(step.lengths)  # [M]
    first = step.lengths.cumsum(dim=0) - step.lengths  # [answers], where each begins in M
    place = torch.arange(len(answer)) - first[answer]  # [M]
    peers = side_of_group(step) * step.lengths.max() + place

    # H is rounded to about 1e-6: below a floor, 1 / H would be nothing but that.
    entropy = step.entropy.double().clamp(min=1e-4)
    right = step.advantage > 0
    weight = torch.where(right, entropy, 1 / entropy)
    size = base + bonus * weight / group_mean(weight, peers)
    return torch.where(right, size, -size)


def standardised(reward: Tensor, group: Tensor) -> Tensor:
    """(r_t - mean) / std of the group. [M], [M] -> [M]; 0 where a group's rewards are equal but for
    what the rounding of H makes of it."""
    deviation = reward - group_mean(reward, group)
    std = group_mean(deviation**2, group).sqrt()
    return torch.where(std < 1e-4, 0.0, deviation / std)


def gtpo(step: Step, apart: bool = False, base: float = 1.0, bonus: float = 0.1) -> Tensor:
    """GTPO (2508.04349): A_t is `entropy_weighted_reward`, `standardised` over all tokens of the
    answers to a problem. -> [M]. Where all answers are right, or all wrong, A stays 0.

    `apart` (equation 6, as two implementations quote it): right and wrong answers are standardised
    each by themselves. Then base and bonus cancel, both kinds have a mean A of 0, and an answer that
    is the only right one has A = 0."""
    problem = step.group.repeat_interleave(step.lengths)  # [M]
    group = side_of_group(step) if apart else problem
    advantage = standardised(entropy_weighted_reward(step, base, bonus), group)
    return torch.where(step.advantage == 0, 0.0, advantage.to(step.advantage.dtype))


# ---- Shaping of tokens: advantage, entropy [B, T] -> [B, T].


def multiplied(advantage: Tensor, entropy: Tensor, alpha: float, kappa: float) -> Tensor:
    """The entropy advantage (2506.14758) with times in place of plus, as a public copy has it:

        A_t <- A_t (1 + min(alpha H_t, 1 / kappa))

    H of the current policy, without gradient. [B, T], [B, T] -> [B, T]. Uncertain tokens of wrong
    answers are punished more, where the paper's are punished less."""
    return advantage * (1 + (alpha * entropy.detach()).clamp(max=1 / kappa))


# ---- Losses: arguments, shapes and results of advantage.policy_loss.


def kl_cov(step: Step, share: float = 2e-4, weight: float = 1.0) -> Loss:
    """KL-Cov (2505.22617): no clip, and the max(1, floor(share M)) tokens of highest
    C_t (`covariance`) are held where they were,

        loss_t = -rho_t A_t + weight |log rho_t|  for those,      -rho_t A_t  for all others

    summed and divided as in policy_loss. -> the loss. (In the first update of a rollout log rho is
    0 but for rounding. What holds them then has the gradient of a sign, -weight, 0 or weight, which
    the rounding decides.) Its statistics are those of policy_loss: what that would have clipped."""
    found = covariance(step.advantage, step.old_logp, step)
    count = max(1, int(share * len(found)))
    least = found.topk(count).values[-1]

    def loss(
        logp: Tensor,
        old_logp: Tensor,
        advantage: Tensor,
        mask: Tensor,
        clip_low: float,
        clip_high: float,
        denominator: float,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        log_ratio = torch.where(mask, logp - old_logp, 0.0)
        held = covariance(advantage, old_logp, step) >= least
        penalty = weight * torch.where(held, log_ratio.abs(), 0.0)
        objective = log_ratio.exp() * advantage - penalty
        total = -torch.where(mask, objective, 0.0).sum() / denominator
        _, statistics = policy_loss(
            logp.detach(), old_logp, advantage, mask, clip_low, clip_high, denominator
        )
        return total, statistics

    return loss


def mean_log_ratio(logp: Tensor, old_logp: Tensor, mask: Tensor) -> Tensor:
    """log s_i = (1 / |o_i|) sum_t log rho_t, of every answer: [B, T] -> [B, 1]."""
    log_ratio = torch.where(mask, logp - old_logp, 0.0)
    return log_ratio.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True)


def gspo(
    logp: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    mask: Tensor,
    clip_low: float,
    clip_high: float,
    denominator: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """GSPO (2507.18071): the ratio of an answer, not of a token, is clipped,

        loss = -mean over answers of min(s_i A_i, clip(s_i) A_i),      s_i = `mean_log_ratio`.exp()

    `denominator`: the answers of the step. Where A differs from token to token, its mean over the
    answer's counts. In the statistics, every token has its answer's ratio."""
    same_for_all = mean_log_ratio(logp, old_logp, mask).expand_as(logp)
    length = mask.sum(dim=1, keepdim=True)  # [B, 1]
    nothing = torch.zeros_like(old_logp)  # policy_loss takes a difference of two
    return policy_loss(
        same_for_all, nothing, advantage / length, mask, clip_low, clip_high, denominator
    )


def gspo_token(
    logp: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    mask: Tensor,
    clip_low: float,
    clip_high: float,
    denominator: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """GSPO-token (2507.18071): every token has its answer's ratio as a number, and the
    gradient of its own,

        s_it = stop(s_i) pi_t / stop(pi_t),      loss_t = -min(s_it A_t, clip(s_it) A_t)

    mean over an answer's tokens, then over answers. Has GSPO's gradient if A is one number per
    answer, and is made for A that is not. `denominator`: the answers of the step."""
    ratio_of_answer = mean_log_ratio(logp, old_logp, mask).detach()
    own_gradient = logp - logp.detach()  # 0
    length = mask.sum(dim=1, keepdim=True)  # [B, 1]
    nothing = torch.zeros_like(old_logp)
    return policy_loss(
        own_gradient + ratio_of_answer,
        nothing,
        advantage / length,
        mask,
        clip_low,
        clip_high,
        denominator,
    )


def cispo(
    logp: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    mask: Tensor,
    clip_low: float,
    clip_high: float,
    denominator: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """CISPO (2506.13585): the ratio is a clipped weight without gradient, so that no
    token loses its own,

        loss_t = -stop(clip(rho_t, 1 - clip_low, 1 + clip_high)) A_t log pi_t

    summed and divided as in policy_loss, whose statistics it has: where the usual loss would have
    cut the gradient."""
    log_ratio = torch.where(mask, logp - old_logp, 0.0)
    weight = log_ratio.detach().exp().clamp(1 - clip_low, 1 + clip_high)
    objective = weight * advantage * torch.where(mask, logp, 0.0)
    total = -torch.where(mask, objective, 0.0).sum() / denominator
    _, statistics = policy_loss(
        logp.detach(), old_logp, advantage, mask, clip_low, clip_high, denominator
    )
    return total, statistics


# ---- Numbers of a step: the weight of an entropy bonus, what a loss is divided by.


def adaptive_entropy(
    entropies: Sequence[float],
    target: float = 0.2,
    change: float = 0.005,
    least: float = 0.0,
    most: float = 1.0,
) -> float:
    """Adaptive entropy control (Skywork-OR1, 2505.22312): the weight of the mean entropy in the
    objective, --entropy-coef, follows the entropies e_1 .. e_k of the steps so far, in nats:

        c_k = min(c_(k-1) + change, most) if e_k <= target, else max(c_(k-1) - change, least)

    from c_0 = least on; the next step has c_k if e_k <= target, else 0."""
    coefficient = least
    applied = 0.0
    for entropy in entropies:
        too_low = entropy <= target
        if too_low:
            coefficient = min(coefficient + change, most)
        else:
            coefficient = max(coefficient - change, least)
        applied = coefficient if too_low else 0.0
    return applied


def most_tokens(step: Step, s: Settings) -> float:
    """Dr. GRPO (2503.20783): a constant, the tokens if every answer were as long as it
    may be, so that no answer's length changes the weight of a token."""
    return float(len(step.lengths) * s.max_new_tokens)


def answers(step: Step, s: Settings) -> float:
    return float(len(step.lengths))


METHODS = {
    "grpo": Method(),
    "80-20": Method(weigh=top_entropy),
    "clip-cov": Method(weigh=clip_cov),
    "kl-cov": Method(loss_of=kl_cov, every_answer=True),
    "adaptive-entropy": Method(entropy_coef=adaptive_entropy),
    "multiplied": Method(shape=multiplied),
    "gtpo": Method(weigh=gtpo),
    "gtpo-apart": Method(weigh=functools.partial(gtpo, apart=True)),
    "difficulty": Method(advantage=weighted_group_advantage),
    "dr-grpo": Method(advantage=centred, denominator=most_tokens),
    "rloo": Method(advantage=leave_one_out),
    "reinforce++": Method(advantage=centred, weigh=whitened),
    "maxrl": Method(advantage=maximum_likelihood),
    "gspo": Method(loss=gspo, denominator=answers),
    "gspo-token": Method(loss=gspo_token, denominator=answers),
    "cispo": Method(loss=cispo),
}
# The papers' clips, for ratios that train.py's do not fit (docs/methods.md).
PAPER_CLIPS = {
    "gspo": dict(clip_low=3e-4, clip_high=4e-4),
    "gspo-token": dict(clip_low=3e-4, clip_high=4e-4),
    "cispo": dict(clip_low=0.999),  # no lower one
}


@functools.cache
def find(name: str) -> Method:
    """The method of METHODS, or the one that FILE:NAME names. ValueError or FileNotFoundError say in
    one sentence what is wrong with it."""
    in_a_file = ":" in name
    if name not in METHODS and not in_a_file:
        raise ValueError(
            f"unknown method {name!r}; the methods are {', '.join(METHODS)}, and FILE:NAME"
        )
    if not in_a_file:
        return METHODS[name]

    method = find_in_file("--method", name, "Method")
    if not isinstance(method, Method):
        file, _, name_in_it = name.rpartition(":")
        raise ValueError(f"--method {name}: {file} has no Method {name_in_it!r}")
    return method
