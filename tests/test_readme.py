"""README.md: its figures come from saved counts, its commands parse, its links lead somewhere."""

import json
import re
import shlex
import sys
import types
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import evaluate
import train
from evaluate import parse_flags, report
from model import load

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


def test_the_line_in_trl(tmp_path):
    """README's trainer against the formula: TRL's own loss of the shaped advantages, and nothing accumulates when TRL
    takes the same batch again."""
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    scope = {}
    exec(next(code for code in re.findall(r"```python\n(.*?)```", README, re.S) if "GRPOTrainer" in code), scope)
    model, tokenizer = AutoModelForCausalLM.from_pretrained("base"), load("base")[1]
    settings = trl.GRPOConfig(str(tmp_path), per_device_train_batch_size=4, num_generations=4, beta=0.0, loss_type="grpo",
                              epsilon_high=0.28, bf16=False, use_cpu=True, report_to="none", temperature=1.0)
    trainer = scope["EntropyAdvantageTrainer"](
        model, lambda completion_ids, **_: [0.0] * len(completion_ids), settings,
        datasets.Dataset.from_list([{"prompt": "7 7 1 8 -> 23 ?"}] * 4), processing_class=tokenizer)
    trainer.current_gradient_accumulation_steps = 1
    g = torch.Generator().manual_seed(0)
    prompt, completion = torch.randint(2, 112, (4, 8), generator=g), torch.randint(2, 112, (4, 9), generator=g)
    mask = (torch.arange(9) < torch.tensor([[9], [4], [1], [7]])).long()
    plain = torch.tensor([1.5, -0.5, -0.5, 0.0])
    tokens = torch.cat((prompt, completion), dim=1)
    with torch.no_grad():
        z = model(tokens).logits[:, 7:-1].log_softmax(-1)
    logp, entropy = z.gather(2, completion[..., None])[..., 0], -(z.exp() * z).sum(-1)
    old = logp + 0.3 * torch.randn(logp.shape, generator=g)
    inputs = {"prompt_ids": prompt, "prompt_mask": torch.ones_like(prompt), "completion_ids": completion,
              "completion_mask": mask, "advantages": plain, "old_per_token_logps": old}
    shaped = plain[:, None] + torch.minimum(0.4 * entropy, plain.abs()[:, None] / 2)
    ratio = (logp - old).exp()
    per_token = -torch.min(ratio * shaped, ratio.clamp(0.8, 1.28) * shaped) * mask
    want = float((per_token.sum(1) / mask.sum(1)).mean())
    losses = [float(trainer._compute_loss(model, inputs)) for _ in range(2)]
    assert losses == pytest.approx([want, want], abs=1e-5) and torch.equal(inputs["advantages"], plain)
    unshaped = -torch.min(ratio * plain[:, None], ratio.clamp(0.8, 1.28) * plain[:, None]) * mask
    assert abs(want - float((unshaped.sum(1) / mask.sum(1)).mean())) > 1e-2
