"""How the embedded base model `base/` was made: next-token prediction on traces of random search.

    OMP_NUM_THREADS=1 python -m lab.pretrain     makes the model again, in runs/base: 48 minutes on one core of an AMD EPYC
    python -m lab.pretrain --report base         prints such figures for any model folder:

        Pass@1                            0.0604        Pass@256                          1.0000
        steps with wrong arithmetic       0.0006        attempts with wrong operands      0.0022
        so after a checked hit            0.9996        so after a checked miss           0.1433
        so after an unchecked attempt     0.5026        attempts that hit                 0.0239
        attempts per response             3.1607        checks per response               1.9166
        responses cut at the limit        0.0610        tokens per response              49.3039

A trace is a countdown prompt and a response that searches blindly: every attempt takes the numbers in a random order and
at each step one of the operators that keep the total a whole number in 0..99. 60 % of attempts are checked (`vs 23`, so
that the model can learn to compare its total with the target, which stands next to it). A checked hit is followed by
`so`, a checked miss mostly by `wait` and sometimes (15 %) by giving up with `so`; an unchecked attempt by `wait` or a
blind `so`, evenly. A trace that fails, or is cut at 128 tokens (so that all positions are trained), is kept with a
probability of 30 %. Only training problems are used, those with few solutions too, in any order of their numbers.
"""

import math
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from evaluate import check_numbers, count_solved, flag, parse_flags, pass_table, pick_device
from model import Transformer, load, response_mask, save
from rollout import Episode, Sampler
from task import LARGEST, NUMBER, OPERATORS, Countdown, Problem, apply_operator, numbers_of

END = "<eos>"
PROMPT, RESPONSE = 7, 128                   # tokens of a prompt and of the longest response, its end token included
ATTEMPTS = 10                               # drawn per trace; 10 of 14 to 16 tokens always fill 128


@dataclass
class Settings:
    report: str = flag("", "only print the figures of this model folder")
    out: str = flag("runs/base", "folder to write; it must not exist")
    seed: int = flag(0, "of weights and traces", least=0)
    steps: int = flag(8000, "optimizer steps")
    batch: int = flag(128, "traces per step")
    lr: float = flag(4e-3, "AdamW's largest learning rate; rises over --warmup, then falls along a cosine to 0")
    warmup: int = flag(100, "steps")
    layers: int = flag(4, "decoder layers")
    width: int = flag(96, "hidden size")
    inner: int = flag(256, "hidden size of the MLP")
    heads: int = flag(4, "query heads")
    kv_heads: int = flag(2, "key and value heads")
    check: float = flag(0.6, "share of attempts that are checked")
    give_up: float = flag(0.15, "chance of `so` after a checked miss")
    blind: float = flag(0.5, "chance of `so` after an unchecked attempt")
    keep_failed: float = flag(0.3, "share of failed traces that are kept")


def random_search(problems: tuple[np.ndarray, np.ndarray], count: int, rng: np.random.Generator, s: Settings,
                  vocabulary: dict[str, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws `count` traces at once and drops most failed ones. problems: numbers [P, n], targets [P] ->
    tokens [N, T], total length [N], solved [N], for the N that are kept. Padding is id 0."""
    shuffle = lambda x: np.take_along_axis(x, rng.random(x.shape).argsort(-1), -1)
    row = rng.integers(len(problems[0]), size=count)
    asked, target = shuffle(problems[0][row]), problems[1][row]                         # [N, n], [N]
    used = shuffle(np.repeat(asked[:, None], ATTEMPTS, axis=1))                         # [N, A, n]
    word = lambda w: np.full((count, ATTEMPTS), vocabulary[w])
    number = lambda x: x + vocabulary["0"]

    total, columns = used[..., 0], [number(used[..., 0])]                               # [N, A], attempt by attempt
    for n in np.moveaxis(used[..., 1:], -1, 0):
        quotient = np.where(total % n == 0, total // n, -1)
        results = np.stack([total + n, total - n, total * n, quotient], -1)             # [N, A, operators]
        allowed = (results >= 0) & (results <= LARGEST)
        choice = np.where(allowed, rng.random(results.shape), -1).argmax(-1)            # [N, A]
        total = np.take_along_axis(results, choice[..., None], -1)[..., 0]
        columns += [choice + vocabulary[OPERATORS[0]], number(n), word("="), number(total)]

    hit, checked = total == target[:, None], rng.random(total.shape) < s.check
    stop = rng.random(total.shape) < np.where(checked, np.where(hit, 1.0, s.give_up), s.blind)
    last = np.where(stop.any(1), stop.argmax(1), ATTEMPTS - 1)                          # [N], the attempt that commits
    columns += [np.where(checked, word("vs"), -1), np.where(checked, number(target)[:, None], -1),
                np.where(stop, word("so"), word("wait"))]
    body = np.stack(columns, -1)                                                        # [N, A, tokens], -1: none
    body[np.arange(ATTEMPTS) > last[:, None]] = -1
    body = np.concatenate([body.reshape(count, -1), np.full((count, 1), vocabulary[END])], 1)
    length = (body >= 0).sum(1)
    body = np.take_along_axis(body, (body < 0).argsort(1, kind="stable"), 1)[:, :RESPONSE].clip(0)
    solved = (length <= RESPONSE) & hit[np.arange(count), last]

    fixed = lambda w: np.full((count, 1), vocabulary[w])
    prompt = np.concatenate([number(asked), fixed("->"), number(target)[:, None], fixed("?")], 1)
    keep = solved | (rng.random(count) < s.keep_failed)
    return np.concatenate([prompt, body], 1)[keep], PROMPT + length.clip(max=RESPONSE)[keep], solved[keep]


def batches(s: Settings, vocabulary: dict[str, int]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless fresh batches of traces of similar length: tokens [B, T], total length [B]."""
    train = Countdown(solutions=1).train
    problems = np.array([numbers_of(p.prompt) for p in train]), np.array([int(p.answer) for p in train])
    rng = np.random.default_rng(s.seed)
    while True:
        tokens, length, _ = random_search(problems, 40 * 3 * s.batch, rng, s, vocabulary)
        order = np.argsort(length + rng.random(len(length)))            # random among equal lengths
        # What does not fill a last batch, all of it traces cut at the limit, is dropped.
        groups = [order[i:i + s.batch] for i in range(0, len(order) - s.batch + 1, s.batch)]
        for rows in (groups[g] for g in rng.permutation(len(groups))):
            yield torch.from_numpy(tokens[rows, :length[rows].max()]), torch.from_numpy(length[rows])


def countdown_tokenizer():
    """A word-level Hugging Face fast tokenizer. Padding is the end token on purpose: masks come from lengths here, never
    from ids, and the default run shows that nothing depends on a pad token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    words = [END, "<unk>", *NUMBER, *OPERATORS, "=", "vs", "wait", "so", "->", "?"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END, unk_token="<unk>",
                                   clean_up_tokenization_spaces=False)


def fresh_model(s: Settings) -> tuple[Transformer, object]:
    tokenizer = countdown_tokenizer()
    model = Transformer(dict(
        architectures=["Qwen2ForCausalLM"], model_type="qwen2", vocab_size=len(tokenizer), hidden_size=s.width,
        intermediate_size=s.inner, num_hidden_layers=s.layers, num_attention_heads=s.heads, num_key_value_heads=s.kv_heads,
        hidden_act="silu", max_position_embeddings=256, rms_norm_eps=1e-6, rope_theta=10000.0, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    model.eos_ids = (tokenizer.eos_token_id,)
    torch.manual_seed(s.seed)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
        elif parameter.dim() == 2:          # smaller where it adds to the residual stream, or is also the head
            scale = 0.5 if name.endswith(("o_proj.weight", "down_proj.weight", "embed_tokens.weight")) else 1.0
            torch.nn.init.normal_(parameter, std=scale * parameter.shape[1] ** -0.5)
    return model, tokenizer


def pretrain(s: Settings) -> None:
    check_numbers(s)
    if Path(s.out).exists():
        raise FileExistsError(f"{s.out} exists; give another --out")
    model, tokenizer = fresh_model(s)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    optimizer = torch.optim.AdamW(model.parameters(), s.lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(
        (step + 1) / s.warmup, 0.5 * (1 + math.cos(math.pi * step / s.steps))))
    stream, average = batches(s, tokenizer.get_vocab()), None
    for _ in (bar := tqdm(range(s.steps), desc=s.out, unit="step", mininterval=5)):
        tokens, length = next(stream)
        position = torch.arange(tokens.shape[1])
        mask = response_mask(torch.full_like(length, PROMPT), length, tokens.shape[1])
        hidden = model(tokens, position.expand_as(tokens))[:, :-1][mask]
        # Divided by a constant: a mean per batch would give the tokens of short traces, whose batches hold fewer
        # of them, more weight, and with them the early `so`.
        loss = F.cross_entropy(F.linear(hidden, model.head), tokens[:, 1:][mask], reduction="sum") / (64 * s.batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        per_token = loss.item() * 64 * s.batch / len(hidden)
        average = per_token if average is None else 0.98 * average + 0.02 * per_token
        bar.set_postfix(loss=f"{average:.4f}", refresh=False)
    save(model, tokenizer, s.out)


def attempts(prompt: str, response: str) -> list[dict]:
    """Takes a response apart. Each attempt: `steps` and `wrong` (arithmetic), `operands` (are they the numbers of the
    prompt), `checked`, `hit` (its stated total is the target) and `then` ("wait", "so" or "" at a cut)."""
    numbers, target = sorted(numbers_of(prompt)), prompt.split()[-2]
    found, words = [], []
    for word in [*response.split(), ""]:
        if word not in ("wait", "so", ""):
            words.append(word)
            continue
        if words:
            checked = len(words) > 2 and words[-2] == "vs"
            chain = words[:-2] if checked else words
            operators, operands = chain[1::4], [NUMBER.get(n) for n in [*chain[:1], *chain[2::4]]]
            totals = [operands[0], *(NUMBER.get(r) for r in chain[4::4])]
            wrong = sum(a is None or n is None or r is None or apply_operator(a, op, n) != r
                        for a, op, n, r in zip(totals, operators, operands[1:], totals[1:]))
            found.append({"steps": len(totals) - 1, "wrong": wrong, "checked": checked, "then": word,
                          "operands": None not in operands and sorted(operands) == numbers,
                          "hit": totals[-1] is not None and str(totals[-1]) == target and len(operands) == len(numbers)})
        words = []
    return found


class Behaviour(Counter):
    """Counts what responses do; its `watch` goes to evaluate.count_solved."""

    def watch(self, problem: Problem, response: str, episode: Episode) -> None:
        self.update({"responses": 1, "entropy": float(episode.entropy.sum()), "tokens": len(episode.response),
                     "cut": not episode.finished})
        for a in (a for a in attempts(problem.prompt, response) if a["then"]):      # one that was cut off says nothing
            kind = ("checked" if a["checked"] else "unchecked", "hit" if a["hit"] else "miss")
            self.update({"attempts": 1, "steps": a["steps"], "wrong steps": a["wrong"], "hits": a["hit"],
                         "wrong operands": not a["operands"], kind: 1, (*kind, "so"): a["then"] == "so"})

    def figures(self) -> dict[str, float]:
        checked, unchecked = (self[kind, "hit"] + self[kind, "miss"] for kind in ("checked", "unchecked"))
        blind = self["unchecked", "hit", "so"] + self["unchecked", "miss", "so"]
        share = lambda part, whole: part / max(1, whole)
        return {"steps with wrong arithmetic": share(self["wrong steps"], self["steps"]),
                "attempts with wrong operands": share(self["wrong operands"], self["attempts"]),
                "so after a checked hit": share(self["checked", "hit", "so"], self["checked", "hit"]),
                "so after a checked miss": share(self["checked", "miss", "so"], self["checked", "miss"]),
                "so after an unchecked attempt": share(blind, unchecked),
                "attempts that hit": share(self["hits"], self["attempts"]),
                "attempts per response": share(self["attempts"], self["responses"]),
                "checks per response": share(checked, self["responses"]),
                "responses cut at the limit": share(self["cut"], self["responses"]),
                "tokens per response": share(self["tokens"], self["responses"]),
                "entropy in nats": share(self["entropy"], self["tokens"])}


def report(folder: str) -> dict[str, float]:
    """Prints what a base model is judged by: 200 validation problems, 256 samples each, temperature 1."""
    model, tokenizer = load(folder, pick_device("auto"))
    task, n, behaviour = Countdown(), 256, Behaviour()
    sampler = Sampler(model, 512, PROMPT + RESPONSE, model.eos_ids)       # as evaluate.py: the same samples
    result = count_solved(sampler, tokenizer, task, task.validation[:200], n, RESPONSE, 1.0, 1.0, 0, progress=folder,
                          watch=behaviour.watch)
    one, every = pass_table(result["solved"], n, (1, n)).mean(0)
    figures = {"Pass@1": one, f"Pass@{n}": every, **behaviour.figures()}
    print(f"{folder}: {sum(p.numel() for p in model.parameters()):,} parameters; 200 validation problems, {n} samples each")
    for name, value in figures.items():
        print(f"{name:32}{value:8.4f}")
    return figures


if __name__ == "__main__":
    settings = parse_flags(Settings, __doc__)
    try:
        report(settings.report) if settings.report else pretrain(settings)
    except (ValueError, OSError) as error:
        sys.exit(f"lab.pretrain: {error}")
    except KeyboardInterrupt:
        sys.exit("lab.pretrain: stopped; nothing was written")
