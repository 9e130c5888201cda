"""Batched KV-cached sampling: prompts in, episodes out. Read after task.py.

A *slot* is one row of the cache. Every slot is at its own position, so nothing is ever padded on the
left; a prompt runs through the model once and its keys and values are copied to its G samples; a slot
takes the next sequence as soon as the host sees that its own has ended. The host looks only every few
tokens: a finished slot writes into a spare column until then, and no step in between waits for the host.

Each token is recorded with its log-probability and entropy under the distribution it was sampled from,
in fp32 (temperature applied; truncation too, if top_p < 1). Training uses top_p = 1, and takes these
log-probabilities as the old policy's.

Departs from the paper: nothing in the maths; the paper samples with a serving engine (its framework's).
"""

from __future__ import annotations

import copy
import hashlib
import math
from dataclasses import dataclass
from typing import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from model import Transformer, response_mask

CHECK_EVERY = 8             # tokens between two looks at the finished flags
GROW_BY = 16                # the cache is as long as the furthest row so far has needed, in multiples of this
PREFILL_TOKENS = 16384      # prompt tokens (with padding) per prefill, which bounds its memory


@dataclass(frozen=True)
class Episode:
    prompt: Tensor          # int64 [P]
    response: Tensor        # int64 [R], a sampled end token included
    logp: Tensor            # fp32 [R], of each response token under the sampled distribution
    entropy: Tensor         # fp32 [R], of that distribution, in nats
    finished: bool          # ended with an end token (False: cut at max_new_tokens)
    prompt_index: int       # which of the prompts given to generate


def seeded_generator(seed: int, step: int, stream: str, device: str | torch.device = "cpu") -> torch.Generator:
    """Random numbers that depend on (seed, step, stream) alone: an evaluation cannot disturb training, and a
    resumed run draws what the first would have drawn."""
    digest = hashlib.sha256(f"{seed} {step} {stream}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))


def draw(problems: Sequence, count: int, step: int, seed: int) -> list:
    """The problems of a step: a new shuffle every epoch, from (seed, epoch) alone."""
    chosen = []
    for i in range(step * count, (step + 1) * count):
        epoch, place = divmod(i, len(problems))
        if not chosen or place == 0:
            order = torch.randperm(len(problems), generator=seeded_generator(seed, epoch, "data"))
        chosen.append(problems[order[place]])
    return chosen


def sample(logits: Tensor, temperature: float, top_p: float,
           generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """logits [S, V] -> token, logp, entropy [S], in fp32, of softmax(logits / temperature) truncated to top_p.
    The token is the first whose cumulative probability, in fp64, exceeds a uniform number: one number a row, where
    the usual argmax(p / E) takes an exponential one for every word of the vocabulary."""
    z = logits.float() / temperature                                    # [S, V]
    if top_p < 1.0:
        z = truncate(z, top_p)
    lse = z.logsumexp(dim=-1, keepdim=True)
    p = (z - lse).exp()
    cdf = p.double().cumsum(dim=-1)
    u = torch.rand(len(p), 1, dtype=torch.float64, generator=generator, device=p.device)
    token = (cdf <= u * cdf[:, -1:]).sum(dim=-1)                        # [S]; first above, so its p is not 0
    entropy = lse[:, 0] - (p * z.masked_fill(p == 0, 0.0)).sum(dim=-1)  # 0 * -inf would be nan
    return token, (z.gather(1, token[:, None]) - lse)[:, 0], entropy


def texts(tokenizer, episodes: Sequence[Episode]) -> list[str]:
    """The responses as text, without the end token that finished them. Any other special token stays in the
    text: dropping it would turn a malformed answer into a good one."""
    return tokenizer.batch_decode([e.response[:-1] if e.finished else e.response for e in episodes])


def truncate(z: Tensor, top_p: float) -> Tensor:
    """Nucleus sampling: keeps the likeliest tokens up to and including the one that reaches `top_p`; the
    others get -inf. [S, V] -> [S, V]."""
    ordered, index = z.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered                           # probability of all likelier tokens
    drop = torch.zeros_like(z, dtype=torch.bool).scatter_(1, index, before >= top_p)
    return z.masked_fill(drop, -torch.inf)


def rounded(length: int) -> int:
    return -(-length // GROW_BY) * GROW_BY


class Sampler:
    """`slots` sequences at a time, each of at most `max_length` tokens with its prompt. `dtype` is that of
    the decode weights and the cache (default: the model's own, and then no copy is made)."""

    def __init__(self, model: Transformer, slots: int, max_length: int, eos_ids: Sequence[int],
                 dtype: torch.dtype | None = None) -> None:
        if not eos_ids:
            raise ValueError("the sampler needs at least one end-of-sequence id")
        self.model, self.slots, self.max_length, self.eos_ids = model, slots, max_length, tuple(eos_ids)
        self.device = model.head.device
        self.dtype = dtype or model.head.dtype
        self.decoder = model if self.dtype == model.head.dtype else copy.deepcopy(model).to(self.dtype)
        self.cache: Tensor | None = None

    @torch.no_grad()
    def sync(self) -> None:
        """Recasts the decode weights after an update. Without a dtype of their own they are the model's."""
        if self.decoder is not self.model:
            for mine, theirs in zip(self.decoder.parameters(), self.model.parameters()):
                mine.copy_(theirs)

    def allocate(self, rows: int) -> None:
        """Makes room for the longest sequences in `rows` slots, unless it is there."""
        if self.cache is None or self.cache.shape[2] < rows:
            self.cache = self.decoder.new_cache(rows, rounded(self.max_length))

    def free(self) -> None:
        """Gives the cache back, before an update that needs the memory."""
        self.cache = None

    @torch.no_grad()
    def generate(self, prompts: Sequence[Sequence[int]], samples_per_prompt: int, max_new_tokens: int,
                 temperature: float, generator: torch.Generator, top_p: float = 1.0,
                 progress: str | None = None) -> list[Episode]:
        """`samples_per_prompt` episodes for each prompt, in the order of the prompts. Same prompts, weights,
        slots and generator state: same episodes (bit for bit on a CPU). ValueError for an empty prompt, one that
        leaves no room for `max_new_tokens` (at least 1), a temperature outside 0.001..1000 or top_p outside (0, 1]."""
        if not 1e-3 <= temperature <= 1e3 or not 0 < top_p <= 1 or max_new_tokens < 1:
            raise ValueError(f"sampling needs temperature > 0 (0.001 to 1000), 0 < top_p <= 1 and a new token at least, "
                             f"not {temperature}, {top_p} and {max_new_tokens}")
        longest = max(map(len, prompts), default=1)
        if min(map(len, prompts), default=1) < 1 or longest + max_new_tokens > self.max_length:
            raise ValueError(f"prompts must have 1 to {self.max_length - max_new_tokens} tokens to leave room for "
                             f"{max_new_tokens} new ones in {self.max_length}; the longest has {longest}")
        queue = [i for i in range(len(prompts)) for _ in range(samples_per_prompt)]     # whose turn is next
        episodes: list[Episode | None] = [None] * len(queue)
        rows, started = min(self.slots, len(queue)), 0
        bar = tqdm(total=len(queue), desc=progress, unit="seq", leave=False, disable=None if progress else True)
        self.allocate(rows)
        cache = self.part(rows, longest)                                # [layers, 2, S, kv_heads, L, d]
        owner = [-1] * rows                                             # the episode in each slot; -1: free
        zeros = lambda *shape, dtype=torch.int64: torch.zeros(*shape, dtype=dtype, device=self.device)
        token, position, count = zeros(rows), zeros(rows), zeros(rows)  # [S]
        alive = zeros(rows, dtype=torch.bool)
        # One spare column at the end, where slots that have finished (or are free) write.
        tokens = zeros(rows, max_new_tokens + 1)
        logps, entropies = (zeros(rows, max_new_tokens + 1, dtype=torch.float32) for _ in range(2))
        eos = torch.tensor(self.eos_ids, device=self.device)
        bank, bank_first, bank_end = None, 0, 0                         # the prompts prefilled last

        while started < len(queue) or max(owner, default=-1) >= 0:
            free = [slot for slot in range(rows) if owner[slot] < 0]
            while free and started < len(queue):                        # refill
                if queue[started] >= bank_end:
                    bank_first = queue[started]
                    bank, bank_end = self.prefill(prompts, bank_first)
                take = [i for i in range(started, min(started + len(free), len(queue))) if queue[i] < bank_end]
                slots, free = free[:len(take)], free[len(take):]
                for slot, i in zip(slots, take):
                    owner[slot] = i
                started += len(take)
                slots = torch.tensor(slots, device=self.device)
                source = torch.tensor([queue[i] - bank_first for i in take], device=self.device)
                cache[:, :, slots, :, :bank.shape[4]] = bank[:, :, source]
                token[slots] = torch.tensor([prompts[queue[i]][-1] for i in take], device=self.device)
                position[slots] = torch.tensor([len(prompts[queue[i]]) - 1 for i in take], device=self.device)
                count[slots], alive[slots] = 0, True

            reach = min(int(position.max()) + CHECK_EVERY, self.max_length)     # no row gets further in this round
            if reach > cache.shape[4]:
                cache = self.longer(cache, reach)
            for _ in range(CHECK_EVERY):                                # decode
                hidden = self.decoder(token[:, None], position[:, None], cache)[:, 0]   # [S, width]
                drawn, logp, entropy = sample(F.linear(hidden, self.decoder.head), temperature, top_p, generator)
                column = torch.where(alive, count, max_new_tokens)[:, None]                 # [S, 1]
                tokens.scatter_(1, column, drawn[:, None])
                logps.scatter_(1, column, logp[:, None])
                entropies.scatter_(1, column, entropy[:, None])
                count += alive
                alive &= ~torch.isin(drawn, eos) & (count < max_new_tokens)
                token = torch.where(alive, drawn, token)
                position += alive                                       # a finished slot stays where it is

            lengths = count.tolist()                                    # harvest: flags and lengths to the host
            for slot, still in enumerate(alive.tolist()):
                if owner[slot] >= 0 and not still:
                    i, n = owner[slot], lengths[slot]
                    response = tokens[slot, :n].cpu().clone()
                    episodes[i] = Episode(torch.tensor(prompts[queue[i]]), response, logps[slot, :n].cpu().clone(),
                                          entropies[slot, :n].cpu().clone(), int(response[-1]) in self.eos_ids, queue[i])
                    owner[slot] = -1
                    bar.update()
            busy = [slot for slot in range(rows) if owner[slot] >= 0]
            if started == len(queue) and 0 < len(busy) <= rows // 2:    # the tail: go on with the busy rows only
                keep, rows, owner = torch.tensor(busy, device=self.device), len(busy), [owner[slot] for slot in busy]
                cache, token, position = cache[:, :, keep], token[keep], position[keep]
                count, alive = count[keep], alive[keep]
                tokens, logps, entropies = tokens[keep], logps[keep], entropies[keep]
        bar.close()
        return episodes

    def part(self, rows: int, length: int) -> Tensor:
        """The start of the buffer as a cache of `rows` and at least `length`. Without gaps: matrix products over a
        slice of a longer cache take twice as long (measured on a CPU)."""
        shape = (*self.cache.shape[:2], rows, self.cache.shape[3], rounded(length), self.cache.shape[5])
        return self.cache.view(-1)[:math.prod(shape)].view(shape)

    def longer(self, cache: Tensor, length: int) -> Tensor:
        """`cache` with room for `length`, in the same buffer: from the last layer to the first, because what a layer
        grows into held the layers behind it. What lies beyond a row's own position is stale but finite."""
        grown = self.part(cache.shape[2], length)
        for layer in reversed(range(len(cache))):
            for kind in (1, 0):
                grown[layer, kind, :, :, :cache.shape[4]] = cache[layer, kind].clone()
        return grown

    def prefill(self, prompts: Sequence[Sequence[int]], first: int) -> tuple[Tensor, int]:
        """Runs prompts[first:end] through the model, as many as the token budget allows, all but their last
        token, which the first decode step takes. Returns their keys and values
        [layers, 2, prompts, kv_heads, T, d] and `end`."""
        end, longest = first, 1
        while end < len(prompts):
            wider = max(longest, len(prompts[end]) - 1)
            if end > first and wider * (end + 1 - first) > PREFILL_TOKENS:
                break
            end, longest = end + 1, wider
        batch = torch.zeros(end - first, longest, dtype=torch.int64)    # [prompts, T], padded on the right
        for row, prompt in zip(batch, prompts[first:end]):
            row[:len(prompt) - 1] = torch.tensor(prompt[:-1], dtype=torch.int64)
        bank = self.decoder.new_cache(end - first, longest)
        self.decoder(batch.to(self.device), torch.arange(longest, device=self.device).expand(*batch.shape), bank)
        return bank, end


def micro_batches(episodes: Sequence[Episode], budget: int) -> list[list[int]]:
    """Indices of episodes sorted by length, cut so that rows x longest <= budget (one row at least)."""
    length = [len(e.prompt) + len(e.response) for e in episodes]
    batches: list[list[int]] = []
    for i in sorted(range(len(episodes)), key=lambda i: length[i]):
        if not batches or (len(batches[-1]) + 1) * length[i] > budget:
            batches.append([])
        batches[-1].append(i)
    return batches


def per_token(values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """A number for every response token, [R_i] each -> padded [N, R], and the mask of what counts."""
    length = torch.tensor([len(v) for v in values])
    return pad_sequence(list(values), batch_first=True), torch.arange(int(length.max())) < length[:, None]


def collate(episodes: Sequence[Episode], device: torch.device, *rows: Tensor) -> tuple[Tensor, ...]:
    """What `score` takes, padded on the right: tokens [B, T], prompt_len [B], total_len [B], and the mask of the
    response [B, T-1]. Then each of `rows`, a number per response token [B, R], in score's columns [B, T-1]."""
    prompt_len = torch.tensor([len(e.prompt) for e in episodes])
    length = torch.tensor([len(e.response) for e in episodes])
    tokens = pad_sequence([torch.cat((e.prompt, e.response)) for e in episodes], batch_first=True)
    mask = response_mask(prompt_len, prompt_len + length, tokens.shape[1])              # column t is token t+1
    columns = [torch.zeros(mask.shape).masked_scatter(mask, row[torch.arange(row.shape[1]) < length[:, None]])
               for row in rows]
    return tuple(x.to(device) for x in (tokens, prompt_len, prompt_len + length, mask, *columns))
