"""Qwen2, Qwen3 and Llama 3 in plain PyTorch. Read after train.py.

Module and parameter names are Hugging Face's, so that a checkpoint loads without a translation
table (plumbing/pretrained.py). `score` is where the paper's H_t comes from: the entropy over the
full vocabulary, of the *current* policy, in the same forward pass that computes the policy loss.

The caller passes no attention mask. Sequences are padded on the right only, where causality
already hides the padding; the lengths say which tokens count. Only a decode step makes a mask.

    B sequences   T tokens of the longest   V words of the vocabulary   L positions in the cache
    d numbers in an attention head
    A cache is [layers, 2 (keys, values), B, kv_heads, L, d].
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from plumbing.batch import response_mask
from plumbing.distributed import own_slice
from plumbing.pretrained import (
    Pretrained,
    check_supported,
    end_tokens,
    head_size,
    open_pretrained,
    read_weights,
    rope_parameters,
)
from plumbing.shard import is_sharded, shard


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, Hugging Face's layout: the two halves of a head are the pairs.
    x [B, heads, T, d]; cos, sin [B, 1, T, d/2]."""
    a, b = x.chunk(2, dim=-1)  # [B, heads, T, d/2] each
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def rope_frequency(config: dict, device: torch.device) -> Tensor:
    """Radians per position of each pair of a head's numbers, fp32 [d/2]."""
    half = head_size(config) // 2
    rope = rope_parameters(config)
    exponent = torch.arange(half, device=device, dtype=torch.float32) / half
    frequency = float(rope["rope_theta"]) ** -exponent
    if rope["rope_type"] == "llama3":
        frequency = stretch_long_waves(frequency, rope)
    return frequency


def stretch_long_waves(frequency: Tensor, rope: dict) -> Tensor:
    """Llama 3.1's scaling: waves that are long against the context of pre-training are stretched by
    a factor, short ones are kept, those between blend."""
    low = rope["low_freq_factor"]
    high = rope["high_freq_factor"]
    waves_in_context = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
    kept = ((waves_in_context - low) / (high - low)).clamp(0, 1)
    return frequency * (kept + (1 - kept) / rope["factor"])


class Attention(nn.Module):
    """Grouped-query attention: query heads share a smaller number of key and value heads."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        width = config["hidden_size"]
        self.head_dim = head_size(config)
        self.heads = config["num_attention_heads"]
        self.kv_heads = config["num_key_value_heads"]
        # In attention the families differ in this alone: biases in Qwen2, norms of queries and keys
        # in Qwen3.
        has_bias = config["model_type"] == "qwen2"
        has_norm = config["model_type"] == "qwen3"
        self.q_proj = nn.Linear(width, self.heads * self.head_dim, bias=has_bias)
        self.k_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=has_bias)
        self.v_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=has_bias)
        self.o_proj = nn.Linear(self.heads * self.head_dim, width, bias=False)
        self.q_norm = nn.RMSNorm(self.head_dim, config["rms_norm_eps"]) if has_norm else None
        self.k_norm = nn.RMSNorm(self.head_dim, config["rms_norm_eps"]) if has_norm else None

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: Tensor | None,
        place: Tensor | None,
        mask: Tensor | None,
    ) -> Tensor:
        """x [B, T, width] -> the same shape. cache: this layer's. place [B * kv_heads] and mask
        [B, 1, L] are those of a decode step (Transformer.decode_places), else None."""
        batch, time, _ = x.shape
        q, k = self.queries_and_keys(x, cos, sin)  # [B, heads, T, d], [B, kv_heads, T, d]
        v = self.split_heads(self.v_proj(x))  # [B, kv_heads, T, d]
        if mask is not None:
            y = self.decode(q, k, v, cache, place, mask)
        else:
            if cache is not None:  # a prefill: every row starts at position 0
                cache[0, :, :, :time] = k
                cache[1, :, :, :time] = v
            y = self.attend(q, k, v)
        return self.o_proj(y.transpose(1, 2).reshape(batch, time, -1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention within T. q [B, heads, T, d]; k, v [B, kv_heads, T, d] -> as q."""
        # In float32 no fast kernel of CUDA knows grouped heads, and the slow one keeps T² scores.
        autocast = torch.is_autocast_enabled(q.device.type)
        ungroup = q.is_cuda and q.dtype == torch.float32 and not autocast
        if ungroup:
            group = self.heads // self.kv_heads
            k = k.repeat_interleave(group, dim=1)
            v = v.repeat_interleave(group, dim=1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=not ungroup)

    def split_heads(self, x: Tensor) -> Tensor:
        """[B, T, heads * d] -> [B, heads, T, d]"""
        batch, time, _ = x.shape
        return x.view(batch, time, -1, self.head_dim).transpose(1, 2)

    def queries_and_keys(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated, both in one go: half as many kernels, whose launches are most of a decode
        step."""
        both = self.split_heads(torch.cat((self.q_proj(x), self.k_proj(x)), dim=-1))
        if self.q_norm is not None:
            q, k = both.split((self.heads, self.kv_heads), dim=1)
            both = torch.cat((self.q_norm(q), self.k_norm(k)), dim=1)
        q, k = rotate(both, cos, sin).split((self.heads, self.kv_heads), dim=1)
        return q, k

    def decode(
        self, q: Tensor, k: Tensor, v: Tensor, cache: Tensor, place: Tensor, mask: Tensor
    ) -> Tensor:
        """One new token per row against the whole cache, hidden beyond the row's own position.

        The query heads that share a key head become the rows of one matrix product: two batched
        products in all. cache [2, B, kv_heads, L, d]; the result [B, heads, 1, d]."""
        batch = len(k)
        # Laid end to end, [B * kv_heads * L, d], position p of row b and head h is at
        # (b * kv_heads + h) * L + p: that is `place`.
        for kind, new in enumerate((k, v)):
            cache[kind].view(-1, self.head_dim).index_copy_(
                0, place, new.reshape(-1, self.head_dim)
            )
        keys, values = cache.flatten(1, 2)  # [B * kv_heads, L, d] each
        grouped = q.reshape(len(keys), -1, self.head_dim)  # [B * kv_heads, group, d]
        grouped = grouped * self.head_dim**-0.5
        affinity = torch.bmm(grouped, keys.transpose(1, 2))  # [B * kv_heads, group, L]
        affinity = affinity.view(batch, self.heads, -1) + mask  # [B, heads, L]
        # softmax adds up in fp32 also where its input is bfloat16.
        weight = affinity.softmax(dim=-1).view(len(keys), -1, keys.shape[1])
        return torch.bmm(weight, values).view(batch, self.heads, 1, -1)


class MLP(nn.Module):
    def __init__(self, config: dict) -> None:
        super().__init__()
        width = config["hidden_size"]
        inner = config["intermediate_size"]
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: dict) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(config["hidden_size"], config["rms_norm_eps"])
        self.post_attention_layernorm = nn.RMSNorm(config["hidden_size"], config["rms_norm_eps"])

    def forward(self, x: Tensor, *attention_arguments) -> Tensor:
        """attention_arguments: cos, sin, cache, place, mask."""
        x = x + self.self_attn(self.input_layernorm(x), *attention_arguments)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """`config` is the dictionary of a Hugging Face config.json. ValueError for an architecture that
    this file does not implement."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        check_supported(config)
        self.config = config
        self.eos_ids: tuple[int, ...] = ()
        self.recompute = False  # True: keep only each layer's input for the backward pass
        # Random, for a model that is not loaded (lab/pretrain.py). Drawn here, because
        # nn.Embedding's own normal numbers cost a second of imports on the meta device, where
        # load_weights builds.
        table = torch.empty(config["vocab_size"], config["hidden_size"]).uniform_(-1, 1)
        self.embed_tokens = nn.Embedding(*table.shape, _weight=table)
        self.layers = nn.ModuleList(Block(config) for _ in range(config["num_hidden_layers"]))
        self.norm = nn.RMSNorm(config["hidden_size"], config["rms_norm_eps"])
        self.tied = config.get("tie_word_embeddings", False)
        if not self.tied:
            self.lm_head = nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)

    @property
    def head(self) -> Tensor:
        """[V, width]"""
        return self.embed_tokens.weight if self.tied else self.lm_head.weight

    def new_cache(self, rows: int, length: int) -> Tensor:
        """Keys and values: [layers, 2, rows, kv_heads, length, d]. Zeros, not empty: masked
        positions are multiplied by a weight of 0, and 0 * nan is nan."""
        attention = self.layers[0].self_attn
        shape = (len(self.layers), 2, rows, attention.kv_heads, length, attention.head_dim)
        return self.head.new_zeros(shape)

    def forward(self, tokens: Tensor, position: Tensor, cache: Tensor | None = None) -> Tensor:
        """tokens, position [B, T] -> hidden states after the last norm [B, T, width].

        Without a cache: causal attention over T. With one and T > 1, a prefill: the same, and keys
        and values are written to cache positions 0..T-1. With one and T = 1, a decode step: each
        row's token goes to its own position and attends to the cache up to there. (So a prefill of
        one token is a decode step at position 0.)"""
        x = self.embed_tokens(tokens)  # [B, T, width]
        frequency = rope_frequency(self.config, tokens.device)  # [d/2]
        angle = position[:, None, :, None] * frequency  # [B, 1, T, d/2], fp32
        cos = angle.cos().to(x.dtype)
        sin = angle.sin().to(x.dtype)

        place = None
        mask = None
        if cache is not None and tokens.shape[1] == 1:
            place, mask = self.decode_places(position, cache, x.dtype)

        recompute = self.recompute and torch.is_grad_enabled()
        for i, layer in enumerate(self.layers):
            layer_cache = None if cache is None else cache[i]
            arguments = (x, cos, sin, layer_cache, place, mask)
            x = (
                checkpoint(layer, *arguments, use_reentrant=False, preserve_rng_state=False)
                if recompute
                else layer(*arguments)
            )
        return self.norm(x)

    @staticmethod
    def decode_places(position: Tensor, cache: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Where a decode step writes its keys and what it may attend to, the same in every layer.
        position [B, 1] -> place [B * kv_heads], see Attention.decode, and a mask [B, 1, L] to add
        before the softmax, -inf beyond the row's own position."""
        kv_heads, length = cache.shape[3:5]
        batch = len(position)
        start = torch.arange(batch * kv_heads, device=position.device) * length
        place = (start.view(-1, kv_heads) + position).flatten()
        hidden_keys = torch.arange(length, device=position.device) > position[:, None]  # [B, 1, L]
        mask = torch.zeros(hidden_keys.shape, dtype=dtype, device=position.device)
        return place, mask.masked_fill_(hidden_keys, -torch.inf)


class Critic(nn.Module):
    """PPO's value function: a copy of the policy's body, and a scalar head that starts at zero (the
    paper is silent)."""

    def __init__(self, policy: Transformer) -> None:
        super().__init__()
        self.body = copy.deepcopy(policy)
        self.body.lm_head = None  # an untied head would never be used
        self.value = nn.Linear(policy.config["hidden_size"], 1, device=policy.head.device)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, T] padded on the right -> fp32 values [B, T-1]: column t is the value of the
        text up to token t, the state in which token t+1 is chosen (score's columns)."""
        position = torch.arange(tokens.shape[1] - 1, device=tokens.device)
        hidden = self.body(tokens[:, :-1], position.expand(len(tokens), -1))  # [B, T-1, width]
        # In fp32: values are compared with returns, and their differences are small.
        with torch.autocast(tokens.device.type, enabled=False):
            return self.value(hidden.float())[..., 0]


def logp_entropy(
    hidden: Tensor, head: Tensor, target: Tensor, temperature: float, entropy_grad: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probability of `target` and entropy (nats, full vocabulary) of softmax(logits /
    temperature), in fp32: H = logsumexp(z) - sum softmax(z) z.
    hidden [N, width], head [V, width], target [N] -> [N], [N]."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        # Cast here, once a chunk. Autocast would cast the head once for all chunks, and add up
        # their gradients in that bfloat16 copy.
        dtype = torch.get_autocast_dtype(device)
        hidden = hidden.to(dtype)
        head = head.to(dtype)
    z = F.linear(hidden, head).float() / temperature  # [N, V]
    lse = z.logsumexp(dim=-1)  # [N]
    # True alone would switch gradients on even under a caller's no_grad.
    with torch.set_grad_enabled(entropy_grad and torch.is_grad_enabled()):
        entropy = lse - ((z - lse[:, None]).exp() * z).sum(dim=-1)
    logp = z.gather(1, target[:, None])[:, 0] - lse
    return logp, entropy


def score(
    model: Transformer,
    tokens: Tensor,
    prompt_len: Tensor,
    total_len: Tensor,
    temperature: float,
    chunk: int = 2048,
    entropy_grad: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of every response token under the current policy.

    tokens [B, T] padded on the right, prompt_len, total_len [B] -> logp, entropy [B, T-1], fp32.
    Column t speaks of token t+1; both are 0 outside the response. The head runs over `chunk`
    response tokens at a time and again in the backward pass: logits [B, T, V] never exist. The
    entropy has a gradient only if `entropy_grad` (for its bonus)."""
    position = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    hidden = model(tokens, position)  # [B, T, width]

    # Only response tokens meet the head: N of them, end to end. Their places are looked up once,
    # because a GPU is waited for there.
    mask = response_mask(prompt_len, total_len, tokens.shape[1])  # [B, T-1]
    place = F.pad(mask, (0, 1)).flatten().nonzero()[:, 0]  # [N], in the B x T tokens
    rows = hidden.flatten(0, 1).index_select(0, place)  # [N, width]
    target = tokens.flatten()[place + 1]  # [N]
    logps = []
    entropies = []
    for some_rows, some_targets in zip(rows.split(chunk), target.split(chunk)):
        logp, entropy = checkpoint(
            logp_entropy,
            some_rows,
            model.head,
            some_targets,
            temperature,
            entropy_grad,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        logps.append(logp)
        entropies.append(entropy)

    zeros = torch.zeros(tokens.numel(), device=tokens.device)  # [B * T]
    logp = zeros.index_copy(0, place, torch.cat(logps)).view(tokens.shape)
    entropy = zeros.index_copy(0, place, torch.cat(entropies)).view(tokens.shape)
    return logp[:, :-1], entropy[:, :-1]


def count_parameters(config: dict) -> int:
    """Weights of a model of this config.json, without allocating it."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Transformer(config).parameters())


def load(
    path_or_hub_id: str,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[Transformer, object]:
    """A Hugging Face folder or hub id ("owner/name") -> (Transformer, tokenizer).
    FileNotFoundError or ValueError say in one sentence what is wrong."""
    pretrained = open_pretrained(path_or_hub_id)
    return load_weights(pretrained, device, dtype), pretrained.tokenizer


def load_weights(
    pretrained: Pretrained,
    device: str | torch.device,
    dtype: torch.dtype,
    sharded: bool = False,
) -> Transformer:
    """The model of an opened folder. Each weight is read into its place: it is in memory once, or
    `sharded`, a slice of it in each process (plumbing/shard.py)."""
    with torch.device("meta"):  # shapes only; what is not read below is an error
        model = Transformer(pretrained.config)
    model = model.to(dtype)
    if sharded:
        shard(model, device)
    model = model.to_empty(device=device)
    read_weights(pretrained.folder, model.state_dict())
    model.eos_ids = end_tokens(pretrained)
    return model


def make_critic(policy: Transformer) -> Critic:
    """A critic that starts from the policy's weights. If these are sliced, slice by slice: nothing
    whole is made."""
    if not is_sharded(policy):
        return Critic(policy)
    with torch.device("meta"):
        critic = Critic(Transformer(policy.config).to(policy.head.dtype))
    shard(critic, policy.head.device)
    critic.to_empty(device=policy.head.device)
    of_policy = policy.state_dict()
    for name, place in critic.body.state_dict().items():
        own_slice(place).copy_(own_slice(of_policy[name]))
    for parameter in critic.value.parameters():
        own_slice(parameter.detach()).zero_()
    critic.body.recompute = policy.recompute
    return critic
