"""lab/RESULTS.md's section on how the settings were chosen: its tables are made again from the saved counts."""

import json
from pathlib import Path

import numpy as np

from evaluate import bootstrap, pass_table

TUNING, PPO = (json.loads(Path(f"lab/results/{name}.json").read_text()) for name in ("tuning", "tuning-ppo"))


def cells(record, *ks):
    values = pass_table(record["solved"], record["samples"], ks)
    return [f"{mean:.3f} [{low:.3f}, {high:.3f}]" for mean, low, high in zip(values.mean(0), *bootstrap(values))]


def rows():
    for r in TUNING:
        yield [f"{r['lr']:g}", f"{r['prompts']} × {r['samples_per_prompt']}", f"{r['minibatch']}", f"{r['steps']}",
               f"{r['threads']}", *cells(r, 1, 64), f"{round(r['cpu_seconds'])}" if r["cpu_seconds"] else "–"]
    for r in PPO:
        yield [f"{r['lr']:g}", f"{r['critic_lr']:g}", f"{np.mean(r['explained_variance'][40:]):+.3f}", *cells(r, 1)]


def test_the_published_tables_come_from_the_saved_counts():
    published, found = Path("lab/RESULTS.md").read_text().splitlines(), list(rows())
    assert len(found) == 8 + 4 and all(len(r["solved"]) == 200 and r["samples"] == 64 for r in TUNING)
    for row in found:
        assert f"| {' | '.join(row)} |" in published, row
