"""README.md: its figures come from saved counts, its commands parse, its links lead somewhere."""

import json
import re
import shlex
from pathlib import Path

import pytest

import evaluate
import train
from evaluate import parse_flags, report

README = Path("README.md").read_text()


@pytest.mark.parametrize("name", ["readme-train", "readme-evaluate"])
def test_the_tables_are_recomputed_from_the_saved_counts(name):
    record = json.loads(Path(f"lab/results/{name}.json").read_text())
    results = {model: r for model, r in record["models"].items() if "solved" in r}
    text, again = report(results, record["k"])
    assert again["models"] == record["models"]
    for line in text.splitlines():
        assert line.rstrip() in README, line


def test_the_commands_parse(capsys):
    scripts = {"train.py": train, "evaluate.py": evaluate}
    found = re.findall(r"^ {4}(?:.*&& )?python (\w+\.py)([^#\n]*)", README, re.M)
    assert len(found) >= 5
    for script, arguments in found:
        parse_flags(scripts[script].Settings, script, shlex.split(arguments))


def test_the_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert Path(target).exists(), target


def test_the_line_is_the_one_in_the_code():
    line = "advantage + torch.minimum(alpha * entropy.detach(), advantage.abs() / kappa)"
    assert line in README and f"    return {line}\n" in Path("advantage.py").read_text()


def test_the_files_keep_their_sizes():
    """A reader reads them in an evening: the root under 1,800 lines with no file over 350, lab/ under 1,400."""
    root, lab = ({p: len(p.read_text().splitlines()) for p in Path(".").glob(pattern)} for pattern in ("*.py", "lab/*.py"))
    assert sum(root.values()) < 1800 and max(root.values()) <= 350 and sum(lab.values()) < 1400
