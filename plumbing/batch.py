"""From problems and episodes to padded tensors: data order, micro-batches, masks from lengths.

A number per response token has two layouts, and `Batch` turns one into the other:

    [N, R]      a row per answer, a column per *response* token: what rewards and advantages are
                about. R is the longest response; prompts take no room.
    [B, T-1]    a row per sequence of a micro-batch, a column per token of prompt and response but
                the first: what a forward pass over [B, T] tokens gives. Column t speaks of token
                t+1, which is chosen after reading tokens 0..t.

Every mask is made from lengths, never from token ids: a sampled end token is part of the response
whatever its id is, and padding may have any id.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from plumbing.seeds import seeded_generator

if TYPE_CHECKING:  # rollout imports this file, through model
    from rollout import Episode


def problems_of_step(problems: Sequence, count: int, step: int, seed: int) -> list:
    """The `count` problems of a step (from 0): a new shuffle every epoch, from (seed, epoch) alone,
    so that a resumed run goes on where the first stopped."""
    chosen = []
    for i in range(step * count, (step + 1) * count):
        epoch, place = divmod(i, len(problems))
        first_of_step_or_epoch = not chosen or place == 0
        if first_of_step_or_epoch:
            order = torch.randperm(len(problems), generator=seeded_generator(seed, epoch, "data"))
        chosen.append(problems[order[place]])
    return chosen


def my_share(problems: Sequence, minibatch: int, rank: int, world: int) -> list:
    """This process's problems: of every minibatch the same number, so that all of them take part in
    every optimizer step."""
    each = minibatch // world
    mine = []
    for i, problem in enumerate(problems):
        place_in_minibatch = i % minibatch
        if place_in_minibatch // each == rank:
            mine.append(problem)
    return mine


def micro_batches(
    episodes: Sequence["Episode"], budget: int, among: Sequence[int] | None = None
) -> list[list[int]]:
    """Indices of episodes (of those `among` these, if given) sorted by length, cut so that
    rows x longest <= `budget` tokens (one row at least). Similar lengths together: little padding.
    """
    lengths = [len(episode.prompt) + len(episode.response) for episode in episodes]
    wanted = range(len(episodes)) if among is None else among
    batches: list[list[int]] = []
    for i in sorted(wanted, key=lengths.__getitem__):
        # Sorted, so this sequence is the longest of the batch so far.
        full = not batches or (len(batches[-1]) + 1) * lengths[i] > budget
        if full:
            batches.append([])
        batches[-1].append(i)
    return batches


def pad_responses(values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """A number for every response token, N tensors [R_i] -> padded [N, R], and the mask of what
    counts, bool [N, R]."""
    length = torch.tensor([len(row) for row in values])
    mask = torch.arange(int(length.max())) < length[:, None]
    return pad_sequence(list(values), batch_first=True), mask


def response_mask(prompt_len: Tensor, total_len: Tensor, length: int) -> Tensor:
    """[B], [B] -> bool [B, length-1]: column t is True where token t+1 belongs to the response."""
    column = torch.arange(length - 1, device=prompt_len.device)
    after_prompt = column >= prompt_len[:, None] - 1
    before_padding = column < total_len[:, None] - 1
    return after_prompt & before_padding


@dataclass(frozen=True)
class Batch:
    """Episodes as one padded tensor, padded on the right."""

    tokens: Tensor  # int64 [B, T], prompt and response
    prompt_len: Tensor  # int64 [B]
    total_len: Tensor  # int64 [B], prompt and response
    mask: Tensor  # bool [B, T-1], True where the next token is of the response

    def align(self, values: Tensor) -> Tensor:
        """A number per response token, [B, R] -> [B, T-1], 0 outside the mask."""
        values = values.to(self.mask.device, non_blocking=True)
        column = torch.arange(self.mask.shape[1], device=values.device)
        first_column = self.prompt_len[:, None] - 1  # the one that speaks of response token 0
        response_token = (column - first_column).clamp(0, values.shape[1] - 1)  # [B, T-1]
        return torch.where(self.mask, values.gather(1, response_token), 0.0)

    def unalign(self, columns: Tensor, length: int) -> Tensor:
        """The way back: [B, T-1] -> [B, length] on the CPU, 0 beyond each response."""
        response_len = self.total_len - self.prompt_len
        response_token = torch.arange(length, device=columns.device)
        inside = response_token < response_len[:, None]  # [B, length]
        column = self.prompt_len[:, None] - 1 + response_token
        column = column.clamp(max=columns.shape[1] - 1)
        return torch.where(inside, columns.gather(1, column), 0.0).cpu()


def collate(episodes: Sequence["Episode"], device: torch.device) -> Batch:
    """Pads episodes on the right, and says where their responses are. One copy to the device, for
    whose arrival nobody waits."""
    prompt_len = torch.tensor([len(episode.prompt) for episode in episodes])
    response_len = torch.tensor([len(episode.response) for episode in episodes])
    total_len = prompt_len + response_len
    sequences = [torch.cat((episode.prompt, episode.response)) for episode in episodes]
    padded = pad_sequence(sequences, batch_first=True)  # [B, T]
    lengths = torch.stack((prompt_len, total_len), dim=1)  # [B, 2]
    table = torch.cat((padded, lengths), dim=1).to(device, non_blocking=True)
    tokens = table[:, :-2].contiguous()
    *_, prompt_len, total_len = table.unbind(dim=1)
    return Batch(
        tokens=tokens,
        prompt_len=prompt_len,
        total_len=total_len,
        mask=response_mask(prompt_len, total_len, tokens.shape[1]),
    )
