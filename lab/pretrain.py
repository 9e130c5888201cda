"""How the embedded base model `base/` was made: next-token prediction on traces of random search."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from model import Transformer, save
from task import END, OPERATORS, Countdown, countdown_tokenizer

RESPONSE = 128                                # tokens a response may take, the end token included
PROMPT = 7
ATTEMPTS = 10                                 # more than fit into 128 tokens (an attempt takes 14 to 16)


def random_search(numbers: np.ndarray, targets: np.ndarray, count: int, rng: np.random.Generator, s,
                  vocabulary: dict[str, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    row = rng.integers(len(numbers), size=count)
    shuffle = lambda x: np.take_along_axis(x, rng.random(x.shape).argsort(-1), -1)
    asked, target = shuffle(numbers[row]), targets[row]                                 # [N, 4], [N]
    used = shuffle(np.repeat(asked[:, None], ATTEMPTS, axis=1))                         # [N, A, 4]
    word = lambda w: np.full((count, ATTEMPTS), vocabulary[w])
    digit = lambda x: x + vocabulary["0"]
    total, columns = used[..., 0], [digit(used[..., 0])]                                # [N, A]
    weights = np.array(s.operator_weights)
    for j in range(1, used.shape[-1]):
        n = used[..., j]
        exact = total % n == 0
        result = np.stack([total + n, total - n, total * n, np.where(exact, total // n, -1)], -1)   # [N, A, 4]
        chance = np.where((result >= 0) & (result <= 99), weights, 0.0)
        choice = (chance / rng.exponential(size=chance.shape)).argmax(-1)               # [N, A]
        total = np.take_along_axis(result, choice[..., None], -1)[..., 0]
        columns += [choice + vocabulary[OPERATORS[0]], digit(n), word("="), digit(total)]
    hit, checked = total == target[:, None], rng.random(total.shape) < s.check
    stop = rng.random(total.shape) < np.where(checked, np.where(hit, 1.0, s.give_up), s.blind)
    last = np.where(stop.any(1), stop.argmax(1), ATTEMPTS)                              # [N]
    columns += [np.where(checked, word("vs"), -1), np.where(checked, digit(target)[:, None], -1),
                np.where(stop, word("so"), word("wait"))]
    body = np.stack(columns, -1)                                                        # [N, A, 16]
    body[np.arange(ATTEMPTS) > last[:, None]] = -1
    body = np.concatenate([body.reshape(count, -1), np.full((count, 1), vocabulary[END])], 1)
    kept = body >= 0
    length = kept.sum(1)
    solved = (length <= RESPONSE) & hit[np.arange(count), np.minimum(last, ATTEMPTS - 1)]
    body = np.take_along_axis(body, (~kept).argsort(1, kind="stable"), 1)[:, :RESPONSE].clip(0)
    prompt = np.concatenate([digit(asked), np.tile([vocabulary["->"]], (count, 1)), digit(target)[:, None],
                             np.tile([vocabulary["?"]], (count, 1))], 1)
    keep = solved | (rng.random(count) < s.keep_failed)
    return np.concatenate([prompt, body], 1)[keep], PROMPT + np.minimum(length, RESPONSE)[keep], solved[keep]


@dataclass
class Settings:
    out: str = "base"
    seed: int = 0
    steps: int = 2200
    batch: int = 128
    lr: float = 4e-3
    warmup: int = 100
    layers: int = 4
    width: int = 96
    inner: int = 256
    heads: int = 4
    kv_heads: int = 2
    threads: int = 1
    operator_weights: tuple = (1., 1., 1., 1.)
    check: float = 0.6
    give_up: float = 0.15
    blind: float = 0.5
    keep_failed: float = 0.3


def batches(s, vocabulary):
    """Endless [batch, length] batches of traces of similar length."""
    train = Countdown().train
    numbers = np.array([[int(w) for w in p.prompt.split("->")[0].split()] for p in train])
    targets = np.array([int(p.answer) for p in train])
    rng = np.random.default_rng(s.seed)
    while True:
        pool = [random_search(numbers, targets, 16384, rng, s, vocabulary) for _ in range(2)]
        tokens, length = (np.concatenate([p[i] for p in pool]) for i in (0, 1))
        order = np.argsort(length + rng.random(len(length)), kind="stable")
        groups = [order[i:i + s.batch] for i in range(0, len(order) - s.batch + 1, s.batch)]
        for g in rng.permutation(len(groups)):
            index = groups[g]
            longest = length[index].max()
            yield torch.from_numpy(tokens[index, :longest]), torch.from_numpy(length[index])


def build(s):
    tokenizer = countdown_tokenizer()
    config = dict(architectures=["Qwen2ForCausalLM"], model_type="qwen2", vocab_size=len(tokenizer), hidden_size=s.width,
                  intermediate_size=s.inner, num_hidden_layers=s.layers, num_attention_heads=s.heads,
                  num_key_value_heads=s.kv_heads, max_position_embeddings=256, rms_norm_eps=1e-6, hidden_act="silu",
                  rope_theta=10000.0, tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id,
                  bos_token_id=None, pad_token_id=tokenizer.pad_token_id)
    torch.manual_seed(s.seed)
    model = Transformer(config)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.5 * s.width ** -0.5 if "embed" in name else
                                  p.shape[1] ** -0.5 * (0.5 if "o_proj" in name or "down" in name else 1))
        elif name.endswith("bias"):
            torch.nn.init.zeros_(p)
    model.eos_ids = (tokenizer.eos_token_id,)
    return model, tokenizer


def pretrain(s):
    model, tokenizer = build(s)
    print(sum(p.numel() for p in model.parameters()), "parameters", s, flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=s.lr, betas=(0.9, 0.98), weight_decay=0.01)
    stream = batches(s, tokenizer.get_vocab())
    run, t0 = [], time.time()
    for step in range(s.steps):
        lr = s.lr * min((step + 1) / s.warmup, 0.5 * (1 + math.cos(math.pi * step / s.steps)) + 0.01)
        for g in optimizer.param_groups:
            g["lr"] = lr
        tokens, length = next(stream)
        position = torch.arange(tokens.shape[1])
        hidden = model(tokens, position.expand_as(tokens))
        mask = (position[:-1] >= PROMPT - 1) & (position[:-1] < length[:, None] - 1)
        loss = F.cross_entropy(F.linear(hidden[:, :-1][mask], model.head), tokens[:, 1:][mask])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        run.append(loss.item())
        if step % 100 == 99:
            print(step + 1, round(float(np.mean(run[-100:])), 4), round(time.time() - t0), flush=True)
            if step % 1000 == 999:
                save(model, tokenizer, s.out)
    save(model, tokenizer, s.out)


if __name__ == "__main__":
    import sys
    s = Settings()
    for a in sys.argv[1:]:
        k, v = a.split("=")
        setattr(s, k, type(getattr(s, k))(v) if not isinstance(getattr(s, k), tuple) else tuple(map(float, v.split(","))))
    torch.set_num_threads(s.threads)
    pretrain(s)
