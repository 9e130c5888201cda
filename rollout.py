"""Batched KV-cached sampling: prompts in, episodes out. The first of the five files of the method.

A *sequence* is one answer being written; when it ends it becomes an *Episode*. A *slot* is a row of
the batch and of the cache, and writes one sequence at a time. Slots are at different positions, so
nothing is padded on the left. A prompt runs through the model once; its keys and values are copied
to all its sequences. When a sequence has ended, its slot takes the next one. To see which have
ended, Python would have to wait for a GPU; so it looks only every CHECK_EVERY tokens. What an ended
slot draws until then goes into a spare last column of the table of tokens, which nobody reads.

Each token is recorded with its log-probability and entropy under the distribution it was sampled
from, in fp32 (at its temperature, truncated if top_p < 1). Training uses top_p = 1, and takes these
log-probabilities as the old policy's. The paper samples with a serving engine, by the same maths.

    S slots   V words of the vocabulary   R response tokens   L positions in the cache
    d numbers in an attention head
    A cache is [layers, 2 (keys, values), S, kv_heads, L, d].
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from model import Transformer
from plumbing.decode_graph import Graphs, GraphedStep
from plumbing.distributed import whole
from plumbing.lora import adapted_layers, merged_copy, merged_weights

CHECK_EVERY = 8  # tokens between two looks at the finished flags
GROW_BY = 16  # the cache is as long as the furthest row has needed, in multiples of this ...
GROW_BY_ON_GPU = 128  # ... or of this: every length needs a CUDA graph of its own
PREFILL_TOKENS = 16384  # prompt tokens (with padding) per prefill, which bounds its memory


def round_up(length: int, device: torch.device) -> int:
    """Positions of a cache for `length` tokens: a multiple of GROW_BY, on a GPU of
    GROW_BY_ON_GPU."""
    multiple = GROW_BY_ON_GPU if device.type == "cuda" else GROW_BY
    return math.ceil(length / multiple) * multiple


@dataclass(frozen=True)
class Episode:
    """One answer to one prompt."""

    prompt: Tensor  # int64 [P]
    response: Tensor  # int64 [R], a sampled end token included
    logp: Tensor  # fp32 [R], of each response token under the sampled distribution
    # Not what the entropy advantage takes: that is the current policy's, from model.score.
    entropy: Tensor  # fp32 [R], of that distribution, in nats
    finished: bool  # ended with an end token (False: cut at max_new_tokens)
    prompt_index: int  # which of the prompts given to generate


def sample(
    logits: Tensor, temperature: float, top_p: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws a token a row from softmax(logits / temperature) truncated to top_p.

    logits [S, V] -> token, logp, entropy [S], in fp32. By the inverse of the cumulative
    distribution, in fp64: one uniform number a row, where torch.multinomial draws one for every
    word."""
    z = logits.float()  # [S, V]
    if temperature != 1.0:
        z = z / temperature
    if top_p < 1.0:
        z = truncate(z, top_p)
    lse = z.logsumexp(dim=-1, keepdim=True)  # [S, 1]
    p = (z - lse).exp()

    # The token is the first whose cumulative probability exceeds u, so never one of probability 0.
    # The last cumulative probability should be 1 but is rounded, so u is multiplied by it.
    cdf = p.cumsum(dim=-1, dtype=torch.float64)
    u = torch.rand(len(p), 1, dtype=torch.float64, generator=generator, device=p.device)
    token = torch.searchsorted(cdf, u * cdf[:, -1:], right=True)  # [S, 1]

    logp = z.gather(1, token) - lse
    if top_p < 1.0:
        z = z.masked_fill_(z == -torch.inf, 0.0)  # 0 * -inf would be nan
    entropy = lse[:, 0] - p.mul_(z).sum(dim=-1)
    return token[:, 0], logp[:, 0], entropy


def truncate(z: Tensor, top_p: float) -> Tensor:
    """Nucleus sampling: keeps the likeliest tokens up to and including the one that reaches
    `top_p`; the others get -inf. [S, V] -> [S, V]."""
    ordered, index = z.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    mass_before = ordered.cumsum(dim=-1) - ordered  # probability of all likelier tokens
    drop = torch.zeros_like(z, dtype=torch.bool).scatter_(1, index, mass_before >= top_p)
    return z.masked_fill(drop, -torch.inf)


def texts(tokenizer, episodes: Sequence[Episode]) -> list[str]:
    """The responses as text, without the end token that finished them. Any other special token
    stays in the text: dropping it would turn a malformed answer into a good one."""
    without_end = [
        episode.response[:-1] if episode.finished else episode.response for episode in episodes
    ]
    return tokenizer.batch_decode(without_end)


class Sampler:
    """`slots` sequences at a time, each of at most `max_length` tokens with its prompt. `dtype` is
    that of the decode weights and the cache. By default it is the model's own, and the model itself
    decodes, unless it has LoRA, which a copy has merged. `graph`: on a GPU, decode steps as CUDA
    graphs. `decoder`: a whole copy to decode with, if the model's weights are sliced (--shard)."""

    def __init__(
        self,
        model: Transformer,
        slots: int,
        max_length: int,
        eos_ids: Sequence[int],
        dtype: torch.dtype | None = None,
        graph: bool = True,
        decoder: Transformer | None = None,
    ) -> None:
        if not eos_ids:
            raise ValueError("the sampler needs at least one end-of-sequence id")
        self.model = model
        self.slots = slots
        self.max_length = max_length
        self.eos_ids = tuple(eos_ids)
        self.device = model.head.device
        self.dtype = dtype or model.head.dtype
        needs_copy = self.dtype != model.head.dtype or len(adapted_layers(model)) > 0
        if decoder is None and needs_copy:
            decoder = merged_copy(model).to(self.dtype)
        self.decoder = model if decoder is None else decoder
        self.graphs = Graphs(wanted=graph and self.device.type == "cuda")
        # One piece of memory; the cache in use is a view of its start (view_of_buffer).
        self.buffer: Tensor | None = None

    @torch.no_grad()
    def sync(self) -> None:
        """Brings the copy up to date after an update: LoRA merged, slices gathered, cast to its dtype.
        Without a copy there is nothing to do."""
        if self.decoder is self.model:
            return
        for name, weight in merged_weights(self.model):
            self.decoder.get_parameter(name).copy_(whole(weight))

    def allocate(self, rows: int) -> None:
        """Makes room for the longest sequences in `rows` slots, unless it is there."""
        if self.buffer is None or self.buffer.shape[2] < rows:
            self.buffer = self.decoder.new_cache(rows, round_up(self.max_length, self.device))

    def free(self) -> None:
        """Gives the buffer back, before an update that needs the memory."""
        self.buffer = None

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        samples_per_prompt: int,
        max_new_tokens: int,
        temperature: float,
        generator: torch.Generator,
        top_p: float = 1.0,
        progress: str | None = None,
    ) -> list[Episode]:
        """`samples_per_prompt` episodes for each prompt, in the order of the prompts.

        Same prompts, weights, slots and generator state: same episodes (bit for bit on a CPU).
        ValueError for settings or prompts out of their bounds."""
        self.check(prompts, max_new_tokens, temperature, top_p)
        slots = Slots(self, prompts, samples_per_prompt, max_new_tokens)
        eager = partial(slots.decode, temperature, top_p, generator)
        # On a GPU, all kernels of a step are launched at once: it is done with them sooner than
        # Python launches one by one. On a CPU this is the step itself.
        decode = GraphedStep(eager, slots, generator, self.graphs) if self.graphs.wanted else eager
        bar = tqdm(
            total=len(slots.prompt_of),
            desc=progress,
            unit="seq",
            leave=False,
            disable=None if progress else True,  # None: on a terminal only
        )
        while slots.waiting or slots.busy:
            slots.refill()
            slots.make_room(CHECK_EVERY)
            for _ in range(CHECK_EVERY):
                decode()
            bar.update(slots.harvest())
            slots.shrink()
        bar.close()
        if self.graphs.wanted:
            decode.close()
        return slots.episodes

    def check(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        temperature: float,
        top_p: float,
    ) -> None:
        lengths = [len(prompt) for prompt in prompts]
        room = self.max_length - max_new_tokens
        if not 1e-3 <= temperature <= 1e3:
            raise ValueError(f"sampling needs temperature > 0 (0.001 to 1000), not {temperature}")
        if not 0 < top_p <= 1:
            raise ValueError(f"sampling needs 0 < top_p <= 1, not {top_p}")
        if max_new_tokens < 1:
            raise ValueError(f"sampling needs a new token at least, not {max_new_tokens}")
        if min(lengths, default=1) < 1:
            raise ValueError("a prompt must have a token at least; one is empty")
        if max(lengths, default=1) > room:
            raise ValueError(
                f"prompts must have 1 to {room} tokens to leave room for {max_new_tokens} new ones "
                f"in {self.max_length}; the longest has {max(lengths)}"
            )
        words = len(self.model.head)
        largest = max((max(prompt) for prompt in prompts), default=0)
        if largest >= words:
            raise ValueError(
                f"a prompt has the token {largest}, and the model has {words}: the tokenizer is "
                "another model's, or has words added that the weights lack"
            )

    def view_of_buffer(self, rows: int, length: int) -> Tensor:
        """A cache of `rows` and at least `length`, laid over the start of the buffer, in the same
        memory as the cache before it, whose contents must then be moved: lengthened, with_rows.
        Without gaps: matrix products over a slice of a longer cache take twice as long (measured on
        a CPU)."""
        layers, kinds, _, kv_heads, _, head_dim = self.buffer.shape
        shape = (layers, kinds, rows, kv_heads, round_up(length, self.device), head_dim)
        return self.buffer.view(-1)[: math.prod(shape)].view(shape)

    def lengthened(self, cache: Tensor, length: int) -> Tensor:
        """The cache laid out anew with room for `length`. Each block (a layer's keys, or its
        values) moves to a higher address, over the old places of later blocks: so the last moves
        first. Its own old and new places overlap: hence the clone. What lies beyond a row's own
        position is stale; it is masked, and finite, so that 0 times it is 0."""
        longer = self.view_of_buffer(cache.shape[2], length)
        old_length = cache.shape[4]
        blocks = list(zip(longer.flatten(0, 1), cache.flatten(0, 1)))
        for new, old in reversed(blocks):
            new[:, :, :old_length] = old.clone()
        return longer

    def with_rows(self, cache: Tensor, keep: Tensor) -> Tensor:
        """The cache laid out anew with only the rows `keep`. Each block moves to a lower address or
        stays: so the first moves first."""
        smaller = self.view_of_buffer(len(keep), cache.shape[4])
        for new, old in zip(smaller.flatten(0, 1), cache.flatten(0, 1)):
            new.copy_(old[keep])
        return smaller

    def prefill(self, prompts: Sequence[Sequence[int]], first: int) -> tuple[Tensor, int]:
        """Fills a new cache, the bank, with prompts[first:end], as many as fit PREFILL_TOKENS,
        padding included -> the bank [layers, 2, prompts, kv_heads, T, d], and `end`. A prompt's
        last token is left for the first decode step, which gives the first logits."""
        end = first + 1
        longest = max(1, len(prompts[first]) - 1)
        while end < len(prompts):
            with_next = max(longest, len(prompts[end]) - 1)
            if with_next * (end + 1 - first) > PREFILL_TOKENS:
                break
            longest = with_next
            end += 1

        # A prompt of one token leaves nothing to prefill: any token fills its place, unseen.
        rows = [torch.tensor(prompt[:-1] or [0]) for prompt in prompts[first:end]]
        batch = pad_sequence(rows, batch_first=True)  # [prompts, T]
        batch = batch.to(self.device, non_blocking=True)
        position = torch.arange(longest, device=self.device).expand(*batch.shape)
        bank = self.decoder.new_cache(*batch.shape)
        self.decoder(batch, position, bank)  # fills the bank; nobody needs its hidden states
        return bank, end


class Slots:
    """The state of one call of Sampler.generate: which sequence is in which slot, and how far."""

    def __init__(
        self,
        sampler: Sampler,
        prompts: Sequence[Sequence[int]],
        samples_per_prompt: int,
        max_new_tokens: int,
    ) -> None:
        self.sampler = sampler
        self.prompts = prompts
        self.max_new_tokens = max_new_tokens
        # What Python knows, as of the last look. Sequence -> its prompt; they get slots in this
        # order:
        self.prompt_of = [i for i in range(len(prompts)) for _ in range(samples_per_prompt)]
        self.started = 0  # how many of them have had a slot
        self.busy: dict[int, int] = {}  # slot -> its sequence; the other slots are free
        self.episodes: list[Episode | None] = [None] * len(self.prompt_of)
        self.rows = min(sampler.slots, len(self.prompt_of))
        self.reached = [0] * self.rows  # position of each slot

        # What the device knows, as of the last token. A decode step changes these in place: a CUDA
        # graph (plumbing/decode_graph.py) is replayed on their addresses.
        self.device = sampler.device
        self.eos = self.on_device(sampler.eos_ids)
        self.newest = self.zeros(torch.int64, self.rows)  # [S], the token to decode next
        self.position = self.zeros(torch.int64, self.rows)  # [S], of that token
        self.count = self.zeros(torch.int64, self.rows)  # [S], response tokens so far
        self.alive = self.zeros(torch.bool, self.rows)  # [S], False: finished, or free
        # The last column is spare, for slots that are not alive.
        columns = max_new_tokens + 1
        self.tokens = self.zeros(torch.int64, self.rows, columns)  # [S, R + 1]
        self.logps = self.zeros(torch.float32, self.rows, columns)
        self.entropies = self.zeros(torch.float32, self.rows, columns)

        longest = max((len(prompt) for prompt in prompts), default=1)
        sampler.allocate(self.rows)
        self.cache = sampler.view_of_buffer(self.rows, longest)  # [layers, 2, S, kv_heads, L, d]
        # Keys and values of prompts[bank_first:bank_end], those prefilled last.
        self.bank: Tensor | None = None
        self.bank_first = 0
        self.bank_end = 0

    def zeros(self, dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=dtype, device=self.device)

    def on_device(self, values: Sequence) -> Tensor:
        """Whole numbers from Python, which does not wait until they have arrived."""
        return torch.tensor(values).to(self.device, non_blocking=True)

    @property
    def state(self) -> list[Tensor]:
        """All that a decode step changes, besides the cache."""
        per_slot = [self.newest, self.position, self.count, self.alive]
        return [*per_slot, self.tokens, self.logps, self.entropies]

    @property
    def waiting(self) -> bool:
        """Whether a sequence has not had a slot yet."""
        return self.started < len(self.prompt_of)

    def refill(self) -> None:
        """Gives every free slot the next sequence, as long as there is one."""
        while self.waiting and len(self.busy) < self.rows:
            next_prompt = self.prompt_of[self.started]
            if next_prompt >= self.bank_end:
                self.bank_first = next_prompt
                self.bank = None  # its memory is free before the next one takes any
                self.bank, self.bank_end = self.sampler.prefill(self.prompts, self.bank_first)
            self.start(self.next_sequences())

    def next_sequences(self) -> dict[int, int]:
        """Free slot -> the sequence it takes, of those whose prompts are in the bank."""
        free = [slot for slot in range(self.rows) if slot not in self.busy]
        left = range(self.started, len(self.prompt_of))
        return {
            slot: sequence
            for slot, sequence in zip(free, left)
            if self.prompt_of[sequence] < self.bank_end
        }

    def start(self, fresh: dict[int, int]) -> None:
        """Puts sequences into slots: the prompt's keys and values, and its last token as the first
        to be decoded."""
        self.busy |= fresh
        self.started += len(fresh)
        prompt_indices = [self.prompt_of[sequence] for sequence in fresh.values()]
        index_in_bank = [i - self.bank_first for i in prompt_indices]
        last_token = [self.prompts[i][-1] for i in prompt_indices]
        last_position = [len(self.prompts[i]) - 1 for i in prompt_indices]
        for slot, position in zip(fresh, last_position):
            self.reached[slot] = position

        # One copy to the device: a row for each list.
        table = self.on_device([list(fresh), index_in_bank, last_token, last_position])
        slots, in_bank, newest, position = table
        # Layer by layer, because the rows that are taken from the bank are copied. What lies behind
        # a shorter prompt is padding: masked, until the slot's own tokens are written over it.
        prefilled = self.bank.shape[4]
        # Both [2, S or prompts, kv_heads, L, d].
        for layer_cache, layer_bank in zip(self.cache, self.bank):
            layer_cache[:, slots, :, :prefilled] = layer_bank[:, in_bank]
        self.newest[slots] = newest
        self.position[slots] = position
        self.count[slots] = 0
        self.alive[slots] = True

    def make_room(self, steps: int) -> None:
        """Makes the cache long enough for `steps` more tokens of the furthest slot. An ended one
        counts too: it goes on writing at its own position."""
        reach = min(max(self.reached) + steps, self.sampler.max_length)
        if reach > self.cache.shape[4]:
            self.cache = self.sampler.lengthened(self.cache, reach)

    def decode(self, temperature: float, top_p: float, generator: torch.Generator) -> None:
        """One token for every slot. A slot that is not alive stays where it is, and writes into the
        spare column: no step waits for the host."""
        decoder = self.sampler.decoder
        hidden = decoder(self.newest[:, None], self.position[:, None], self.cache)[:, 0]
        logits = F.linear(hidden, decoder.head)  # [S, V]
        drawn, logp, entropy = sample(logits, temperature, top_p, generator)  # [S] each

        column = self.count.masked_fill(~self.alive, self.max_new_tokens)[:, None]  # [S, 1]
        self.tokens.scatter_(1, column, drawn[:, None])
        self.logps.scatter_(1, column, logp[:, None])
        self.entropies.scatter_(1, column, entropy[:, None])

        # Slots that were alive have one token more.
        self.count += self.alive
        ended = (drawn[:, None] == self.eos).any(dim=-1)
        has_room = self.count < self.max_new_tokens
        # From here on `alive` is of the next step.
        self.alive &= ~ended & has_room
        self.newest.copy_(torch.where(self.alive, drawn, self.newest))
        self.position += self.alive

    def harvest(self) -> int:
        """Turns sequences that have ended into episodes and frees their slots; returns how many."""
        # The look: here Python waits for the device.
        look = torch.stack((self.count, self.position, self.alive.long()))
        counts, self.reached, alive = look.tolist()
        ended = [slot for slot in self.busy if not alive[slot]]
        if ended:
            lengths = [counts[slot] for slot in ended]
            records = self.records(ended, max(lengths))
            for slot, length, record in zip(ended, lengths, records):
                sequence = self.busy.pop(slot)
                self.episodes[sequence] = self.episode(sequence, record[:, :length])
        return len(ended)

    def records(self, slots: list[int], length: int) -> Tensor:
        """Tokens, log-probabilities and entropies of the slots, to the host in one copy:
        [slots, 3, length] in fp64, which holds all three exactly."""
        rows = self.on_device(slots)
        tables = (self.tokens, self.logps, self.entropies)
        return torch.stack([table[rows, :length].double() for table in tables], dim=1).cpu()

    def episode(self, sequence: int, record: Tensor) -> Episode:
        """record: fp64 [3, R]."""
        prompt_index = self.prompt_of[sequence]
        response, logp, entropy = record
        return Episode(
            prompt=torch.tensor(self.prompts[prompt_index]),
            response=response.long(),
            logp=logp.float(),
            entropy=entropy.float(),
            finished=int(response[-1]) in self.sampler.eos_ids,
            prompt_index=prompt_index,
        )

    def shrink(self) -> None:
        """When nothing waits and at most half of the slots are busy, keeps only those."""
        few_left = 0 < len(self.busy) <= self.rows // 2
        if self.waiting or not few_left:
            return
        kept = sorted(self.busy)
        keep = self.on_device(kept)
        self.busy = {row: self.busy[slot] for row, slot in enumerate(kept)}
        self.rows = len(kept)
        self.reached = [self.reached[slot] for slot in kept]
        self.newest = self.newest[keep]
        self.position = self.position[keep]
        self.count = self.count[keep]
        self.alive = self.alive[keep]
        self.tokens = self.tokens[keep]
        self.logps = self.logps[keep]
        self.entropies = self.entropies[keep]
        self.cache = self.sampler.with_rows(self.cache, keep)
