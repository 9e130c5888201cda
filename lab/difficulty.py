"""The weight by difficulty that the entropy advantage amounts to at full strength, and no entropy at
all: `python -m lab.difficulty` takes train.py's flags; use it with --alpha 0.

Where the cap binds on every token, psi = |A| / kappa, and the expected gradient of a problem is that
of plain GRPO times M(p, infinity) = 1 + (1 - 2p) / kappa, p being the share of its answers that are
right (docs/derivation.md). So this multiplies the group's advantages by that number. If the entropy
advantage is nothing but a learning rate that depends on difficulty, both train the same.
"""

import torch
from torch import Tensor

import advantage
import train

KAPPA = 2.0


def weighted_group_advantage(reward: Tensor, group: Tensor) -> Tensor:
    """GRPO's advantages, [N], [N] -> [N], each problem's times M(p, infinity). Rewards are +-1."""
    plain = advantage.group_advantage(reward, group)
    _, index, size = group.unique(return_inverse=True, return_counts=True)
    right = torch.zeros(len(size)).index_add(0, index, (reward > 0).float())
    share_right = right / size  # [groups]
    weight = 1 + (1 - 2 * share_right) / KAPPA
    return plain * weight[index]


if __name__ == "__main__":
    train.group_advantage = weighted_group_advantage
    train.main()
