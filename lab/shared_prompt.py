"""Scores answers to one problem, whose prompt is computed once.

`model.score` pads answers into rows and computes the prompt anew in each. Here the prompt is one row
and the answers are others, which attend to its keys and values: the same numbers, but for rounding,
and less work where prompts are long and have many answers (lab.effect_methods on a real model).
train.py does without: its micro-batches mix problems.

    B answers to one problem   P tokens of the prompt   R of the longest answer
    d numbers in an attention head
"""

from typing import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from model import Attention, Transformer, logp_entropy, rope_frequency
from plumbing.batch import pad_responses
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
    responses, mask = pad_responses([episode.response for episode in episodes])  # [B, R]
    responses = responses.to(device)
    mask = mask.to(device)
    of_prompt, of_answers = forward(model, prompt.to(device), responses)

    # The prompt's last token speaks of an answer's first, that of the next, and so on.
    last = of_prompt[-1].expand(len(episodes), 1, -1)
    hidden = torch.cat((last, of_answers[:, :-1]), dim=1)  # [B, R, width]
    target = responses[mask]  # [N]
    logp, entropy = logp_entropy(hidden[mask], model.head, target, temperature, entropy_grad=True)
    zeros = torch.zeros(mask.shape, device=device)
    return zeros.masked_scatter(mask, logp), zeros.masked_scatter(mask, entropy)


def forward(model: Transformer, prompt: Tensor, responses: Tensor) -> tuple[Tensor, Tensor]:
    """prompt [P], responses [B, R] -> hidden states after the last norm, [P, width] and
    [B, R, width]."""
    p = len(prompt)
    r = responses.shape[1]
    x = model.embed_tokens(prompt)[None]  # [1, P, width]
    y = model.embed_tokens(responses)  # [B, R, width]
    position = torch.arange(p + r, device=prompt.device)
    angle = position[:, None] * rope_frequency(model.config, prompt.device)  # [P + R, d/2]
    cos = angle.cos().to(x.dtype)
    sin = angle.sin().to(x.dtype)
    for layer in model.layers:
        of_prompt, of_answers = attend(
            layer.self_attn, layer.input_layernorm(x), layer.input_layernorm(y), cos, sin
        )
        x = x + of_prompt
        y = y + of_answers
        x = x + layer.mlp(layer.post_attention_layernorm(x))
        y = y + layer.mlp(layer.post_attention_layernorm(y))
    return model.norm(x)[0], model.norm(y)


def attend(
    attention: Attention, x: Tensor, y: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """The prompt x [1, P, width] to itself, the answers y [B, R, width] to it and to themselves ->
    the same shapes."""
    p = x.shape[1]
    batch, r, _ = y.shape
    q, k = attention.queries_and_keys(x, cos[:p], sin[:p])  # [1, heads, P, d], [1, kv_heads, P, d]
    v = attention.split_heads(attention.v_proj(x))
    of_prompt = attention.attend(q, k, v)  # [1, heads, P, d]

    own_q, own_k = attention.queries_and_keys(y, cos[p:], sin[p:])
    own_v = attention.split_heads(attention.v_proj(y))
    # Not every kernel that takes a mask knows grouped heads.
    group = attention.heads // attention.kv_heads
    keys = torch.cat((k.expand(batch, -1, -1, -1), own_k), dim=2).repeat_interleave(group, dim=1)
    values = torch.cat((v.expand(batch, -1, -1, -1), own_v), dim=2).repeat_interleave(group, dim=1)
    visible = torch.ones(r, p + r, dtype=torch.bool, device=y.device).tril(diagonal=p)
    of_answers = F.scaled_dot_product_attention(own_q, keys, values, attn_mask=visible)

    of_prompt = attention.o_proj(of_prompt.transpose(1, 2).flatten(2))
    of_answers = attention.o_proj(of_answers.transpose(1, 2).flatten(2))
    return of_prompt, of_answers
