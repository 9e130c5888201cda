"""Does the line help? All arms, several seeds, one command: `python -m lab.study`; its results are lab/RESULTS.md.

    python -m lab.study             trains every arm, measures it on the *test* problems once, prints the tables
    python -m lab.study --map       varies one setting at a time, on the validation problems
    python -m lab.study --tables    only prints the tables and draws the figures, from the saved counts
    python -m lab.study --quick     a miniature of all this, in minutes, in runs/quick: to see that it works

Fixed before it ran: the primary outcome is Pass@1 and Pass@64 of GRPO with the entropy advantage minus those of GRPO, with
the t interval over seeds; all else is secondary. FRESH came later; RESULTS.md says what was fixed for it, and when.

Each finished run leaves ARM-SEED.json.gz in lab/results/ (right answers per problem, what responses did, curves, a digest of
the weights), so an interrupted study goes on where it was. Seeds vary data order and sampling, the base is the same.
"""

import concurrent.futures
import gzip
import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import train
from advantage import group_advantage, shape_with_entropy
from checkpoint import read_json, resumed, whole
from evaluate import bootstrap, count_solved, flag, parse_flags, pass_table
from lab.plot import draw
from lab.pretrain import Behaviour
from model import load
from rollout import Sampler
from task import load_task

GRPO, LINE, PPO, ENDING = "GRPO", "GRPO + entropy advantage", "PPO", " + entropy advantage"
CORE = {GRPO: ["--alpha", "0"], LINE: []}
OTHERS = {"GRPO + entropy regularisation": ["--alpha", "0", "--entropy-coef", "0.003"],     # the best of three, see MAP
          "GRPO without clip-higher": ["--alpha", "0", "--clip-high", "0.2"],
          PPO: ["--algo", "ppo", "--alpha", "0"], PPO + ENDING: ["--algo", "ppo"]}
PAIRS = {"steps x 3": ["--steps", "300"], "lr 1e-4, minibatch 2": ["--lr", "1e-4", "--minibatch", "2"],
         "hard": ["--task", "countdown-hard"], "easy": ["--task", "countdown-easy"]}        # each without and with the line
MAP = {f"beta {b}": ["--alpha", "0", "--entropy-coef", b] for b in ("0.003", "0.01", "0.03")} | {
    f"{name} {x}": [f"--{name}", x] for name, x in (("alpha", "1"), ("alpha", "2"), ("kappa", "1.5"), ("kappa", "4"))} | {
    name + line: flags + CORE[GRPO + line] for name, flags in PAIRS.items() for line in ("", ENDING)}
FRESH = {"fresh " + arm: (CORE | MAP)[arm] for arm in (GRPO, LINE, "kappa 4", "hard", "hard" + ENDING)} | {     # seeds 5 to 9
    "repeated " + arm: MAP[arm] for arm in ("hard", "hard" + ENDING)}                                           # seeds 0 to 4
AGAINST = {arm: arm.removesuffix(ENDING) if arm.endswith(ENDING) else GRPO for arm in (LINE, *OTHERS, *MAP)
           if arm not in (PPO, *PAIRS)}
AGAINST |= {x + arm: x + other for x in ("fresh ", "repeated ") for arm, other in AGAINST.items() if x + arm in FRESH}
GROUP, ALPHA, KAPPA = 16, 0.4, 2.0          # what `Watch` asks about, of any model
KS = (1, 4, 16, 64, 128)
T_975 = (np.inf, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
         2.120, 2.110, 2.101)                # Student's t at 97.5 %, by degrees of freedom; two arms of ten seeds have 18
CURVES = ("reward", "length", "entropy", "equal_groups", "shaping", "shaping_up", "shaping_down", "capped", "explained_variance")


@dataclass
class Settings:
    seeds: int = flag(5, "training seeds of the core arms, from 0", choices=range(1, 11))
    other_seeds: int = flag(3, "training seeds of the other arms", choices=range(1, 11))
    arms: str = flag("", "only these arms, as their files are called, separated by commas: grpo,ppo-entropy-advantage")
    map: bool = flag(False, "vary one setting at a time instead, seed 0, on the validation problems")
    quick: bool = flag(False, "a miniature: one seed, 3 steps, 5 problems, in runs/quick")
    runs: str = flag("runs/study", "where the training runs go")
    results: str = flag("lab/results", "where the counts go")
    processes: int = flag(2, "single-threaded processes side by side")
    tables: bool = flag(False, "only print the tables from the saved counts, and draw the figures")


def key(arm: str, *seed: int) -> str:
    return "-".join([arm.lower().replace(" + ", "-").replace(",", "").replace(" ", "-"), *map(str, seed)])


class Watch(Behaviour):
    """What responses do, and what the line would do to them: in groups of 16 with so many right answers, the tokens of
    right and of wrong ones, their sum of psi / |A| and how often the cap binds. `watch` goes to evaluate.count_solved."""

    def __init__(self, task) -> None:
        super().__init__()
        self.task, self.group, self.line = task, [], {"right": {}, "wrong": {}}

    def watch(self, problem, response, episode) -> None:
        super().watch(problem, response, episode)
        grams = list(zip(*(response.split()[i:] for i in range(4))))
        self.update({"grams": len(grams), "repeated": len(grams) - len(set(grams))})
        self.group.append((self.task.reward(problem, response, episode.finished), episode.entropy))
        if len(self.group) == GROUP:
            reward, entropy = torch.tensor([r for r, _ in self.group]), torch.cat([h for _, h in self.group])
            advantage = group_advantage(reward, torch.zeros(GROUP, dtype=torch.long))
            plain = torch.cat([a.expand(len(h)) for a, (_, h) in zip(advantage, self.group)])           # [tokens]
            share, self.group = (shape_with_entropy(plain, entropy, ALPHA, KAPPA) - plain) / plain.abs(), []
            for side, mask in (("right", plain > 0), ("wrong", plain < 0)):
                if mask.any():                                                  # nowhere if all are right or all wrong
                    kept = self.line[side].setdefault(int((reward > 0).sum()), [0, 0.0, 0])
                    sums = int(mask.sum()), float(share[mask].sum()), int((share[mask] > 0.9999 / KAPPA).sum())
                    kept[:] = [a + b for a, b in zip(kept, sums)]

    def figures(self) -> dict:
        return super().figures() | {"repeated 4-grams, share": self["repeated"] / max(1, self["grams"]), "line": self.line}


def measure(folder: str, target: str, split: str, problems: int, samples: int) -> None:
    """Samples the first problems of a split once and saves the counts. `folder`: a run, or "base"."""
    torch.set_num_threads(1)
    s = train.Settings() if folder == "base" else train.Settings(**read_json(Path(folder, "config.json")))
    (model, tokenizer), task = load(folder), load_task(s.task)
    watch, part = Watch(task), getattr(task, split)[:problems]
    sampler = Sampler(model, s.slots, len(task.encode(part[0], tokenizer)) + s.max_new_tokens, model.eos_ids)
    counts = count_solved(sampler, tokenizer, task, part, samples, s.max_new_tokens, s.temperature, 1.0, 0, watch=watch.watch)
    record = {"run": folder, "split": split, "solved": counts["solved"], "samples": samples, **watch.figures()}
    if folder != "base":
        log = [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]
        weights = Path(folder, "model/model.safetensors").read_bytes()
        record |= {"run": train.run_name(s), "weights": hashlib.sha256(weights).hexdigest(),
                   "curves": {name: [x[name] and float(f"{x[name]:.4g}") for x in log] for name in CURVES if name in log[0]}}
    with whole(Path(target)) as fresh:
        fresh.write_bytes(gzip.compress(json.dumps(record).encode(), mtime=0))      # no time stamp: same counts, same bytes


def jobs(s: Settings) -> list[tuple[str, int, list[str] | None, str]]:
    """What is left to do, in this order: arm, seed, train.py's flags (None: it is the base), where the counts go."""
    core = [(arm, seed, flags) for seed in range(s.seeds) for arm, flags in CORE.items()]
    found = [*core, *((arm, 0, flags) for arm, flags in MAP.items())] if s.map else [
        ("base", 0, None), *core, *((arm, seed, flags) for arm, flags in OTHERS.items() for seed in range(s.other_seeds)),
        *((arm, 5 * arm.startswith("fresh") + seed, flags) for seed in range(5)[:s.seeds] for arm, flags in FRESH.items())]
    known, wanted = {key(arm) for arm, *_ in found}, set(filter(None, s.arms.split(",")))
    if wanted - known:
        raise ValueError(f"no arm is called {', '.join(sorted(wanted - known))}; there are {', '.join(sorted(known))}")
    files = [(*job, f"{s.results}{'/map' * s.map}/{key(*job[:2])}.json.gz") for job in found if key(job[0]) in (wanted or known)]
    return [job for job in files if not Path(job[3]).exists()]


def work(arm: str, seed: int, flags: list[str] | None, target: str, s: Settings) -> None:
    """Trains (unless it is the base, or done) and measures one run, each in a process of one thread."""
    folder = f"{s.runs}/{key(arm, seed)}" if flags is not None else "base"
    run = lambda *command: subprocess.run([sys.executable, *command], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
                                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if flags is not None:                                       # with few evaluations: what is reported is measured below
        flags = ["--seed", str(seed), *flags, "--final-samples", "8", "--eval-problems", "20",
                 *(["--steps", "3", "--critic-warmup", "1"] if s.quick else [])]
        if not Path(folder).exists():
            run("train.py", "--out", s.runs, "--name", key(arm, seed), *flags)
        elif train.run_name(resumed(folder, [], train.Settings)) == train.run_name(parse_flags(train.Settings, __doc__, flags)):
            run("train.py", "--resume", folder)                 # begun, and perhaps finished
        else:
            raise ValueError(f"{folder} is not a run of {arm}: its settings are others; move it away")
    size = 5 if s.quick else 200, 64 if s.map else 128 if s.quick else 256
    run("-c", f"from lab.study import measure; measure{(folder, target, 'validation' if s.map or s.quick else 'test', *size)}")


def study(s: Settings) -> None:
    with concurrent.futures.ThreadPoolExecutor(s.processes) as pool:
        futures = [pool.submit(work, *job, s) for job in jobs(s)]
        try:
            for future in tqdm(concurrent.futures.as_completed(futures), total=len(futures), desc="study", unit="run"):
                future.result()
        except BaseException:                                   # Ctrl-C or a failed run: start none of the others
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def read(results: Path, arm: str) -> dict[int, dict]:
    """The saved counts of an arm: seed -> record."""
    files = {seed: results / f"{key(arm, seed)}.json.gz" for seed in range(10)}
    return {seed: json.loads(gzip.decompress(file.read_bytes())) for seed, file in files.items() if file.exists()}


def passes(records: dict[int, dict]) -> dict[int, np.ndarray]:
    return {seed: pass_table(r["solved"], r["samples"], [k for k in KS if k <= r["samples"]]) for seed, r in records.items()}


def gains(arm: dict[int, np.ndarray], other: dict[int, np.ndarray]) -> np.ndarray:
    """[seeds, problems, K] of the seeds that both have; a single run is compared with the other arm's mean over seeds."""
    if len(arm) == 1:
        other = {seed: np.mean(list(other.values()), 0) for seed in arm}
    return np.array([arm[seed] - other[seed] for seed in sorted(set(arm) & set(other))])


def cells(mean, low, high, sign: str = "") -> list[str]:
    return [f"{m:{sign}.3f} [{l:{sign}.3f}, {h:{sign}.3f}]" for m, l, h in zip(mean, low, high)]


def over_problems(values: np.ndarray, sign: str = "") -> list[str]:
    """[seeds, problems, K] -> means with 95 % bootstrap intervals: what other problems would give these models."""
    return cells(values.mean((0, 1)), *bootstrap(values.mean(0)), sign)


def student(mean: np.ndarray, variance: np.ndarray, freedom: int) -> list[str]:
    """95 % t intervals, from the variance of the mean. Without a degree of freedom they have no end."""
    half = T_975[freedom] * np.sqrt(np.maximum(variance, 1e-30))
    return cells(mean, mean - half, mean + half, "+")


def over_seeds(gain: np.ndarray) -> list[str]:
    """Paired differences [seeds, K] -> means with 95 % t intervals: what other training runs would give."""
    return student(gain.mean(0), ((gain - gain.mean(0)) ** 2).sum(0) / max(1, len(gain) - 1) / len(gain), len(gain) - 1)


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def compared(arms: dict[str, dict]) -> list[str]:
    """Two tables of arms that have counts, {arm: {seed: record}}: their Pass@K, and each against its baseline. Where an arm
    has one run only, the variance of a run is taken from the core arms, as if it were the same in all."""
    rate, also, rows = {arm: passes(found) for arm, found in arms.items()}, ("tokens per response", "entropy in nats"), []
    one = next(record for found in arms.values() for record in found.values())
    titles = [f"Pass@{k}" for k in KS if k <= one["samples"]]
    core = [np.stack(list(rate[arm].values())).mean(1) for arm in CORE if arm in rate]              # [seeds, K] each
    freedom = sum(map(len, core)) - len(core)
    variance = sum(((runs - runs.mean(0)) ** 2).sum(0) for runs in core) / max(1, freedom)          # [K]
    for arm, other in AGAINST.items():
        if not {arm, other} <= set(rate) or not len(gain := gains(rate[arm], rate[other])):         # [seeds, problems, K]
            continue                                            # no run, or no seed that both have, yet
        name, seeds = (f"the {len(gain)} seeds of both", over_seeds(gain.mean(1))) if len(rate[arm]) > 1 else (
            "seeds (spread of the core)", student(gain[0].mean(0), variance * (1 + 1 / len(rate[other])), freedom))
        rows += [[f"{arm} − {other}, over problems", *over_problems(gain, "+")], [f"the same, over {name}", *seeds]]
    return [table([f"{one['split']}, mean over seeds (how many), 95 % interval over problems", *titles, *also], [
                  [f"{arm} ({len(found)})", *over_problems(np.stack(list(found.values()))),
                   *(f"{np.mean([r[name] for r in arms[arm].values()]):.3f}" for name in also)] for arm, found in rate.items()]),
            table(["difference, 95 % interval", *titles], rows)]


def tables(results: Path) -> str:
    """Markdown tables, from the saved counts alone, of the arms that have some; the last: fresh seeds, then all of the core."""
    arms, fresh = ({arm: found for arm in some if (found := read(results, arm))} for some in (("base", *CORE, *OTHERS), FRESH))
    together = {arm: found for arm in (*CORE, "hard", "hard" + ENDING) if (
        found := arms.get(arm, {}) | fresh.get("fresh " + arm, {}) | fresh.get("repeated " + arm, {}))}
    if "base" not in arms or not set(arms.get(GRPO, ())) & set(arms.get(LINE, ())):
        raise ValueError(f"{results} needs saved counts of the base, and of {GRPO} and {LINE} with one seed in common at least")
    blocks = compared(arms) + [table(["one run", *(f"Pass@{k}" for k in KS)], [
        [f"{arm}, seed {seed}", *(f"{x:.3f}" for x in values.mean(0))]
        for arm, found in (arms | fresh).items() if arm != "base" for seed, values in passes(found).items()])]

    names = [name for name, value in arms["base"][0].items() if isinstance(value, float)]
    figure = {arm: {seed: np.array([r[name] for name in names]) for seed, r in found.items()} for arm, found in arms.items()}
    mean = [[f"{x:.3f}" for x in np.mean(list(found.values()), 0)] for found in figure.values()]    # base, core, others
    blocks.append(table(["mean over seeds", "base", *CORE, "difference, interval over seeds", *list(arms)[3:]], [
        list(row) for row in zip(names, *mean[:3], over_seeds(gains(figure[LINE], figure[GRPO])), *mean[3:])]))

    rows = []
    for ns in (range(1, 2), range(2, 4), range(4, 8), range(8, 12), range(12, 16)):
        sums = [np.sum([r["line"][side].get(str(n), [0, 0, 0]) for r in arms[LINE].values() for n in ns], 0)
                for side in ("right", "wrong")]
        rows.append([f"{ns[0]} to {ns[-1]}", *(x for n, psi, capped in sums for x in (
            f"{n:,.0f}", f"{psi / max(1, n):.3f}", f"{capped / max(1, n):.3f}"))])
    sides = [f"{x}, {side} answers" for side in ("right", "wrong") for x in ("tokens", "ψ / abs(A)", "capped")]
    blocks.append(table(["right of 16", *sides], rows))

    rows = []
    for arm in [arm for arm in arms if arm != "base"]:
        curves = [r["curves"] for r in arms[arm].values()]
        for first in range(0, len(curves[0]["reward"]), 20):
            known = [[x for c in curves for x in c.get(name, [])[first:first + 20] if x is not None] for name in CURVES]
            rows.append([f"{arm}, steps {first + 1} to {first + 20}", *(f"{np.mean(x):.3g}" if x else "–" for x in known)])
    blocks.append(table(["training, mean over seeds", *CURVES], rows))
    return "\n\n".join(blocks + (compared(fresh) + compared(together) if fresh else []))


def map_tables(results: Path) -> str:
    """Those of the map, of validation problems: whoever chooses by them reads no count of a test problem."""
    if GRPO not in (tried := {arm: found for arm in (*CORE, *MAP) if (found := read(results / "map", arm))}):
        raise ValueError(f"{results}/map needs saved counts of {GRPO}, which the others are compared with")
    return "\n\n".join(compared(tried))


def figures(results: Path, out: Path) -> list[Path]:
    """curves.png and pass_at_k.png, as lab/plot.py draws them, and behaviour.png: bars of means, ticks of seeds."""
    arms = {arm: list(found.values()) for arm in ("base", *CORE, *OTHERS) if (found := read(results, arm))}
    curves = lambda record: {name: dict(enumerate(values, 1)) for name, values in record["curves"].items()}
    runs = {f"{arm} ({len(found)})": [{"model": "base", "curves": curves(record), "final": {"models": {
        "base": arms["base"][0], "trained": record}}} for record in found] for arm, found in arms.items() if arm != "base"}
    written = draw(runs, out, f"the {arms['base'][0]['split']} problems")
    from matplotlib.figure import Figure                        # there, as `draw` has not complained
    names = [name for name, value in arms["base"][0].items() if isinstance(value, float)]
    figure = Figure((15, 8), layout="constrained")
    for axis, name in zip(figure.subplots(3, 4, sharey=True).flat, names):
        axis.barh(list(arms), [np.mean([r[name] for r in found]) for found in arms.values()], color="0.8")
        for place, found in enumerate(arms.values()):
            axis.plot([r[name] for r in found], [place] * len(found), "|", color="0", markersize=10)
        axis.set_title(name, fontsize="medium")
    axis.invert_yaxis()
    figure.savefig(out / "behaviour.png", dpi=100)
    return [*written, out / "behaviour.png"]


if __name__ == "__main__":
    settings = parse_flags(Settings, __doc__)
    if settings.quick:
        settings.seeds, settings.other_seeds, settings.runs, settings.results = 1, 1, "runs/quick", "runs/quick/results"
    try:
        if not settings.tables:
            study(settings)
        print((map_tables if settings.map else tables)(Path(settings.results)))
        settings.map or print(*figures(Path(settings.results), Path(settings.results).parent / "figures/study"), sep="\n")
    except subprocess.CalledProcessError as error:
        sys.exit(f"lab.study: {' '.join(error.cmd[1:])} failed: {error.stderr.strip().rpartition(chr(10))[2]}")
    except (ValueError, OSError) as error:
        sys.exit(f"lab.study: {error}")
    except KeyboardInterrupt:
        sys.exit("lab.study: stopped; the same command goes on with what is left")
