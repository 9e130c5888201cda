"""Pass@K with intervals: `python evaluate.py base runs/grpo`. Read last of the root files.

Pass@K is the chance that at least one of K answers is right. From n samples of which c are right,
its unbiased estimate is 1 - C(n-c, K) / C(n, K): the share of all K-subsets that contain a right
one. Taking the first K samples has the same mean and far more noise; drawing K with replacement is
biased.

The intervals are 95 % bootstrap intervals over problems: what other problems of the kind would
give, not what another training seed would. Models are compared on the same problems, pair by pair,
and with the same random numbers, so that a model and its copy differ by exactly 0 (train.py's
evaluations before and after have different ones).

The paper samples at T = 0.6 and top-p 0.95 (`--preset paper`) and gives no intervals. Here T = 1,
as trained.
"""

import dataclasses
import functools
import json
import math
import sys
from pathlib import Path
from typing import Callable, Sequence

import numpy as np
import torch

from model import count_parameters, load_weights
from plumbing.memory import EVALUATION_MAY_HELP, out_of_memory, plan_evaluation
from plumbing.pretrained import Pretrained, find_folder, open_pretrained
from plumbing.seeds import seeded_generator
from plumbing.settings import (
    EVALUATION_PRESETS,
    EvaluationSettings,
    check_numbers,
    parse_flags,
    pick_device,
)
from rollout import Episode, Sampler, texts
from tasks import Problem, load_task

SEQUENCES = 16384  # sampled per call of the sampler, which bounds the memory that episodes take
USUAL_KS = (1, 4, 16, 64, 256)
COLUMN = 24  # characters of a cell of the table


def pass_at_k(n: int, c: int, k: int) -> float:
    """1 - C(n-c, k) / C(n, k), for c right answers among n samples. Exact at any n: only the
    quotient of two integers is rounded. ValueError unless 0 <= c <= n and 1 <= k <= n."""
    if not 0 <= c <= n:
        raise ValueError(f"Pass@K needs 0 <= c <= n right answers; got n = {n}, c = {c}")
    if not 1 <= k <= n:
        raise ValueError(f"Pass@K needs 1 <= K <= n; got n = {n}, K = {k}")
    with_a_right_one = math.comb(n, k) - math.comb(n - c, k)
    return with_a_right_one / math.comb(n, k)


def pass_table(counts: Sequence[int], n: int, ks: Sequence[int]) -> np.ndarray:
    """Right answers per problem -> Pass@K per problem, [problems, len(ks)]."""
    estimate = functools.cache(pass_at_k)
    return np.array([[estimate(n, c, k) for k in ks] for c in counts])


def bootstrap(values: np.ndarray, resamples: int = 10_000) -> np.ndarray:
    """95 % percentile interval of the mean over problems, [problems, columns] -> [2, columns]. Its
    seed is fixed, so the same values give the same interval."""
    rng = np.random.default_rng(0)
    problems = len(values)
    equal = np.full(problems, 1 / problems)
    # How often each problem is drawn in each resample, as a weight: [resamples, problems].
    weights = rng.multinomial(problems, equal, size=resamples) / problems
    return np.percentile(weights @ values, [2.5, 97.5], axis=0)


def see_nothing(problem: Problem, response: str, episode: Episode) -> None:
    pass


def count_solved(
    sampler: Sampler,
    tokenizer,
    task,
    problems: Sequence[Problem],
    samples: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    step: int = 0,
    progress: str | None = None,
    watch: Callable[[Problem, str, Episode], None] = see_nothing,
) -> dict:
    """Samples and grades: {"solved": right answers per problem, "samples": how many each had,
    "tokens": mean response length, "finished": share not cut at the limit}. `seed` and `step` name
    random streams apart from training's. `watch` sees every response (lab/ passes its own)."""
    solved = [0] * len(problems)
    tokens = 0
    finished = 0
    block = max(1, SEQUENCES // samples)
    for first in range(0, len(problems), block):
        part = problems[first : first + block]
        label = f"{progress} {first + len(part)}/{len(problems)} problems" if progress else None
        episodes = sampler.generate(
            [task.encode(problem, tokenizer) for problem in part],
            samples,
            max_new_tokens,
            temperature,
            seeded_generator(seed, step, f"evaluate {first}", sampler.device),
            top_p=top_p,
            progress=label,
        )
        asked = [part[episode.prompt_index] for episode in episodes]
        responses = texts(tokenizer, episodes)
        rewards = task.rewards(asked, responses, [episode.finished for episode in episodes])
        for problem, response, episode, reward in zip(
            asked, responses, episodes, rewards, strict=True
        ):
            if reward > 0:
                solved[first + episode.prompt_index] += 1
            tokens += len(episode.response)
            if episode.finished:
                finished += 1
            watch(problem, response, episode)
    total = samples * len(problems)
    return {
        "solved": solved,
        "samples": samples,
        "tokens": tokens / total,
        "finished": finished / total,
    }


def report(results: dict[str, dict], ks: Sequence[int]) -> tuple[str, dict]:
    """Results of count_solved by model -> (a table to print, the same as JSON): Pass@K with its
    95 % interval, then the difference of each model from the first, paired by problem."""
    tables = {}  # name -> [problems, len(ks)]
    for name, result in results.items():
        tables[name] = pass_table(result["solved"], result["samples"], ks)
    first, *others = tables
    for name in others:
        tables[f"{name} - {first}"] = tables[name] - tables[first]

    width = max(12, *(len(f"{name} - {first}") for name in results))
    head = " " * width + " " + " ".join(f"Pass@{k}".rjust(COLUMN) for k in ks)
    rows = [head]
    record = {"k": list(ks), "models": {}}
    for name, values in tables.items():
        mean = values.mean(axis=0)
        low, high = bootstrap(values)
        number = ".3f" if name in results else "+.3f"  # a difference has a sign
        cells = []
        for m, lo, hi in zip(mean, low, high):
            cell = f"{m:{number}} [{lo:{number}}, {hi:{number}}]"
            cells.append(cell.rjust(COLUMN))
        rows.append(f"{name:{width}} " + " ".join(cells))
        summary = {"pass": mean.tolist(), "low": low.tolist(), "high": high.tolist()}
        record["models"][name] = summary | results.get(name, {})

    lengths = [f"{name} {result['tokens']:.1f}" for name, result in results.items()]
    rows.append(f"mean response length in tokens: {', '.join(lengths)}")
    return "\n".join(rows), record


def chosen_ks(k: str, samples: int) -> list[int]:
    """The K that --k names, or the usual ones as far as the samples go. ValueError."""
    if samples < 1:
        raise ValueError(f"Pass@K needs 1 <= K <= samples; --samples is {samples}")
    if not k:
        return [usual for usual in USUAL_KS if usual <= samples]
    try:
        ks = sorted({int(part) for part in k.split(",")})
    except ValueError:
        raise ValueError(f"--k must be whole numbers separated by commas, not {k!r}") from None
    if ks[0] < 1 or ks[-1] > samples:
        raise ValueError(
            f"Pass@K needs 1 <= K <= samples: --k {k} does not fit --samples {samples}"
        )
    return ks


def plan_sampling(
    pretrained: Pretrained,
    task,
    problems: Sequence[Problem],
    s: EvaluationSettings,
    device: torch.device,
    may_help: str = EVALUATION_MAY_HELP,
) -> int:
    """The longest sequence in tokens, prompt and answer. ValueError if there is not enough memory."""
    prompts = [len(task.encode(problem, pretrained.tokenizer)) for problem in problems]
    length = max(prompts, default=0) + s.max_new_tokens
    plan_evaluation(
        pretrained.config,
        count_parameters(pretrained.config),
        s,
        length,
        rows=min(s.slots, len(problems) * s.samples),
        problems=len(problems),
        device=device,
        may_help=may_help,
    )
    return length


def count_of_model(
    name: str,
    pretrained: Pretrained,
    length: int,
    task,
    problems: Sequence[Problem],
    s: EvaluationSettings,
    device: torch.device,
) -> dict:
    """count_solved of a model, which is loaded for it: no two are in memory at a time."""
    model = load_weights(pretrained, device, getattr(torch, s.dtype))
    return count_solved(
        Sampler(model, s.slots, length, model.eos_ids, graph=s.graph),
        pretrained.tokenizer,
        task,
        problems,
        samples=s.samples,
        max_new_tokens=s.max_new_tokens,
        temperature=s.temperature,
        top_p=s.top_p,
        seed=s.seed,
        progress=name,
    )


def evaluate(s: EvaluationSettings) -> dict:
    """Runs the command; returns the JSON record."""
    # What can be checked cheaply is checked before the first model is sampled.
    ks = chosen_ks(s.k, s.samples)
    check_numbers(s)
    for name in s.models:
        find_folder(name)
    if s.json and not Path(s.json).absolute().parent.is_dir():
        raise FileNotFoundError(f"--json {s.json} names a folder that does not exist")
    device = pick_device(s.device)
    task = load_task(s.task, s.data, s.test_data, s.template)
    problems = getattr(task, s.split)[: s.problems or None]  # 0: all
    if not problems:
        raise ValueError(f"{s.task} has no {s.split} problems")

    opened = {name: open_pretrained(name) for name in s.models}  # each once, in their order
    length = {}
    for name, pretrained in opened.items():
        length[name] = plan_sampling(pretrained, task, problems, s, device)
    results = {}
    for name, pretrained in opened.items():
        results[name] = count_of_model(name, pretrained, length[name], task, problems, s, device)

    table, record = report(results, ks)
    print(
        f"{s.task} {s.split}: {len(problems)} problems, {s.samples} samples each, "
        f"temperature {s.temperature}, top-p {s.top_p}, seed {s.seed}; "
        f"95 % intervals over problems\n{table}"
    )
    record["settings"] = dataclasses.asdict(s)
    if s.json:
        Path(s.json).write_text(json.dumps(record) + "\n")
    return record


def main() -> None:
    try:
        evaluate(parse_flags(EvaluationSettings, __doc__, presets=EVALUATION_PRESETS))
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"evaluate.py: {error}")
    except KeyboardInterrupt:
        sys.exit("evaluate.py: stopped; nothing was written")
    except (MemoryError, RuntimeError) as error:
        sys.exit(f"evaluate.py: {out_of_memory(error, EVALUATION_MAY_HELP)}")


if __name__ == "__main__":
    main()
