"""What a change of the advantages multiplies the policy gradient by: M. The proof is in
docs/derivation.md.

A *shaping* makes another advantage of an answer's advantage A, of the entropy H of the state in
which a token is chosen, and of the share of the group that is right. Of these, only A knows how the
answer turned out, and with two rewards it has two values, A+ and A-. So in expectation, a shaping f
multiplies the gradient of plain GRPO at every state by one number:

    M = (f(A+) - f(A-)) / (A+ - A-)

The rest of f is the same for right and wrong answers, a baseline. For the entropy advantage

    M(p, H) = 1 + (psi+ - psi-) / (A+ - A-),      psi = min(alpha H, |A| / kappa)

    p, share   right answers, as a share of all answers or of a group      H in nats
"""

import math
from typing import Callable

import torch
from torch import Tensor

from advantage import shape_with_entropy

# advantage, entropy, share of the group that is right -> advantage; tensors that broadcast.
Shaping = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain(advantage: Tensor, entropy: Tensor, share: Tensor) -> Tensor:
    return advantage


def entropy_advantage(alpha: float, kappa: float) -> Shaping:
    """The paper's."""

    def shape(advantage: Tensor, entropy: Tensor, share: Tensor) -> Tensor:
        return shape_with_entropy(advantage, entropy, alpha, kappa)

    return shape


def full_strength(kappa: float) -> Shaping:
    """The entropy advantage as alpha grows without bound: psi is at its cap on every token."""

    def shape(advantage: Tensor, entropy: Tensor, share: Tensor) -> Tensor:
        return advantage + advantage.abs() / kappa

    return shape


def multiplicative(alpha: float, kappa: float) -> Shaping:
    """As the README's fork has it: uncertain tokens count more, whatever the answer was."""

    def shape(advantage: Tensor, entropy: Tensor, share: Tensor) -> Tensor:
        return advantage * (1 + (alpha * entropy).clamp(max=1 / kappa))

    return shape


def difficulty_weight(kappa: float) -> Shaping:
    """A times M at full strength: no entropy at all."""

    def shape(advantage: Tensor, entropy: Tensor, share: Tensor) -> Tensor:
        return advantage * (1 + (1 - 2 * share) / kappa)

    return shape


def without_baseline(shaping: Shaping, size: int) -> Shaping:
    """A times the M of another shaping: what it does in expectation, without the baseline that it
    adds. `size` answers a group."""

    def shape(advantage: Tensor, entropy: Tensor, share: Tensor) -> Tensor:
        factor = multiplier(shaping, share, entropy, size)
        return torch.where(advantage == 0, advantage, advantage * factor)  # M is nan if all equal

    return shape


def two_advantages(share: Tensor, size: float = math.inf) -> tuple[Tensor, Tensor]:
    """A+ and A- of GRPO for rewards of two values, whichever they are: (r - mean) / std over a
    group of `size` answers (with the unbiased std) of which this share is right."""
    shrink = math.sqrt(1 - 1 / size)
    positive = ((1 - share) / share).sqrt() * shrink
    negative = -(share / (1 - share)).sqrt() * shrink
    return positive, negative


def multiplier(shaping: Shaping, share: Tensor, entropy: Tensor, size: float = math.inf) -> Tensor:
    """M, where this share of `size` answers is right; by default of infinitely many."""
    positive, negative = two_advantages(share, size)
    spread = shaping(positive, entropy, share) - shaping(negative, entropy, share)
    return spread / (positive - negative)


def multiplier_of_groups(
    shaping: Shaping, p: float, entropy: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """Groups of `size` answers, each right with probability p -> M over all groups, and what plain
    GRPO itself multiplies the gradient of p at a state by: 1 / sqrt(p (1 - p)) if they were large.

    In a small group, A depends on the answer itself through mean and std. The others are
    independent of it: `others` of them are right with a binomial probability."""
    shaped = torch.zeros_like(entropy)  # mean over the others, if right minus if wrong
    unshaped = torch.zeros_like(entropy)
    for others in range(size):
        chance = math.comb(size - 1, others) * p**others * (1 - p) ** (size - 1 - others)
        some_wrong = others + 1 < size
        some_right = others > 0
        if some_wrong:  # a group of equal rewards has A = 0
            share = torch.tensor((others + 1) / size, dtype=entropy.dtype)
            positive, _ = two_advantages(share, size)
            shaped = shaped + chance * shaping(positive, entropy, share)
            unshaped = unshaped + chance * positive
        if some_right:
            share = torch.tensor(others / size, dtype=entropy.dtype)
            _, negative = two_advantages(share, size)
            shaped = shaped - chance * shaping(negative, entropy, share)
            unshaped = unshaped - chance * negative
    return shaped / unshaped, unshaped
