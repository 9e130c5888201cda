"""The gradient of every problem of a rollout, and the inner products that are kept of it.

The gradient of a batch is the sum of those of its problems. So the length of any sum of problems'
gradients, its angle to another, and the same for every resample or half of the batch, follow from
the products between problems: a matrix [n, n] for n problems in place of n gradients. Of a change
of the advantages (a shaping, see lab/multiplier.py), two are kept: its products with the plain
gradients, and with itself.

The gradients themselves exist only while they are multiplied: shapings x problems x parameters
numbers, 0.8 GB for the embedded model, 7 shapings and 64 problems. For more problems, those of a
block may be added up first, and a block stands for a problem in all that follows. Of a larger model each part of
the parameters is folded to at most ROOM numbers, with random signs, which keeps inner products in
expectation and to about |a| |b| / sqrt(ROOM); smaller parts are exact.
"""

import functools
from dataclasses import dataclass
from typing import Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from advantage import policy_loss
from lab.multiplier import Shaping
from model import Transformer, score
from plumbing.batch import collate, micro_batches
from rollout import Episode

ROOM = 300_007  # more than any part of the embedded model has; odd, so that columns are mixed
MICRO_TOKENS = 1024  # of one problem, in one forward pass
PARTS = ("embedding", "attention", "MLP", "norms")
LEVELS = 30_000  # steps from 0 to the largest number of a saved matrix


@dataclass
class Group:
    """A problem's answers, and what GRPO makes of them."""

    episodes: list[Episode]
    advantage: Tensor  # [answers, R], 0 beyond an answer's end
    share: Tensor  # of the answers that are right, a number


def part_of(parameter_name: str) -> str:
    if "embed_tokens" in parameter_name or "lm_head" in parameter_name:
        return "embedding"
    if "self_attn" in parameter_name:
        return "attention"
    if "mlp" in parameter_name:
        return "MLP"
    return "norms"


def fold(vector: Tensor) -> Tensor:
    """A vector of at most ROOM numbers with, nearly, the same inner products: pieces of that length
    are added up, each number with a random sign, the same in every call."""
    if len(vector) <= ROOM:
        return vector
    folded = torch.zeros(ROOM, device=vector.device)
    for piece, sign in zip(vector.split(ROOM), signs(len(vector), vector.device)):
        folded[: len(piece)] += piece * sign
    return folded


@functools.cache
def signs(length: int, device: torch.device) -> list[Tensor]:
    """Random +1 and -1 for the pieces of a vector. Kept, because drawing them takes as long as a
    backward pass of the model: a byte for each number that is folded."""
    random = torch.Generator(device).manual_seed(0)
    found = []
    for first in range(0, length, ROOM):
        size = min(ROOM, length - first)
        coin = torch.randint(0, 2, (size,), generator=random, device=device)
        found.append((2 * coin - 1).to(torch.int8))
    return found


def group_gradients(
    model: Transformer,
    group: Group,
    shapings: dict[str, Shaping],
    band: tuple[float, float],
    temperature: float,
) -> dict[str, Tensor]:
    """The gradient of train.update's loss in the first update of a rollout, summed over the group's
    response tokens whose entropy is in the band -> part -> [shapings, numbers]. Divided by the
    tokens of the batch, the sum over its groups is the gradient of the update."""
    named = list(model.named_parameters())
    parameters = [parameter for _, parameter in named]
    zeros = by_part(named, [torch.zeros_like(parameter) for parameter in parameters])
    total = {part: torch.stack([zero] * len(shapings)) for part, zero in zeros.items()}
    for rows in micro_batches(group.episodes, MICRO_TOKENS):
        batch = collate([group.episodes[i] for i in rows], model.head.device)
        plain = batch.align(group.advantage[rows])  # [B, T-1], as all below
        logp, entropy = score(model, batch.tokens, batch.prompt_len, batch.total_len, temperature)
        low, high = band
        inside = batch.mask & (entropy >= low) & (entropy < high)
        if not inside.any():
            continue

        for i, shaping in enumerate(shapings.values()):
            shaped = shaping(plain, entropy, group.share)
            # The policy is its own old one: the ratio is 1, and no clip binds.
            loss, _ = policy_loss(logp, logp.detach(), shaped, inside, 0.2, 0.28, denominator=1.0)
            found = torch.autograd.grad(loss, parameters, retain_graph=True)
            for part, vector in by_part(named, found).items():
                total[part][i] += vector
    return total


def all_gradients(
    model: Transformer,
    blocks: Sequence[Sequence[Group]],
    shapings: dict[str, Shaping],
    band: tuple[float, float],
    temperature: float,
    progress: str | None = None,
) -> dict[str, Tensor]:
    """The sum over the groups of every block -> part -> [shapings, blocks, numbers]."""
    rows: dict[str, list[Tensor]] = {part: [] for part in PARTS}
    for block in tqdm(blocks, desc=progress, unit="block", leave=False, disable=None):
        of_groups = [group_gradients(model, group, shapings, band, temperature) for group in block]
        for part in PARTS:
            rows[part].append(sum(gradients[part] for gradients in of_groups))
    return {part: torch.stack(found, dim=1) for part, found in rows.items()}


def by_part(named: Sequence[tuple[str, Tensor]], gradients: Sequence[Tensor]) -> dict[str, Tensor]:
    """Part -> its parameters' gradients, end to end, folded."""
    found: dict[str, list[Tensor]] = {part: [] for part in PARTS}
    for (name, _), gradient in zip(named, gradients):
        found[part_of(name)].append(gradient.flatten().float())
    return {part: fold(torch.cat(pieces)) for part, pieces in found.items()}


def products(vectors: Tensor) -> dict[str, np.ndarray]:
    """[shapings, blocks, numbers] -> of every shaping the products between blocks, [blocks, blocks]
    each: with the first shaping (symmetric, as only sums over both are asked for), and with
    itself."""
    first = vectors[0]
    found = {"plain": [], "itself": []}
    for shaped in vectors:
        with_first = (shaped @ first.T).double().cpu().numpy()
        found["plain"].append((with_first + with_first.T) / 2)
        found["itself"].append((shaped @ shaped.T).double().cpu().numpy())
    return {name: np.stack(matrices) for name, matrices in found.items()}


def pack(matrices: np.ndarray) -> list[dict]:
    """Symmetric matrices [shapings, n, n] as the whole numbers of their upper triangles, in steps
    of the largest number / LEVELS."""
    packed = []
    for matrix in matrices:
        step = float(np.abs(matrix).max()) / LEVELS or 1.0
        upper = matrix[np.triu_indices(len(matrix))]
        packed.append({"step": step, "triangle": np.rint(upper / step).astype(int).tolist()})
    return packed


def unpack(packed: Sequence[dict], size: int) -> np.ndarray:
    """-> [shapings, size, size]"""
    matrices = np.zeros((len(packed), size, size))
    rows, columns = np.triu_indices(size)
    for matrix, one in zip(matrices, packed):
        values = np.array(one["triangle"]) * one["step"]
        matrix[rows, columns] = values
        matrix[columns, rows] = values
    return matrices
