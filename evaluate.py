"""Pass@K with intervals: `python evaluate.py base runs/grpo`. Read last of the root files.

Pass@K is the chance that at least one of K answers is right. From n samples of which c are right, its unbiased estimate
is 1 - C(n-c, K) / C(n, K): the share of all K-subsets that contain a right one. Taking the first K samples has the same
mean and far more noise; drawing K with replacement is biased.
The intervals are 95 % bootstrap intervals over problems: what other problems of the kind would give, not what another
training seed would. Models are compared on the same problems, pair by pair, and with the same random numbers, so that a
model and its copy differ by exactly 0 (train.py's evaluations before and after have different ones).
Departs from the paper: it samples at T = 0.6, top-p 0.95 (`--preset paper`), gives no intervals. Here T = 1, as trained.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import sys
from pathlib import Path
from typing import Callable, Sequence

import numpy as np
import torch

from model import find_folder, load
from rollout import Episode, Sampler, seeded_generator, texts
from task import Problem, load_task

SEQUENCES = 16384           # sampled per call, which bounds the memory that episodes take
PRESETS = {"paper": dict(temperature=0.6, top_p=0.95)}


def flag(default, help: str, **options):
    """A field of a settings dataclass: its default, its one line of documentation, argparse's extras."""
    return dataclasses.field(default=default, metadata={"help": help} | options)


def parse_flags(settings_class, description: str, arguments: Sequence[str] | None = None, presets: dict | None = None):
    """Turns a dataclass of `flag` fields into --flags and returns it filled in. A --preset changes the defaults."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for field in dataclasses.fields(settings_class):
        options = {key: value for key, value in field.metadata.items() if key != "least"}
        if isinstance(field.default, bool):
            options["action"] = argparse.BooleanOptionalAction
        else:
            options.setdefault("type", type(field.default))
        if options.get("nargs"):
            parser.add_argument(field.name, **options)
        else:
            parser.add_argument("--" + field.name.replace("_", "-"), default=field.default, **options)
    if presets:
        parser.set_defaults(**presets.get(parser.parse_args(arguments).preset, {}))
    return settings_class(**vars(parser.parse_args(arguments)))


def check_numbers(s) -> None:
    """ValueError for a number that is not finite or less than its flag's `least`: by default 1 if it is whole, else 0."""
    for field in dataclasses.fields(s):
        value = getattr(s, field.name)
        least = field.metadata.get("least", int(type(value) is int))
        if type(value) in (int, float) and not least <= value < math.inf:
            wanted = f"at least {least}" if math.isfinite(value) else "a finite number"
            raise ValueError(f"--{field.name.replace('_', '-')} must be {wanted}; it is {value}")


def pick_device(name: str) -> torch.device:
    """"auto" is the GPU if there is one; each process of torchrun takes its own. ValueError for one that is not there."""
    if name == "auto":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        if torch.device(name).type not in ("cpu", "cuda"):
            raise RuntimeError("only cpu and cuda devices are supported")
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from None


def pass_at_k(n: int, c: int, k: int) -> float:
    """1 - C(n-c, k) / C(n, k), for c right answers among n samples. Exact at any n: only the quotient of two integers is
    rounded. ValueError unless 0 <= c <= n and 1 <= k <= n."""
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"Pass@K needs 1 <= K <= n and 0 <= c <= n; got n = {n}, c = {c}, K = {k}")
    return (math.comb(n, k) - math.comb(n - c, k)) / math.comb(n, k)


def pass_table(counts: Sequence[int], n: int, ks: Sequence[int]) -> np.ndarray:
    """Right answers per problem -> Pass@K per problem, [problems, len(ks)]."""
    one = functools.cache(pass_at_k)
    return np.array([[one(n, c, k) for k in ks] for c in counts])


def bootstrap(values: np.ndarray, resamples: int = 10_000) -> np.ndarray:
    """95 % percentile interval of the mean over problems, [problems, columns] -> [2, columns]; every time the same."""
    rng = np.random.default_rng(0)
    weights = rng.multinomial(len(values), np.full(len(values), 1 / len(values)), size=resamples) / len(values)
    return np.percentile(weights @ values, [2.5, 97.5], axis=0)


def count_solved(sampler: Sampler, tokenizer, task, problems: Sequence[Problem], samples: int, max_new_tokens: int,
                 temperature: float, top_p: float, seed: int, step: int = 0, progress: str | None = None,
                 watch: Callable[[Problem, str, Episode], None] = lambda *_: None) -> dict:
    """Samples and grades: {"solved": right answers per problem, "samples": how many each had, "tokens": mean response
    length, "finished": share not cut at the limit}. Has random streams of its own. `watch` sees every response."""
    solved, tokens, finished = [0] * len(problems), 0, 0
    block = max(1, SEQUENCES // samples)
    for first in range(0, len(problems), block):
        part = problems[first:first + block]
        episodes = sampler.generate([task.encode(p, tokenizer) for p in part], samples, max_new_tokens, temperature,
                                    seeded_generator(seed, step, f"evaluate {first}", sampler.device), top_p,
                                    progress and f"{progress} {first + len(part)}/{len(problems)} problems")
        for episode, response in zip(episodes, texts(tokenizer, episodes)):
            reward = task.reward(part[episode.prompt_index], response, episode.finished)
            solved[first + episode.prompt_index] += reward > 0
            tokens, finished = tokens + len(episode.response), finished + episode.finished
            watch(part[episode.prompt_index], response, episode)
    total = samples * len(problems)
    return {"solved": solved, "samples": samples, "tokens": tokens / total, "finished": finished / total}


def report(results: dict[str, dict], ks: Sequence[int]) -> tuple[str, dict]:
    """Results of count_solved by model -> (a table to print, the same as JSON): Pass@K with its 95 % interval, then
    the difference of each model from the first, paired by problem."""
    tables = {name: pass_table(r["solved"], r["samples"], ks) for name, r in results.items()}
    first, *others = tables
    tables |= {f"{name} - {first}": tables[name] - tables[first] for name in others}
    rows, width, record = [], max(12, *(len(f"{name} - {first}") for name in results)), {"k": list(ks), "models": {}}
    for name, values in tables.items():
        mean, (low, high) = values.mean(axis=0), bootstrap(values)
        sign = "+" if name not in results else ""
        rows.append(f"{name:{width}} " + " ".join(f"{m:{sign}.3f} [{l:{sign}.3f}, {h:{sign}.3f}]".rjust(24)
                                                  for m, l, h in zip(mean, low, high)))
        record["models"][name] = {"pass": mean.tolist(), "low": low.tolist(), "high": high.tolist(),
                                  **results.get(name, {})}
    head = " " * width + " " + " ".join(f"Pass@{k}".rjust(24) for k in ks)
    lengths = ", ".join(f"{name} {r['tokens']:.1f}" for name, r in results.items())
    return "\n".join([head, *rows, f"mean response length in tokens: {lengths}"]), record


@dataclasses.dataclass
class Settings:
    models: tuple = flag((), "folders or hub ids of models; the others are compared with the first", nargs="+", type=str)
    task: str = flag("countdown", "countdown, countdown-easy, countdown-hard or math")
    data: str = flag("", "math: the training data, whose splits are train and validation")
    test_data: str = flag("", "math: the test data")
    template: str = flag("dapo", "math: how a problem is put", choices=("dapo", "qwen-math", "chat", "none"))
    split: str = flag("validation", "keep test for the day when all is frozen", choices=("train", "validation", "test"))
    problems: int = flag(200, "how many problems, from the start of the split (0: all)", least=0)
    samples: int = flag(256, "samples per problem, the n of Pass@K")
    k: str = flag("", "the K of Pass@K, separated by commas; by default 1,4,16,64,256 as far as --samples goes")
    temperature: float = flag(1.0, "sampling temperature")
    top_p: float = flag(1.0, "nucleus sampling; 1 samples the whole distribution")
    preset: str = flag("", "paper: temperature 0.6 and top-p 0.95", choices=("", *PRESETS))
    max_new_tokens: int = flag(128, "longest response, in tokens")
    slots: int = flag(512, "sequences decoded at a time")
    seed: int = flag(0, "seed of the samples", least=0)
    device: str = flag("auto", "cpu, cuda, cuda:1 ...; auto takes a GPU if there is one")
    json: str = flag("", "also write the table, with the counts of every problem, to this file")


def evaluate(s: Settings) -> dict:
    """Runs the command; returns the JSON record."""
    try:
        ks = sorted({int(k) for k in s.k.split(",")}) if s.k else [k for k in (1, 4, 16, 64, 256) if k <= s.samples] or [1]
    except ValueError:
        raise ValueError(f"--k must be whole numbers separated by commas, not {s.k!r}") from None
    if s.samples < 1 or ks[0] < 1 or ks[-1] > s.samples:
        raise ValueError(f"Pass@K needs 1 <= K <= samples: --k {s.k or ks[0]} does not fit --samples {s.samples}")
    check_numbers(s)
    for name in s.models:
        find_folder(name)                       # before the first is sampled
    if not Path(s.json).absolute().parent.is_dir():
        raise FileNotFoundError(f"--json {s.json} names a folder that does not exist")
    task, device = load_task(s.task, s.data, s.test_data, s.template), pick_device(s.device)
    problems = getattr(task, s.split)[:s.problems or None]
    if not problems:
        raise ValueError(f"{s.task} has no {s.split} problems")
    results = {}
    for name in dict.fromkeys(s.models):
        model, tokenizer = load(name, device)
        longest = max(len(task.encode(p, tokenizer)) for p in problems)
        sampler = Sampler(model, s.slots, longest + s.max_new_tokens, model.eos_ids)
        results[name] = count_solved(sampler, tokenizer, task, problems, s.samples, s.max_new_tokens, s.temperature, s.top_p,
                                     s.seed, progress=name)
    table, record = report(results, ks)
    print(f"{s.task} {s.split}: {len(problems)} problems, {s.samples} samples each, temperature {s.temperature}, "
          f"top-p {s.top_p}, seed {s.seed}; 95 % intervals over problems\n{table}")
    record["settings"] = dataclasses.asdict(s)
    if s.json:
        Path(s.json).write_text(json.dumps(record) + "\n")
    return record


if __name__ == "__main__":
    try:
        evaluate(parse_flags(Settings, __doc__, presets=PRESETS))
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"evaluate.py: {error}")
    except KeyboardInterrupt:
        sys.exit("evaluate.py: stopped; nothing was written")
