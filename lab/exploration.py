"""Responses taken apart: which tokens are pivotal, which sentences reflective, and how uncertain the model was there.

The paper's: some of the words (because, therefore, thus, however, although, first, then, suggest, demonstrate, recall;
verify, check), and that reflection is a matter of whole sentences. Its full lists and its splitter are not given, so the
other words, the regular expressions and the splitter are ours. Words are found by spelling, with the errors that has:
"the first term" counts as sequential, "a check for $20" as a check. Of a pivotal word only the first token counts, the
place where the word is chosen.

On countdown the pivotal tokens are the operators and the operands there is a choice of; the others are `=`, results and
an operand when only one is left. Reflective are `vs ...`, `wait` and the attempts after it. `wait` and `so` are the two
outcomes of one decision, with the same distribution behind them.

No text makes the searches explode: their repetitions are bounded. Countdown is read word by word.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model import score
from rollout import Episode, collate, micro_batches
from task import NUMBER, OPERATORS, numbers_of

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
              r"|make\ssure|(?:plug|substitut)(?:e|ed|ged|ging|ing)?(?:\s\S{1,20}){0,3}\sback",
    "correct": r"mistakes?|mistaken|incorrect(?:ly)?|wrong|an\serror|correct(?:ed|ing|ion)|(?:me|to)\scorrect"
               r"|wait(?=\s?(?:[,.!:…—]|--))|hold\son|hmm+|actually(?=,)",
    "start again": r"(?:try|start|begin)\s(?:again|over)|re-?(?:consider|examine|evaluate|think|do)|backtrack"
                   r"|go\sback|alternatively|(?:another|different)\s(?:approach|way|method)"}.items()}
MICRO_TOKENS = 16384                        # per forward pass
# Which kinds are the exploratory ones (True) and which they are compared with (False); kinds not named are left out.
TEXT = {**dict.fromkeys(PIVOTAL, True), "other": False}, {**dict.fromkeys(REFLECTIVE, True), "other": False}
COUNTDOWN = ({"operand": True, "operator": True, "last operand": False, "=": False, "result": False},
             {"check": True, "wait": True, "attempt after wait": True, "first attempt": False, "so": False})
# Mathematics, where a full stop or a new line ends nothing. A price is none: as in pandoc, a closing $ has no space
# before it and no digit after it. The bounds keep the search linear.
FORMULA = re.compile(r"\$\$[^$]{1,2000}\$\$|(?<!\\)\\\[(?:[^\\]|\\[^\[\]]){1,2000}\\\]"
                     r"|\$(?![\s$])[^$\n]{1,500}(?<!\s)\$(?!\d)"
                     r"|\\begin\{(\w{1,10}\*?)\}(?s:.){1,2000}?\\end\{\1\}|\[asy\](?s:.){1,2000}?\[/asy\]")
BREAK = re.compile(r"[.!?](?:\$\$?|\\[)\]]|[\"')\]”]){0,3}(?=\s)|\n"
                   r"|(?:\\\]|\\end\{\w{1,10}\*?\}|\[/asy\])(?=\s{0,2}[A-Z])")
ABBREVIATION = re.compile(r"(?:\b(?:e\.g|i\.e|etc|vs|cf|eqs?|figs?|mr|mrs|ms|dr)|(?:^|\n)\s{0,9}\d{1,3})\.$", re.IGNORECASE)


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
        if found.group() == "\n" and (text.endswith(("\\]", "$$"), 0, end - 1) or after.startswith(("\\[", "$$"))):
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


@dataclass
class Reading:
    """A response, taken apart and scored."""
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
