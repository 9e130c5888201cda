"""How often an update waits for a GPU, counted by the pretended device, which notes every operation
for which CUDA would be waited for."""

from pretended import ROOT, pretended_python

# Two micro-batches of the embedded model, after one update in which nothing is counted.
COUNTED = """
import torch
import train
from plumbing.batch import micro_batches, pad_responses
from plumbing.optimizer import make_optimizer
from plumbing.settings import Settings
from model import Critic, load
from rollout import Episode

episodes = []
for length in (5, 9, 30, 31):
    numbers = torch.linspace(-2.0, -1.0, length)
    tokens = torch.arange(length) % 112
    episodes.append(Episode(torch.arange(1, 8), tokens, numbers, -numbers, True, 0))
old_logp, mask = pad_responses([episode.logp for episode in episodes])
advantage = torch.tensor([1.0, -1.0, 0.5, -0.5])[:, None] * mask

reward = torch.tensor([1.0, -1.0, 1.0, -1.0])

def waits(function, *arguments):
    function(*arguments)
    with pretend.Record(ROOT) as record:
        function(*arguments)
    return sum(record.waits.values())

for changes in KINDS:
    s = Settings(micro_tokens=80, device="cuda", algo="ppo", **changes)
    assert len(micro_batches(episodes, s.micro_tokens)) == 2
    model = load("base", "cuda", getattr(torch, s.weights))[0]
    model.recompute = s.recompute
    policy = (model, make_optimizer(model, s.lr, s))
    value_model = Critic(model)
    critic = (value_model, make_optimizer(value_model, s.critic_lr, s))
    print(
        waits(train.update, *policy, episodes, old_logp, advantage, s),
        waits(train.update_critic, *critic, episodes, old_logp, advantage, s),
        waits(train.critic_advantage, value_model, episodes, reward, mask, s),
    )
"""

FLOAT32 = dict()
AUTOCAST = dict(dtype="bfloat16", recompute=True)
BFLOAT16 = dict(dtype="bfloat16", weights="bfloat16")


def test_an_update_waits_once_and_once_more_for_every_micro_batch():
    """The policy's: once to read all sums for the log, and in each of two micro-batches to hear how
    many response tokens it has. The critic's: once for the log. Its predictions: two results."""
    kinds = [FLOAT32, AUTOCAST, BFLOAT16]
    printed = pretended_python(f"KINDS = {kinds!r}; ROOT = {str(ROOT)!r}" + COUNTED)
    assert printed.splitlines() == ["3 1 2"] * 3
