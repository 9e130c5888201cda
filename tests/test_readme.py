"""README.md: its figures come from saved counts, its commands parse, its links lead somewhere."""

import json
import re
import shlex
import sys
import types
from pathlib import Path

import pytest
import torch

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


def forked(number):
    """The module that the README's diff of this number makes of the file it names."""
    name, *lines = re.findall(r"```diff\n--- (.*?)```", README, re.S)[number].splitlines()
    old, new = ("\n".join(line[1:] for line in lines if line[0] in signs) for signs in (" -", " +"))
    source = Path(name).read_text()
    assert source.count(old) == 1, f"diff {number} does not fit {name}"
    module = types.ModuleType(f"forked_{Path(name).stem}")
    sys.modules[module.__name__] = module                                   # where dataclasses look for their module
    exec(compile(source.replace(old, new), name, "exec"), module.__dict__)
    return module


REWARDS, GROUPS = torch.tensor([1.0, -1.0, -1.0, -1.0, -1.0, -1.0, -1.0]), torch.tensor([0, 0, 0, 0, 1, 1, 1])


def test_fork_without_the_standard_deviation():
    assert forked(0).group_advantage(REWARDS, GROUPS).tolist() == [1.5, -0.5, -0.5, -0.5, 0, 0, 0]


def test_fork_with_leave_one_out_baselines():
    assert forked(1).group_advantage(REWARDS, GROUPS).tolist() == pytest.approx([2.0, -2 / 3, -2 / 3, -2 / 3, 0, 0, 0])


def test_fork_with_a_multiplicative_line():
    got = forked(2).shape_with_entropy(torch.tensor([2.0, -2.0, -2.0, 0.0]), torch.tensor([0.5, 0.5, 9.0, 9.0]), 0.4, 2.0)
    assert got.tolist() == pytest.approx([2.4, -2.4, -3.0, 0.0])


def test_fork_with_a_schedule_for_alpha(tmp_path, monkeypatch):
    module, alphas = forked(3), []
    shape = module.shape_with_entropy
    monkeypatch.setattr(module, "shape_with_entropy", lambda a, h, alpha, kappa: alphas.append(alpha) or shape(a, h, alpha, kappa))
    module.train(module.Settings(out=str(tmp_path), steps=4, prompts=2, samples=2, minibatch=2, eval_problems=1,
                                 eval_samples=1, final_samples=1, slots=4, skip_zero=False, max_new_tokens=8))
    assert alphas == pytest.approx([0.3, 0.2, 0.1, 0.0])
