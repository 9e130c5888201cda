"""The entropy advantage inside verl (0.9.1), switched on by two of its own flags:

    actor_rollout_ref.model.external_lib=lab.verl_entropy_advantage
    actor_rollout_ref.actor.calculate_entropy=True

verl imports external_lib in every worker, before the worker takes the actor's loss by its name in
engine_workers; so this file puts another there, which shapes the advantages first. (The losses that
verl lets one register, `policy_loss.loss_mode`, are given no entropy.) docs/engines.md has the
whole command. From the environment:

    ENTROPY_ALPHA   weight of the entropy (default: 0.4, the paper's for GRPO)
    ENTROPY_KAPPA   psi is at most |A| / kappa (default: 2)
"""

import os
from typing import Callable

from verl.workers import engine_workers
from verl.workers.utils.padding import no_padding_2_padding

from advantage import shape_with_entropy
from plumbing.settings import PAPER_ALPHA


def with_entropy_advantage(ppo_loss: Callable, alpha: float, kappa: float) -> Callable:
    """verl's ppo_loss, but of shaped advantages. ValueError where verl computed no entropy."""

    def shaped_loss(config, model_output, data, dp_group=None):
        packed = model_output.get("entropy")  # all tokens of all rows, prompts too
        if packed is None:
            raise ValueError(
                "the entropy advantage needs actor_rollout_ref.actor.calculate_entropy=True"
            )
        entropy = no_padding_2_padding(packed, data)  # [B, R]
        advantage = data["advantages"]
        if advantage.is_nested:
            advantage = advantage.to_padded_tensor(0.0)  # [B, R]
        # A copy, so that the next pass over the same answers does not shape what is shaped.
        data = data.copy()
        data["advantages"] = shape_with_entropy(advantage, entropy, alpha, kappa)
        return ppo_loss(config, model_output, data, dp_group)

    return shaped_loss


def number(name: str, default: float) -> float:
    """A variable of the environment. ValueError if it is no number."""
    text = os.environ.get(name, default)
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{name} must be a number; it is {text!r}") from None


ALPHA = number("ENTROPY_ALPHA", PAPER_ALPHA["grpo"])
KAPPA = number("ENTROPY_KAPPA", 2.0)
if not ALPHA >= 0:
    raise ValueError(f"ENTROPY_ALPHA must be at least 0; it is {ALPHA}")
if not KAPPA > 1:
    raise ValueError(f"ENTROPY_KAPPA must be greater than 1; it is {KAPPA}")

engine_workers.ppo_loss = with_entropy_advantage(engine_workers.ppo_loss, ALPHA, KAPPA)
print(f"entropy advantage: alpha {ALPHA}, kappa {KAPPA}")
