"""Where is the entropy, and does it sit on exploratory reasoning? `python -m lab.analyze base` or `... RUN --base base`.

Samples responses (or reads those of a file), scores the entropy of every token under the model, and compares:

    pivotal tokens       with the other tokens                              (the paper's Section 2 and Figure 2)
    reflective actions   sentences that verify, correct or start again, with the others
    rare behaviours      the 10 % of sentences furthest from their 5 nearest sentences of --base, with the rest
    the same within bins of position, difficulty and so on: does the difference survive?
    runs side by side    length, repetition, pivotal tokens, reflective actions (Section 6), and their answers to a problem

It prints tables and writes report.json, entropy.png (bars with 95 % intervals) and responses.html (every token coloured
by its entropy, the paper's Figure 1) to --out.

The paper's: the three comparisons, k = 5, 10 %, and some of the words (because, therefore, thus, however, although, first,
then, suggest, demonstrate, recall; verify, check). Ours, where it is silent: the other words, the splitter, the sentence
vectors (mean hidden states of the base model, each sentence read alone, at unit length, so that one space serves both
models; --encoder takes a sentence-transformers model instead), and that only the first token of a pivotal word counts,
where the word is chosen. Words are found by spelling: "the first term" counts as sequential, "a check for $20" as a check.
End tokens are left out. Also ours: effect sizes, intervals over responses (tokens of one response depend on each other),
and a permutation test that shuffles the labels within each response.

On countdown, pivotal tokens are the operators and operands there is a choice of, the others are `=`, results and the last
number left; reflective are `vs ...`, `wait` and the attempts after it. Much of this holds by construction: forced tokens
have entropy near 0, and the checks came from the generator. There the comparison of base and trained model is what informs.
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
from model import find_folder, load, response_mask, score
from rollout import Episode, Sampler, collate, micro_batches, seeded_generator, texts
from task import NUMBER, OPERATORS, Countdown, Problem, chains, numbers_of

PIVOTAL = {
    "causal": "because, therefore, thus, hence, since, so, consequently, accordingly, as a result, due to",
    "contrastive": "however, although, though, but, yet, instead, whereas, nevertheless, nonetheless, otherwise, unless, "
                   "despite, conversely, on the other hand, in contrast",
    "sequential": "first, firstly, second, secondly, third, thirdly, then, next, finally, lastly, afterwards, subsequently",
    "reasoning verbs": "suggest, suggests, suggesting, demonstrate, demonstrates, demonstrating, recall, recalling, assume, "
                       "assuming, suppose, consider, considering, imply, implies, implying, conclude, concludes, deduce, "
                       "infer, observe, notice, note, show, shows, prove, proves"}
CATEGORY = {word: category for category, words in PIVOTAL.items() for word in words.split(", ")}
# Not within a longer or hyphenated word ("so-called"), nor a LaTeX command (\implies). Longest first; all literal, so
# that no text can make the search explode.
WORD = re.compile(r"(?<![\w\\])(?<!\w-)(?:" + "|".join(re.escape(w).replace(r"\ ", r"\s") for w in
                  sorted(CATEGORY, key=len, reverse=True)) + r")(?!-?\w)", re.IGNORECASE)
REFLECTIVE = {name: re.compile(r"(?<![\w\\])(?:" + pattern + r")(?!\w)", re.IGNORECASE) for name, pattern in {
    "verify": r"(?:re-?|double[- ])?(?:verif(?:y|ies|ied|ying|ication)|check(?:s|ed|ing)?)|(?:re-?)?confirm(?:s|ed|ing)?"
              r"|make\ssure|(?:plug|substitut)(?:e|ed|ging|ing)?(?:\s\S{1,20}){0,3}\sback",
    "correct": r"mistakes?|mistaken|incorrect(?:ly)?|wrong|an\serror|correct(?:ed|ing|ion)|(?:me|to)\scorrect"
               r"|wait(?=\s?(?:[,.!:…—]|--))|hold\son|hmm+|actually(?=,)",
    "start again": r"(?:try|start|begin)\s(?:again|over)|re-?(?:consider|examine|evaluate|think|do)|rethink|backtrack"
                   r"|go\sback|alternatively|(?:another|different)\s(?:approach|way|method)"}.items()}
# Which kinds are the exploratory ones (True) and which they are compared with (False); kinds not named are left out.
TEXT = {**dict.fromkeys(PIVOTAL, True), "other": False}, {**dict.fromkeys(REFLECTIVE, True), "other": False}
COUNTDOWN = ({"operand": True, "operator": True, "last operand": False, "=": False, "result": False},
             {"check": True, "wait": True, "attempt after wait": True, "first attempt": False, "so": False})
# Mathematics, where a full stop or a new line ends nothing. A price is none: as in pandoc, a closing $ has no space
# before it and no digit after it. The bounds keep the search linear.
FORMULA = re.compile(r"\$\$[^$]{1,2000}\$\$|\\\[(?:[^\\]|\\[^\[\]]){1,2000}\\\]|\$(?![\s$])[^$\n]{1,500}(?<!\s)\$(?!\d)")
BREAK = re.compile(r"[.!?](?:\$\$?|\\[)\]]|[\"')\]”]){0,3}(?=\s)|\n")
ABBREVIATION = re.compile(r"(?:\b(?:e\.g|i\.e|etc|vs|cf|eqs?|figs?|mr|mrs|ms|dr|st|no)|(?:^|\n)\s{0,9}\d{1,3})\.$", re.IGNORECASE)
NGRAM, NEIGHBOURS, RARE, RESAMPLES = 4, 5, 0.1, 2000


@dataclass
class Settings:
    models: tuple = flag((), "model folders, run folders or hub ids", nargs="+", type=str)
    base: str = flag("", "the model they were trained from: shown first, and what rare sentences are far from")
    task: str = flag("countdown", "how responses are taken apart", choices=("countdown", "text"))
    texts: str = flag("", "jsonl file with prompts (problem, question or prompt) and, optionally, responses to read "
                          "(solution, response or answer) in place of sampled ones")
    resample: bool = flag(False, "sample responses to the prompts of --texts even where it has some")
    problems: int = flag(50, "how many problems: from the start of countdown's validation problems, or of --texts")
    samples: int = flag(16, "sampled responses per problem")
    temperature: float = flag(1.0, "of sampling and of the entropies")
    max_new_tokens: int = flag(128, "longest response, in tokens")
    slots: int = flag(256, "sequences decoded at a time")
    micro_tokens: int = flag(16384, "tokens per forward pass")
    permutations: int = flag(1000, "of the permutation test")
    encoder: str = flag("", "name of a sentence-transformers model for the sentence vectors")
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


def split_sentences(text: str) -> list[int]:
    """Where the sentences of `text` end. A new line ends one too, unless a display formula stands next to it."""
    inside, ends = bytearray(len(text) + 1), []
    for formula in FORMULA.finditer(text):
        inside[formula.start() + 1:formula.end()] = b"\1" * (formula.end() - formula.start() - 1)
    for found in BREAK.finditer(text):
        end, after = found.end(), text[found.end():found.end() + 40].lstrip(" ")
        if inside[end] or (text[end - 1] != "\n" and (after.lstrip()[:1].islower()
                                                      or ABBREVIATION.search(text[max(0, end - 16):end]))):
            continue
        if found.group() == "\n" and (text[:end - 1].endswith(("\\]", "$$")) or after.startswith(("\\[", "$$"))):
            continue
        ends.append(end)
    return [*ends, len(text)]


def dissect_text(pieces: Sequence[str]) -> tuple[list[str], list[tuple[int, int, str]]]:
    """Kinds of the tokens and sentences with theirs, for English mathematics."""
    text, ends = "".join(pieces), np.cumsum([len(p) for p in pieces])
    kinds = ["other"] * len(pieces)
    for found in WORD.finditer(text):
        kinds[int(np.searchsorted(ends, found.start(), side="right"))] = CATEGORY[" ".join(found.group().lower().split())]
    # A token belongs to the sentence of its first character that is no space: " Then" opens one.
    begins = [int(end) - len(p.lstrip() or p) for end, p in zip(ends, pieces)]
    borders = split_sentences(text)
    place = np.searchsorted(borders, begins, side="right")
    sentences = []
    for _, group in itertools.groupby(range(len(pieces)), key=lambda i: place[i]):
        members = list(group)
        sentence = "".join(pieces[members[0]:members[-1] + 1])
        if any(c.isalnum() for c in sentence):              # not for blank lines between sentences
            kind = next((name for name, pattern in REFLECTIVE.items() if pattern.search(sentence)), "other")
            sentences.append((members[0], members[-1] + 1, kind))
    return kinds, sentences


def dissect_countdown(prompt: str, words: Sequence[str]) -> tuple[list[str], list[tuple[int, int, str]]]:
    """The same for countdown, where every word is a token. Never raises on a malformed response."""
    kinds, parts = [], []
    place, left, attempt = 0, numbers_of(prompt), "first attempt"
    for word in words:
        if word in ("wait", "so"):
            kind = part = word
            place, left, attempt = 0, numbers_of(prompt), "attempt after wait" if word == "wait" else "first attempt"
        elif word == "vs" or place < 0:                     # place -1: within a check
            kind, part, place = "vs" if word == "vs" else "target", "check", -1
        else:
            part = attempt
            kind = ("operand", "operator", "operand", "=", "result")[place]
            fits = {"operator": word in OPERATORS, "=": word == "="}.get(kind, word in NUMBER)
            if kind == "operand":
                kind = "operand" if len(set(left)) > 1 else "last operand"      # no choice: one number is left
                if NUMBER.get(word) in left:
                    left.remove(NUMBER[word])
            kind, place = kind if fits else "malformed", place + 1 if place < 4 else 1
        kinds.append(kind)
        parts.append(part)
    cuts = [0, *(i for i in range(1, len(parts)) if parts[i] != parts[i - 1]), len(parts)]
    return kinds, [(a, b, parts[a]) for a, b in zip(cuts, cuts[1:]) if b > a]


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
def entropies(model, episodes: Sequence[Episode], temperature: float, micro_tokens: int) -> list[np.ndarray]:
    """The entropy of every response token under the model, in nats, a row per episode."""
    found: list[np.ndarray] = [np.empty(0)] * len(episodes)
    for part in micro_batches(episodes, micro_tokens):
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
def mean_hidden(model, tokenizer, sentences: Sequence[str], micro_tokens: int) -> Tensor:
    """Each sentence read alone -> the mean of its last hidden states, at unit length. [N, width], fp64."""
    ids = [torch.tensor(tokenizer.encode(s, add_special_tokens=False) or [model.eos_ids[0]]) for s in sentences]
    empty = torch.zeros(0)
    episodes = [Episode(i[:0], i, empty, empty, True, 0) for i in ids]
    found = torch.empty(len(ids), model.head.shape[1], dtype=torch.float64)
    for part in micro_batches(episodes, micro_tokens):
        tokens, _, length, _ = collate([episodes[i] for i in part], model.head.device)
        index = torch.arange(tokens.shape[1], device=tokens.device)
        hidden = model(tokens, index.expand_as(tokens)).double()                        # [B, T, width]
        mask = index < length[:, None]
        found[part] = ((hidden * mask[..., None]).sum(1) / length[:, None]).cpu()
    return F.normalize(found, dim=-1)


def nearest(vectors: Tensor, others: Tensor, k: int = NEIGHBOURS) -> Tensor:
    """Mean Euclidean distance of each of `vectors` [N, d] to its k nearest `others` [M, d] (all, if fewer). [N]"""
    k = min(k, len(others))
    return torch.cat([torch.cdist(rows, others, compute_mode="donot_use_mm_for_euclid_dist").topk(k, largest=False)
                      .values.mean(-1) for rows in vectors.split(256)])


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
    exact = math.prod(math.comb(len(v), k) for v, _, k in parts) <= permutations
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


def compare(values: np.ndarray, label: np.ndarray, group: np.ndarray, permutations: int) -> dict | None:
    """Labelled values against the others: means, difference and Cohen's d, each with a 95 % interval over groups, and
    the permutation test. None unless there are at least two of both."""
    if min(label.sum(), (~label).sum()) < 2:
        return None
    _, index = np.unique(group, return_inverse=True)
    columns = [np.bincount(index, weights=l * values ** power) for l in (label, ~label) for power in (0, 1, 2)]

    def figures(totals: np.ndarray) -> np.ndarray:
        n, s, square, n0, s0, square0 = totals
        mean, mean0 = s / n, s0 / n0
        variance = (square - n * mean ** 2 + square0 - n0 * mean0 ** 2) / (n + n0 - 2)      # pooled
        return np.array([mean, mean0, mean - mean0, (mean - mean0) / np.sqrt(np.maximum(variance, 0))])

    moments = np.column_stack(columns)
    with np.errstate(invalid="ignore", divide="ignore"):
        point, many = figures(moments.sum(0)), figures(resampled(moments).T)
    low, high = np.nanpercentile(many, [2.5, 97.5], axis=1)
    record = {name: {"mean": float(p), "interval": [float(l), float(h)]} for name, p, l, h in
              zip(("mean", "others", "difference", "d"), point, low, high)}
    return record | {"n": int(label.sum()), "n_others": int((~label).sum()), "p": permutation_p(values, label, group, permutations)}


def bins(x: np.ndarray, count: int) -> tuple[np.ndarray, list[str]]:
    """Bins of about equally many values: the bin of each, and what each covers."""
    edges = np.unique(np.quantile(x, np.linspace(0, 1, count + 1)[1:-1], method="higher"))
    place = np.searchsorted(edges, x, side="right")
    return place, [f"{x[place == i].min():g} to {x[place == i].max():g}" if (place == i).any() else "" for i in range(len(edges) + 1)]
