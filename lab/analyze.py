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
responses. Sampled end tokens are left out. Difficulty on countdown is minus the number of chains that solve the problem,
elsewhere the `level` in the file, if it has one.

On countdown part of this holds by construction: `=` and results are determined, so their entropy is near 0, and the checks
come from the generator of the base model's texts. What informs there is the comparison of base and trained model.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from evaluate import flag, parse_flags, pick_device
from lab.exploration import (COUNTDOWN, TEXT, Reading, alternatives, decode_pieces, dissect_countdown, dissect_text,
                             entropies, mean_hidden)
from lab.page import draw, page, tables
from model import find_folder, load
from rollout import Episode, Sampler, seeded_generator
from task import Countdown, chains, numbers_of

NGRAM, NEIGHBOURS, RARE, RESAMPLES, PERMUTATIONS = 4, 5, 0.1, 2000, 1000
SLOTS = 256                                 # sequences decoded at a time


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
    are no more than `permutations`, else that many at random. nan if no group has both labels. It asks about differences
    within groups only; the difference of all means also holds what differs from group to group."""
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
            rows = max(1, 2 ** 22 // len(v))                # bounds the memory
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


def within(values: np.ndarray, label: np.ndarray, group: np.ndarray, x: np.ndarray) -> dict[str, dict | None]:
    """`compare` within each of 4 bins of x, of about equally many values; strings are bins of their own."""
    if x.dtype.kind == "U":
        return {str(name): compare(*(a[x == name] for a in (values, label, group))) for name in np.unique(x)}
    edges = np.unique(np.quantile(x, [0.25, 0.5, 0.75], method="higher"))
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
                json.dumps(row, ensure_ascii=False).encode()        # half a character is no text
            except (ValueError, TypeError, RecursionError):
                raise ValueError(f"{s.texts}, line {number}, holds no JSON object of valid text") from None
            text = lambda *names: next((row[n] for n in names if isinstance(row.get(n), str) and row[n].strip()), None)
            level = re.search(r"\d{1,3}", str(row.get("level", ""))[:99])
            found.append({"prompt": text("problem", "question", "prompt"),
                          "difficulty": float(level[0]) if level else math.nan,
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
    ids: list[list[int]] = []
    if problems[0]["response"]:
        ids, none = [encode(p["response"]) for p in problems], torch.zeros(0)
        episodes = [Episode(torch.tensor(prompt), torch.tensor(response), none, none, True, i)
                    for i, (prompt, response) in enumerate(zip(prompts, ids))]
    if not all(prompts + ids) or any(tokenizer.unk_token_id in x for x in prompts + ids):
        raise ValueError(f"the tokenizer of {name} has no words for these texts")
    if not ids:
        sampler = Sampler(model, SLOTS, max(map(len, prompts)) + s.max_new_tokens, model.eos_ids)
        episodes = sampler.generate(prompts, s.samples, s.max_new_tokens, s.temperature,
                                    seeded_generator(s.seed, 0, "analyze", sampler.device), progress=name)
        sampler.free()
        episodes = [dataclasses.replace(e, response=e.response[:-1]) if e.finished else e for e in episodes]
    readings = []
    for e, entropy in zip(episodes, entropies(model, episodes, s.temperature)):
        p, ids = problems[e.prompt_index], e.response.tolist()
        pieces = decode_pieces(decode, ids)
        kinds, sentences = (dissect_text(pieces) if s.task == "text" else
                            dissect_countdown(p["prompt"], [piece.strip() for piece in pieces]))
        whole = sentences if e.finished else sentences[:-1]         # the limit may have cut the last one
        readings.append(Reading(e.prompt_index, p["prompt"], ids, pieces, kinds, whole, entropy, p["difficulty"]))
    first = {r.problem: i for i, r in reversed([*enumerate(readings)])}
    for i in (i for problem, i in first.items() if problem < s.show):
        readings[i].alternatives = alternatives(model, decode, episodes[i], s.temperature)
    return functools.partial(mean_hidden, model, tokenizer), readings


def distances(vectors: Callable, readings: Sequence[Reading], base: Sequence[Reading]) -> np.ndarray | None:
    """Mean distance of every sentence of `readings` to its nearest ones of `base`; None if one of the two has none."""
    own, others = ([r.sentence(a, b) for r in x for a, b, _ in r.sentences] for x in (readings, base))
    if not own or not others:
        return None
    place = {sentence: i for i, sentence in enumerate(dict.fromkeys(own + others))}     # each is read once
    table = torch.as_tensor(vectors(list(place)), dtype=torch.float64)
    once, back = torch.tensor([place[sentence] for sentence in own]).unique(return_inverse=True)
    return nearest(table[once], table[[place[sentence] for sentence in others]])[back].numpy()


def comparisons(readings: Sequence[Reading], far: np.ndarray | None, task: str) -> dict:
    """Every comparison for one model; `far`: the distances of its sentences from the base model's."""
    token_kinds, sentence_kinds = TEXT if task == "text" else COUNTDOWN
    tokens = [(h, kind, i, t, r.difficulty, "begins a word" if begins else "within a word")
              for i, r in enumerate(readings)
              for t, (h, kind, begins) in enumerate(zip(r.entropy, r.kinds, word_starts(r.pieces)))]
    sentences = [(r.entropy[a:b].mean(), kind, i, a, r.difficulty, b - a)
                 for i, r in enumerate(readings) for a, b, kind in r.sentences]
    record: dict = {}
    for subject, rows, kinds, further in (("pivotal tokens", tokens, token_kinds, "place"),
                                          ("reflective actions", sentences, sentence_kinds, "length in tokens"),
                                          ("rare behaviours", sentences, None, "kind")):
        if not rows or (kinds is None and far is None):
            continue
        values, kind, group, position, difficulty, other = map(np.array, zip(*rows))
        if kinds is None:
            rare = np.argsort(-far, kind="stable")[:math.ceil(RARE * len(far))]
            label, keep, other = np.isin(np.arange(len(far)), rare), np.full(len(far), True), kind
        else:
            label, keep = np.array([kinds.get(k) is True for k in kind]), np.array([k in kinds for k in kind])
        chosen = values[keep], label[keep], group[keep]
        strata = {name: x[keep] for name, x in (("position", position), ("difficulty", difficulty), (further, other))}
        total = lambda k, weights: np.bincount(group[kind == k], weights[kind == k], len(readings))
        record[subject] = {
            "all": compare(*chosen),
            "kinds": {str(k): ratio(total(k, values), total(k, np.ones(len(values)))) for k in np.unique(kind) if kinds},
            "within": {name: within(*chosen, x) for name, x in strata.items()
                       if len(set(x)) > 1 and not (x.dtype.kind == "f" and np.isnan(x).any())}}
    return record


def word_starts(pieces: Sequence[str]) -> list[bool]:
    """False for a token that goes on in a word: its letters follow letters."""
    return [not (p[:1].isalnum() and before[-1:].isalnum()) for before, p in zip(["", *pieces], pieces)]


def behaviour(readings: Sequence[Reading], task: str) -> dict:
    """What the responses of one model do, per response."""
    token_kinds, sentence_kinds = TEXT if task == "text" else COUNTDOWN
    one, length = [1] * len(readings), [len(r.ids) for r in readings]
    grams = [[tuple(r.ids[i:i + NGRAM]) for i in range(len(r.ids) - NGRAM + 1)] for r in readings]
    pivotal = [[i for i, k in enumerate(r.kinds) if token_kinds.get(k)] for r in readings]
    reflective = [[(a, b) for a, b, k in r.sentences if sentence_kinds.get(k)] for r in readings]
    in_pivotal = [sum(r.entropy[p]) for r, p in zip(readings, pivotal)]
    in_reflective = [sum(r.entropy[a:b].sum() for a, b in x) for r, x in zip(readings, reflective)]
    return {"tokens per response": ratio(length, one),
            f"repeated {NGRAM}-grams, share": ratio([len(g) - len(set(g)) for g in grams], [len(g) for g in grams]),
            "pivotal tokens per response": ratio([len(p) for p in pivotal], one),
            "pivotal tokens per 100 tokens": ratio([100 * len(p) for p in pivotal], length),
            "reflective actions per response": ratio([len(x) for x in reflective], one),
            "entropy per token": ratio([r.entropy.sum() for r in readings], length),
            "entropy per pivotal token": ratio(in_pivotal, [len(p) for p in pivotal]),
            "entropy per token of reflection": ratio(in_reflective, [sum(b - a for a, b in x) for x in reflective])}


def encoder(name: str) -> Callable[[Sequence[str]], np.ndarray]:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise ValueError("--encoder needs sentence-transformers: pip install sentence-transformers") from None
    return functools.partial(SentenceTransformer(name).encode, normalize_embeddings=True)


def analyze(s: Settings) -> dict:
    """Runs the command; returns what report.json holds. ValueError or OSError name what is wrong."""
    if min(s.problems, s.samples, s.max_new_tokens) < 1 or min(s.show, s.seed) < 0 or not 1e-3 <= s.temperature <= 1e3:
        raise ValueError("--problems, --samples and --max-new-tokens must be at least 1, --show and --seed at least 0, "
                         "--temperature 0.001 to 1000")
    names, problems = list(dict.fromkeys([*([s.base] if s.base else []), *s.models])), problems_of(s)
    for name in names:
        find_folder(name)                       # before the first is sampled
    vectors, out = encoder(s.encoder) if s.encoder else None, Path(s.out)
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[Reading]] = {}
    report: dict = {"settings": dataclasses.asdict(s), "models": {}}
    for name in names:
        mean, found[name] = read(name, problems, s)
        vectors = vectors or mean               # of the first model, the base if there is one, for all of them
        far = distances(vectors, found[name], found[s.base]) if s.base and name != s.base else None
        report["models"][name] = {"behaviour": behaviour(found[name], s.task), **comparisons(found[name], far, s.task)}
    first = {name: {r.problem: r for r in reversed(readings)} for name, readings in found.items()}
    cases = [{name: r[i] for name, r in first.items()} for i in range(min(s.show, len(problems)))]
    report["cases"] = [{"prompt": problems[i]["prompt"], **{name: "".join(r.pieces) for name, r in case.items()}}
                       for i, case in enumerate(cases)]
    print(f"{len(problems)} problems, {len(found[names[0]])} responses a model, temperature {s.temperature}, seed {s.seed}",
          "(entropies in nats, 95 % intervals over responses)\n" + tables(report))
    kinds = TEXT if s.task == "text" else COUNTDOWN
    (out / "responses.html").write_text(page(cases, kinds), encoding="utf-8")
    text = json.dumps(json.loads(json.dumps(report), parse_constant=lambda _: None), indent=1)      # JSON has no nan
    (out / "report.json").write_text(text + "\n")
    print(f"written: {out}/report.json, {out}/responses.html")
    print(draw(report, out / "entropy.png"))
    return report


if __name__ == "__main__":
    try:
        analyze(parse_flags(Settings, __doc__))
    except (ValueError, OSError) as error:
        sys.exit(f"lab.analyze: {error}")
    except KeyboardInterrupt:
        sys.exit("lab.analyze: stopped; nothing was written")
