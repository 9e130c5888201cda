"""Runs and single updates, each with replicas and with --shard, in the two processes that torchrun has
started. Run by test_shard.py, which compares:

python -m torch.distributed.run --standalone --nproc-per-node 2 tests/two_processes_shard.py FOLDER
"""

import dataclasses
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from model import Transformer, load, load_weights, make_critic, score
from plumbing.batch import collate, pad_responses
from plumbing.distributed import is_slice, join, own_slice, whole
from plumbing.optimizer import make_optimizer
from plumbing.pretrained import open_pretrained, save
from plumbing.settings import Settings
from rollout import Episode
from training_runs import SMALL
from train import train, update

OWN_TASK = f"{Path(__file__).parent / 'by_length.py'}:ByLength"
GRPO = dict(max_new_tokens=24, eval_problems=3, eval_samples=1, final_samples=1)
# grad_clip: a norm that is added up in another order has another last bit, and with it all that is
# divided by it.
PPO = dict(algo="ppo", critic_warmup=1, recompute=True, grad_clip=100.0, steps=3)
BFLOAT16 = dict(dtype="bfloat16", weights="bfloat16")
# A name, which test_shard.py uses too, and what changes.
RUNS = {
    "grpo": {},
    "ppo": PPO,
    "bfloat16": BFLOAT16,
    "ppo-bfloat16": PPO | BFLOAT16,
    "autocast": dict(dtype="bfloat16"),
    "untied, odd sizes": dict(model="untied"),
}
# The last process has fewer rows of such tables.
UNTIED = dict(
    model_type="qwen3",
    vocab_size=113,
    hidden_size=32,
    intermediate_size=49,
    num_hidden_layers=2,
    num_attention_heads=3,
    num_key_value_heads=1,
    head_dim=10,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
)
EPISODES = 10
LENGTH = 30  # tokens of a sequence


def settings_of(folder: Path, name: str, **changes) -> Settings:
    if "model" in changes:
        changes["model"] = str(folder / changes["model"])
    flags = SMALL | GRPO | dict(task=OWN_TASK, out=str(folder), name=name) | changes
    return Settings(**flags)


def make_untied(folder: Path) -> None:
    torch.manual_seed(0)
    model = Transformer(UNTIED)
    model.eos_ids = (0,)
    save(model, open_pretrained("base").tokenizer, folder / "untied")


def make_runs(folder: Path) -> None:
    """FOLDER/grpo-replicas, FOLDER/grpo-sharded, ...; and FOLDER/resumed-sharded, which is
    ppo-sharded in two parts."""
    for name, changes in RUNS.items():
        train(settings_of(folder, f"{name}-replicas", **changes))
        train(settings_of(folder, f"{name}-sharded", **changes, shard=True))
    train(settings_of(folder, "resumed-sharded", **PPO | dict(steps=2), shard=True))
    train(Settings(resume=str(folder / "resumed-sharded"), steps=3))


def make_episodes(g: torch.Generator) -> list[Episode]:
    """So many tokens each that two sequences fill a micro-batch; as if the embedded model had sampled
    them, but for a little."""
    episodes = []
    for i in range(EPISODES):
        prompt = torch.randint(2, 112, (8,), generator=g)
        response = torch.randint(2, 112, (LENGTH - 8,), generator=g)
        nothing = torch.zeros(LENGTH - 8)
        episodes.append(Episode(prompt, response, nothing, nothing, True, i))

    model, _ = load("base")
    batch = collate(episodes, torch.device("cpu"))
    with torch.no_grad():
        logp, _ = score(model, batch.tokens, batch.prompt_len, batch.total_len, temperature=1.0)
    by_model = batch.unalign(logp, LENGTH - 8)  # [10, 22]
    sampled = by_model + 0.1 * torch.randn(by_model.shape, generator=g)
    return [dataclasses.replace(episode, logp=row) for episode, row in zip(episodes, sampled)]


def weights_after(
    model: Transformer, mine: slice, advantage: Tensor, method: str
) -> dict[str, Tensor]:
    """Of one update by SGD on these of the episodes."""
    episodes = make_episodes(torch.Generator().manual_seed(0))
    old_logp, _ = pad_responses([episode.logp for episode in episodes])
    # A method is told of groups: here each process has one.
    s = Settings(micro_tokens=2 * LENGTH, grad_clip=1e9, method=method, samples=EPISODES // 2)
    make_optimizer(model, 0.0, s)  # zeroes the gradients
    update(
        model,
        torch.optim.SGD(model.parameters(), 1.0),
        episodes[mine],
        old_logp[mine],
        advantage[:, None].expand_as(old_logp)[mine],
        s,
    )
    return {name: whole(weight.detach()) for name, weight in model.named_parameters()}


def make_updates(folder: Path, rank: int) -> None:
    """FOLDER/KIND-HOW.safetensors, with the weights that there are afterwards."""
    advantage = torch.randn(EPISODES, generator=torch.Generator().manual_seed(1))
    half = EPISODES // 2
    first_half_only = advantage.clone()
    first_half_only[half:] = 0
    # Of 10 sequences the first process has so many, and the second the others: 6 and 4 are 3 and 2
    # micro-batches. And a loss that divides by the tokens of an answer.
    kinds = {
        "uneven": (6, advantage, ""),
        "second has none": (half, first_half_only, ""),
        "second has none, gspo": (half, first_half_only, "gspo"),
        "none": (half, torch.zeros(EPISODES), ""),
    }
    pretrained = open_pretrained("base")
    for kind, (cut, values, method) in kinds.items():
        mine = slice(0, cut) if rank == 0 else slice(cut, EPISODES)
        for how in ("replicas", "sharded"):
            model = load_weights(pretrained, "cpu", torch.float32, sharded=how == "sharded")
            after = weights_after(model, mine, values, method)
            if rank == 0:
                save_file(after, folder / f"{kind}-{how}.safetensors")


def find_whole_weights(folder: Path, rank: int) -> None:
    """FOLDER/whole-RANK.json: names of weights that are not slices, or are not half of their tensor
    (where it can be halved), after loading and after a critic's pass without gradients."""
    pretrained = open_pretrained("base")
    policy = load_weights(pretrained, "cpu", torch.float32, sharded=True)
    critic = make_critic(policy)
    with torch.no_grad():
        critic(torch.zeros(1, 3, dtype=torch.int64))
    found = []
    for name, weight in [*policy.named_parameters(), *critic.named_parameters()]:
        can_be_halved = len(weight) % 2 == 0
        if not is_slice(weight):
            found.append(name)
        elif can_be_halved and own_slice(weight).untyped_storage().nbytes() != weight.nbytes // 2:
            found.append(name)
    (folder / f"whole-{rank}.json").write_text(json.dumps(found))


def main() -> None:
    folder = Path(sys.argv[1])
    rank, _ = join()
    if rank == 0:
        make_untied(folder)
    make_updates(folder, rank)  # in which the second one waits for the folder
    find_whole_weights(folder, rank)
    make_runs(folder)


if __name__ == "__main__":
    main()
