"""Does the entropy advantage help? Several seeds of every arm, one command; lab/RESULTS.md has what
came of it.

    python -m lab.study             trains every arm, measures it on the *test* problems once,
                                    prints the tables
    python -m lab.study --map       varies one setting at a time, on the validation problems
    python -m lab.study --tables    only prints the tables and draws the figures, from the counts
    python -m lab.study --quick     a miniature of all this, in minutes, in runs/quick: to see
                                    that it works

Fixed before it ran: the primary outcome is Pass@1 and Pass@64 of GRPO with the entropy advantage
minus those of GRPO, with the t interval over seeds; all else is secondary. The arms are listed in
lab/arms.py, the tables made in lab/tables.py.

Each finished run leaves ARM-SEED.json.gz in lab/results/ (right answers per problem, what responses
did, curves, a digest of the weights), so an interrupted study goes on where it was. Seeds vary data
order and sampling, the base is the same.
"""

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from advantage import group_advantage, shape_with_entropy
from evaluate import count_solved
from lab.arms import BASE, CORE, FRESH, MAP, OTHERS, Arm, key
from lab.behaviour import Behaviour
from lab.children import Children, side_by_side, study_in_a_sentence
from lab.saved import save_packed
from lab.tables import CURVES, figures, map_tables, tables
from model import load
from plumbing.checkpoint import read_json
from plumbing.lock import lock
from plumbing.run import settings_of_run
from plumbing.settings import Settings as TrainSettings
from plumbing.settings import flag, parse_flags, run_name
from rollout import Episode, Sampler
from tasks import Problem, load_task

# What `Watch` asks about, of any model: groups of 16, and train.py's default entropy advantage.
GROUP = 16
ALPHA = 0.4
KAPPA = 2.0
FRESH_SEEDS = 5  # of each arm in FRESH


@dataclass
class Settings:
    seeds: int = flag(5, "training seeds of the core arms, from 0", choices=range(1, 11))
    other_seeds: int = flag(3, "training seeds of the other arms", choices=range(1, 11))
    arms: str = flag(
        "",
        "only these arms, as their files are called, separated by commas: "
        "grpo,ppo-entropy-advantage",
    )
    map: bool = flag(
        False, "vary one setting at a time instead, seed 0, on the validation problems"
    )
    quick: bool = flag(False, "a miniature: one seed, 3 steps, 5 problems, in runs/quick")
    runs: str = flag("runs/study", "where the training runs go")
    results: str = flag("lab/results", "where the counts go")
    processes: int = flag(2, "single-threaded processes side by side")
    tables: bool = flag(False, "only print the tables from the saved counts, and draw the figures")


@dataclass(frozen=True)
class Job:
    arm: Arm
    seed: int
    counts: str  # the file where its counts go


def jobs(s: Settings) -> list[Job]:
    """What is left to do, in this order. ValueError for an arm that is not known."""
    planned = [(arm, seed) for seed in range(s.seeds) for arm in CORE]
    if s.map:
        planned += [(arm, 0) for arm in MAP]
    else:
        planned = [(BASE, 0), *planned]
        planned += [(arm, seed) for arm in OTHERS for seed in range(s.other_seeds)]
        for extra in range(min(s.seeds, FRESH_SEEDS)):
            planned += [(arm, arm.first_seed + extra) for arm in FRESH]

    known = {key(arm.name) for arm, _ in planned}
    wanted = {name for name in s.arms.split(",") if name}
    unknown = wanted - known
    if unknown:
        raise ValueError(
            f"no arm is called {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}"
        )

    folder = f"{s.results}/map" if s.map else s.results
    left = []
    for arm, seed in planned:
        counts = f"{folder}/{key(arm.name, seed)}.json.gz"
        is_wanted = not wanted or key(arm.name) in wanted
        if is_wanted and not Path(counts).exists():
            left.append(Job(arm, seed, counts))
    return left


def study(s: Settings) -> list[str]:
    """Does all jobs, some of them side by side -> a sentence for each that failed."""
    return side_by_side(
        lambda job, children: work(job, s, children), jobs(s), s.processes, label="study"
    )


def work(job: Job, s: Settings, children: Children) -> None:
    """Trains one run (unless it is the base, or done) and measures it, each in a process of its
    own."""
    if job.arm is BASE:
        folder = "base"
    else:
        folder = f"{s.runs}/{key(job.arm.name, job.seed)}"
        train_run(job, folder, s, children)

    split = "validation" if s.map or s.quick else "test"
    problems = 5 if s.quick else 200
    if s.map:
        samples = 64
    else:
        samples = 128 if s.quick else 256
    arguments = (folder, job.counts, split, problems, samples)
    children.run("-c", f"from lab.study import measure; measure{arguments}")


def train_run(job: Job, folder: str, s: Settings, children: Children) -> None:
    """Begins the run, or goes on with it. ValueError if `folder` is another run."""
    # Few evaluations: what is reported is measured afterwards.
    flags = ["--seed", str(job.seed), *job.arm.flags.split()]
    flags += ["--final-samples", "8", "--eval-problems", "20"]
    if s.quick:
        flags += ["--steps", "3", "--critic-warmup", "1"]

    if Path(folder).exists():
        wanted = parse_flags(TrainSettings, __doc__, flags)
        if run_name(settings_of_run(folder)) != run_name(wanted):
            raise ValueError(
                f"{folder} is not a run of {job.arm.name}: its settings are others; move it away"
            )
    children.train(Path(folder), flags)


class Watch(Behaviour):
    """What responses do, and what the entropy advantage would do to them. `watch` goes to
    evaluate.count_solved.

    `added`: for right and for wrong answers, by how many of a group of 16 are right: the tokens,
    their sum of psi / |A|, and of how many the cap binds."""

    def __init__(self, task) -> None:
        super().__init__()
        self.task = task
        self.group: list[tuple[float, Tensor]] = []  # reward, entropy of each token
        self.added: dict[str, dict[int, list]] = {"right": {}, "wrong": {}}

    def watch(self, problem: Problem, response: str, episode: Episode) -> None:
        super().watch(problem, response, episode)
        self.count_repeated(response.split())

        reward = self.task.reward(problem, response, episode.finished)
        self.group.append((reward, episode.entropy))
        if len(self.group) == GROUP:
            self.count_added()
            self.group = []

    def count_repeated(self, words: list[str]) -> None:
        grams = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
        self["grams"] += len(grams)
        self["repeated"] += len(grams) - len(set(grams))

    def count_added(self) -> None:
        rewards = torch.tensor([reward for reward, _ in self.group])
        entropies = [entropy for _, entropy in self.group]
        one_group = torch.zeros(GROUP, dtype=torch.long)
        advantages = group_advantage(rewards, one_group)  # [16]

        # Token by token, all answers one after another.
        pairs = zip(advantages, entropies)
        plain = torch.cat([advantage.expand(len(entropy)) for advantage, entropy in pairs])
        shaped = shape_with_entropy(plain, torch.cat(entropies), ALPHA, KAPPA)
        share = (shaped - plain) / plain.abs()  # psi / |A|
        capped = share > 0.9999 / KAPPA

        right_answers = int((rewards > 0).sum())
        for side, mask in (("right", plain > 0), ("wrong", plain < 0)):
            if mask.any():  # nowhere if all are right or all wrong
                sums = self.added[side].setdefault(right_answers, [0, 0.0, 0])
                sums[0] += int(mask.sum())
                sums[1] += float(share[mask].sum())
                sums[2] += int(capped[mask].sum())

    def figures(self) -> dict:
        repeated = self["repeated"] / max(1, self["grams"])
        # "line" is what the saved counts have called it from the start.
        return super().figures() | {"repeated 4-grams, share": repeated, "line": self.added}


def measure(folder: str, counts: str, split: str, problems: int, samples: int) -> None:
    """Samples the first problems of a split once and saves the counts. `folder`: a run, or
    "base"."""
    torch.set_num_threads(1)
    is_run = folder != "base"
    s = TrainSettings(**read_json(Path(folder, "config.json"))) if is_run else TrainSettings()
    model, tokenizer = load(folder)
    task = load_task(s.task)
    watch = Watch(task)
    part = getattr(task, split)[:problems]
    prompt_length = len(task.encode(part[0], tokenizer))  # the same of all
    sampler = Sampler(model, s.slots, prompt_length + s.max_new_tokens, model.eos_ids)
    result = count_solved(
        sampler,
        tokenizer,
        task,
        part,
        samples,
        s.max_new_tokens,
        s.temperature,
        top_p=1.0,
        seed=0,
        watch=watch.watch,
    )
    record = {
        "run": folder,
        "split": split,
        "solved": result["solved"],
        "samples": samples,
        **watch.figures(),
    }
    if is_run:
        record["run"] = run_name(s)
        record |= what_was_trained(Path(folder))

    save_packed(record, counts)


def what_was_trained(run: Path) -> dict:
    """A digest of the weights, and the log's columns with four digits."""
    weights = (run / "model/model.safetensors").read_bytes()
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    curves = {}
    for name in CURVES:
        if name in log[0]:
            curves[name] = [four_digits(line[name]) for line in log]
    return {"weights": hashlib.sha256(weights).hexdigest(), "curves": curves}


def four_digits(value: float | None) -> float | None:
    """None stays None: there was nothing to average."""
    return float(f"{value:.4g}") if value else value


def run_and_print(s: Settings) -> None:
    """ChildProcessError, after the tables, if a run failed."""
    results = Path(s.results)
    failures = []
    if not s.tables:
        with lock(results):  # or two studies would train the same runs
            failures = study(s)
    if failures:
        print(*failures, sep="\n", file=sys.stderr)

    if s.map:
        print(map_tables(results))
    else:
        print(tables(results))
        print(*figures(results, results.parent / "figures/study"), sep="\n")
    if failures:
        raise ChildProcessError(f"{len(failures)} runs failed; the same command tries them again")


def as_miniature(s: Settings) -> Settings:
    """--quick has few runs, in a place of their own."""
    if s.quick:
        s.seeds = 1
        s.other_seeds = 1
        s.runs = "runs/quick"
        s.results = "runs/quick/results"
    return s


if __name__ == "__main__":
    with study_in_a_sentence("lab.study"):
        run_and_print(as_miniature(parse_flags(Settings, __doc__)))
