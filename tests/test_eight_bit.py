"""--optimizer adamw8bit: its weights against AdamW in float64 on average, its resume, its memory, what
is refused. Needs torchao but for the last."""

import importlib.util

import pytest
import torch

import train
from model import count_parameters, load
from plumbing import memory
from plumbing.checkpoint import state_of
from plumbing.optimizer import make_optimizer
from plumbing.settings import Settings, check
from training_runs import replace_reward, reward_by_length, small_run

needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="pip install torchao==0.18.0"
)
EIGHT_BIT = dict(weights="bfloat16", dtype="bfloat16", optimizer="adamw8bit")


class OneWeight(torch.nn.Module):
    """So many numbers that all begin at 0.3."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((count,), 0.3, dtype=torch.bfloat16))


@needs_torchao
def test_the_mean_of_the_weights_is_adamws(gradients=(2.0, -0.5, 1.0)):
    """65,536 equal weights and gradients, so that the codes hold their moments exactly, against
    torch's AdamW of one weight in float64. A step of 1e-4 is a twentieth of what bfloat16 resolves
    at 0.3: rounded to the nearest, no weight would move."""
    module = OneWeight(2**16)
    s = Settings(weight_decay=0.1, **EIGHT_BIT)
    optimizer = make_optimizer(module, 1e-4, s)
    start = float(module.weight[0].detach())
    exact = torch.nn.Parameter(torch.tensor([start], dtype=torch.float64))
    adamw = torch.optim.AdamW([exact], 1e-4, weight_decay=0.1)
    for gradient in gradients:
        module.weight.grad.fill_(gradient)
        optimizer.step()
        exact.grad = torch.tensor([gradient], dtype=torch.float64)
        adamw.step()
        values = module.weight.detach().double()
        moved = float(exact.detach()) - start
        # The standard deviation of such a mean is under 3e-6.
        assert abs(float(values.mean()) - start - moved) < 1.5e-5 < abs(moved) / 5
    neighbours = values.unique()
    assert 2 <= len(neighbours) <= 4
    assert float(neighbours.diff().max()) == 2**-9  # of bfloat16, from 0.25 to 0.5


@needs_torchao
def test_the_rounding_is_one_of_seed_and_step_alone():
    def weights(seed: int, global_seed: int) -> torch.Tensor:
        torch.manual_seed(global_seed)
        module = OneWeight(2**12)
        optimizer = make_optimizer(module, 1e-4, Settings(seed=seed, **EIGHT_BIT))
        seen = []
        for _ in range(2):
            module.weight.grad.fill_(1.0)
            optimizer.step()
            seen.append(module.weight.detach().clone())
        # Nobody else's random numbers are touched.
        after = torch.rand(1)
        torch.manual_seed(global_seed)
        assert torch.equal(after, torch.rand(1))
        return torch.stack(seen)

    first = weights(seed=0, global_seed=1)
    assert torch.equal(first, weights(seed=0, global_seed=2))
    assert not torch.equal(first, weights(seed=1, global_seed=1))
    moved_in_first = first[0] != OneWeight(1).weight.detach()
    moved_in_second = first[1] != first[0]
    assert not torch.equal(moved_in_first, moved_in_second)


@needs_torchao
def test_a_resumed_run_is_the_same(tmp_path, monkeypatch):
    """Bit for bit: weights, codes and scales."""
    replace_reward(monkeypatch, reward_by_length)
    changes = dict(max_new_tokens=24, lr=1e-3, **EIGHT_BIT)
    whole, _ = small_run(tmp_path, "whole", steps=3, **changes)
    half, _ = small_run(tmp_path, "half", steps=1, **changes)
    train.train(Settings(resume=str(half), steps=3))
    files = [folder / "state.safetensors" for folder in (whole, half)]
    assert files[0].read_bytes() == files[1].read_bytes()
    trained = load(str(whole))[0].embed_tokens.weight
    assert not torch.equal(trained, load("base")[0].embed_tokens.weight.to(trained.dtype))


@needs_torchao
def test_the_planned_bytes_are_those_of_the_state():
    model, _ = load("base")
    model = model.to(torch.bfloat16)
    s = Settings(**EIGHT_BIT)
    tensors = state_of({"policy": (model, make_optimizer(model, s.lr, s))})
    held = sum(tensor.nbytes for tensor in tensors.values())
    planned = count_parameters(model.config) * (2 + memory.bytes_of_moments(s))
    assert held == pytest.approx(planned, rel=0.02)
    assert 4.03 < planned / count_parameters(model.config) < 4.04  # and the gradient's 2: 6


def test_what_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="^--optimizer must be adamw without --weights bfloat16; "):
        check(Settings(optimizer="adamw8bit", dtype="bfloat16"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="^--optimizer adamw8bit needs torchao: pip install torch"):
        check(Settings(**EIGHT_BIT))
