"""lab/RESULTS.md's sections on how the settings were chosen and on PPO: their tables are made again from the saved counts."""

import json
import statistics
from pathlib import Path

import numpy as np

from evaluate import bootstrap, pass_table

TUNING, PPO = (json.loads(Path(f"lab/results/{name}.json").read_text()) for name in ("tuning", "ppo"))


def cells(record, *ks):
    values = pass_table(record["solved"], record["samples"], ks)
    return [f"{mean:.3f} [{low:.3f}, {high:.3f}]" for mean, low, high in zip(values.mean(0), *bootstrap(values))]


def rows():
    for r in TUNING:
        yield [f"{r['lr']:g}", f"{r['prompts']} × {r['samples_per_prompt']}", f"{r['minibatch']}", f"{r['steps']}",
               f"{r['threads']}", *cells(r, 1, 64), f"{round(r['cpu_seconds'])}" if r["cpu_seconds"] else "–"]
    for first in range(0, len(PPO["runs"][0]["reward"]), 10):
        yield [f"steps {first + 1} to {first + 10}", *(f"{np.mean(run[name][first:first + 10]):+.3f}" for name in (
            "reward", "explained_variance") for run in PPO["runs"])]
    for step, counts in PPO["runs"][0]["validation"].items():
        yield [f"{step} ({counts['samples']} samples)", *(cells(run["validation"][step], 1)[0] for run in PPO["runs"])]
    for r in PPO["tuning"]:
        yield [f"{r['lr']:g}", f"{r['critic_lr']:g}", f"{np.mean(r['explained_variance'][40:]):+.3f}", *cells(r, 1)]


def test_the_published_tables_come_from_the_saved_counts():
    published, found = Path("lab/RESULTS.md").read_text().splitlines(), list(rows())
    assert len(found) == 8 + 10 + 5 + 4 and all(len(r["solved"]) == 200 and r["samples"] == 64 for r in TUNING)
    for row in found:
        assert f"| {' | '.join(row)} |" in published, row


def test_what_is_said_of_ppo_holds_for_every_seed():
    assert [run["seed"] for run in PPO["runs"]] == [0, 1, 2]
    for run in PPO["runs"]:
        mean = lambda name, first: statistics.mean(run[name][first:first + 10])
        assert len(run["reward"]) == 100 and mean("explained_variance", 0) < 0.03 < mean("explained_variance", 90)
        assert mean("reward", 90) > mean("reward", 0) + 0.15
        first, last = (run["validation"][step] for step in ("0", "100"))
        rate = lambda record: statistics.mean(record["solved"]) / record["samples"]
        assert rate(last) > 2 * rate(first)
