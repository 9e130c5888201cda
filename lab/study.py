"""All arms, several seeds, one command: `python -m lab.study`.

It trains, measures on the *test* problems once, and prints the tables. Run it when the settings
are frozen, not before. `--tables` prints them again from the saved counts, without running anything.

Each finished run leaves lab/results/ARM-SEED.json.gz: right answers per test problem and what the responses did. A
run that has left its file is not done again, so an interrupted study goes on where it was; one whose training was
stopped goes on from its last save. Two single-threaded processes work side by side. Seeds vary data order and sampling; the
base model is the same.

Two intervals stand side by side because they answer different questions: over problems (bootstrap, as in evaluate.py)
what other problems would give with these trained models, over seeds (t) what other training runs would give.
"""

import concurrent.futures
import gzip
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from evaluate import bootstrap, count_solved, flag, parse_flags, pass_table
from lab.pretrain import PROMPT, RESPONSE, Behaviour
from model import load
from rollout import Sampler
from task import Countdown

ARMS = {"GRPO": ["--alpha", "0"], "GRPO + entropy advantage": []}
PROBLEMS, SAMPLES = 200, 256
KS = (1, 4, 16, 64, 128)
T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
MOST_SEEDS = len(T_975) + 1
BEHAVIOUR = ("tokens per response", "attempts per response", "checks per response", "attempts that hit",
             "so after a checked hit", "so after a checked miss", "so after an unchecked attempt",
             "responses cut at the limit", "steps with wrong arithmetic", "attempts with wrong operands", "entropy in nats")


@dataclass
class Settings:
    seeds: int = flag(3, "training seeds per arm, from 0")
    runs: str = flag("runs/study", "where the training runs go")
    results: str = flag("lab/results", "where the counts go")
    processes: int = flag(2, "single-threaded processes side by side")
    tables: bool = flag(False, "only print the tables from the saved counts")
    measure: str = flag("", "used by the study itself: measure this model folder and write --to")
    to: str = flag("", "see --measure")


def key(arm: str, seed: int) -> str:
    return f"{arm.lower().replace(' + ', '-').replace(' ', '-')}-{seed}"


def measure(model_folder: str, target: Path) -> None:
    """Samples the test problems once and saves the counts."""
    torch.set_num_threads(1)
    model, tokenizer = load(model_folder)
    behaviour, task = Behaviour(), Countdown()
    result = count_solved(Sampler(model, 512, PROMPT + RESPONSE, model.eos_ids), tokenizer, task, task.test[:PROBLEMS],
                          SAMPLES, RESPONSE, 1.0, 1.0, seed=0, watch=behaviour.watch)
    fresh = target.with_suffix(".tmp")
    with gzip.GzipFile(fresh, "wb", mtime=0) as file:           # no time stamp: same counts, same bytes
        file.write(json.dumps({"solved": result["solved"], "samples": SAMPLES, **behaviour.figures()}).encode())
    fresh.rename(target)


def work(arm: str, seed: int, s: Settings) -> None:
    """Trains (unless it is the base, or done) and measures one run, each in a process of one thread."""
    target, folder = Path(s.results) / f"{key(arm, seed)}.json.gz", "base"
    run = lambda *command: subprocess.run([sys.executable, *command], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
                                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if arm in ARMS:
        folder = f"{s.runs}/{key(arm, seed)}"
        if Path(folder, "config.json").exists():                # begun, and perhaps finished
            run("train.py", "--resume", folder)
        else:
            run("train.py", "--out", s.runs, "--name", key(arm, seed), "--seed", str(seed), *ARMS[arm])
    run("-m", "lab.study", "--measure", folder, "--to", str(target))


def study(s: Settings) -> None:
    if not 1 <= s.seeds <= MOST_SEEDS:
        raise ValueError(f"--seeds must be 1 to {MOST_SEEDS}; it is {s.seeds}")
    Path(s.results).mkdir(parents=True, exist_ok=True)
    todo = [("base", 0), *((arm, seed) for seed in range(s.seeds) for arm in ARMS)]
    todo = [job for job in todo if not Path(s.results, f"{key(*job)}.json.gz").exists()]
    with concurrent.futures.ThreadPoolExecutor(s.processes) as pool:
        futures = [pool.submit(work, *job, s) for job in todo]
        try:
            for future in tqdm(concurrent.futures.as_completed(futures), total=len(futures), desc="study", unit="run"):
                future.result()
        except BaseException:                                   # Ctrl-C or a failed run: start none of the others
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def read(results: Path, arm: str) -> dict[int, dict]:
    """The saved counts of an arm: seed -> record."""
    files = {seed: results / f"{key(arm, seed)}.json.gz" for seed in range(MOST_SEEDS)}
    return {seed: json.loads(gzip.decompress(file.read_bytes())) for seed, file in files.items() if file.exists()}


def tables(results: Path) -> str:
    """The results as Markdown tables, from the saved counts alone. The arms are compared over the seeds that both
    have. ValueError where an arm has no counts, or the two have no seed in common."""
    arms = {arm: read(results, arm) for arm in ("base", *ARMS)}
    if missing := [arm for arm, found in arms.items() if not found]:
        raise ValueError(f"there are no saved counts of {', '.join(missing)} in {results}")
    passes = {arm: {seed: pass_table(r["solved"], r["samples"], KS) for seed, r in found.items()}
              for arm, found in arms.items()}                   # arm -> seed -> [problems, K]
    cells = lambda mean, low, high, sign="": " | ".join(f"{m:{sign}.3f} [{l:{sign}.3f}, {h:{sign}.3f}]"
                                                        for m, l, h in zip(mean, low, high))
    lines = ["| mean over seeds, 95 % interval over problems | " + " | ".join(f"Pass@{k}" for k in KS) + " |",
             "|---" * (len(KS) + 1) + "|"]
    for arm, found in passes.items():
        values = np.stack(list(found.values()))                 # [seeds, problems, K]
        lines.append(f"| {arm} ({len(values)} seed{'s' * (len(values) > 1)}) | "
                     f"{cells(values.mean((0, 1)), *bootstrap(values.mean(0)))} |")
    plain, shaped = (passes[arm] for arm in ARMS)
    if not (both := sorted(set(plain) & set(shaped))):
        raise ValueError(f"the arms in {results} have no seed in common")
    n, gain = len(both), np.stack([shaped[seed] - plain[seed] for seed in both])
    per_seed = gain.mean(1)                                     # [seeds, K]
    half = T_975[n - 1] * per_seed.std(0, ddof=1) / n ** 0.5 if n > 1 else np.full(len(KS), np.inf)
    mean = per_seed.mean(0)
    lines += [f"| difference, interval over problems | {cells(mean, *bootstrap(gain.mean(0)), '+')} |",
              f"| difference, interval over {n} seeds | {cells(mean, mean - half, mean + half, '+')} |", "",
              "| per seed | " + " | ".join(f"Pass@{k}" for k in KS) + " |", "|---" * (len(KS) + 1) + "|"]
    for arm in ARMS:
        lines += [f"| {arm}, seed {seed} | " + " | ".join(f"{x:.3f}" for x in values.mean(0)) + " |"
                  for seed, values in passes[arm].items()]
    lines += ["", "| mean over seeds | " + " | ".join(arms) + " |", "|---" * (len(arms) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(f"{np.mean([r[name] for r in found.values()]):.3f}" for found in arms.values()) + " |"
              for name in BEHAVIOUR]
    return "\n".join(lines)


def tuning(results: Path) -> str:
    """What was tried before the settings were frozen, as a Markdown table, from the counts in tuning.json."""
    rows = json.loads((results / "tuning.json").read_text())
    lines = ["| learning rate | prompts × samples | minibatch | steps | threads | Pass@1 | Pass@64 | CPU seconds |",
             "|---" * 8 + "|"]
    for r in rows:
        table = pass_table(r["solved"], r["samples"], (1, 64))
        cells = [f"{m:.3f} [{l:.3f}, {h:.3f}]" for m, l, h in zip(table.mean(0), *bootstrap(table))]
        lines.append(f"| {r['lr']:g} | {r['prompts']} × {r['samples_per_prompt']} | {r['minibatch']} | {r['steps']} | "
                     f"{r['threads']} | {' | '.join(cells)} | {round(r['cpu_seconds']) if r['cpu_seconds'] else '–'} |")
    return "\n".join(lines)


def ppo(results: Path) -> str:
    """Three seeds of PPO and what was tried before, as Markdown tables, from the curves in ppo.json."""
    saved = json.loads((results / "ppo.json").read_text())
    seeds = [f"seed {run['seed']}" for run in saved["runs"]]
    columns = [f"{name}, {seed}" for name in ("reward", "explained variance") for seed in seeds]
    lines = [f"| | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for first in range(0, len(saved["runs"][0]["reward"]), 10):
        cells = [f"{np.mean(run[name][first:first + 10]):+.3f}" for name in ("reward", "explained_variance")
                 for run in saved["runs"]]
        lines.append(f"| steps {first + 1} to {first + 10} | {' | '.join(cells)} |")
    lines += ["", f"| validation Pass@1 after step | {' | '.join(seeds)} |", "|---" * (1 + len(seeds)) + "|"]
    for step, counts in saved["runs"][0]["validation"].items():
        cells = []
        for run in saved["runs"]:
            table = pass_table(run["validation"][step]["solved"], run["validation"][step]["samples"], (1,))
            low, high = bootstrap(table)[:, 0]
            cells.append(f"{table.mean():.3f} [{low:.3f}, {high:.3f}]")
        lines.append(f"| {step} ({counts['samples']} samples) | {' | '.join(cells)} |")
    lines += ["", "| learning rate | critic's | explained variance, steps 41 to 50 | validation Pass@1 after step 50 |", "|---|---|---|---|"]
    for run in saved["tuning"]:
        table = pass_table(run["solved"], run["samples"], (1,))
        low, high = bootstrap(table)[:, 0]
        lines.append(f"| {run['lr']:g} | {run['critic_lr']:g} | {np.mean(run['explained_variance'][40:]):+.3f} | "
                     f"{table.mean():.3f} [{low:.3f}, {high:.3f}] |")
    return "\n".join(lines)


if __name__ == "__main__":
    settings = parse_flags(Settings, __doc__)
    try:
        if settings.measure:
            measure(settings.measure, Path(settings.to))
        else:
            if not settings.tables:
                study(settings)
            print(tables(Path(settings.results)), tuning(Path("lab/results")), ppo(Path("lab/results")), sep="\n\n")
    except subprocess.CalledProcessError as error:
        sys.exit(f"lab.study: {' '.join(error.cmd[1:])} failed: {error.stderr.strip().splitlines()[-1:]}")
    except (ValueError, OSError) as error:
        sys.exit(f"lab.study: {error}")
    except KeyboardInterrupt:
        sys.exit("lab.study: stopped; the same command goes on with what is left")
