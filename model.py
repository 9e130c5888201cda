"""Qwen2, Qwen3 and Llama 3 in plain PyTorch, and everything that touches their weights. Read after train.py.

Module and parameter names are Hugging Face's, so that a checkpoint loads without a translation table. `score` is where
the paper's H_t comes from: the entropy over the full vocabulary, of the *current* policy, in the same forward pass that
computes the policy loss.
Departs from Hugging Face: no attention mask argument. Sequences are padded on the right only, where causality already
hides the padding; the lengths say which tokens count.
"""

import copy
import json
import math
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from checkpoint import read_json, whole

SUPPORTED = ("qwen2", "qwen3", "llama")


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, Hugging Face's layout: the two halves of a head are the pairs.
    x [B, heads, T, d]; cos, sin [B, 1, T, d/2]."""
    a, b = x.chunk(2, dim=-1)                                       # [B, heads, T, d/2] each
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Attention(nn.Module):
    """Grouped-query attention: query heads share a smaller number of key and value heads."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        width, self.head_dim, kind = config["hidden_size"], head_size(config), config["model_type"]
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.q_proj = nn.Linear(width, self.heads * self.head_dim, bias=kind == "qwen2")
        self.k_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=kind == "qwen2")
        self.v_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=kind == "qwen2")
        self.o_proj = nn.Linear(self.heads * self.head_dim, width, bias=False)
        norm = lambda: nn.RMSNorm(self.head_dim, config["rms_norm_eps"]) if kind == "qwen3" else None
        self.q_norm, self.k_norm = norm(), norm()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Tensor | None, place: Tensor | None,
                mask: Tensor | None) -> Tensor:
        batch, time, _ = x.shape
        split = lambda y, heads: y.view(batch, time, heads, self.head_dim).transpose(1, 2)
        qk = split(torch.cat((self.q_proj(x), self.k_proj(x)), dim=-1), self.heads + self.kv_heads)
        if self.q_norm is not None:
            q, k = qk.split((self.heads, self.kv_heads), dim=1)
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), dim=1)
        q, k = rotate(qk, cos, sin).split((self.heads, self.kv_heads), dim=1)   # [B, heads, T, d], [B, kv_heads, T, d]
        v = split(self.v_proj(x), self.kv_heads)                    # [B, kv_heads, T, d]
        if cache is not None and mask is None:                      # a prefill: rows start at position 0
            cache[0, :, :, :time], cache[1, :, :, :time] = k, v
        y = (F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True) if mask is None
             else self.decode(q, k, v, cache, place, mask))
        return self.o_proj(y.transpose(1, 2).reshape(batch, time, -1))

    def decode(self, q: Tensor, k: Tensor, v: Tensor, cache: Tensor, place: Tensor, mask: Tensor) -> Tensor:
        """One new token per row against the whole cache, hidden beyond the row's own position. The group
        of query heads of one key head becomes the rows of one matrix product: two batched products in all."""
        for kind, new in enumerate((k, v)):                         # cache [2, B, kv_heads, L, d]
            cache[kind].view(-1, self.head_dim).index_copy_(0, place, new.reshape(-1, self.head_dim))
        keys, values = cache.flatten(1, 2)                          # [B * kv_heads, L, d] each
        q = q.reshape(len(keys), -1, self.head_dim) * self.head_dim ** -0.5   # [B * kv_heads, group, d]
        weight = torch.bmm(q, keys.transpose(1, 2)).view(len(k), self.heads, -1) + mask      # [B, heads, L]
        weight = weight.softmax(dim=-1).view(len(keys), -1, keys.shape[1])    # sums in fp32 whatever the dtype
        return torch.bmm(weight, values).view(len(k), self.heads, 1, -1)


class MLP(nn.Module):
    def __init__(self, config: dict) -> None:
        super().__init__()
        width, inner = config["hidden_size"], config["intermediate_size"]
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
        x = x + self.self_attn(self.input_layernorm(x), *attention_arguments)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """`config` is the dictionary of a Hugging Face config.json; `save` writes it back, but for the dtype.
    ValueError for an architecture this file does not implement."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        check_supported(config)
        self.config = config
        self.eos_ids: tuple[int, ...] = ()
        self.recompute = False                  # keep only each layer's input for the backward pass
        table = torch.empty(config["vocab_size"], config["hidden_size"]).uniform_(-1, 1)    # normal numbers cost a second on meta
        self.embed_tokens = nn.Embedding(*table.shape, _weight=table)
        self.layers = nn.ModuleList(Block(config) for _ in range(config["num_hidden_layers"]))
        self.norm = nn.RMSNorm(config["hidden_size"], config["rms_norm_eps"])
        if not config.get("tie_word_embeddings", False):
            self.lm_head = nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)

    @property
    def head(self) -> Tensor:
        """[vocabulary, width]"""
        return self.embed_tokens.weight if self.config.get("tie_word_embeddings", False) else self.lm_head.weight

    def new_cache(self, rows: int, length: int) -> Tensor:
        """Keys and values: [layers, 2, rows, kv_heads, length, head_dim]. Zeros, not empty: masked positions
        are multiplied by a weight of 0, and 0 * nan is nan."""
        attention = self.layers[0].self_attn
        return self.head.new_zeros(len(self.layers), 2, rows, attention.kv_heads, length, attention.head_dim)

    def forward(self, tokens: Tensor, position: Tensor, cache: Tensor | None = None) -> Tensor:
        """tokens, position [B, T] -> hidden states after the last norm [B, T, width]. Without a cache: causal attention
        over T. With one and T > 1: the same, and keys and values are written to cache positions 0..T-1. With one and
        T = 1: each row's token goes to its own position and attends to the cache up to there."""
        angle = position[:, None, :, None] * rope_frequency(self.config, tokens.device)     # [B, 1, T, d/2], fp32
        x = self.embed_tokens(tokens)                                               # [B, T, width]
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        mask = place = None
        if cache is not None and tokens.shape[1] == 1:
            kv_heads, length = cache.shape[3:5]
            rows = torch.arange(len(tokens) * kv_heads, device=tokens.device).view(-1, kv_heads) * length
            place = (rows + position).flatten()                     # of the new keys, rows laid end to end
            hidden_keys = torch.arange(length, device=tokens.device) > position[:, None]            # [B, 1, L]
            mask = x.new_zeros(hidden_keys.shape).masked_fill_(hidden_keys, -torch.inf)
        recompute = self.recompute and torch.is_grad_enabled()
        for i, layer in enumerate(self.layers):
            arguments = (cos, sin, None if cache is None else cache[i], place, mask)
            x = checkpoint(layer, x, *arguments, use_reentrant=False) if recompute else layer(x, *arguments)
        return self.norm(x)


class Critic(nn.Module):
    """PPO's value function: a copy of the policy's body and a scalar head that starts at zero (the paper is silent)."""

    def __init__(self, policy: Transformer) -> None:
        super().__init__()
        self.body = copy.deepcopy(policy)
        self.body.lm_head = None                                    # an untied head would never be used
        self.value = nn.Linear(policy.config["hidden_size"], 1, device=policy.head.device)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, T] padded on the right -> fp32 values [B, T-1]: column t is the value of the text up to token
        t, the state in which token t+1 is chosen (score's columns)."""
        position = torch.arange(tokens.shape[1] - 1, device=tokens.device)
        hidden = self.body(tokens[:, :-1], position.expand(len(tokens), -1))            # [B, T-1, width]
        with torch.autocast(tokens.device.type, enabled=False):
            return self.value(hidden.float())[..., 0]


def head_size(config: dict) -> int:
    """Qwen3's default is 128, whatever the width."""
    return config.get("head_dim") or (128 if config["model_type"] == "qwen3"
                                      else config["hidden_size"] // config["num_attention_heads"])


def rope_of(config: dict) -> dict:
    """transformers 5 has it all in rope_parameters, earlier versions in rope_scaling and rope_theta."""
    rope = (config.get("rope_scaling") or {}) | (config.get("rope_parameters") or {})
    return {"rope_theta": config.get("rope_theta", 10000.0), "rope_type": rope.get("type", "default")} | rope


def rope_frequency(config: dict, device: torch.device) -> Tensor:
    """Radians per position of each pair of a head's numbers, fp32 [d/2]. Llama 3.1's scaling: waves that are long
    against the context of pre-training are stretched by a factor, short ones are kept, those between blend."""
    half, rope = head_size(config) // 2, rope_of(config)
    frequency = float(rope["rope_theta"]) ** -(torch.arange(half, device=device, dtype=torch.float32) / half)
    if rope["rope_type"] == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        waves = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)     # in that context
        kept = ((waves - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (kept + (1 - kept) / rope["factor"])
    return frequency


def check_supported(config: dict) -> None:
    if config.get("model_type") not in SUPPORTED:
        raise ValueError(f"model type {config.get('model_type')!r} is not supported; supported: {', '.join(SUPPORTED)}")
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
              "num_key_value_heads", "rms_norm_eps")
    if missing := [name for name in needed if name not in config]:
        raise ValueError(f"the model's config.json lacks {', '.join(missing)}")
    rope, activation = rope_of(config)["rope_type"], config.get("hidden_act", "silu")
    sliding = config.get("use_sliding_window") or set(config.get("layer_types") or ()) - {"full_attention"}
    unusual = {"sliding-window attention": sliding,
               "biases": config["model_type"] != "qwen2" and (config.get("attention_bias") or config.get("mlp_bias")),
               f"RoPE scaling {rope!r}": rope not in ("default", "llama3"),
               f"activation {activation!r}": activation != "silu"}
    if found := [name for name, present in unusual.items() if present]:
        raise ValueError(f"this {config['model_type']} checkpoint uses {found[0]}, which model.py does not implement")


def logp_entropy(hidden: Tensor, head: Tensor, target: Tensor, temperature: float,
                 entropy_grad: bool = False) -> tuple[Tensor, Tensor]:
    """Log-probability of `target` and entropy (nats, full vocabulary) of softmax(logits / temperature), in fp32.
    hidden [N, width], head [V, width], target [N] -> [N], [N]. H = logsumexp(z) - sum softmax(z) z."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):     # cast here: autocast's cached copy would sum the chunks' gradients in bf16
        hidden, head = (x.to(torch.get_autocast_dtype(kind)) for x in (hidden, head))
    z = F.linear(hidden, head).float() / temperature                # [N, V]
    lse = z.logsumexp(dim=-1)                                       # [N]
    with torch.set_grad_enabled(entropy_grad and torch.is_grad_enabled()):
        entropy = lse - ((z - lse[:, None]).exp() * z).sum(dim=-1)
    return z.gather(1, target[:, None])[:, 0] - lse, entropy


def score(model: Transformer, tokens: Tensor, prompt_len: Tensor, total_len: Tensor, temperature: float,
          chunk: int = 2048, entropy_grad: bool = False) -> tuple[Tensor, Tensor]:
    """tokens [B, T] padded on the right, prompt_len, total_len [B] -> logp, entropy [B, T-1], fp32. Column t speaks of
    token t+1; both are 0 outside the response. The head runs over `chunk` response tokens at a time and again in the
    backward pass: logits [B, T, V] never exist. The entropy has a gradient only if `entropy_grad` (for its bonus)."""
    hidden = model(tokens, torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens))   # [B, T, width]
    mask = response_mask(prompt_len, total_len, tokens.shape[1])                        # [B, T-1]
    rows, target = hidden[:, :-1][mask], tokens[:, 1:][mask]                            # [N, width], [N]
    pieces = [checkpoint(logp_entropy, r, model.head, t, temperature, entropy_grad, use_reentrant=False)
              for r, t in zip(rows.split(chunk), target.split(chunk))]
    logp, entropy = (torch.cat(x) for x in zip(*pieces))                                # [N], [N]
    empty = torch.zeros(mask.shape, device=tokens.device)                               # [B, T-1]
    return empty.masked_scatter(mask, logp), empty.masked_scatter(mask, entropy)


def response_mask(prompt_len: Tensor, total_len: Tensor, length: int) -> Tensor:
    """[B], [B] -> bool [B, length-1]: column t is True where token t+1 belongs to the response. From
    lengths only, so that a sampled end token counts, whatever its id and whatever the padding is."""
    column = torch.arange(length - 1, device=prompt_len.device)
    return (column >= prompt_len[:, None] - 1) & (column < total_len[:, None] - 1)


def load(path_or_hub_id: str, device: str | torch.device = "cpu",
         dtype: torch.dtype = torch.float32) -> tuple[Transformer, object]:
    """A Hugging Face folder or hub id ("owner/name") -> (Transformer, tokenizer). Each weight is read from safetensors
    into its place: it is in memory once. FileNotFoundError or ValueError say in one sentence what is wrong."""
    folder, config, tokenizer = opened(path_or_hub_id)
    with torch.device("meta"):                                      # shapes only; what is not read below is an error
        model = Transformer(config)
    wanted = dict(model.to(dtype).to_empty(device=device).state_dict())
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safetensors.safe_open(file, "pt") as saved:
                for name in saved.keys():
                    new, place = saved.get_tensor(name), wanted.pop(name.removeprefix("model."), None)
                    if place is None and name.endswith(("lm_head.weight", "rotary_emb.inv_freq")):
                        continue            # some tied checkpoints store the head too, old ones RoPE's frequencies
                    if place is None:
                        raise ValueError(f"{file} has a tensor {name} that config.json does not call for")
                    if place.shape != new.shape:
                        raise ValueError(f"{name} in {file} is {(*new.shape,)}, config.json wants {(*place.shape,)}")
                    place.copy_(new)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{file} is not a readable safetensors file ({error})") from None
    if wanted:
        raise ValueError(f"{folder} lacks {len(wanted)} tensors, {min(wanted)} among them; only safetensors are read")
    generation = folder / "generation_config.json"
    eos = read_json(generation).get("eos_token_id") if generation.exists() else None
    eos = next((e for e in (eos, config.get("eos_token_id"), tokenizer.eos_token_id) if e is not None), None)
    if eos is None:
        raise ValueError(f"{folder} names no end-of-sequence token")
    model.eos_ids = tuple(eos) if isinstance(eos, list) else (eos,)
    return model, tokenizer


def opened(path_or_hub_id: str) -> tuple[Path, dict, object]:
    """A model without its weights: its folder, config.json and tokenizer."""
    from transformers import PreTrainedTokenizerFast

    folder = find_folder(path_or_hub_id)
    config = read_json(folder / "config.json")
    if "model_type" not in config:
        raise ValueError(f"{folder}/config.json names no model type; a run's folder holds a model once a step saved one")
    check_supported(config)
    if not (folder / "tokenizer.json").exists():
        raise FileNotFoundError(f"{folder} has no tokenizer.json")
    # Not AutoTokenizer: for model_type qwen2 it installs Qwen2's byte-level rules whatever tokenizer.json says.
    return folder, config, PreTrainedTokenizerFast.from_pretrained(folder)


def find_folder(path_or_hub_id: str) -> Path:
    for folder in (Path(path_or_hub_id, "model"), Path(path_or_hub_id)):    # of a run folder, its trained model
        if (folder / "config.json").exists():
            return folder
    if folder.is_dir():
        raise FileNotFoundError(f"{folder} is no model folder: it has no config.json")
    if path_or_hub_id.count("/") != 1 or path_or_hub_id.startswith(("/", ".", "~")) or folder.parent.exists():
        raise FileNotFoundError(f"there is no model folder {path_or_hub_id}")
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(path_or_hub_id, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"]))
    except Exception as error:                                      # offline, unknown, gated: each its own type
        raise FileNotFoundError(f"there is no folder {path_or_hub_id}, and the Hugging Face hub did not give a "
                                f"model of that name ({type(error).__name__})") from None


def save(model: Transformer, tokenizer, directory: str | Path) -> None:
    """Writes what transformers' from_pretrained loads, wholly or not at all (checkpoint.whole). OSError if it cannot."""
    weights = {name if name.startswith("lm_head") else "model." + name: tensor.detach().cpu().contiguous()
               for name, tensor in model.state_dict().items()}
    dtype = str(model.head.dtype).removeprefix("torch.")
    config = {key: value for key, value in model.config.items() if key != "torch_dtype"} | {"dtype": dtype}
    eos = model.eos_ids[0] if len(model.eos_ids) == 1 else list(model.eos_ids)
    with whole(Path(directory)) as fresh:
        fresh.mkdir()
        safetensors.torch.save_file(weights, fresh / "model.safetensors", metadata={"format": "pt"})
        for name, content in (("config.json", config), ("generation_config.json", {"eos_token_id": eos})):
            (fresh / name).write_text(json.dumps(content, indent=2) + "\n")
        tokenizer.save_pretrained(fresh)
