"""How the embedded base model `base/` was made: next-token prediction on traces of random search.

    OMP_NUM_THREADS=1 python -m lab.pretrain     makes the model again, in runs/base: 48 minutes on
                                                 one core of an AMD EPYC
    python -m lab.pretrain --report base         prints such figures for any model folder:

        Pass@1                            0.0604        Pass@256                          1.0000
        steps with wrong arithmetic       0.0006        attempts with wrong operands      0.0022
        so after a checked hit            0.9996        so after a checked miss           0.1433
        so after an unchecked attempt     0.5026        attempts that hit                 0.0239
        attempts per response             3.1607        checks per response               1.9166
        responses cut at the limit        0.0610        tokens per response              49.3039

A trace is a countdown prompt and a response that searches blindly: every attempt takes the numbers
in a random order and at each step one of the operators that keep the total a whole number in 0..99.
60 % of attempts are checked (`vs 23`, so that the model can learn to compare its total with the
target, which stands next to it). A checked hit is followed by `so`, a checked miss mostly by `wait`
and sometimes (15 %) by giving up with `so`; an unchecked attempt by `wait` or a blind `so`, evenly.
A trace that fails, or is cut at 128 tokens (so that all positions are trained), is kept with a
probability of 30 %. Only training problems are used, those with few solutions too, in any order of
their numbers.

Shapes: N traces, A attempts in each, n numbers in each attempt.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from evaluate import count_solved, pass_table
from lab.behaviour import Behaviour
from model import Transformer, count_parameters, load
from plumbing.batch import response_mask
from plumbing.pretrained import save
from plumbing.settings import check_numbers, flag, parse_flags, pick_device
from rollout import Sampler
from tasks.countdown import LARGEST, NUMBER, OPERATORS, Countdown, numbers_of

END = "<eos>"
PROMPT = 7  # tokens of a prompt
RESPONSE = 128  # tokens of the longest response, its end token included
ATTEMPTS = 10  # drawn per trace; 10 of 14 to 16 tokens always fill 128
DRAWN = 120  # traces drawn at a time, for every one in a batch
LOSS_TOKENS = 64  # the summed loss is divided by this for every trace, however long it is
NONE = -1  # no token: the place is closed up later


@dataclass
class Settings:
    report: str = flag("", "only print the figures of this model folder")
    out: str = flag("runs/base", "folder to write; it must not exist")
    seed: int = flag(0, "of weights and traces", least=0)
    steps: int = flag(8000, "optimizer steps")
    batch: int = flag(128, "traces per step")
    lr: float = flag(
        4e-3, "AdamW's largest learning rate; rises over --warmup, then falls along a cosine to 0"
    )
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


def shuffle(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random order of the last axis, another one in every row."""
    order = rng.random(values.shape).argsort(-1)
    return np.take_along_axis(values, order, axis=-1)


def blind_chains(
    operands: np.ndarray, rng: np.random.Generator
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Calculates from left to right, with a random one of the operators that are allowed.

    operands [N, A, n] -> n - 1 operators, by their place in OPERATORS, and n - 1 totals,
    each [N, A]."""
    total = operands[..., 0]
    operators = []
    totals = []
    for step in range(1, operands.shape[-1]):
        number = operands[..., step]
        exact = total % number == 0
        quotient = np.where(exact, total // number, -1)
        results = np.stack([total + number, total - number, total * number, quotient], axis=-1)
        allowed = (results >= 0) & (results <= LARGEST)  # [N, A, operators]

        # The allowed operator with the largest of random numbers.
        choice = np.where(allowed, rng.random(results.shape), -1).argmax(-1)
        total = np.take_along_axis(results, choice[..., None], axis=-1)[..., 0]
        operators.append(choice)
        totals.append(total)
    return operators, totals


def close_up(tokens: np.ndarray) -> np.ndarray:
    """Moves what is not NONE to the left of each row, in its order. [N, T] -> [N, T]"""
    order = (tokens == NONE).argsort(axis=1, kind="stable")
    return np.take_along_axis(tokens, order, axis=1)


def random_search(
    problems: tuple[np.ndarray, np.ndarray],
    count: int,
    rng: np.random.Generator,
    s: Settings,
    vocabulary: dict[str, int],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws `count` traces at once and drops most failed ones.

    problems: numbers [P, n], targets [P] -> tokens [N, T], total length [N], solved [N], for the N
    that are kept. Padding is id 0."""
    numbers, targets = problems
    zero = vocabulary["0"]  # the numbers' ids follow one another from here
    every_trace = np.arange(count)

    def word(text: str) -> np.ndarray:
        return np.full((count, ATTEMPTS), vocabulary[text])

    # Which problems, their numbers in any order, and the attempts.
    row = rng.integers(len(numbers), size=count)
    asked = shuffle(numbers[row], rng)  # [N, n]
    target = targets[row][:, None]  # [N, 1]
    operands = shuffle(np.repeat(asked[:, None], ATTEMPTS, axis=1), rng)  # [N, A, n]
    operators, totals = blind_chains(operands, rng)

    # What each attempt leads to, and the one that commits: the first `so`, or the last attempt.
    hit = totals[-1] == target  # [N, A]
    checked = rng.random(hit.shape) < s.check
    after_check = np.where(hit, 1.0, s.give_up)
    stop = rng.random(hit.shape) < np.where(checked, after_check, s.blind)
    last = np.where(stop.any(axis=1), stop.argmax(axis=1), ATTEMPTS - 1)  # [N]

    # The tokens of each attempt: n (op n = r)... [vs target] so-or-wait.
    columns = [zero + operands[..., 0]]
    for step, (operator, total) in enumerate(zip(operators, totals), 1):
        columns.append(vocabulary[OPERATORS[0]] + operator)
        columns.append(zero + operands[..., step])
        columns.append(word("="))
        columns.append(zero + total)
    columns.append(np.where(checked, word("vs"), NONE))
    columns.append(np.where(checked, zero + target, NONE))
    columns.append(np.where(stop, word("so"), word("wait")))
    body = np.stack(columns, axis=-1)  # [N, A, tokens]

    # The response: attempts up to the last, the end token, cut at the limit.
    beyond = np.arange(ATTEMPTS) > last[:, None]
    body[beyond] = NONE
    end = np.full((count, 1), vocabulary[END])
    response = close_up(np.concatenate([body.reshape(count, -1), end], axis=1))
    length = (response != NONE).sum(axis=1)
    response = response[:, :RESPONSE].clip(0)  # NONE, now all at the end, becomes the padding
    solved = (length <= RESPONSE) & hit[every_trace, last]

    arrow = np.full((count, 1), vocabulary["->"])
    question = np.full((count, 1), vocabulary["?"])
    tokens = np.concatenate([zero + asked, arrow, zero + target, question, response], axis=1)
    total_length = PROMPT + length.clip(max=RESPONSE)
    keep = solved | (rng.random(count) < s.keep_failed)
    return tokens[keep], total_length[keep], solved[keep]


def batches(s: Settings, vocabulary: dict[str, int]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless fresh batches of traces of similar length: tokens [B, T], total length [B]."""
    train = Countdown(least_solutions=1).train
    numbers = np.array([numbers_of(problem.prompt) for problem in train])
    targets = np.array([int(problem.answer) for problem in train])
    rng = np.random.default_rng(s.seed)
    while True:
        # Many at a time, so that batches of similar length can be made of them.
        count = DRAWN * s.batch
        tokens, length, _ = random_search((numbers, targets), count, rng, s, vocabulary)
        order = np.argsort(length + rng.random(len(length)))  # random among equal lengths
        # What does not fill a last batch, all of it traces cut at the limit, is dropped.
        whole = len(order) // s.batch
        groups = [order[i * s.batch : (i + 1) * s.batch] for i in range(whole)]
        for i in rng.permutation(whole):
            rows = groups[i]
            longest = length[rows].max()
            yield torch.from_numpy(tokens[rows, :longest]), torch.from_numpy(length[rows])


def countdown_tokenizer():
    """A word-level Hugging Face fast tokenizer. Padding is the end token on purpose: masks come
    from lengths here, never from ids, and the default run shows that nothing depends on a pad
    token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [END, "<unk>", *NUMBER, *OPERATORS, "=", "vs", "wait", "so", "->", "?"]
    ids = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def fresh_model(s: Settings) -> tuple[Transformer, object]:
    """A Qwen2 of the sizes in `s` with random weights from its seed, and the tokenizer."""
    tokenizer = countdown_tokenizer()
    config = dict(
        architectures=["Qwen2ForCausalLM"],
        model_type="qwen2",
        vocab_size=len(tokenizer),
        hidden_size=s.width,
        intermediate_size=s.inner,
        num_hidden_layers=s.layers,
        num_attention_heads=s.heads,
        num_key_value_heads=s.kv_heads,
        hidden_act="silu",
        max_position_embeddings=256,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Transformer(config)
    model.eos_ids = (tokenizer.eos_token_id,)

    # Smaller where a matrix adds to the residual stream, or is also the head.
    small = ("o_proj.weight", "down_proj.weight", "embed_tokens.weight")
    torch.manual_seed(s.seed)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
        elif parameter.dim() == 2:
            scale = 0.5 if name.endswith(small) else 1.0
            torch.nn.init.normal_(parameter, std=scale * parameter.shape[1] ** -0.5)
    return model, tokenizer


def make_schedule(
    optimizer: torch.optim.Optimizer, s: Settings
) -> torch.optim.lr_scheduler.LambdaLR:
    """Up in a straight line over the warmup, then down along a cosine to 0."""

    def share_of_lr(step: int) -> float:
        rising = (step + 1) / s.warmup
        falling = 0.5 * (1 + math.cos(math.pi * step / s.steps))
        return min(rising, falling)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, share_of_lr)


def next_token_loss(
    model: Transformer, tokens: torch.Tensor, length: torch.Tensor
) -> tuple[torch.Tensor, int]:
    """Cross-entropy of the response tokens, summed, and how many there are. tokens [B, T], total
    length [B]."""
    position = torch.arange(tokens.shape[1]).expand_as(tokens)
    prompt_length = torch.full_like(length, PROMPT)
    mask = response_mask(prompt_length, length, tokens.shape[1])  # [B, T-1]
    hidden = model(tokens, position)[:, :-1][mask]  # [response tokens, width]
    logits = F.linear(hidden, model.head)
    return F.cross_entropy(logits, tokens[:, 1:][mask], reduction="sum"), len(hidden)


def pretrain(s: Settings) -> None:
    check_numbers(s)
    if Path(s.out).exists():
        raise FileExistsError(f"{s.out} exists; give another --out")
    model, tokenizer = fresh_model(s)
    print(f"{count_parameters(model.config):,} parameters")
    optimizer = torch.optim.AdamW(model.parameters(), s.lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = make_schedule(optimizer, s)

    # A constant: a mean per batch would give the tokens of short traces, whose batches hold fewer
    # of them, more weight, and with them the early `so`.
    denominator = LOSS_TOKENS * s.batch
    stream = batches(s, tokenizer.get_vocab())
    average = None
    bar = tqdm(range(s.steps), desc=s.out, unit="step", mininterval=5)
    for _ in bar:
        tokens, length = next(stream)
        total, count = next_token_loss(model, tokens, length)
        loss = total / denominator
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()

        # Shown per token, averaged over some fifty steps.
        per_token = loss.item() * denominator / count
        average = per_token if average is None else 0.98 * average + 0.02 * per_token
        bar.set_postfix(loss=f"{average:.4f}", refresh=False)
    save(model, tokenizer, s.out)


def report(folder: str) -> dict[str, float]:
    """Prints what a base model is judged by: 200 validation problems, 256 samples each,
    temperature 1."""
    model, tokenizer = load(folder, pick_device("auto"))
    task = Countdown()
    samples = 256
    behaviour = Behaviour()
    sampler = Sampler(
        model, 512, PROMPT + RESPONSE, model.eos_ids
    )  # as evaluate.py: the same samples
    result = count_solved(
        sampler,
        tokenizer,
        task,
        task.validation[:200],
        samples,
        max_new_tokens=RESPONSE,
        temperature=1.0,
        top_p=1.0,
        seed=0,
        progress=folder,
        watch=behaviour.watch,
    )
    single, every = pass_table(result["solved"], samples, (1, samples)).mean(0)
    figures = {"Pass@1": single, f"Pass@{samples}": every, **behaviour.figures()}
    size = f"{count_parameters(model.config):,} parameters"
    print(f"{folder}: {size}; 200 validation problems, {samples} samples each")
    for name, value in figures.items():
        print(f"{name:32}{value:8.4f}")
    return figures


if __name__ == "__main__":
    settings = parse_flags(Settings, __doc__)
    try:
        if settings.report:
            report(settings.report)
        else:
            pretrain(settings)
    except (ValueError, OSError) as error:
        sys.exit(f"lab.pretrain: {error}")
    except KeyboardInterrupt:
        sys.exit("lab.pretrain: stopped; nothing was written")
