"""Would this trick change my update at all? `python -m lab.effect base runs/grpo` (lab/RESULTS.md has
what came of it).

Samples answers to training problems once, and takes the gradient of the update that GRPO would make
of them: of plain GRPO, and with a change of the advantages (a shaping). Then prints, for each
shaping, with 95 % intervals over problems,

    cosine        with the plain gradient: how far the update is turned
    length        relative to the plain gradient's
    projection    on the plain gradient, relative to its length: <changed, plain> / <plain, plain>
    M predicts    that projection, by the formula of lab/multiplier.py from the tokens' entropies
                  and the groups' rewards alone, without a gradient

over all tokens, by how many of a group are right, by the entropy of the tokens and by the part of
the parameters. A shaping of your own is a line in `shapings`.

Beside them the noise floor, the cosine between the plain gradients of two halves of the problems: a
cosine near 1 says little where other problems would have turned the update further. And how far the
plain gradients of hard and of easy problems agree: where they do not, a weight on difficulty turns
their sum. And three figures of the noise itself:

    expected projection   that of the expected gradients: from products of different problems only,
                          in which noise averages to 0. (The projection above has the noise of
                          both gradients in it. It is the same noise, scaled as M says too, so a
                          projection that M predicts is no proof that there is anything but noise.)
    variance              of the gradient over problems, relative to plain GRPO's
    noise                 the same, relative to the squared length of the expected gradient: what
                          is left when a longer gradient is divided by its length, as AdamW and
                          clipping do

    lab/multiplier.py     the shapings, and M
    lab/gradients.py      the gradient of every problem, and the products that are kept
    lab/effect_report.py  figures, tables and picture

Of the policy gradient of GRPO, in the first update of a rollout. `--again` prints the tables from
saved products, without a model.
"""

import dataclasses
import math
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Sequence

import torch
from torch import Tensor

from advantage import group_advantage
from lab.effect_report import BANDS, draw, sum_of_parts, tables
from lab.gradients import PARTS, Group, all_gradients, pack, products
from lab.multiplier import (
    Shaping,
    difficulty_weight,
    entropy_advantage,
    full_strength,
    multiplicative,
    multiplier,
    plain,
    without_baseline,
)
from lab.saved import read_packed, save_packed
from model import Transformer, load
from plumbing.batch import pad_responses, problems_of_step
from plumbing.metrics import Stopwatch
from plumbing.pretrained import find_folder
from plumbing.seeds import seeded_generator
from plumbing.settings import TEMPLATE_NAMES, check_numbers, flag, parse_flags, pick_device
from rollout import Episode, Sampler, texts
from tasks import load_task


@dataclass
class Settings:
    models: tuple = flag((), "model folders, run folders or hub ids", nargs="*", type=str)
    again: str = flag("", "print the tables of this file again, which --json has written")
    task: str = flag("countdown", "countdown, countdown-easy, countdown-hard or math")
    data: str = flag("", "math: the training data")
    template: str = flag("dapo", "math: how a problem is put", choices=TEMPLATE_NAMES)
    problems: int = flag(96, "training problems, those of train.py's first step", least=2)
    samples: int = flag(16, "answers per problem, the group of GRPO", least=2)
    block: int = flag(1, "problems, of about the same share right, that are taken as one")
    brief: bool = flag(
        False, "not by entropy, nor by parameters: takes a third of the time and of the file"
    )
    alpha: float = flag(0.4, "of the entropy advantage; five times as much is tried too")
    kappa: float = flag(2.0, "of the entropy advantage: psi is at most |A| / kappa")
    temperature: float = flag(1.0, "of sampling and of scoring alike")
    max_new_tokens: int = flag(128, "longest response, in tokens")
    slots: int = flag(512, "sequences decoded at a time")
    seed: int = flag(0, "of the order of the problems and of the samples", least=0)
    device: str = flag("auto", "cpu, cuda, cuda:1 ...; auto takes a GPU if there is one")
    json: str = flag("", "also save what the tables are made of in this file (.json.gz)")
    figure: str = flag("", "also draw M and the measured projections into this file (matplotlib)")


def shapings(alpha: float, kappa: float, samples: int) -> dict[str, Shaping]:
    """What is compared; the first is what the others are compared with. (One that makes something
    of A = 0 would need the groups of equal answers, which are left out.)"""
    usual = entropy_advantage(alpha, kappa)
    return {
        "plain": plain,
        f"alpha {alpha:g}": usual,
        f"alpha {5 * alpha:g}": entropy_advantage(5 * alpha, kappa),
        "full strength": full_strength(kappa),
        f"alpha {alpha:g}, no baseline": without_baseline(usual, samples),
        "difficulty weight": difficulty_weight(kappa),
        f"multiplicative {alpha:g}": multiplicative(alpha, kappa),
    }


def measure(name: str, s: Settings) -> dict:
    """Samples and differentiates; returns what the tables are made of, as JSON."""
    clock = Stopwatch()
    model, tokenizer = load(name, pick_device(s.device))
    groups, right = sample_groups(model, tokenizer, s)
    sampling_seconds = clock.lap()

    # Only groups with both right and wrong answers have a gradient.
    mixed = [i for i, count in enumerate(right) if 0 < count < s.samples]
    mixed.sort(key=lambda i: right[i])
    members = [mixed[first : first + s.block] for first in range(0, len(mixed), s.block)]
    if len(members) < 2:
        raise ValueError(
            f"{name}: only {len(mixed)} of {s.problems} problems had right and wrong answers; "
            "try more --problems or --samples, or another task"
        )
    blocks = [[groups[i] for i in block] for block in members]

    compared = shapings(s.alpha, s.kappa, s.samples)
    kept = {}
    sums = {}
    total = dict.fromkeys(PARTS, 0.0)
    bands = {"all": (-math.inf, math.inf)} if s.brief else BANDS
    for label, band in bands.items():
        found = all_gradients(model, blocks, compared, band, s.temperature, f"{name}, {label}")
        of_parts = [products(vectors) for vectors in found.values()]
        kept[label] = sum_of_parts(of_parts)
        sums[label] = predictions(blocks, compared, band)
        for part, vectors in found.items():
            total[part] = total[part] + vectors
    if not s.brief:
        kept |= {part: products(vectors) for part, vectors in total.items()}
    packed = {}
    for label, both in kept.items():
        packed[label] = {kind: pack(matrices) for kind, matrices in both.items()}
    return {
        "settings": dataclasses.asdict(s),
        "seconds": [round(sampling_seconds), round(clock.lap())],
        "shapings": list(compared),
        "right": right,  # of every problem
        "blocks": members,  # the problems of each
        "sums": sums,
        "products": packed,
    }


def sample_groups(model: Transformer, tokenizer, s: Settings) -> tuple[list[Group], list[int]]:
    """A rollout on training problems -> its groups, and how many answers of each are right."""
    episodes, rewards = sample_and_reward(model, tokenizer, s, s.problems, s.temperature)
    groups = []
    right = []
    for first in range(0, len(episodes), s.samples):
        answers = episodes[first : first + s.samples]
        reward = rewards[first : first + s.samples]
        one_group = torch.zeros(s.samples, dtype=torch.int64)
        of_answer = group_advantage(reward, one_group)
        _, counted = pad_responses([episode.logp for episode in answers])  # [answers, R]
        advantage = of_answer[:, None] * counted
        is_right = reward > 0
        share = is_right.float().mean().to(model.head.device)
        groups.append(Group(answers, advantage, share))
        right.append(int(is_right.sum()))
    return groups, right


def sample_and_reward(
    model: Transformer, tokenizer, s, problems: int, temperature: float
) -> tuple[list[Episode], Tensor]:
    """s.samples answers to each of so many training problems, those to one problem neighbours, and
    their rewards [N]. `s`: settings of lab.effect or lab.effect_methods."""
    task = load_task(s.task, s.data, "", s.template)
    chosen = problems_of_step(task.train, problems, 0, s.seed)
    prompts = [task.encode(problem, tokenizer) for problem in chosen]
    longest = max(len(prompt) for prompt in prompts)
    sampler = Sampler(model, s.slots, longest + s.max_new_tokens, model.eos_ids)
    random = seeded_generator(s.seed, 0, "effect", model.head.device)
    episodes = sampler.generate(
        prompts, s.samples, s.max_new_tokens, temperature, random, progress="samples"
    )
    sampler.free()
    rewards = task.rewards(
        [chosen[episode.prompt_index] for episode in episodes],
        texts(tokenizer, episodes),
        [episode.finished for episode in episodes],
    )
    return episodes, torch.tensor(rewards)


def predictions(
    blocks: Sequence[Sequence[Group]], compared: dict[str, Shaping], band: tuple[float, float]
) -> dict:
    """What M predicts needs sums over the tokens of a band, a number a block: of the tokens'
    weights, and of their weights times H, and times M with every shaping.

    A token's weight is (A (1 - pi))^2: A (1 - pi) is the gradient at the logit of the token that was
    chosen with probability pi, so a token without a choice has none. The squared length of the
    gradient would be the sum of these if tokens pulled in directions of their own."""
    rows = []
    for block in blocks:
        of_groups = [prediction_sums(group, compared, band) for group in block]
        rows.append(torch.stack(of_groups).sum(dim=0).tolist())
    tokens, weights, entropies, *predicted = [list(column) for column in zip(*rows)]
    return {"tokens": tokens, "weight": weights, "weight H": entropies, "weight M": predicted}


def prediction_sums(
    group: Group, compared: dict[str, Shaping], band: tuple[float, float]
) -> torch.Tensor:
    """Tokens, weight, weight H, and weight M of every shaping."""
    low, high = band
    logp, counted = pad_responses([episode.logp for episode in group.episodes])
    entropy, _ = pad_responses([episode.entropy for episode in group.episodes])
    inside = counted & (entropy >= low) & (entropy < high)
    weight = (group.advantage * (1 - logp.exp()))[inside] ** 2
    entropy = entropy[inside]
    sums = [inside.sum(), weight.sum(), (weight * entropy).sum()]
    for shaping in compared.values():
        factor = multiplier(shaping, group.share.cpu(), entropy, len(group.episodes))
        sums.append((weight * factor).sum())
    return torch.stack([number.double() for number in sums])


def read(file: str) -> dict[str, dict]:
    """What --json has written: model -> record."""
    return read_packed(file)


def check_models_and_files(s) -> None:
    """What both commands, lab.effect and lab.effect_methods, check before they sample. ValueError or
    FileNotFoundError."""
    check_numbers(s)
    if bool(s.models) == bool(s.again):
        raise ValueError("either models to measure or --again FILE is needed")
    if not Path(s.json).absolute().parent.is_dir():
        raise FileNotFoundError(f"{s.json} names a folder that does not exist")
    for name in s.models:
        find_folder(name)


def effect(s: Settings) -> None:
    """Runs the command."""
    if s.kappa <= 1:
        raise ValueError(
            f"--kappa must be greater than 1, or shaping could flip a sign; it is {s.kappa}"
        )
    if not Path(s.figure).absolute().parent.is_dir():
        raise FileNotFoundError(f"{s.figure} names a folder that does not exist")
    if s.figure and find_spec("matplotlib") is None:
        raise ValueError("the picture needs matplotlib: pip install matplotlib")
    check_models_and_files(s)

    if s.again:
        records = read(s.again)
    else:
        records = {Path(name).name: measure(name, s) for name in dict.fromkeys(s.models)}
    print(tables(records))
    if s.json:
        save_packed(records, s.json, separators=(",", ":"))
    if s.figure:
        draw(records, Path(s.figure))


if __name__ == "__main__":
    try:
        effect(parse_flags(Settings, __doc__))
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"lab.effect: {error}")
    except KeyboardInterrupt:
        sys.exit("lab.effect: stopped; nothing was written")
