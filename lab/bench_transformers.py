"""The same work with transformers' model: its `generate`, and the same loss written over it."""

from typing import Callable, Sequence

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from advantage import policy_loss, shape_with_entropy
from lab.bench_work import count_tokens, minibatches, wait_for_device
from model import Transformer
from plumbing.batch import collate
from plumbing.pretrained import named_as_in_transformers
from plumbing.settings import Settings as TrainSettings
from rollout import Episode

Cut = Callable[[Sequence[Episode]], list[list[int]]]  # an optimizer step -> its micro-batches


def peer_model(model: Transformer, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """transformers' model of the same weights."""
    peer = AutoModelForCausalLM.from_config(AutoConfig.for_model(**model.config)).float()
    peer.load_state_dict({"lm_head.weight": model.head} | named_as_in_transformers(model))
    peer.tie_weights()
    return peer.to(model.head.device, dtype)


def peer_generate(
    peer,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    eos: int | None,
    cache: str | None = None,
) -> int:
    """Samples a response per prompt, all of one length, in a static batch -> tokens up to each
    one's first end token."""
    ids = torch.tensor(prompts, device=peer.device)  # [B, P]
    peer.generation_config.eos_token_id = eos
    peer.generation_config.pad_token_id = 0
    generated = peer.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=new_tokens,
        cache_implementation=cache,
    )
    responses = generated[:, ids.shape[1] :].cpu()  # [B, R]
    if eos is None:
        return responses.numel()
    ended = responses == eos
    before_end = ended.int().cumsum(1).eq(0)
    return int(before_end.sum() + ended.any(1).sum())


def peer_generate_batches(
    peer,
    prompts: Sequence[Sequence[int]],
    samples: int,
    slots: int,
    new_tokens: int,
    eos: int,
) -> int:
    """`samples` responses per prompt, in static batches of `slots` -> their tokens."""
    each = slots // samples  # prompts in a batch
    tokens = 0
    for first in range(0, len(prompts), each):
        batch = [prompt for prompt in prompts[first : first + each] for _ in range(samples)]
        tokens += peer_generate(peer, batch, new_tokens, eos)
    return tokens


def peer_update(
    peer,
    optimizer: torch.optim.Optimizer,
    episodes: list[Episode],
    reward: Tensor,
    s: TrainSettings,
    cut: Cut,
) -> int:
    """bench_work.our_update over transformers' model."""
    for part, old_logp, advantage in minibatches(episodes, reward):
        denominator = count_tokens(part)
        for rows in cut(part):
            chosen = [part[i] for i in rows]
            loss = peer_loss(peer, chosen, old_logp[rows], advantage[rows], s, denominator)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), s.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
    wait_for_device(peer)
    return count_tokens(episodes)


def peer_loss(
    peer,
    episodes: Sequence[Episode],
    old_logp: Tensor,
    advantage: Tensor,
    s: TrainSettings,
    denominator: int,
) -> Tensor:
    """The policy loss of a micro-batch, with all its logits at once; old_logp, advantage [B, R]."""
    batch = collate(episodes, peer.device)
    column = torch.arange(batch.tokens.shape[1], device=peer.device)
    attention = column < batch.total_len[:, None]  # [B, T]
    output = peer(input_ids=batch.tokens, attention_mask=attention, use_cache=False)
    logits = output.logits[:, :-1].float() / s.temperature  # [B, T-1, V]
    logps = logits.log_softmax(-1)
    target = batch.tokens[:, 1:, None]
    logp = logps.gather(2, target)[..., 0]  # [B, T-1]
    constant = logps.detach()  # the entropy advantage has no gradient
    entropy = -(constant.exp() * constant).sum(-1)  # [B, T-1]

    plain = batch.align(advantage)
    shaped = shape_with_entropy(plain, entropy, s.alpha, s.kappa)
    old = batch.align(old_logp)
    loss, _ = policy_loss(
        logp, old, shaped, batch.mask, s.clip_low, s.clip_high, denominator=denominator
    )
    return loss
