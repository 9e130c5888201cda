"""Answers to one problem in one sequence, behind their prompt, which is computed once.

`model.score` pads answers into rows and computes the prompt anew for each. Here every answer sees the
prompt and itself: the same numbers, but for rounding, and less work where prompts are long and have
many answers (lab.effect_methods on a real model). train.py does without: the mask, of all tokens by
all tokens, is one that flash attention does not take.

    B answers to one problem   S tokens: the prompt's, then those of each answer in turn
    R tokens of the longest answer
"""

from typing import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from model import Attention, Transformer, logp_entropy, rope_frequency
from rollout import Episode


def score_group(
    model: Transformer, episodes: Sequence[Episode], temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy (nats, with its gradient) of every response token, [B, R] each, 0
    beyond an answer's end. The logits of all response tokens are there at once. ValueError if the
    prompts differ."""
    prompt = episodes[0].prompt
    if not all(torch.equal(episode.prompt, prompt) for episode in episodes):
        raise ValueError("the answers are to different prompts")
    device = model.head.device
    lengths = [len(episode.response) for episode in episodes]
    responses = [episode.response for episode in episodes]
    tokens = torch.cat((prompt, *responses)).to(device)  # [S]
    position, before, visible = layout(len(prompt), lengths)
    hidden = forward(model, tokens, position.to(device), visible.to(device))  # [S, width]

    rows = hidden[before.to(device)]  # [all response tokens, width]
    target = tokens[len(prompt) :]
    logp, entropy = logp_entropy(rows, model.head, target, temperature, entropy_grad=True)
    logp = pad_sequence(logp.split(lengths), batch_first=True)  # [B, R]
    entropy = pad_sequence(entropy.split(lengths), batch_first=True)
    return logp, entropy


def layout(prompt_length: int, lengths: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Positions [S]; for every response token the index of the token before it, [S - prompt]; and
    what each token attends to, bool [S, S]."""
    places = [torch.arange(length) for length in (prompt_length, *lengths)]
    position = torch.cat((places[0], *[prompt_length + place for place in places[1:]]))
    owner = torch.arange(len(places)).repeat_interleave(torch.tensor([prompt_length, *lengths]))

    index = torch.arange(len(position))
    is_first = position == prompt_length
    before = torch.where(is_first, prompt_length - 1, index - 1)[prompt_length:]

    is_earlier = index <= index[:, None]  # [S, S]: row by row what is not behind it
    of_same_answer = owner == owner[:, None]
    of_prompt = owner == 0
    return position, before, is_earlier & (of_same_answer | of_prompt)


def forward(model: Transformer, tokens: Tensor, position: Tensor, visible: Tensor) -> Tensor:
    """Transformer.forward of one sequence with a mask: tokens, position [S], visible [S, S] -> hidden
    states after the last norm [S, width]."""
    x = model.embed_tokens(tokens)[None]  # [1, S, width]
    angle = position[:, None] * rope_frequency(model.config, tokens.device)  # [S, d/2]
    cos = angle.cos().to(x.dtype)
    sin = angle.sin().to(x.dtype)
    for layer in model.layers:
        x = x + attend(layer.self_attn, layer.input_layernorm(x), cos, sin, visible)
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.norm(x)[0]


def attend(attention: Attention, x: Tensor, cos: Tensor, sin: Tensor, visible: Tensor) -> Tensor:
    """x [1, S, width] -> the same shape."""
    q, k = attention.queries_and_keys(x, cos, sin)  # [1, heads, S, d], [1, kv_heads, S, d]
    v = attention.split_heads(attention.v_proj(x))
    # Not every kernel that takes a mask knows grouped heads.
    group = attention.heads // attention.kv_heads
    k = k.repeat_interleave(group, dim=1)  # [1, heads, S, d]
    v = v.repeat_interleave(group, dim=1)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    return attention.o_proj(y.transpose(1, 2).flatten(2))
