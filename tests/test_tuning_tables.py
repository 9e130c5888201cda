"""How the settings were chosen: the tables in lab/results/TABLES.md are made again here from the
saved counts, with evaluate.py's estimator and intervals, apart from lab/published.py."""

import json
from pathlib import Path

import numpy as np
import pytest

from evaluate import bootstrap, pass_table

RESULTS = Path("lab/results")
TUNING = json.loads((RESULTS / "tuning.json").read_text())
PPO = json.loads((RESULTS / "tuning-ppo.json").read_text())


@pytest.fixture(scope="module")
def published():
    return (RESULTS / "TABLES.md").read_text().splitlines()


def cells(run, *ks):
    values = pass_table(run["solved"], run["samples"], ks)
    low, high = bootstrap(values)
    return [f"{m:.3f} [{a:.3f}, {b:.3f}]" for m, a, b in zip(values.mean(0), low, high)]


def test_all_runs_are_there():
    assert len(TUNING) == 8
    assert len(PPO) == 4
    for run in TUNING:
        assert len(run["solved"]) == 200
        assert run["samples"] == 64


@pytest.mark.parametrize("run", TUNING)
def test_a_row_of_the_published_table_comes_from_the_saved_counts(run, published):
    pass_1, pass_64 = cells(run, 1, 64)
    seconds = f"{round(run['cpu_seconds'])}" if run["cpu_seconds"] else "–"
    size = f"{run['prompts']} × {run['samples_per_prompt']} | {run['minibatch']}"
    setting = f"{run['lr']:g} | {size} | {run['steps']} | {run['threads']}"
    assert f"| {setting} | {pass_1} | {pass_64} | {seconds} |" in published


@pytest.mark.parametrize("run", PPO)
def test_a_row_of_ppo_comes_from_the_saved_counts(run, published):
    [pass_1] = cells(run, 1)
    explained = np.mean(run["explained_variance"][40:])
    row = f"| {run['lr']:g} | {run['critic_lr']:g} | {explained:+.3f} | {pass_1} |"
    assert row in published
