"""README.md and docs/: figures come from saved counts, commands parse, links lead somewhere, and the
diffs do what they say, against values worked out by hand."""

import json
import re
import shlex
import sys
import types
from pathlib import Path

import pytest
import torch

from evaluate import report
from plumbing.settings import EvaluationSettings, Settings, parse_flags

README = Path("README.md").read_text()
PAGES = [Path("README.md"), *sorted(Path("docs").glob("*.md"))]
FORK = Path("docs/fork.md").read_text()
REAL_MODELS = Path("docs/real-models.md").read_text()


@pytest.mark.parametrize(
    ("name", "page"),
    [("readme-train", README), ("readme-evaluate", FORK)],
    ids=["train", "evaluate"],
)
def test_the_tables_are_recomputed_from_the_saved_counts(name, page):
    record = json.loads(Path(f"lab/results/{name}.json").read_text())
    results = {model: r for model, r in record["models"].items() if "solved" in r}
    text, again = report(results, record["k"])
    assert again["models"] == record["models"]
    for line in text.splitlines():
        assert line.rstrip() in page, line


def commands(text: str) -> list[tuple[str, str]]:
    """The indented `python SCRIPT FLAGS` lines of a page."""
    return re.findall(r"^ {4}(?:.*&& )?python (\w+\.py)([^#\n\[]*)", text, re.M)


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_the_commands_parse(page):
    settings = {"train.py": Settings, "evaluate.py": EvaluationSettings}
    for script, arguments in commands(page.read_text()):
        parse_flags(settings[script], script, shlex.split(arguments))


def test_there_are_commands_to_parse():
    assert len(commands(README)) >= 5
    assert len(commands(REAL_MODELS)) >= 3


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_the_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_line_is_the_one_in_the_code():
    line = "advantage + torch.minimum(alpha * entropy.detach(), advantage.abs() / kappa)"
    assert line in README
    assert f"    return {line}\n" in Path("advantage.py").read_text()


def forked(page: str, number: int) -> types.ModuleType:
    """The module that the page's diff of this number makes of the file it names."""
    diffs = re.findall(r"```diff\n--- (.*?)```", page, re.S)
    name, *lines = diffs[number].splitlines()
    old = "\n".join(line[1:] for line in lines if line[0] in " -")
    new = "\n".join(line[1:] for line in lines if line[0] in " +")
    source = Path(name).read_text()
    assert source.count(old) == 1, f"diff {number} does not fit {name}"
    module = types.ModuleType(f"forked_{Path(name).stem}")
    sys.modules[module.__name__] = module  # where dataclasses look for their module
    exec(compile(source.replace(old, new), name, "exec"), module.__dict__)
    return module


REWARDS = torch.tensor([1.0, -1.0, -1.0, -1.0, -1.0, -1.0, -1.0])
GROUPS = torch.tensor([0, 0, 0, 0, 1, 1, 1])


def test_fork_without_the_standard_deviation():
    advantage = forked(README, 0).group_advantage(REWARDS, GROUPS)
    assert advantage.tolist() == [1.5, -0.5, -0.5, -0.5, 0, 0, 0]


def test_fork_with_a_multiplicative_entropy_term():
    advantage = torch.tensor([2.0, -2.0, -2.0, 0.0])
    entropy = torch.tensor([0.5, 0.5, 9.0, 9.0])
    got = forked(README, 1).shape_with_entropy(advantage, entropy, 0.4, 2.0)
    assert got.tolist() == pytest.approx([2.4, -2.4, -3.0, 0.0])


def test_fork_with_leave_one_out_baselines():
    advantage = forked(FORK, 0).group_advantage(REWARDS, GROUPS)
    assert advantage.tolist() == pytest.approx([2.0, -2 / 3, -2 / 3, -2 / 3, 0, 0, 0])


def test_fork_with_a_schedule_for_alpha(tmp_path, monkeypatch):
    module = forked(FORK, 1)
    shape = module.shape_with_entropy
    alphas = []

    def spy(advantage, entropy, alpha, kappa):
        alphas.append(alpha)
        return shape(advantage, entropy, alpha, kappa)

    monkeypatch.setattr(module, "shape_with_entropy", spy)
    settings = module.Settings(
        out=str(tmp_path),
        steps=4,
        prompts=2,
        samples=2,
        minibatch=2,
        eval_problems=1,
        eval_samples=1,
        final_samples=1,
        slots=4,
        skip_zero=False,
        max_new_tokens=8,
    )
    module.train(settings)
    assert alphas == pytest.approx([0.3, 0.2, 0.1, 0.0])
