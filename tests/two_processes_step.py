"""One update of the policy and PPO's advantages, shared out over however many processes torchrun
started; each writes what it got. Run by test_distributed.py, in one process and in two:

python tests/two_processes_step.py FOLDER FACTOR [RANK]

FACTOR of the second half's advantages; RANK of LoRA, none if not given.
"""

import sys

import torch
from safetensors.torch import save_file
from torch import Tensor

from model import Critic, load
from plumbing.batch import pad_responses
from plumbing.distributed import join
from plumbing.lora import adapted_layers, add_adapters
from plumbing.optimizer import make_optimizer
from plumbing.settings import Settings
from rollout import Episode
from train import critic_advantage, update

EPISODES = 12


def make_episodes(g: torch.Generator) -> list[Episode]:
    episodes = []
    lengths = torch.randint(3, 40, (EPISODES,), generator=g).tolist()
    for i, length in enumerate(lengths):
        prompt = torch.randint(2, 112, (8,), generator=g)
        response = torch.randint(2, 112, (length,), generator=g)
        logp = -torch.rand(length, generator=g) - 4
        episodes.append(Episode(prompt, response, logp, torch.zeros(length), True, i))
    return episodes


def whitened_advantage(model, episodes: list[Episode], reward: Tensor, weight: Tensor) -> Tensor:
    """[tokens of these episodes], by a critic with this head."""
    critic = Critic(model)
    with torch.no_grad():
        critic.value.weight.copy_(weight)
    _, counted = pad_responses([episode.logp for episode in episodes])
    advantage, _, _ = critic_advantage(critic, episodes, reward, counted, Settings())
    return advantage[counted]


def main() -> None:
    folder = sys.argv[1]
    factor = float(sys.argv[2])
    lora_rank = int(sys.argv[3]) if len(sys.argv) > 3 else 0
    rank, world = join()
    mine = slice(rank * EPISODES // world, (rank + 1) * EPISODES // world)

    # The same random numbers in every process.
    g = torch.Generator().manual_seed(0)
    episodes = make_episodes(g)
    advantage = torch.randn(EPISODES, 1, generator=g)
    advantage[EPISODES // 2 :] *= factor
    model, _ = load("base")
    critic_weight = torch.randn(1, model.config["hidden_size"], generator=g)
    reward = torch.randn(EPISODES, generator=g)
    old_logp, _ = pad_responses([episode.logp for episode in episodes])  # [12, R]

    whitened = whitened_advantage(model, episodes[mine], reward[mine], critic_weight)
    if lora_rank:
        add_adapters(model, lora_rank, alpha=4, seed=0)
        for layer in adapted_layers(model).values():  # B = 0 would leave A without a gradient
            layer.lora_B.data.normal_(std=0.02, generator=g)
    s = Settings(grad_clip=1e9)
    make_optimizer(model, 0.0, s)  # zeroes the gradients
    sums = update(
        model,
        torch.optim.SGD(model.parameters(), 1.0),
        episodes[mine],
        old_logp[mine],
        advantage.expand_as(old_logp)[mine],
        s,
    )

    results = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    results["whitened"] = whitened
    timeless = sorted(set(sums) - {"score_s"})
    results["sums"] = torch.tensor([float(sums[name]) for name in timeless])
    save_file(results, f"{folder}/{world}-{rank}.safetensors")


main()
