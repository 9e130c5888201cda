"""The tables of lab/SMOLLM2.md, made again from what the run left in lab/results/. Nothing is sampled
here.

    python -m lab.smollm2_tables

What SmolLM2 answers to benchmark questions, its words and sentences (lab/english.py), its training on
arithmetic, and what lab.effect measured of it.
"""

import json
import statistics
from pathlib import Path

from evaluate import report
from lab.effect_report import tables as effect_tables
from lab.english import SAVED as ENGLISH
from lab.english import markdown, read
from lab.real_model import table_of
from lab.saved import read_text
from lab.tables import table

RESULTS = Path("lab/results")
RUNS = {"with the term": "entropy-advantage", "without": "grpo"}  # its name in the tables: in files
MODELS = {"smollm2": "before", "ea": "after, with the term", "grpo": "after, without"}
STEPS = 10  # of training, to a row
SECONDS = ("rollout_s", "reward_s", "update_s")


def saved(name: str) -> dict:
    """A file of lab/results: smollm2`name`.json.gz."""
    return json.loads(unpacked(f"{name}.json.gz"))


def unpacked(name: str) -> str:
    return read_text(RESULTS / f"smollm2{name}")


def log_of(run: str) -> list[dict]:
    return [json.loads(line) for line in unpacked(f"-{run}.jsonl.gz").splitlines()]


def pass_table() -> str:
    """Pass@K on the test problems: before, after, and the differences. Also how the answers end."""
    record = saved("-arithmetic")
    results = {}
    for folder, result in record["models"].items():
        if "solved" in result:  # no difference
            results[MODELS[Path(folder).name]] = result
    _, again = report(results, record["k"])

    rows = []
    for name, found in again["models"].items():
        is_difference = name not in results
        row = [name.replace(" - ", " minus "), *cells(found, "+" if is_difference else "")]
        if not is_difference:
            row += [f"{results[name]['finished']:.3f}", f"{results[name]['tokens']:.1f}"]
        rows.append(row + [""] * (len(record["k"]) + 3 - len(row)))
    return table(
        ["130 test problems, 16 answers each", *[f"Pass@{k}" for k in record["k"]], "finished",
         "tokens"], rows,
    )  # fmt: skip


def greedy_table() -> str:
    """The untrained model once more, taking nearly always its likeliest token, and by how much the
    trained ones, at temperature 1, are better than that: Pass@1, paired by problem."""
    [[_, untrained]] = saved("-greedy")["models"].items()
    results = {"before, temperature 0.02, one answer each": untrained}
    for folder, result in saved("-arithmetic")["models"].items():
        name = MODELS.get(Path(folder).name)
        if "solved" in result and name != "before":
            results[f"{name}, temperature 1"] = result
    _, again = report(results, [1])
    rows = []
    for name, found in again["models"].items():
        if " - " in name:
            rows.append([name.partition(" - ")[0] + " minus that", *cells(found, "+")])
        elif name.startswith("before"):
            rows.append([name, *cells(found, "")])
    return table(["130 test problems", "Pass@1"], rows)


def cells(found: dict, sign: str) -> list[str]:
    each = zip(found["pass"], found["low"], found["high"])
    return [f"{mean:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]" for mean, low, high in each]


def training_table() -> str:
    """Means over ten steps, but for the largest gap."""
    rows = []
    for label, run in RUNS.items():
        log = log_of(run)
        for first in range(0, len(log), STEPS):
            steps = log[first : first + STEPS]
            rows.append(
                [
                    f"{label}, {first + 1} to {first + len(steps)}",
                    f"{mean(steps, 'reward'):+.3f}",
                    f"{mean(steps, 'length'):.1f}",
                    f"{mean(steps, 'entropy'):.3f}",
                    f"{mean(steps, 'equal_groups'):.2f}",
                    f"{mean(steps, 'gap_mean'):.4f}",
                    f"{max(known(steps, 'gap_max')):.2f}",
                ]
            )
    head = ["steps", "reward", "length", "entropy", "groups all equal", "gap", "largest gap"]
    return table(head, rows)


def known(steps: list[dict], name: str) -> list[float]:
    """Without the steps that had nothing to measure."""
    return [line[name] for line in steps if line[name] is not None]


def mean(steps: list[dict], name: str) -> float:
    return statistics.mean(known(steps, name))


def seconds_table() -> str:
    """Medians over the steps, their sum, and the most memory."""
    rows = []
    for label, run in RUNS.items():
        log = log_of(run)
        whole = [sum(line[part] for part in SECONDS) for line in log]
        medians = [statistics.median(known(log, name)) for name in (*SECONDS, "score_s")]
        rows.append(
            [
                label,
                f"{statistics.median(whole):.2f}",
                *[f"{median:.2f}" for median in medians],
                f"{sum(whole):.0f}",
                f"{max(known(log, 'peak_memory_gb')):.1f}",
            ]
        )
    head = ["seconds", "a step", "rollout", "reward", "update", "of it scoring, forward"]
    return table([*head, f"all {len(log)} steps", "peak memory, GB"], rows)


def page_tables() -> list[str]:
    """Every table of the page, in its order."""
    english = markdown(read(ENGLISH)).split("\n\n")
    arithmetic = [pass_table(), greedy_table(), training_table(), seconds_table()]
    return [table_of(saved("")), *english, *arithmetic]


def effect_text() -> str:
    """What lab.effect printed."""
    return effect_tables(saved("-effect"))


if __name__ == "__main__":
    print("\n\n".join([*page_tables(), effect_text()]))
