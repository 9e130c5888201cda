"""Batched KV-cached sampling: prompts in, episodes out. Read after task.py.

A *slot* is a row of the cache, at a position of its own: nothing is ever padded on the left. A prompt runs through the
model once; its keys and values are copied to its G samples. A slot takes the next sequence when the host sees that its
own has ended. The host looks every few tokens; till then the slot writes into a spare column, and no step waits for it.
Each token is recorded with its log-probability and entropy under the distribution it was sampled from, in fp32 (at its
temperature, truncated if top_p < 1). Training uses top_p = 1, and takes these log-probabilities as the old policy's.
Departs from the paper: not in the maths; it samples with a serving engine.
"""

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


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """logits [S, V] -> token, logp, entropy [S], in fp32, of softmax(logits / temperature) truncated to top_p.
    The token is the first whose cumulative probability, in fp64, exceeds a uniform number: one number a row, where
    the usual argmax(p / E) takes an exponential one for every word of the vocabulary."""
    z = logits.float() / temperature                                    # [S, V]
    z = truncate(z, top_p) if top_p < 1.0 else z
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


class Sampler:
    """`slots` sequences at a time, each of at most `max_length` tokens with its prompt. `dtype` is that of
    the decode weights and the cache (default: the model's own, and then no copy is made)."""

    def __init__(self, model: Transformer, slots: int, max_length: int, eos_ids: Sequence[int],
                 dtype: torch.dtype | None = None) -> None:
        if not eos_ids:
            raise ValueError("the sampler needs at least one end-of-sequence id")
        self.model, self.slots, self.max_length, self.eos_ids = model, slots, max_length, tuple(eos_ids)
        self.device, self.dtype = model.head.device, dtype or model.head.dtype
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
            self.cache = self.decoder.new_cache(rows, -(-self.max_length // GROW_BY) * GROW_BY)

    def free(self) -> None:
        """Gives the cache back, before an update that needs the memory."""
        self.cache = None

    @torch.no_grad()
    def generate(self, prompts: Sequence[Sequence[int]], samples_per_prompt: int, max_new_tokens: int,
                 temperature: float, generator: torch.Generator, top_p: float = 1.0,
                 progress: str | None = None) -> list[Episode]:
        """`samples_per_prompt` episodes for each prompt, in the order of the prompts. Same prompts, weights, slots and
        generator state: same episodes (bit for bit on a CPU). ValueError for settings or prompts out of their bounds."""
        if not 1e-3 <= temperature <= 1e3 or not 0 < top_p <= 1 or max_new_tokens < 1:
            raise ValueError("sampling needs temperature > 0 (0.001 to 1000), 0 < top_p <= 1 and a new token at least, "
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
        busy: dict[int, int] = {}                                       # slot -> its episode; the other slots are free
        on_device = lambda values: torch.tensor(values, device=self.device)
        zeros = lambda kind, *shape: torch.zeros(*shape, dtype=kind, device=self.device)
        token, position, count, alive = (zeros(kind, rows) for kind in 3 * [torch.int64] + [torch.bool])    # [S] each
        # Tokens, logps, entropies [S, R + 1]: the last column is spare, for slots that have finished (or are free).
        records = [zeros(kind, rows, max_new_tokens + 1) for kind in (torch.int64, torch.float32, torch.float32)]
        eos = on_device(self.eos_ids)
        bank, bank_first, bank_end = None, 0, 0                         # the prompts prefilled last

        while started < len(queue) or busy:
            while started < len(queue) and len(busy) < rows:            # refill
                if queue[started] >= bank_end:
                    bank_first = queue[started]
                    bank, bank_end = self.prefill(prompts, bank_first)
                free = (slot for slot in range(rows) if slot not in busy)
                fresh = {slot: i for slot, i in zip(free, range(started, len(queue))) if queue[i] < bank_end}
                busy |= fresh
                started += len(fresh)
                slots, chosen = on_device([*fresh]), [queue[i] for i in fresh.values()]
                cache[:, :, slots, :, :bank.shape[4]] = bank[:, :, on_device([j - bank_first for j in chosen])]
                token[slots] = on_device([prompts[j][-1] for j in chosen])
                position[slots] = on_device([len(prompts[j]) - 1 for j in chosen])
                count[slots], alive[slots] = 0, True

            reach = min(int(position.max()) + CHECK_EVERY, self.max_length)     # no row gets further in this round
            cache = self.longer(cache, reach) if reach > cache.shape[4] else cache
            for _ in range(CHECK_EVERY):                                # decode
                hidden = self.decoder(token[:, None], position[:, None], cache)[:, 0]   # [S, width]
                drawn, logp, entropy = sample(F.linear(hidden, self.decoder.head), temperature, top_p, generator)
                column = torch.where(alive, count, max_new_tokens)[:, None]                 # [S, 1]
                for record, new in zip(records, (drawn, logp, entropy)):
                    record.scatter_(1, column, new[:, None])
                count += alive
                alive &= ~torch.isin(drawn, eos) & (count < max_new_tokens)
                token = torch.where(alive, drawn, token)
                position += alive                                       # a finished slot stays where it is

            for slot, (n, goes_on) in enumerate(zip(count.tolist(), alive.tolist())):   # harvest: both come to the host
                if slot in busy and not goes_on:
                    i, (response, *numbers) = busy.pop(slot), (record[slot, :n].cpu().clone() for record in records)
                    finished = int(response[-1]) in self.eos_ids
                    episodes[i] = Episode(torch.tensor(prompts[queue[i]]), response, *numbers, finished, queue[i])
                    bar.update()
            if started == len(queue) and 0 < len(busy) <= rows // 2:    # the tail: go on with the busy rows only
                kept = sorted(busy)
                rows, busy, keep = len(kept), {row: busy[slot] for row, slot in enumerate(kept)}, on_device(kept)
                token, position, count, alive, *records = (x[keep] for x in (token, position, count, alive, *records))
                old, cache = cache, self.part(rows, cache.shape[4])     # in the same buffer, from the first layer on
                for new, held in zip(cache.flatten(0, 1), old.flatten(0, 1)):
                    new.copy_(held[keep])
        bar.close()
        return episodes

    def part(self, rows: int, length: int) -> Tensor:
        """The start of the buffer as a cache of `rows` and at least `length`. Without gaps: matrix products over a
        slice of a longer cache take twice as long (measured on a CPU)."""
        shape = (*self.cache.shape[:2], rows, self.cache.shape[3], -(-length // GROW_BY) * GROW_BY, self.cache.shape[5])
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
        """Runs prompts[first:end], within the budget, all but their last tokens (the first decode step's), through the
        model -> keys and values [layers, 2, prompts, kv_heads, T, d], and `end`."""
        end, longest = first + 1, max(1, len(prompts[first]) - 1)
        while end < len(prompts) and max(longest, len(prompts[end]) - 1) * (end + 1 - first) <= PREFILL_TOKENS:
            longest, end = max(longest, len(prompts[end]) - 1), end + 1
        batch = pad_sequence([torch.tensor(prompt[:-1] or [0]) for prompt in prompts[first:end]], batch_first=True)
        bank = self.decoder.new_cache(*batch.shape)                     # batch [prompts, T]; 0 where there is no token
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
