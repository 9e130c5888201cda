"""Where the entropy is: the tables in lab/results/TABLES.md are made again here from the saved report
of lab/analyze.py, apart from lab/published.py; and what RESULTS.md quotes of them."""

import gzip
import json
from pathlib import Path

import pytest

RESULTS = Path("lab/results")
REPORT = json.loads(gzip.decompress((RESULTS / "entropy.json.gz").read_bytes()))
NAMES = {
    "base": "base",
    "runs/grpo-alpha=0.0": "GRPO",
    "runs/grpo": "GRPO + entropy advantage",
}
COMPARED = [
    ("pivotal tokens: operators, operands there is a choice of", "pivotal tokens", "all"),
    ("reflective actions: checks, attempts after `wait`", "reflective actions", "all"),
    (
        "attempts after `wait`, against first attempts",
        "reflective actions",
        "length in tokens 13",
    ),
    ("rare sentences, against all others", "rare behaviours", "all"),
    (
        "rare attempts after `wait`, against the others",
        "rare behaviours",
        "kind attempt after wait",
    ),
]
TOKENS = ("operand", "operator", "vs", "wait", "so", "last operand", "=", "result")
QUOTED = ("0.901", "0.915", "1.080", "0.916", "0.946", "0.130")  # entropies of tokens, in prose


@pytest.fixture(scope="module")
def published():
    return (RESULTS / "TABLES.md").read_text().splitlines()


def cell(figure):
    low, high = figure["interval"]
    return f"{figure['mean']:.3f} [{low:.3f}, {high:.3f}]"


def token_rows():
    by_model = REPORT["comparisons"]["pivotal tokens"]
    for kind in TOKENS:
        found = [cell(by_model[name][f"kind {kind}"]["mean"]) for name in NAMES]
        yield f"| `{kind}` | " + " | ".join(found) + " |"


@pytest.mark.parametrize("row, subject, start", COMPARED)
def test_a_published_comparison_is_that_of_the_report(row, subject, start, published):
    cells = []
    for name in NAMES:
        comparisons = REPORT["comparisons"][subject].get(name, {})
        found = [value for key, value in comparisons.items() if key.startswith(start)]
        cells += [cell(found[0]["mean"]), cell(found[0]["others"])] if found else ["", ""]
    assert f"| {row} | " + " | ".join(cells) + " |" in published


def test_the_published_entropies_of_tokens_are_those_of_the_report(published):
    for row in token_rows():
        assert row in published, row


def test_what_is_published_of_responses_is_of_the_report(published):
    for what in REPORT["behaviour"]["base"]:
        cells = [cell(REPORT["behaviour"][name][what]) for name in NAMES]
        assert f"| {what} | " + " | ".join(cells) + " |" in published


def test_the_columns_are_named_after_the_models(published):
    names = " | ".join(NAMES.values())
    beside = " | ".join(f"{name} | the others" for name in NAMES.values())
    assert f"|  | {beside} |" in published
    assert f"| entropy of a token | {names} |" in published
    assert f"| per response, but for shares and entropies | {names} |" in published


def test_the_entropies_quoted_in_the_text_are_in_the_tables():
    results = Path("lab/RESULTS.md").read_text()
    rows = "\n".join(token_rows())
    for figure in QUOTED:
        assert figure in rows
        assert figure in results


def test_what_is_left_of_rare_behaviours_is_quoted():
    results = Path("lab/RESULTS.md").read_text()
    left = []
    for name in ("runs/grpo-alpha=0.0", "runs/grpo"):
        rare = REPORT["comparisons"]["rare behaviours"][name]["kind attempt after wait"]
        left.append(cell(rare["difference"]))
    quoted = f"({left[0]} without the entropy advantage, {left[1]} with it)"
    assert quoted in " ".join(results.split())
