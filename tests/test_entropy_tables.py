"""lab/RESULTS.md's section on entropy: its tables are those of the saved report of lab/analyze.py."""

import gzip
import json
from pathlib import Path

REPORT = json.loads(gzip.decompress(Path("lab/results/entropy.json.gz").read_bytes()))
NAMES = {"base": "base", "runs/grpo-alpha=0.0": "GRPO", "runs/grpo": "GRPO with the line"}
ROWS = {"pivotal tokens: operators, operands there is a choice of": ("pivotal tokens", "all"),
        "reflective actions: checks, attempts after `wait`": ("reflective actions", "all"),
        "attempts after `wait`, against first attempts": ("reflective actions", "length in tokens 13"),
        "rare sentences, against all others": ("rare behaviours", "all"),
        "rare attempts after `wait`, against the others": ("rare behaviours", "kind attempt after wait")}
TOKENS = ("operand", "operator", "vs", "wait", "so", "last operand", "=", "result")


def cell(figure):
    low, high = figure["interval"]
    return f"{figure['mean']:.3f} [{low:.3f}, {high:.3f}]"


def tables():
    lines = ["| | " + " | ".join(f"{name} | the others" for name in NAMES.values()) + " |", "|---" * 7 + "|"]
    for row, (subject, start) in ROWS.items():
        cells = []
        for name in NAMES:
            found = [c for key, c in REPORT["comparisons"][subject].get(name, {}).items() if key.startswith(start)]
            cells += [cell(found[0]["mean"]), cell(found[0]["others"])] if found else ["", ""]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    lines += ["", "| entropy of a token | " + " | ".join(NAMES.values()) + " |", "|---" * 4 + "|"]
    for kind in TOKENS:
        found = [REPORT["comparisons"]["pivotal tokens"][name][f"kind {kind}"]["mean"] for name in NAMES]
        lines.append(f"| `{kind}` | " + " | ".join(map(cell, found)) + " |")
    lines += ["", "| per response, but for shares and entropies | " + " | ".join(NAMES.values()) + " |", "|---" * 4 + "|"]
    for what in REPORT["behaviour"]["base"]:
        lines.append(f"| {what} | " + " | ".join(cell(REPORT["behaviour"][name][what]) for name in NAMES) + " |")
    return lines


def test_the_published_tables_are_those_of_the_report():
    published = Path("lab/RESULTS.md").read_text().splitlines()
    for line in tables():
        assert line in published, line
    left = [cell(REPORT["comparisons"]["rare behaviours"][name]["kind attempt after wait"]["difference"]) for name in NAMES
            if name != "base"]
    assert f"({left[0]} without the line, {left[1]} with it)" in Path("lab/RESULTS.md").read_text().replace("\n", " ")
    for figure in (0.901, 0.915, 1.080, 0.916, 0.946, 0.130):              # in README's sentence
        assert f"{figure:.3f}" in "\n".join(tables()) and f"{figure:.3f}" in Path("README.md").read_text()
