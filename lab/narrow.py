"""Where GRPO narrows what a model can do, does the entropy advantage keep it wide?

    python -m lab.narrow             trains every arm, measures it on the *test* problems once,
                                     prints the tables
    python -m lab.narrow --tables    only prints the tables, from the saved counts

The setting: countdown-easy (problems with twelve or more solutions), answers of at most 24 tokens,
which is one attempt and its check, 200 steps, everything else as train.py has it. The base model
reaches every problem within 256 answers; GRPO makes a single answer right more than twice as often and
gives up many problems for it. (Most answers that end at the limit say `wait` after a wrong attempt:
they are wrong either way.)

## Frozen before any of these runs, with what was known

Known, on the 107 validation problems, from one run of GRPO of 300 steps, seed 0 (base -> step 200):
Pass@1 0.049 -> 0.128, Pass@64 0.891 -> 0.370. No arm but GRPO had been run in this setting.

Outcomes: Pass@1 and Pass@256 on all 119 test problems, 512 samples each, five seeds, the difference to
GRPO paired by seed, with 95 % t intervals over seeds. Secondary: the same by thirds of the problems,
ordered by the base model's Pass@1; the entropy at the end.

Predictions, from the theorem of docs/derivation.md (M(p, H) = 1 + (psi+ - psi-) / (A+ - A-)):

    1. GRPO narrows: Pass@256 is below the base's and Pass@1 above it, intervals apart.
    2. The entropy advantage at the paper's strength (alpha 0.4) makes no difference that five seeds
       can show, in either outcome: M is within 1.1 of 1 here, and AdamW divides by the gradient's size.
    3. At full strength (alpha 10), M is 1.5 for problems that are hardly ever solved and 0.5 for those
       that always are, a ratio of three between them. So it narrows less: Pass@256 is higher than
       GRPO's, mostly in the hard third; Pass@1 is not higher.
    4. The difficulty weight alone (no entropy) does what full strength does: its difference to full
       strength is within the noise in both outcomes, and it has the signs of 3.
    5. Entropy regularisation (beta 0.003) narrows less: Pass@256 is higher than GRPO's.
    6. Without clip-higher it narrows more: Pass@256 is lower than GRPO's.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Sequence

import numpy as np
import torch

from evaluate import count_solved, pass_table
from lab.arms import Arm, key
from lab.children import Children, side_by_side, study_in_a_sentence
from lab.saved import save_packed
from lab.tables import gains, over_problems, over_seeds, read_all, table
from model import load
from plumbing.lock import lock
from plumbing.settings import Settings as TrainSettings
from plumbing.settings import flag, parse_flags
from rollout import Episode, Sampler
from tasks import Problem, load_task

SETTING = "--task countdown-easy --max-new-tokens 24 --steps 200"
VALIDATION = "--eval-problems 20 --eval-every 100 --final-samples 8"  # seldom, it is not reported
SEEDS = range(5)
SAMPLES = 512
KS = (1, 4, 16, 64, 256)

BASE = Arm("base")
GRPO = Arm("GRPO", "--alpha 0")
FULL_STRENGTH = Arm("full strength", "--alpha 10", against="GRPO")
DIFFICULTY = Arm("difficulty weight alone", "--alpha 0", against="GRPO")
TRAINED = [
    GRPO,
    Arm("entropy advantage", "", against="GRPO"),
    FULL_STRENGTH,
    DIFFICULTY,
    Arm("entropy regularisation", "--alpha 0 --entropy-coef 0.003", against="GRPO"),
    Arm("without clip-higher", "--alpha 0 --clip-high 0.2", against="GRPO"),
]


@dataclass
class Settings:
    runs: str = flag("runs/narrow", "where the training runs go")
    results: str = flag("lab/results/narrow", "where the counts go")
    processes: int = flag(2, "single-threaded processes side by side")
    tables: bool = flag(False, "only print the tables from the saved counts")


def study(s: Settings) -> list[str]:
    """Trains and measures what has no counts yet, all arms of a seed before the next seed -> a
    sentence for each run that failed."""
    jobs = [(BASE, 0)] + [(arm, seed) for seed in SEEDS for arm in TRAINED]
    left = [(arm, seed) for arm, seed in jobs if not counts_file(s, arm, seed).exists()]
    return side_by_side(
        lambda job, children: work(*job, s, children), left, s.processes, label="narrow"
    )


def counts_file(s: Settings, arm: Arm, seed: int) -> Path:
    return Path(s.results, f"{key(arm.name, seed)}.json.gz")


def work(arm: Arm, seed: int, s: Settings, children: Children) -> None:
    """Trains one run, or goes on with it, and measures it."""
    model = "base"
    if arm is not BASE:
        model = f"{s.runs}/{key(arm.name, seed)}"
        program = ["-m", "lab.difficulty"] if arm is DIFFICULTY else ["train.py"]
        flags = f"{SETTING} {VALIDATION} {arm.flags} --seed {seed}".split()
        children.train(Path(model), flags, program)
    arguments = (model, str(counts_file(s, arm, seed)))
    children.run("-c", f"from lab.narrow import measure; measure{arguments}")


def measure(folder: str, counts: str) -> None:
    """Samples the test problems once and saves the counts. `folder`: a run, or "base"."""
    torch.set_num_threads(1)
    s = parse_flags(TrainSettings, __doc__, SETTING.split())
    model, tokenizer = load(folder)
    task = load_task(s.task)
    entropy = 0.0

    def watch(problem: Problem, response: str, episode: Episode) -> None:
        nonlocal entropy
        entropy += float(episode.entropy.sum())

    prompt_length = len(task.encode(task.test[0], tokenizer))  # the same of all
    sampler = Sampler(model, s.slots, prompt_length + s.max_new_tokens, model.eos_ids)
    result = count_solved(
        sampler,
        tokenizer,
        task,
        task.test,
        samples=SAMPLES,
        max_new_tokens=s.max_new_tokens,
        temperature=1.0,
        top_p=1.0,
        seed=0,
        watch=watch,
    )
    tokens = result["tokens"] * len(task.test) * SAMPLES
    record = result | {"entropy": entropy / tokens}
    if folder != "base":
        weights = Path(folder, "model/model.safetensors").read_bytes()
        record["weights"] = hashlib.sha256(weights).hexdigest()
        log = [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]
        record["reward"] = [round(line["reward"], 4) for line in log]
        record["training_entropy"] = [round(line["entropy"], 4) for line in log]
    save_packed(record, counts)


def passes(records: dict[int, dict], ks: Sequence[int] = KS) -> dict[int, np.ndarray]:
    """Pass@K of every problem, [problems, K], by seed."""
    return {seed: pass_table(r["solved"], r["samples"], ks) for seed, r in records.items()}


def tables(s: Settings) -> str:
    """Levels, differences, and the differences by thirds of the problems. Markdown."""
    records = read_all(Path(s.results), [BASE, *TRAINED])
    rate = {name: passes(found) for name, found in records.items()}
    titles = [f"Pass@{k}" for k in KS]

    levels = []
    for name, found in rate.items():
        values = np.stack(list(found.values()))  # [seeds, problems, K]
        also = [
            np.mean([r[key] for r in records[name].values()]) for key in ("finished", "entropy")
        ]
        row = [f"{name} ({len(found)})", *over_problems(values)]
        levels.append(row + [f"{value:.3f}" for value in also])

    pairs = [(arm.name, arm.against) for arm in TRAINED if arm.against]
    pairs.append((DIFFICULTY.name, FULL_STRENGTH.name))
    thirds = by_difficulty(rate["base"][0])
    differences = []
    in_thirds = []
    for name, against in pairs:
        if name not in rate or against not in rate:
            continue
        gain = gains(rate[name], rate[against])  # [seeds, problems, K]
        differences.append([f"{name} − {against}", *over_seeds(gain.mean(1))])
        for third, problems in thirds.items():
            in_third = over_seeds(gain[:, problems].mean(1))
            in_thirds.append([f"{name} − {against}, {third}", *in_third])
    head = "difference, 95 % interval over seeds"
    return "\n\n".join(
        [
            table(["mean over seeds (how many), 95 % interval over problems", *titles, "finished",
                   "entropy in nats"], levels),
            table([head, *titles], differences),
            table([f"{head}, by the base model's Pass@1", *titles], in_thirds),
        ]
    )  # fmt: skip


def by_difficulty(base: np.ndarray) -> dict[str, np.ndarray]:
    """Thirds of the problems, by the base model's Pass@K [problems, K] at K = 1."""
    order = np.argsort(base[:, 0], kind="stable")
    hard, middle, easy = np.array_split(order, 3)
    return {"hard third": hard, "middle third": middle, "easy third": easy}


def run_and_print(s: Settings) -> None:
    """ChildProcessError, after the tables, if a run failed."""
    failures = []
    if not s.tables:
        with lock(Path(s.results)):
            failures = study(s)
    print(tables(s))
    if failures:
        raise ChildProcessError("; ".join(failures))


if __name__ == "__main__":
    with study_in_a_sentence("lab.narrow"):
        run_and_print(parse_flags(Settings, __doc__))
