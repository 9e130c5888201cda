"""README.md and docs/: figures come from saved counts, commands parse, links lead somewhere, and the
diffs do what they say, against values worked out by hand and TRL's own loss."""

import json
import re
import shlex
import sys
import types
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from evaluate import report
from model import load
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


def trl_trainer(folder):
    """The trainer of docs/real-models.md on the embedded model."""
    datasets = pytest.importorskip("datasets")
    trl = pytest.importorskip("trl")
    snippets = re.findall(r"```python\n(.*?)```", REAL_MODELS, re.S)
    scope = {}
    exec(next(code for code in snippets if "GRPOTrainer" in code), scope)
    settings = trl.GRPOConfig(
        str(folder),
        per_device_train_batch_size=4,
        num_generations=4,
        beta=0.0,
        loss_type="grpo",
        epsilon_high=0.28,
        bf16=False,
        use_cpu=True,
        report_to="none",
        temperature=1.0,
    )
    trainer = scope["EntropyAdvantageTrainer"](
        AutoModelForCausalLM.from_pretrained("base"),
        lambda completion_ids, **_: [0.0] * len(completion_ids),
        settings,
        datasets.Dataset.from_list([{"prompt": "7 7 1 8 -> 23 ?"}] * 4),
        processing_class=load("base")[1],
    )
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def test_the_entropy_advantage_in_trl(tmp_path):
    """The trainer against the formula: TRL's own loss of the shaped advantages, and nothing
    accumulates when TRL takes the same batch again."""
    trainer = trl_trainer(tmp_path)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(2, 112, (4, 8), generator=generator)
    completion = torch.randint(2, 112, (4, 9), generator=generator)
    mask = (torch.arange(9) < torch.tensor([[9], [4], [1], [7]])).long()
    plain = torch.tensor([1.5, -0.5, -0.5, 0.0])

    tokens = torch.cat((prompt, completion), dim=1)
    with torch.no_grad():
        z = trainer.model(tokens).logits[:, 7:-1].log_softmax(-1)
    logp = z.gather(2, completion[..., None])[..., 0]
    entropy = -(z.exp() * z).sum(-1)
    old = logp + 0.3 * torch.randn(logp.shape, generator=generator)
    inputs = {
        "prompt_ids": prompt,
        "prompt_mask": torch.ones_like(prompt),
        "completion_ids": completion,
        "completion_mask": mask,
        "advantages": plain,
        "old_per_token_logps": old,
    }

    def loss_of(advantage):
        ratio = (logp - old).exp()
        objective = torch.min(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
        return float(((-objective * mask).sum(1) / mask.sum(1)).mean())

    psi = torch.minimum(0.4 * entropy, plain.abs()[:, None] / 2)
    want = loss_of(plain[:, None] + psi)
    losses = [float(trainer._compute_loss(trainer.model, inputs)) for _ in range(2)]
    assert losses == pytest.approx([want, want], abs=1e-5)
    assert torch.equal(inputs["advantages"], plain)
    assert abs(want - loss_of(plain[:, None])) > 1e-2
