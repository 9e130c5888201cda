"""Where is the entropy, and does it sit on exploratory reasoning? `python -m lab.analyze RUN --base base`.

Samples responses (or reads those of a file), scores the entropy of every token under the model, and compares

    pivotal tokens       with the other tokens                                  (the paper's Section 2 and Figure 2)
    reflective actions   sentences that verify, correct or start again, with the others
    rare behaviours      the 10 % of sentences furthest from their 5 nearest sentences of --base, with the rest

each over all and within bins of position, difficulty and so on, which later papers ask for: does the difference survive?
Then runs side by side: length, repetition, pivotal tokens and reflective actions (Section 6), and their answers to the
same problem. Tables are printed; report.json, entropy.png and responses.html (the paper's Figure 1) go to --out.

The paper's: the comparisons, k = 5, 10 %. Ours, where it is silent: the lists (lab/exploration.py); the sentence vectors,
mean hidden states of the base model at unit length, each sentence read alone, or those of an --encoder; effect sizes;
intervals by a bootstrap over responses, whose tokens depend on each other; a permutation test that shuffles labels within
responses. Sampled end tokens are left out. Difficulty is, on countdown, how few chains solve a problem; else the file's level.

On countdown part of this holds by construction: `=` and results are determined, so their entropy is near 0, and the checks
come from the generator of the base model's texts. What informs there is the comparison of base and trained model.
"""

from __future__ import annotations

import dataclasses
import functools
import html
import itertools
import json
import math
import re
import sys
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from evaluate import flag, parse_flags, pick_device
from lab.exploration import COUNTDOWN, TEXT, dissect_countdown, dissect_text
from model import find_folder, load, score
from rollout import Episode, Sampler, collate, micro_batches, seeded_generator
from task import Countdown, chains, numbers_of

NGRAM, NEIGHBOURS, RARE, RESAMPLES, PERMUTATIONS = 4, 5, 0.1, 2000, 1000
SLOTS, MICRO_TOKENS = 256, 16384            # sequences decoded at a time, tokens per forward pass
SUBJECTS = ("pivotal tokens", "reflective actions", "rare behaviours")


@dataclass
class Settings:
    models: tuple = flag((), "model folders, run folders or hub ids", nargs="+", type=str)
    base: str = flag("", "the model they were trained from: comes first, and rare sentences are far from its own")
    task: str = flag("countdown", "how responses are taken apart", choices=("countdown", "text"))
    texts: str = flag("", "jsonl file of prompts (problem, question or prompt) and, if it has them, responses (solution, "
                          "response or answer), which are then read instead of sampled")
    resample: bool = flag(False, "sample responses to the prompts of --texts even where it has some")
    problems: int = flag(50, "how many, from the start of countdown's validation problems or of --texts")
    samples: int = flag(16, "sampled responses per problem")
    temperature: float = flag(1.0, "of the samples and of the entropies")
    max_new_tokens: int = flag(128, "longest response, in tokens")
    encoder: str = flag("", "a sentence-transformers model for the sentence vectors")
    show: int = flag(3, "problems on the HTML page, with the first response of every model")
    seed: int = flag(0, "seed of the samples")
    device: str = flag("auto", "cpu, cuda, cuda:1 ...; auto takes a GPU if there is one")
    out: str = flag("runs/analysis", "folder for the report, the picture and the page")


@dataclass
class Reading:
    """A response taken apart."""
    problem: int
    prompt: str
    ids: list[int]
    pieces: list[str]                       # the text of each token
    kinds: list[str]                        # of each token
    sentences: list[tuple[int, int, str]]   # first token, the one after the last, kind
    entropy: np.ndarray                     # [R], nats
    difficulty: float                       # higher is harder; nan where it is not known
    alternatives: list[list[tuple[str, float]]] | None = None       # the three likeliest tokens at each place

    def sentence(self, first: int, end: int) -> str:
        return "".join(self.pieces[first:end]).strip()


def decode_pieces(decode: Callable[[tuple[int, ...]], str], ids: Sequence[int]) -> list[str]:
    """The text of each token. Tokens are decoded after the one before, because spaces depend on it; one that holds
    only some bytes of a character gets "", and the last of them the character."""
    pieces, start, read = [], 0, 0
    for end in range(1, len(ids) + 1):
        before, text = decode(tuple(ids[start:read])), decode(tuple(ids[start:end]))
        if text.endswith("\ufffd") and end - read < 4 and end < len(ids):       # a character has 4 bytes at most
            pieces.append("")
        else:
            pieces.append(text[len(before):])
            start, read = read, end
    return pieces


@torch.no_grad()
def entropies(model, episodes: Sequence[Episode], temperature: float) -> list[np.ndarray]:
    """The entropy of every response token under the model, in nats, a row per episode."""
    found: list[np.ndarray] = [np.empty(0)] * len(episodes)
    for part in micro_batches(episodes, MICRO_TOKENS):
        tokens, prompt_len, total_len, mask = collate([episodes[i] for i in part], model.head.device)
        entropy = score(model, tokens, prompt_len, total_len, temperature)[1]
        for i, row, counts in zip(part, entropy, mask):
            found[i] = row[counts].double().cpu().numpy()
    return found


@torch.no_grad()
def alternatives(model, decode: Callable, episode: Episode, temperature: float) -> list[list[tuple[str, float]]]:
    """The three likeliest tokens, with their probabilities, at each place of the response."""
    tokens = torch.cat((episode.prompt, episode.response))[None].to(model.head.device)
    hidden = model(tokens, torch.arange(tokens.shape[1], device=tokens.device)[None])[0, len(episode.prompt) - 1:-1]
    found = []
    for rows in hidden.split(512):                          # [512, vocabulary] at most
        p, index = (F.linear(rows, model.head).float() / temperature).softmax(-1).topk(min(3, len(model.head)))
        found += [[(decode((i,)), q) for i, q in zip(*pair)] for pair in zip(index.tolist(), p.tolist())]
    return found


@torch.no_grad()
def mean_hidden(model, tokenizer, sentences: Sequence[str]) -> Tensor:
    """Each sentence read alone -> the mean of its last hidden states, at unit length. [N, width], fp64."""
    ids = [torch.tensor(tokenizer.encode(s, add_special_tokens=False) or [model.eos_ids[0]]) for s in sentences]
    empty = torch.zeros(0)
    episodes = [Episode(i[:0], i, empty, empty, True, 0) for i in ids]
    found = torch.empty(len(ids), model.head.shape[1], dtype=torch.float64)
    for part in micro_batches(episodes, MICRO_TOKENS):
        tokens, _, length, _ = collate([episodes[i] for i in part], model.head.device)
        index = torch.arange(tokens.shape[1], device=tokens.device)
        hidden = model(tokens, index.expand_as(tokens)).double()                        # [B, T, width]
        mask = index < length[:, None]
        found[part] = ((hidden * mask[..., None]).sum(1) / length[:, None]).cpu()
    return F.normalize(found, dim=-1)


def nearest(vectors: Tensor, others: Tensor, k: int = NEIGHBOURS) -> Tensor:
    """Mean Euclidean distance of each of `vectors` [N, d] to its k nearest `others` [M, d] (all, if fewer). [N]"""
    k = min(k, len(others))
    return torch.cat([torch.cdist(rows, others).topk(k, largest=False).values.mean(-1) for rows in vectors.split(256)])


def resampled(totals: np.ndarray) -> np.ndarray:
    """Bootstrap over responses: [responses, columns] -> the columns' sums in each resample [RESAMPLES, columns]."""
    rng, n = np.random.default_rng(0), len(totals)
    return np.concatenate([rng.multinomial(n, np.full(n, 1 / n), size=100) @ totals for _ in range(RESAMPLES // 100)])


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> dict:
    """sum / sum over responses, with its 95 % interval."""
    pairs = np.column_stack([numerator, denominator]).astype(float)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean, many = np.divide(*pairs.sum(0)), np.divide(*resampled(pairs).T)
    interval = np.nanpercentile(many, [2.5, 97.5]).tolist() if np.isfinite(mean) else [math.nan] * 2
    return {"mean": float(mean), "interval": interval, "n": float(pairs[:, 1].sum())}


def permutation_p(values: np.ndarray, label: np.ndarray, group: np.ndarray, permutations: int) -> float:
    """Two-sided p of the difference of means, if labels are shuffled within each group. All arrangements if there
    are no more than `permutations`, else that many at random. nan if no group has both labels."""
    order = np.argsort(group, kind="stable")
    cuts = np.flatnonzero(np.diff(group[order])) + 1
    parts = [(v, v[l].sum(), int(l.sum())) for v, l in zip(np.split(values[order], cuts), np.split(label[order], cuts))
             if 0 < l.sum() < len(l)]                       # the others are the same in every arrangement
    if not parts:
        return math.nan
    # Each group keeps its number of labels, so the difference of means grows with the sum over the labelled ones.
    distance = abs(sum(s for _, s, _ in parts) - sum(k * v.mean() for v, _, k in parts))
    exact = sum(math.log(math.comb(len(v), k)) for v, _, k in parts) <= math.log(permutations) + 1e-9
    sums, rng = np.zeros(1 if exact else permutations), np.random.default_rng(0)
    for v, _, k in parts:
        centred = v - v.mean()
        if exact:
            sums = np.add.outer(sums, [sum(c) for c in itertools.combinations(centred, k)]).ravel()
        else:
            rows = max(1, 1 << 22 // len(v))                # bounds the memory
            sums += np.concatenate([rng.permuted(np.tile(centred, (min(rows, permutations - i), 1)), axis=1)[:, :k].sum(1)
                                    for i in range(0, permutations, rows)])
    extreme = int((abs(sums) >= distance - 1e-9 * (1 + distance)).sum())
    return extreme / len(sums) if exact else (extreme + 1) / (permutations + 1)


def compare(values: np.ndarray, label: np.ndarray, group: np.ndarray) -> dict | None:
    """Labelled values against the others: means, difference and Cohen's d, each with a 95 % interval over groups, and
    the permutation test. None unless there are at least two of both."""
    if min(label.sum(), (~label).sum()) < 2:
        return None
    _, index = np.unique(group, return_inverse=True)
    moments = np.column_stack([np.bincount(index, l * values ** power) for l in (label, ~label) for power in (0, 1, 2)])

    def figures(totals: np.ndarray) -> np.ndarray:
        n, s, square, n0, s0, square0 = totals
        mean, mean0 = s / n, s0 / n0
        variance = (square - n * mean ** 2 + square0 - n0 * mean0 ** 2) / (n + n0 - 2)      # pooled
        return np.array([mean, mean0, mean - mean0, (mean - mean0) / np.sqrt(np.maximum(variance, 1e-300))])

    with np.errstate(invalid="ignore", divide="ignore"):
        point, many = figures(moments.sum(0)), figures(resampled(moments).T)
    low, high = np.nanpercentile(many, [2.5, 97.5], axis=1)
    record = {name: {"mean": float(p), "interval": [float(l), float(h)]} for name, p, l, h in
              zip(("mean", "others", "difference", "d"), point, low, high)}
    return record | {"n": int(label.sum()), "n others": int((~label).sum()),
                     "p": permutation_p(values, label, group, PERMUTATIONS)}


def within(values: np.ndarray, label: np.ndarray, group: np.ndarray, x: np.ndarray, count: int) -> dict[str, dict | None]:
    """`compare` within each of `count` bins of x, of about equally many values; strings are bins of their own."""
    if x.dtype.kind == "U":
        return {str(name): compare(*(a[x == name] for a in (values, label, group))) for name in np.unique(x)}
    edges = np.unique(np.quantile(x, np.linspace(0, 1, count + 1)[1:-1], method="higher"))
    place, found = np.searchsorted(edges, x, side="right"), {}
    for i in np.unique(place):
        name = f"{x[place == i].min():g} to {x[place == i].max():g}"
        found[name] = compare(*(a[place == i] for a in (values, label, group)))
    return found


def problems_of(s: Settings) -> list[dict]:
    """prompt, response (None: to be sampled) and difficulty (nan: not known) of each problem."""
    if not s.texts and s.task != "countdown":
        raise ValueError("--task text needs prompts or responses: --texts FILE.jsonl")
    if not s.texts:
        found = [{"prompt": p.prompt, "response": None} for p in Countdown().validation[:s.problems]]
    else:
        found = []
        for number, line in enumerate(Path(s.texts).read_bytes().splitlines()[:s.problems], 1):
            try:
                row = dict(json.loads(line))
            except (ValueError, TypeError, RecursionError):
                raise ValueError(f"{s.texts}, line {number}, holds no JSON object") from None
            text = lambda *names: next((row[n] for n in names if isinstance(row.get(n), str) and row[n].strip()), None)
            level = re.search(r"\d{1,3}", str(row.get("level", ""))[:99])
            found.append({"prompt": text("problem", "question", "prompt"), "difficulty": float(level[0]) if level else math.nan,
                          "response": None if s.resample else text("solution", "response", "answer")})
            if found[-1]["prompt"] is None:
                raise ValueError(f"{s.texts}, line {number}, has no problem, question or prompt")
    for p in found:
        if s.task == "countdown":
            if not re.fullmatch(r"\d\d?( \d\d?){1,5} -> \d\d? \?", p["prompt"], re.ASCII):
                raise ValueError(f"{p['prompt'][:50]!r} is no countdown prompt; other texts need --task text")
            p["difficulty"] = -float(chains(tuple(numbers_of(p["prompt"])))[int(p["prompt"].split()[-2])])
    found = [p for p in found if p["response"]] or found        # a file that has responses is read, not sampled
    if not found:
        raise ValueError(f"{s.texts} has no problems")
    return found


def read(name: str, problems: Sequence[dict], s: Settings) -> tuple[Callable, list[Reading]]:
    """Samples (or reads) and scores -> what turns sentences into vectors, and the responses."""
    model, tokenizer = load(name, pick_device(s.device))
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)
    decode = functools.lru_cache(1 << 16)(lambda ids: tokenizer.decode(ids, clean_up_tokenization_spaces=False))
    prompts = [encode(p["prompt"]) for p in problems]
    if problems[0]["response"]:
        ids, empty = [encode(p["response"]) for p in problems], torch.zeros(0)
        episodes = [Episode(torch.tensor(p), torch.tensor(r), empty, empty, False, i) for i, (p, r) in enumerate(zip(prompts, ids))]
    else:
        sampler = Sampler(model, SLOTS, max(map(len, prompts)) + s.max_new_tokens, model.eos_ids)
        episodes = sampler.generate(prompts, s.samples, s.max_new_tokens, s.temperature,
                                    seeded_generator(s.seed, 0, "analyze", sampler.device), progress=name)
        sampler.free()
        episodes = [dataclasses.replace(e, response=e.response[:-1]) if e.finished else e for e in episodes]
    if not all(len(p) for p in prompts) or any(tokenizer.unk_token_id in e.response.tolist() for e in episodes if e.logp.numel() == 0):
        raise ValueError(f"the tokenizer of {name} has no words for these texts")
    readings = []
    for e, entropy in zip(episodes, entropies(model, episodes, s.temperature)):
        p, pieces = problems[e.prompt_index], decode_pieces(decode, e.response.tolist())
        parts = dissect_text(pieces) if s.task == "text" else dissect_countdown(p["prompt"], [w.strip() for w in pieces])
        readings.append(Reading(e.prompt_index, p["prompt"], e.response.tolist(), pieces, *parts, entropy, p["difficulty"]))
    seen = set()
    for e, r in zip(episodes, readings):
        if r.problem < s.show and r.problem not in seen and not seen.add(r.problem):
            r.alternatives = alternatives(model, decode, e, s.temperature)
    return functools.partial(mean_hidden, model, tokenizer), readings


def distances(vectors: Callable, readings: Sequence[Reading], base: Sequence[Reading]) -> np.ndarray:
    """Mean distance of every sentence of `readings` to its nearest ones of `base`."""
    own, others = ([r.sentence(a, b) for r in x for a, b, _ in r.sentences] for x in (readings, base))
    place = {sentence: i for i, sentence in enumerate(dict.fromkeys(own + others))}     # each is read once
    table = torch.as_tensor(vectors(list(place)), dtype=torch.float64)
    index = torch.tensor([place[sentence] for sentence in own])
    once, back = index.unique(return_inverse=True)
    return nearest(table[once], table[[place[sentence] for sentence in others]])[back].numpy()


def analyse(readings: Sequence[Reading], far: np.ndarray | None, task: str) -> dict:
    """Every figure of one model; `far`: the distances of its sentences from the base model's."""
    token_kinds, sentence_kinds = TEXT if task == "text" else COUNTDOWN
    starts = lambda r: ["begins a word" if not p[:1].isalnum() or i == 0 or not r.pieces[i - 1][-1:].isalnum() else "goes on"
                        for i, p in enumerate(r.pieces)]
    tokens = [row for i, r in enumerate(readings) for row in zip(r.entropy, r.kinds, itertools.repeat(i), itertools.count(),
                                                                 itertools.repeat(r.difficulty), starts(r))]
    sentences = [(r.entropy[a:b].mean(), kind, i, a, r.difficulty, b - a)
                 for i, r in enumerate(readings) for a, b, kind in r.sentences]
    record: dict = {}
    for subject, rows, kinds, extra in ((SUBJECTS[0], tokens, token_kinds, "place in the word"),
                                        (SUBJECTS[1], sentences, sentence_kinds, "tokens"), (SUBJECTS[2], sentences, None, "kind")):
        if not rows or (kinds is None and far is None):
            continue
        values, kind, group, position, difficulty, other = map(np.array, zip(*rows))
        if kinds is None:
            label, keep, other = np.zeros(len(far), dtype=bool), np.ones(len(far), dtype=bool), kind
            label[np.argsort(-far, kind="stable")[:math.ceil(RARE * len(far))]] = True
        else:
            label, keep = np.array([kinds.get(k) is True for k in kind]), np.array([k in kinds for k in kind])
        one = [values[keep], label[keep], group[keep]]
        per = lambda k: (np.bincount(group[kind == k], values[kind == k], len(readings)), np.bincount(group[kind == k], minlength=len(readings)))
        strata = {"position": position, "difficulty": difficulty, extra: other}
        record[subject] = {"all": compare(*one), "kinds": {} if kinds is None else {k: ratio(*per(k)) for k in sorted(set(kind))},
                           "within": {name: within(*one, x[keep], 4) for name, x in strata.items()
                                      if len(set(x[keep])) > 1 and not (x.dtype.kind == "f" and np.isnan(x).any())}}
    length = [len(r.ids) for r in readings]
    grams = [[tuple(r.ids[i:i + NGRAM]) for i in range(len(r.ids) - NGRAM + 1)] for r in readings]
    pivotal = [[i for i, k in enumerate(r.kinds) if token_kinds.get(k)] for r in readings]
    reflective = [[(a, b) for a, b, k in r.sentences if sentence_kinds.get(k)] for r in readings]
    one = [1] * len(readings)
    record["behaviour"] = {
        "tokens per response": ratio(length, one),
        f"repeated {NGRAM}-grams": ratio([len(g) - len(set(g)) for g in grams], list(map(len, grams))),
        "pivotal tokens per response": ratio(list(map(len, pivotal)), one),
        "pivotal tokens per 100 tokens": ratio([100 * len(p) for p in pivotal], length),
        "reflective actions per response": ratio(list(map(len, reflective)), one),
        "entropy of a token": ratio([r.entropy.sum() for r in readings], length),
        "entropy of a pivotal token": ratio([r.entropy[p].sum() for r, p in zip(readings, pivotal)], list(map(len, pivotal))),
        "entropy of a token of a reflective action": ratio([sum(r.entropy[a:b].sum() for a, b in x) for r, x in zip(readings, reflective)],
                                                           [sum(b - a for a, b in x) for x in reflective])}
    return record
