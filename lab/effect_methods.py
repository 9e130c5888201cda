"""How far does each published relative of the entropy advantage turn the update of plain GRPO?
`python -m lab.effect_methods base runs/grpo-alpha=0.0` (lab/METHODS.md has what came of it).

lab.effect asks that of changes of the advantages. A method may change more: the loss, what it is
divided by, or the advantages by quantiles and covariances of a whole step. So here the answers to all
problems are one optimizer step, and every method goes through what train.update goes through: its
advantages, `by_method`, its shape, its loss. That loss's gradient with respect to log pi of every
token, a number a token, is all that tells methods apart. The rest of the way to the parameters is the
same for all, and is taken for the tokens of a problem and of a band of entropies at a time.

At two places of a rollout:

    first    the first of its updates: the policy is the sampler's, so every ratio is 1 but for rounding
    last     after `--moves` optimizer steps of plain GRPO on the answers to other problems. The
             answers are the same, ratios are not 1, and clips bind

Of each method, beside plain GRPO (`--method grpo`), with 95 % intervals over problems,

    cosine     between the two gradients: how far the update is turned
    expected   the cosine between the expected gradients, estimated from products of different problems
               only, in which noise averages to 0 (so it may exceed 1; none where noise hides it)
    length     of its gradient, relative (AdamW divides it out, unless it changes from step to step)
    cut        tokens without a gradient, of those that have one in the first update of plain GRPO

over all tokens; the fifth of them that has the highest entropy (the sampler's), and the others; hard
problems, of whose answers less than a quarter is right, and all others. And the noise floor, the
cosine between the gradients of plain GRPO in two halves of the problems.

Clips are GSPO's and CISPO's own, as in lab/relatives.py. The adaptive entropy coefficient is that of
its first action, 0.005: it follows a log, and has none here. `--again` prints the tables from saved
products, without a model.
"""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from advantage import group_advantage, policy_loss, shape_with_entropy
from lab.effect import check_models_and_files, sample_and_reward
from lab.effect_methods_report import summary, tables
from lab.effect_report import FEWEST
from lab.gradients import by_part, pack, products
from lab.methods import METHODS, PAPER_CLIPS
from lab.saved import read_packed, save_packed
from lab.shared_prompt import score_group
from model import Transformer, load
from plumbing.batch import micro_batches, pad_responses
from plumbing.method import Update, advantage_of, by_log, by_method
from plumbing.metrics import Stopwatch
from plumbing.optimizer import make_optimizer
from plumbing.settings import TEMPLATE_NAMES, flag, parse_flags, pick_device
from plumbing.settings import Settings as TrainSettings
from rollout import Episode
from train import update

MICRO_TOKENS = 4096  # of a forward pass, the prompt counted once for each of its answers
BANDS = ("top fifth of H", "other tokens")
TOP = 0.2  # of the tokens, as in 80/20
# What train.py is told beside --method, or instead of it.
FLAGS = PAPER_CLIPS | {
    "entropy advantage": dict(method="", alpha=0.4),
    "full strength": dict(method="", alpha=10.0),
}


@dataclass
class Settings:
    models: tuple = flag((), "model folders, run folders or hub ids", nargs="*", type=str)
    again: str = flag("", "print the tables of this file again, which --json has written")
    task: str = flag("countdown", "countdown, countdown-easy, countdown-hard or math")
    data: str = flag("", "math: the training data")
    template: str = flag("dapo", "math: how a problem is put", choices=TEMPLATE_NAMES)
    problems: int = flag(96, "training problems, those of train.py's first step", least=4)
    samples: int = flag(16, "answers per problem, the group of GRPO", least=2)
    block: int = flag(2, "problems, of about the same share right, that are taken as one")
    moves: int = flag(
        7,
        "optimizer steps between the two places, of train.py's 8 per rollout; 0: only the first",
        least=0,
    )
    lr: float = flag(2e-4, "AdamW's learning rate in these")
    max_new_tokens: int = flag(128, "longest response, in tokens")
    slots: int = flag(512, "sequences decoded at a time")
    seed: int = flag(0, "of the order of the problems and of the samples", least=0)
    device: str = flag("auto", "cpu, cuda, cuda:1 ...; auto takes a GPU if there is one")
    json: str = flag("", "also save what the tables are made of in this file (.json.gz)")


class Rollout(NamedTuple):
    """Answers to problems; those to one problem are neighbours."""

    episodes: list[Episode]
    reward: Tensor  # [N]
    group: Tensor  # [N], the problem of each
    old_logp: Tensor  # [N, R], as all below; the sampler's
    entropy: Tensor
    mask: Tensor


def compared(s: Settings) -> dict[str, TrainSettings]:
    """Row -> settings of train.py; the first is what the others are compared with."""
    usual = TrainSettings(
        lr=s.lr, samples=s.samples, max_new_tokens=s.max_new_tokens, device=s.device
    )
    rows = {}
    for name in dict.fromkeys((*METHODS, *FLAGS)):
        changes = dict(method=name) | FLAGS.get(name, {})
        # A log of one step without any entropy, so that an adaptive coefficient has acted.
        rows[name] = by_log(dataclasses.replace(usual, **changes), [{"entropy": 0.0}])
    return rows


def sample_rollouts(model: Transformer, tokenizer, s: Settings) -> tuple[Rollout, Rollout | None]:
    """What is measured, and the answers to other problems that move the policy, if it is moved."""
    number = s.problems + s.moves * TrainSettings().minibatch
    temperature = TrainSettings().temperature
    episodes, rewards = sample_and_reward(model, tokenizer, s, number, temperature)
    measured = s.problems * s.samples
    first = rollout_of(episodes[:measured], rewards[:measured])
    others = rollout_of(episodes[measured:], rewards[measured:]) if s.moves else None
    return first, others


def rollout_of(episodes: list[Episode], reward: Tensor) -> Rollout:
    old_logp, mask = pad_responses([episode.logp for episode in episodes])
    entropy, _ = pad_responses([episode.entropy for episode in episodes])
    group = torch.tensor([episode.prompt_index for episode in episodes])
    return Rollout(episodes, reward, group, old_logp, entropy, mask)


def update_of(rollout: Rollout, s: TrainSettings) -> Update:
    """What train.update works with if all the answers are one optimizer step."""
    per_answer = advantage_of(s.method, group_advantage)(rollout.reward, rollout.group)  # [N]
    advantage = per_answer[:, None] * rollout.mask
    tokens = int(rollout.mask.sum())
    paper = Update(advantage, tokens, shape_with_entropy, policy_loss, s)
    return by_method(paper, rollout.episodes, rollout.old_logp)


def move(model: Transformer, rollout: Rollout, s: TrainSettings) -> None:
    """Optimizer steps of plain GRPO, as the first of a run."""
    optimizer = make_optimizer(model, s.lr, s)
    advantage = update_of(rollout, s).advantage
    size = s.minibatch * s.samples
    for first in range(0, len(rollout.episodes), size):
        part = slice(first, first + size)
        old_logp = rollout.old_logp[part]
        update(model, optimizer, rollout.episodes[part], old_logp, advantage[part], s)


def weights_of_tokens(
    this: Update,
    mask: Tensor,
    logp: Tensor,
    entropy: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
) -> Tensor:
    """The gradient of a method's loss with respect to log pi of every token. All [B, R]."""
    s = this.s
    logp = logp.detach().requires_grad_()
    shaped = this.shape(advantage, entropy.detach(), s.alpha, s.kappa)
    loss, _ = this.loss(logp, old_logp, shaped, mask, s.clip_low, s.clip_high, this.denominator)
    [weight] = torch.autograd.grad(loss, logp)
    return weight


def add_gradients(
    gradients_of: Tensor,
    model: Transformer,
    rollout: Rollout,
    answers: Sequence[int],
    updates: dict[str, Update],
) -> Tensor:
    """Adds the part that these answers to one problem have in the gradient of every method to
    `gradients_of`, [bands, methods, numbers]. Returns how many tokens each method cuts, [methods]."""
    named = list(model.named_parameters())
    parameters = [parameter for _, parameter in named]
    tokens = rollout.mask.sum()
    least = rollout.entropy[rollout.mask].quantile(1 - TOP)
    plain = updates["grpo"]
    cut = torch.zeros(len(updates))
    for rows in micro_batches(rollout.episodes, MICRO_TOKENS, among=answers):
        episodes = [rollout.episodes[i] for i in rows]
        logp, entropy = score_group(model, episodes, plain.s.temperature)  # [B, R], as all below
        mask = rows_like(logp, rollout.mask, rows)
        old_logp = rows_like(logp, rollout.old_logp, rows)
        taught = rows_like(logp, plain.advantage, rows) != 0
        top = mask & (rows_like(logp, rollout.entropy, rows) >= least)

        # A method is a row of weights, on log pi and on H of every token.
        of_logp = []
        of_entropy = []
        for this in updates.values():
            advantage = rows_like(logp, this.advantage, rows)
            of_logp.append(weights_of_tokens(this, mask, logp, entropy, old_logp, advantage))
            of_entropy.append(-this.s.entropy_coef / tokens * mask)
        weights = torch.stack((torch.stack(of_logp), torch.stack(of_entropy)), dim=1)
        values = torch.stack((logp, entropy))  # [2, B, R]
        cut += (taught & (weights[:, 0] == 0)).sum(dim=(1, 2)).cpu()

        for band, inside in enumerate((top, mask & ~top)):
            mixed, basis = low_rank(weights[:, :, inside].flatten(1))
            gradients = []
            for row in basis:
                linear = row @ values[:, inside].flatten()
                found = torch.autograd.grad(linear, parameters, retain_graph=True)
                gradients.append(flat(named, found))
            if gradients:
                gradients_of[band] += mixed @ torch.stack(gradients)
    return cut


def rows_like(logp: Tensor, of_all: Tensor, rows: Sequence[int]) -> Tensor:
    """These rows of a tensor [N, longest R], cut to the width of logp [B, R] and moved to its
    device."""
    return of_all[rows, : logp.shape[1]].to(logp.device)


def low_rank(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [m, n] as mixed [m, r] @ basis [r, n], to about 1e-6 of each row: a backward pass for each
    of r rows, not of m. Gradients are linear in the weights of tokens, and most methods differ by a
    number for right and one for wrong answers, so r is small."""
    size = rows.double().norm(dim=1, keepdim=True)
    left, strength, right = torch.linalg.svd(rows / size.clamp(min=1e-300), full_matrices=False)
    needed = strength > 1e-6
    mixed = size * left[:, needed]
    basis = strength[needed, None] * right[needed]
    return mixed.float(), basis.float()


def flat(named: Sequence[tuple[str, Tensor]], gradients: Sequence[Tensor]) -> Tensor:
    """All parameters' gradients, end to end, the larger parts folded."""
    return torch.cat(list(by_part(named, gradients).values()))


def measure(name: str, s: Settings) -> dict:
    """Samples and differentiates; returns what the tables are made of, as JSON."""
    clock = Stopwatch()
    model, tokenizer = load(name, pick_device(s.device))
    rollout, others = sample_rollouts(model, tokenizer, s)
    rows = compared(s)
    right = (rollout.reward > 0).view(s.problems, s.samples).sum(dim=1).tolist()
    mixed = sum(0 < count < s.samples for count in right)
    if mixed < FEWEST * s.block:
        raise ValueError(
            f"{name}: only {mixed} of {s.problems} problems had right and wrong answers; "
            "try more --problems or --samples, or another task"
        )
    record = {
        "settings": dataclasses.asdict(s),
        "methods": list(rows),
        "right": right,
        "tokens": int(rollout.mask.sum()),
        "places": {},
    }
    # Blocks of problems of about the same share right.
    order = sorted(range(s.problems), key=right.__getitem__)
    record["blocks"] = [order[i : i + s.block] for i in range(0, len(order), s.block)]

    record["places"]["first"] = measure_place(
        model, rollout, record["blocks"], rows, f"{name}, first"
    )
    if others:
        move(model, others, rows["grpo"])
        record["places"]["last"] = measure_place(
            model, rollout, record["blocks"], rows, f"{name}, last"
        )
    record["seconds"] = round(clock.lap())
    return record


def measure_place(
    model: Transformer,
    rollout: Rollout,
    blocks: Sequence[Sequence[int]],
    rows: dict[str, TrainSettings],
    progress: str,
) -> dict:
    """With the policy where it is: the share of the tokens that each method cuts, and the products of
    blocks."""
    updates = {label: update_of(rollout, s) for label, s in rows.items()}
    plain = updates["grpo"]
    named = list(model.named_parameters())
    numbers = len(flat(named, [parameter.detach() for _, parameter in named]))
    vectors = torch.zeros(len(BANDS), len(updates), len(blocks), numbers, device=model.head.device)
    cut = torch.zeros(len(updates))
    for i, block in enumerate(tqdm(blocks, desc=progress, unit="block", leave=False, disable=None)):
        for problem in block:
            answers = (rollout.group == problem).nonzero().flatten().tolist()
            cut += add_gradients(vectors[:, :, i], model, rollout, answers, updates)

    kept = {"all tokens": vectors.sum(dim=0)} | dict(zip(BANDS, vectors))
    packed = {}
    for label, of_label in kept.items():
        both = products(of_label)
        packed[label] = {kind: pack(matrices) for kind, matrices in both.items()}
    taught = (plain.advantage != 0).sum()
    return {"cut": (cut / taught).tolist(), "products": packed}


def effect(s: Settings) -> None:
    """Runs the command."""
    check_models_and_files(s)
    if s.again:
        records = read_packed(s.again)
    else:
        records = {Path(name).name: measure(name, s) for name in dict.fromkeys(s.models)}
    print(summary(records), tables(records), sep="\n\n")
    if s.json:
        save_packed(records, s.json, separators=(",", ":"))


if __name__ == "__main__":
    try:
        effect(parse_flags(Settings, __doc__))
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"lab.effect_methods: {error}")
    except KeyboardInterrupt:
        sys.exit("lab.effect_methods: stopped; nothing was written")
