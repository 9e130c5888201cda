"""Where is the entropy, and does it sit on exploratory reasoning? `python -m lab.analyze base runs/grpo`.

Samples responses (or reads saved ones), takes every token's entropy under the model, and compares (the paper's Section 2)

    pivotal tokens       with the other tokens
    reflective actions   sentences that verify, correct or start again, with the others
    rare behaviours      the 10 % of sentences furthest from their 5 nearest sentences of the first model, with the rest

over all, within bins of position, difficulty and length, and each kind with all the rest; then what the models' responses
do (Section 6). Tables are printed; report.json, entropy.png (Figure 2) and responses.html (Figure 1) go to --out.

Ours, where the paper is silent: most words, and the splitter (both err: "the first term" is sequential, "a check for $20"
reflects); sentence vectors, means of the first model's last hidden states over the sentence read alone; 95 % intervals by
a bootstrap over problems, since responses to one are not independent; Cohen's d; a permutation test that shuffles labels
within responses (trust the intervals: neighbouring tokens are not exchangeable). End tokens are left out, and the last
sentence of a response cut at the limit. Difficulty is minus the chains that solve a countdown, or a saved `level`.

On countdown the pivotal tokens are the operators and the operands there is a choice of; the others are `=`, results and an
operand when only one is left, whose entropy is near 0 by construction. Checks (`vs 23`, taught by lab/pretrain.py) and
attempts after `wait` reflect, first attempts do not; `wait` and `so`, two outcomes of one decision, are on neither side. So
what informs is the base beside the trained model.
"""

import functools
import html
import itertools
import json
import math
import re
import sys
import unicodedata
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from evaluate import count_solved, flag, parse_flags, pick_device
from model import find_folder, load
from rollout import Sampler
from task import NUMBER, OPERATORS, Problem, chains, load_task, numbers_of

Sentences = list[tuple[int, int, str]]      # first token, the one after the last, kind
NGRAM, NEIGHBOURS, RARE, RESAMPLES, PERMUTATIONS = 4, 5, 0.1, 2000, 1000
COLUMNS = ("mean", "others", "difference", "d")
PIVOTAL = {
    "causal": "because, therefore, thus, hence, since, so, consequently, accordingly, as a result, due to",
    "contrastive": "however, although, though, but, yet, instead, whereas, nevertheless, nonetheless, otherwise, unless, "
                   "despite, conversely, on the other hand, in contrast",
    "sequential": "first, firstly, second, secondly, third, thirdly, then, next, finally, lastly, afterwards, subsequently",
    "reasoning verbs": "suggest, suggests, demonstrate, demonstrates, recall, assume, assuming, suppose, consider, imply, "
                       "implies, conclude, deduce, infer, observe, notice, note, show, shows, prove, proves"}
REFLECTIVE = {kind: re.compile(rf"(?<![\w\\])(?:{words})(?!\w)", re.IGNORECASE) for kind, words in {
    "verify": r"(?:re-?|double[- ])?(?:verif(?:y|ies|ied|ying|ication)|check(?:s|ed|ing)?)|(?:re-?)?confirm(?:s|ed|ing)?"
              r"|make\ssure|(?:plug|substitut)(?:e|ed|ged|ging|ing)?(?:\s\S{1,20}){0,3}\sback",
    "correct": r"mistakes?|mistaken|incorrect(?:ly)?|wrong|an\serror|correct(?:ed|ing|ion)|(?:me|to)\scorrect"
               r"|wait(?=\s?(?:[,.!:…—]|--))|hold\son|hmm+|actually(?=,)",
    "start again": r"(?:try|start|begin)\s(?:again|over)|re-?(?:consider|examine|evaluate|think|do)|backtrack|go\sback"
                   r"|alternatively|(?:another|different)\s(?:approach|way|method)"}.items()}
# A group per category. Not within a longer or hyphenated word ("so-called"), nor a LaTeX command (\implies).
WORD = re.compile(r"(?<![\w\\])(?<!\w-)(?:" + "|".join("(" + words.replace(", ", "|").replace(" ", r"\s") + ")"
                  for words in PIVOTAL.values()) + r")(?!-?\w)", re.IGNORECASE)
# Kinds of tokens and of sentences: exploratory (True), or compared with those (False). Others are on neither side.
TEXT = ({**dict.fromkeys(PIVOTAL, True), "other": False, "within a word": False},
        {**dict.fromkeys(REFLECTIVE, True), "other": False})
COUNTDOWN = ({"operand": True, "operator": True, "last operand": False, "=": False, "result": False},
             {"check": True, "attempt after wait": True, "first attempt": False})
# A sentence ends at a stop before a capital or a formula, and at the end of a line unless the next goes on in small letters
# or is a formula; not after "1." or "e.g.". All repetitions are bounded, so that no text makes a search explode.
BREAK = re.compile(r"(?<!\n\d)(?<!\be\.g)(?<!\bi\.e)(?<!\bcf)[.!?](?:\$\$?|\\[)\]]|[\"')\]”]){0,3}(?=\s{1,9}(?:[A-Z$\\(]|\[asy))"
                   r"|\n(?=\s{0,9}(?:[A-Z#*]|\[asy|-\s|\d{1,3}\.\s))")


@dataclass
class Settings:
    models: tuple = flag((), "model folders, run folders or hub ids; the first is the base of the others", nargs="+", type=str)
    task: str = flag("countdown", "countdown, or math, whose responses are taken apart as English")
    data: str = flag("", "math: the training data, whose validation problems are taken")
    template: str = flag("dapo", "math: how a problem is put", choices=("dapo", "qwen-math", "chat", "none"))
    saved: str = flag("", "read responses, do not sample: jsonl of problem, response (or solution) and, if known, level")
    problems: int = flag(50, "how many, from the start")
    samples: int = flag(16, "responses per problem")
    temperature: float = flag(1.0, "of the samples and of the entropies")
    max_new_tokens: int = flag(128, "longest response, in tokens")
    device: str = flag("auto", "cpu, cuda, cuda:1 ...; auto takes a GPU if there is one")
    out: str = flag("runs/analysis", "folder for the report, the picture and the page")


def dissect_text(pieces: Sequence[str]) -> tuple[list[str], Sentences]:
    """English mathematics, given the text of each token -> the tokens' kinds, and the sentences."""
    text, ends = "".join(pieces), np.cumsum([len(p) for p in pieces], dtype=int)
    kinds = ["within a word" if a[-1:].isalnum() and b[:1].isalnum() else "other" for a, b in zip(["", *pieces], pieces)]
    for found in WORD.finditer(text):
        kinds[int(np.searchsorted(ends, found.start(), side="right"))] = list(PIVOTAL)[found.lastindex - 1]
    # A token belongs to the sentence of its first character that is no space: " Then" opens one.
    begins = [end - len(p.lstrip() or p) for end, p in zip(ends, pieces)]
    place, sentences = np.searchsorted([found.end() for found in BREAK.finditer(text)], begins, side="right"), []
    for members in np.split(np.arange(len(pieces)), np.flatnonzero(np.diff(place)) + 1):
        sentence = "".join(pieces[i] for i in members)
        if any(c.isalnum() for c in sentence):              # blank lines are none
            kind = next((kind for kind, words in REFLECTIVE.items() if words.search(sentence)), "other")
            sentences.append((int(members[0]), int(members[-1]) + 1, kind))
    return kinds, sentences


def dissect_countdown(prompt: str, words: Sequence[str]) -> tuple[list[str], Sentences]:
    """The same for countdown, where every word is a token. Never raises on a malformed response."""
    kinds, sentences, attempt = [], [], "first attempt"
    place, left = 0, numbers_of(prompt)                     # place in `n (op n = r)...`; -1: in a check
    for i, word in enumerate(words):
        if word in ("wait", "so"):
            kind = part = word
            place, left, attempt = 0, numbers_of(prompt), "attempt after " + word
        elif word == "vs" or place < 0:
            kind, part, place = "vs" if word == "vs" else "target", "check", -1
        else:
            kind, part = ("operand", "operator", "operand", "=", "result")[place], attempt
            fits = {"operator": word in OPERATORS, "=": word == "="}.get(kind, word in NUMBER)
            if kind == "operand":
                kind = "operand" if len(set(left)) > 1 else "last operand"      # no choice: one is left, or equal ones
                if NUMBER.get(word) in left:
                    left.remove(NUMBER[word])
            kind, place = kind if fits else "malformed", place + 1 if place < 4 else 1
        kinds.append(kind)
        goes_on = i > 0 and sentences[-1][2] == part
        sentences.append((sentences.pop()[0] if goes_on else i, i + 1, part))
    return kinds, sentences


def decode_pieces(decode: Callable[[tuple[int, ...]], str], ids: Sequence[int]) -> list[str]:
    """The text of each token: what it adds to the eight before it, because spaces depend on them. One that holds only some
    bytes of a character adds "", and the last of them the character; eight tokens hold a whole one."""
    text = lambda first, end: decode(tuple(ids[first:end])).rstrip("\ufffd")
    return [text(max(0, i - 8), i + 1)[len(text(max(0, i - 8), i)):] for i in range(len(ids))]


@dataclass
class Reading:
    """A response, taken apart and scored: of each of its R tokens the text, kind, entropy in nats and the three likeliest in
    its place with their probabilities. Difficulty is higher where it is harder, nan where it is not known."""
    problem: int
    prompt: str
    ids: list[int]
    pieces: list[str]
    kinds: list[str]
    sentences: Sentences
    entropy: np.ndarray
    likeliest: list[list[tuple[str, float]]]
    difficulty: float


def hidden_states(model, ids: Sequence[int]) -> torch.Tensor:
    return model(torch.tensor([ids], device=model.head.device), torch.arange(len(ids), device=model.head.device)[None])[0]


def predictions(model, hidden: torch.Tensor, temperature: float) -> tuple[np.ndarray, list, list]:
    """States [R, width] -> the next token's entropy in nats [R], ids and probabilities of the three likeliest [R, 3]."""
    chances = ((F.linear(rows, model.head).float() / temperature).softmax(-1) for rows in hidden.split(256))  # few at once
    found = [(torch.special.entr(p).sum(-1), *p.topk(3)) for p in chances]
    entropy, p, ids = (torch.cat(x).cpu() for x in zip(*found))
    return entropy.double().numpy(), ids.tolist(), p.tolist()


def read(name: str, s: Settings) -> tuple[Callable, list[Reading]]:
    """Samples (or reads) and scores -> what makes unit vectors [N, width] of N sentences, and the responses."""
    model, tokenizer = load(name, pick_device(s.device))
    encode = functools.partial(tokenizer.encode, add_special_tokens=False)
    vector = functools.cache(lambda text: F.normalize(hidden_states(model, encode(text)).double().mean(0), dim=0).cpu())
    decode = functools.lru_cache(1 << 16)(lambda ids: tokenizer.decode(ids, clean_up_tokenization_spaces=False))
    if s.saved:
        answers = []                                        # problem, level, finished, ids of prompt and of response
        for number, line in enumerate(Path(s.saved).read_bytes().splitlines()[:s.problems], 1):
            try:
                row = json.loads(line)
                prompt, response = row.get("problem") or row["prompt"], row.get("response") or row["solution"]
                answers.append((Problem(prompt, ""), float(row.get("level", math.nan)), True, encode(prompt), encode(response)))
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise ValueError(f"{s.saved}, line {number}, needs a problem and a response ({error!r})") from None
    else:
        task, found = load_task(s.task, s.data, "", s.template), []
        problems = task.validation[:s.problems]
        sampler = Sampler(model, 256, max(len(task.encode(p, tokenizer)) for p in problems) + s.max_new_tokens, model.eos_ids)
        count_solved(sampler, tokenizer, task, problems, s.samples, s.max_new_tokens, s.temperature, 1.0, seed=0,
                     progress=name, watch=lambda p, _, e: found.append((p, e, e.response.tolist())))
        answers = [(p, math.nan, e.finished, e.prompt.tolist(), ids[:len(ids) - e.finished]) for p, e, ids in found]
    numbers = {prompt: i for i, prompt in enumerate(dict.fromkeys(p.prompt for p, *_ in answers))}
    if len(numbers) < 2 or any(not a[3] or tokenizer.unk_token_id in a[3] + a[4] * bool(s.saved) for a in answers):
        raise ValueError(f"there must be two problems, and the tokenizer of {name} must have words for all texts")
    readings = []
    for problem, difficulty, finished, prompt, ids in answers:
        entropy, *likeliest = predictions(model, hidden_states(model, prompt + ids)[len(prompt) - 1:-1], s.temperature)
        pieces = decode_pieces(decode, ids)
        if s.task == "countdown":
            kinds, sentences = dissect_countdown(problem.prompt, [piece.strip() for piece in pieces])
            difficulty = -float(chains(tuple(numbers_of(problem.prompt)))[int(problem.prompt.split()[-2])])
        else:
            kinds, sentences = dissect_text(pieces)
        readings.append(Reading(numbers[problem.prompt], problem.prompt, ids, pieces, kinds,
                                sentences if finished else sentences[:-1], entropy,
                                [[(decode((t,)), q) for t, q in zip(*three)] for three in zip(*likeliest)], difficulty))
    return lambda sentences: torch.stack([vector(text) for text in sentences]), readings


def nearest(vectors: torch.Tensor, others: torch.Tensor, k: int = NEIGHBOURS) -> torch.Tensor:
    """Mean Euclidean distance of each of `vectors` [N, d] to its k nearest `others` [M, d] (all, if fewer). [N]"""
    return torch.cat([torch.cdist(rows, others).topk(min(k, len(others)), largest=False).values.mean(-1)
                      for rows in vectors.split(256)])


def bootstrap(figures: Callable[[np.ndarray], np.ndarray], totals: np.ndarray) -> list[dict]:
    """`figures` makes numbers [F] of sums [columns], and [F, N] of [columns, N]. totals: the sums of each problem
    [problems, columns] -> each number, with its 95 % interval over problems."""
    weights = np.random.default_rng(0).multinomial(len(totals), np.full(len(totals), 1 / len(totals)), size=RESAMPLES)
    with np.errstate(all="ignore"):
        point, many = figures(totals.sum(0)), figures((weights @ totals).T)
    many = [row[np.isfinite(row)] for row in many]          # a resample may have none of a kind
    return [{"mean": float(mean), "interval": np.percentile(row, [2.5, 97.5]).tolist() if len(row) else [math.nan] * 2}
            for mean, row in zip(point, many)]


def permutation_p(values: np.ndarray, label: np.ndarray, group: np.ndarray, permutations: int = PERMUTATIONS) -> float:
    """Two-sided p of the difference of means if labels are shuffled within each stretch of equal `group`: over all
    arrangements, if they are no more than `permutations`, else at random. nan if no group has both labels."""
    cuts = np.flatnonzero(np.diff(group)) + 1
    parts = [(v - v.mean(), l) for v, l in zip(np.split(values, cuts), np.split(label, cuts)) if 0 < l.sum() < len(l)]
    # Each group keeps its number of labels, so the difference of means grows with the sum over the labelled ones.
    distance = abs(sum(v[l].sum() for v, l in parts))
    exact = math.prod(math.comb(len(l), int(l.sum())) for _, l in parts) <= permutations
    sums, rng = np.zeros(1 if exact else permutations), np.random.default_rng(0)
    for v, l in parts:
        if exact:
            sums = np.add.outer(sums, [sum(c) for c in itertools.combinations(v, l.sum())]).ravel()
        else:
            sums += rng.permuted(np.tile(v, (permutations, 1)), axis=1)[:, :l.sum()].sum(1)
    extreme = int((abs(sums) >= distance - 1e-9 * (1 + distance)).sum())
    return math.nan if not parts else extreme / len(sums) if exact else (extreme + 1) / (permutations + 1)


def compare(rows: dict[str, np.ndarray], label: np.ndarray) -> dict | None:
    """Entropy of the labelled rows and of the others: means, difference, Cohen's d; None if there are not two of both."""
    if min(label.sum(), (~label).sum()) < 2:
        return None
    problem = np.unique(rows["problem"], return_inverse=True)[1]
    moments = [np.bincount(problem, side * rows["entropy"] ** power) for side in (label, ~label) for power in (0, 1, 2)]
    def figures(totals: np.ndarray) -> np.ndarray:
        n, s, square, n0, s0, square0 = totals
        variance = (square - s ** 2 / n + square0 - s0 ** 2 / n0) / (n + n0 - 2)            # pooled
        difference = s / n - s0 / n0
        return np.array([s / n, s0 / n0, difference, difference / np.sqrt(np.where(variance > 1e-12, variance, np.nan))])
    n, p = int(label.sum()), permutation_p(rows["entropy"], label, rows["response"])
    return dict(zip(COLUMNS, bootstrap(figures, np.column_stack(moments)))) | {"n": n, "n others": len(label) - n, "p": p}


def comparisons(readings: Sequence[Reading], spans: Callable[[Reading], Sequence], sides: dict[str, bool],
                far: np.ndarray | None = None) -> dict[str, dict | None]:
    """`compare` for what `spans` finds in a response (first token, the one after the last, kind): over all on the two
    `sides` (or, given distances, the furthest against the rest), in 4 bins of about equally many, and kind by kind."""
    names = ("entropy", "kind", "problem", "response", "position", "difficulty", "length in tokens")
    rows = [(r.entropy[a:b].mean(), kind, r.problem, i, a, r.difficulty, b - a)
            for i, r in enumerate(readings) for a, b, kind in spans(r)]
    if not rows:
        return {"all": None}
    everything = {name: np.array(column) for name, column in zip(names, zip(*rows))}
    select = lambda rows, mask: {name: column[mask] for name, column in rows.items()}
    if far is None:
        chosen = select(everything, np.isin(everything["kind"], list(sides)))
        label = np.isin(chosen["kind"], [kind for kind, side in sides.items() if side])
    else:
        chosen, label = everything, far >= np.quantile(far, 1 - RARE)       # equal sentences on the same side
    record = {"all": compare(chosen, label)}
    for name in names[4:]:
        x = chosen[name]
        place = np.searchsorted(np.unique(np.quantile(x, [0.25, 0.5, 0.75], method="higher")), x, side="right")
        for mask in (place == i for i in np.unique(place) if len(set(place)) > 1 and not np.isnan(x).any()):
            record[f"{name} {x[mask].min():g} to {x[mask].max():g}"] = compare(select(chosen, mask), label[mask])
    for kind in np.unique(everything["kind"]):
        mask = everything["kind"] == kind
        record[f"kind {kind}"] = compare(everything, mask) if far is None else compare(select(everything, mask), label[mask])
    return record


def behaviour(readings: Sequence[Reading], kinds: tuple[dict, dict]) -> dict[str, dict]:
    """What the responses of one model do, figure by figure."""
    names = ("tokens per response", f"repeated {NGRAM}-grams, share", "pivotal tokens per response",
             "pivotal tokens per 100 tokens", "reflective actions per response", "entropy per token",
             "entropy per pivotal token", "entropy per token of reflection")
    totals = np.zeros((1 + max(r.problem for r in readings), 2, len(names)))        # numerators and denominators
    for r in readings:
        n, grams = len(r.ids), [tuple(r.ids[i:i + NGRAM]) for i in range(len(r.ids) - NGRAM + 1)]
        pivotal = [h for h, kind in zip(r.entropy, r.kinds) if kinds[0].get(kind)]
        reflective = [r.entropy[a:b] for a, b, kind in r.sentences if kinds[1].get(kind)]
        totals[r.problem] += [[n, len(grams) - len(set(grams)), len(pivotal), 100 * len(pivotal), len(reflective),
                               sum(r.entropy), sum(pivotal), sum(map(sum, reflective))],
                              [1, len(grams), 1, n, 1, n, len(pivotal), sum(map(len, reflective))]]
    return dict(zip(names, bootstrap(lambda t: t[:len(names)] / t[len(names):], totals.reshape(len(totals), -1))))


def visible(text: str, longest: int = 200) -> str:
    """`text` as harmless HTML: escaped, what cannot be seen or turns others round by number, not endless."""
    unseen = lambda c: unicodedata.category(c) in ("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp")
    shown = "".join("⏎\n" if c == "\n" else f"⟨U+{ord(c):04X}⟩" if unseen(c) else c for c in text[:longest])
    return html.escape(shown) + f"⟨{len(text) - longest:,} more characters⟩" * (len(text) > longest)


def page(cases: Sequence[dict[str, Reading]], kinds: tuple[dict, dict]) -> str:
    """lab/page.html filled in: for each problem the answers of all models side by side, tokens coloured by entropy."""
    darkest, body = max(1e-6, np.quantile([0, *(h for case in cases for r in case.values() for h in r.entropy)], 0.99)), []
    for case in cases:
        body.append(f'<h2 class="prompt">{visible(next(iter(case.values())).prompt, 10_000)}</h2><div class="row">')
        for name, r in case.items():
            body.append(f'<div><h3>{visible(name)}</h3><div class="text" dir="ltr">')
            sentence = {i: kind for first, end, kind in r.sentences for i in range(first, end)}
            for i, (piece, kind, h, likeliest) in enumerate(zip(r.pieces[:10_000], r.kinds, r.entropy, r.likeliest)):
                tip = "&#10;".join([f"{h:.3f} nats, token {i + 1}", f"{kind}; sentence: {sentence.get(i, 'none')}",
                                    *(f"{p:7.2%}  {visible(text, 40)}" for text, p in likeliest)])
                marks = "t" + " p" * bool(kinds[0].get(kind)) + " r" * bool(kinds[1].get(sentence.get(i)))
                body.append(f'<span class="{marks}" style="background:rgba(235,80,0,{min(1.0, h / darkest):.2f})" '
                            f'data-h="{tip}">{visible(piece)}</span>')
            body.append(f"⟨10,000 of {len(r.pieces):,} tokens⟩" * (len(r.pieces) > 10_000) + "</div></div>")
        body.append("</div>")
    frame = Path(__file__).with_name("page.html").read_text(encoding="utf-8").replace("DARKEST", f"{darkest:.2f}")
    return frame.replace("BODY", "".join(body))


def tables(report: dict) -> str:
    cell = lambda x: x if isinstance(x, str) else f"{x['mean']:.3f} [{x['interval'][0]:.3f}, {x['interval'][1]:.3f}]"
    line = lambda row, cells: f"{row:32}" + "".join(cell(x).rjust(28) for x in cells)
    lines = [line("", [name[-24:] for name in report["behaviour"]])]
    for row in next(iter(report["behaviour"].values())):
        lines.append(line(row, [figures[row] for figures in report["behaviour"].values()]))
    for subject, name, record in ((x, *pair) for x, models in report["comparisons"].items() for pair in models.items()):
        lines += ["", line(f"{name}: {subject}"[-32:], COLUMNS) + f"{'n':>8}{'others':>8}{'p':>8}"]
        lines += [line(row, [c[x] for x in COLUMNS]) + f"{c['n']:8}{c['n others']:8}{c['p']:8.2g}" if c else
                  line(row, ["too few"]) for row, c in record.items()]
    return "\n".join(lines)


def draw(comparisons: dict, file: Path) -> None:
    """A panel per comparison, two bars per model."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(4 * len(comparisons), 4), layout="constrained")
    for axis, (subject, models) in zip(figure.subplots(1, len(comparisons)), comparisons.items()):
        found = [(name, record["all"]) for name, record in models.items() if record["all"]]
        for shift, side, label, colour in ((-0.2, "mean", subject, "0.5"), (0.2, "others", "others", "0.8")):
            mean, ends = (np.array([c[side][x] for _, c in found]) for x in ("mean", "interval"))
            axis.bar(np.arange(len(found)) + shift, mean, 0.38, color=colour, label=label)
            axis.vlines(np.arange(len(found)) + shift, *ends.reshape(-1, 2).T, color="0")
        axis.margins(y=0.25)                                # room for the legend
        axis.set_xticks(range(len(found)), [Path(name).name[-16:].replace("$", r"\$") for name, _ in found])
        axis.set(ylabel="mean entropy, nats", title=subject)
        axis.legend(frameon=False, ncols=2, loc="upper center")
    figure.savefig(file, dpi=150)


@torch.no_grad()
def analyze(s: Settings) -> dict:
    """Runs the command; returns what report.json holds. ValueError or OSError name what is wrong."""
    if min(s.problems, s.samples, s.max_new_tokens) < 1 or not 1e-3 <= s.temperature <= 1e3:
        raise ValueError("--problems, --samples and --max-new-tokens must be at least 1, --temperature 0.001 to 1000")
    names, kinds = list(dict.fromkeys(s.models)), COUNTDOWN if s.task == "countdown" else TEXT
    for name in names:
        find_folder(name)                       # before the first is sampled
    if find_spec("matplotlib") is None:
        raise ValueError("the picture needs matplotlib: pip install matplotlib")
    subjects: dict = {"pivotal tokens": {}, "reflective actions": {}, "rare behaviours": {}}
    report, cases, base = {"settings": vars(s), "behaviour": {}, "comparisons": subjects}, {}, ()
    tokens, sentences = lambda r: [(t, t + 1, kind) for t, kind in enumerate(r.kinds)], lambda r: r.sentences
    for name in names:
        own, readings = read(name, s)
        report["behaviour"][name] = behaviour(readings, kinds)
        subjects["pivotal tokens"][name] = comparisons(readings, tokens, kinds[0])
        subjects["reflective actions"][name] = comparisons(readings, sentences, kinds[1])
        texts = ["".join(r.pieces[a:b]).strip() for r in readings for a, b, _ in r.sentences]
        vectors, first = base = base or (own, texts)            # of the first model, for all of them
        if name != names[0] and first and texts:
            far = nearest(vectors(texts), vectors(first)).numpy()
            subjects["rare behaviours"][name] = comparisons(readings, sentences, {}, far)
        for r in reversed(readings):
            cases.setdefault(r.problem, {})[name] = r
    shown, out = [cases[i] for i in sorted(cases)[:3]], Path(s.out)
    report["answers"] = [{name: r.prompt + "\n" + "".join(r.pieces) for name, r in case.items()} for case in shown]
    print(f"{len(cases)} problems, {len(readings)} responses, entropies in nats, 95 % intervals over problems\n" + tables(report))
    out.mkdir(parents=True, exist_ok=True)
    (out / "responses.html").write_text(page(shown, kinds), encoding="utf-8")
    plain = json.loads(json.dumps(report), parse_constant=lambda _: None)       # JSON has no nan
    (out / "report.json").write_text(json.dumps(plain, indent=1) + "\n")
    draw(report["comparisons"], out / "entropy.png")
    return report


if __name__ == "__main__":
    try:
        analyze(parse_flags(Settings, __doc__))
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"lab.analyze: {error}")
