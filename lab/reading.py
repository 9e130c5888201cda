"""A response as lab.analyze sees it: taken apart, and scored token by token by the model.

Responses are sampled from the model or read from a file. Each then runs through the model once,
behind its prompt, for the entropy of every token and the likeliest tokens in its place. A sentence
gets a vector, the mean of the model's last hidden states over the sentence read alone.
"""

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from evaluate import count_solved
from lab.exploration import Span, dissect_countdown, dissect_text
from model import Transformer, load
from plumbing.settings import pick_device
from rollout import Sampler
from tasks import Problem, load_task
from tasks.countdown import count_chains, numbers_of

SLOTS = 256  # sequences sampled at a time
ROWS = 256  # tokens whose probabilities exist at a time
CONTEXT = 8  # tokens that a token's text may depend on; eight hold a whole character
LIKELIEST = 3
REMEMBERED = 1 << 16  # texts of token sequences that are kept


@dataclass
class Answer:
    """A response before it is read."""

    problem: str
    prompt: list[int]  # token ids, as are those of the response, without its end token
    response: list[int]
    finished: bool  # False: cut at the limit
    level: float  # how hard the problem is, nan if that is not known


@dataclass
class Reading:
    """A response of R tokens, taken apart and scored."""

    problem: int  # problems are numbered in the order of their first response
    prompt: str
    ids: list[int]  # [R]
    pieces: list[str]  # [R], the text of each token
    kinds: list[str]  # [R]
    sentences: list[Span]
    entropy: np.ndarray  # [R], nats
    likeliest: list[list[tuple[str, float]]]  # [R], the three likeliest tokens, their probabilities
    difficulty: float  # higher where it is harder, nan where it is not known

    def token_spans(self) -> list[Span]:
        """Every token as a span of its own."""
        return [Span(i, i + 1, kind) for i, kind in enumerate(self.kinds)]

    def sentence_spans(self) -> list[Span]:
        return self.sentences

    def sentence_texts(self) -> list[str]:
        return ["".join(self.pieces[s.first : s.end]).strip() for s in self.sentences]


def read_responses(name: str, s) -> tuple[Callable[[Sequence[str]], torch.Tensor], list[Reading]]:
    """Samples (or reads) and scores, under lab.analyze's settings `s` -> what makes unit vectors
    [N, width] of N sentences, and the responses."""
    model, tokenizer = load(name, pick_device(s.device), getattr(torch, s.dtype))
    encode = functools.partial(tokenizer.encode, add_special_tokens=False)
    if s.saved:
        answers = saved_answers(s.saved, s.problems, encode)
    else:
        answers = sampled_answers(model, tokenizer, name, s)
    check_answers(answers, tokenizer.unk_token_id, name, s)

    @functools.lru_cache(REMEMBERED)
    def decode(ids: tuple[int, ...]) -> str:
        return tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    order = dict.fromkeys(answer.problem for answer in answers)
    number = {problem: i for i, problem in enumerate(order)}
    readings = [read_answer(answer, number[answer.problem], model, decode, s) for answer in answers]
    return sentence_vectors(model, encode), readings


def saved_answers(file: str, count: int, encode: Callable[[str], list[int]]) -> list[Answer]:
    """The first `count` lines of a jsonl. ValueError, with the line, for one that lacks a problem
    or a response, or has a text that no tokenizer takes."""
    answers = []
    lines = Path(file).read_bytes().splitlines()
    for number, line in enumerate(lines[:count], start=1):
        try:
            row = json.loads(line)
            problem = row.get("problem") or row["prompt"]
            response = row.get("response") or row["solution"]
            level = float(row.get("level", math.nan))
            answer = Answer(
                problem=problem,
                prompt=encode(problem),
                response=encode(response),
                finished=True,
                level=level,
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{file}, line {number}, needs a problem and a response ({error!r})"
            ) from None
        answers.append(answer)
    return answers


def sampled_answers(model: Transformer, tokenizer, name: str, s) -> list[Answer]:
    """Answers to the first problems of a split. End tokens are left out. ValueError without
    problems."""
    task = load_task(s.task, s.data, s.test_data, s.template)
    problems = getattr(task, s.split)[: s.problems]
    if not problems:
        raise ValueError(f"{s.task} has no {s.split} problems")
    longest = max(len(task.encode(problem, tokenizer)) for problem in problems)
    sampler = Sampler(model, SLOTS, longest + s.max_new_tokens, model.eos_ids)
    answers = []

    def watch(problem: Problem, text: str, episode) -> None:
        ids = episode.response.tolist()
        answer = Answer(
            problem=problem.prompt,
            prompt=episode.prompt.tolist(),
            response=ids[:-1] if episode.finished else ids,
            finished=episode.finished,
            level=math.nan,
        )
        answers.append(answer)

    graded = count_solved(
        sampler,
        tokenizer,
        task,
        problems,
        samples=s.samples,
        max_new_tokens=s.max_new_tokens,
        temperature=s.temperature,
        top_p=s.top_p,
        seed=0,
        progress=name,
        watch=watch,
    )
    # As hard as the model finds it: the share of its answers that are wrong. (Countdown has a
    # measure of its own.)
    level = {}
    for problem, solved in zip(problems, graded["solved"]):
        level[problem.prompt] = 1 - solved / s.samples
    for answer in answers:
        answer.level = level[answer.problem]
    return answers


def check_answers(answers: Sequence[Answer], unknown: int | None, name: str, s) -> None:
    """ValueError unless intervals over problems exist, and the model can read every text."""
    if len({answer.problem for answer in answers}) < 2:
        raise ValueError("there must be two problems")
    for answer in answers:
        # What the model wrote itself it can read.
        ids = answer.prompt + answer.response if s.saved else answer.prompt
        if not answer.prompt or unknown in ids:
            raise ValueError(f"the tokenizer of {name} must have words for all texts")


def read_answer(
    answer: Answer,
    problem: int,
    model: Transformer,
    decode: Callable[[tuple[int, ...]], str],
    s,
) -> Reading:
    """Takes one answer apart and scores it."""
    # What stands before a token predicts it: from the prompt's last token to the last but one.
    hidden = hidden_states(model, answer.prompt + answer.response)
    before = hidden[len(answer.prompt) - 1 : -1]  # [R, width]
    entropy, ids, probabilities = predictions(model, before, s.temperature)
    likeliest = []
    for three, chances in zip(ids, probabilities):
        words = [decode((token,)) for token in three]
        likeliest.append(list(zip(words, chances)))

    pieces = decode_pieces(decode, answer.response)
    if s.task == "countdown":
        kinds, sentences = dissect_countdown(answer.problem, [piece.strip() for piece in pieces])
        difficulty = countdown_difficulty(answer.problem)
    else:
        kinds, sentences = dissect_text(pieces)
        difficulty = answer.level
    if not answer.finished:
        sentences = sentences[:-1]  # the last one was cut

    return Reading(
        problem=problem,
        prompt=answer.problem,
        ids=answer.response,
        pieces=pieces,
        kinds=kinds,
        sentences=sentences,
        entropy=entropy,
        likeliest=likeliest,
        difficulty=difficulty,
    )


def countdown_difficulty(prompt: str) -> float:
    """Minus the number of chains that solve it."""
    target = int(prompt.split()[-2])  # "7 7 1 8 -> 23 ?"
    solutions = count_chains(tuple(numbers_of(prompt)))[target]
    return -float(solutions)


def decode_pieces(decode: Callable[[tuple[int, ...]], str], ids: Sequence[int]) -> list[str]:
    """The text of each token: what it adds to the eight before it, because spaces depend on them.
    A token that holds only some bytes of a character adds "", and the last of them the character.
    """

    def text(first: int, end: int) -> str:
        return decode(tuple(ids[first:end])).rstrip("\ufffd")  # the sign for half a character

    pieces = []
    for i in range(len(ids)):
        first = max(0, i - CONTEXT)
        known = text(first, i)
        pieces.append(text(first, i + 1)[len(known) :])
    return pieces


def hidden_states(model: Transformer, ids: Sequence[int]) -> torch.Tensor:
    """The last hidden states of T tokens, [T, width]."""
    device = model.head.device
    tokens = torch.tensor([ids], device=device)  # [1, T]
    positions = torch.arange(len(ids), device=device)[None]  # [1, T]
    return model(tokens, positions)[0]


def predictions(
    model: Transformer, hidden: torch.Tensor, temperature: float
) -> tuple[np.ndarray, list[list[int]], list[list[float]]]:
    """States [R, width] -> the next token's entropy in nats [R], and the ids and probabilities of
    the three likeliest [R, 3]."""
    entropy = []
    likeliest = []
    chances = []
    for rows in hidden.split(ROWS):
        probability = (F.linear(rows, model.head).float() / temperature).softmax(-1)  # [ROWS, V]
        entropy.append(torch.special.entr(probability).sum(-1))
        top = probability.topk(LIKELIEST)
        likeliest.append(top.indices)
        chances.append(top.values)
    return (
        torch.cat(entropy).cpu().double().numpy(),
        torch.cat(likeliest).cpu().tolist(),
        torch.cat(chances).cpu().tolist(),
    )


def sentence_vectors(
    model: Transformer, encode: Callable[[str], list[int]]
) -> Callable[[Sequence[str]], torch.Tensor]:
    """What makes unit vectors [N, width] of N sentences; equal ones are read once."""

    @functools.cache
    def vector(sentence: str) -> torch.Tensor:
        mean = hidden_states(model, encode(sentence)).double().mean(0)
        return F.normalize(mean, dim=0).cpu()

    def vectors(sentences: Sequence[str]) -> torch.Tensor:
        return torch.stack([vector(sentence) for sentence in sentences])

    return vectors
