"""plumbing/optimizer.py: MasterAdamW against torch's AdamW on float32 copies of the weights, and
moments that are made early against those that torch's AdamW makes itself."""

import torch

from plumbing.optimizer import MasterAdamW, make_optimizer
from plumbing.settings import Settings
from pretended import pretended_python


def test_the_optimizer_is_adamw_on_a_float32_master():
    """Fed the same gradients, the masters agree but for the rounding of the first moment, and steps
    too small for bfloat16 add up."""
    g = torch.Generator().manual_seed(0)
    matrix = torch.randn(40, 30, generator=g) * 0.02
    vector = torch.randn(7, generator=g)
    start = [matrix.bfloat16(), vector.bfloat16()]
    mine = [torch.nn.Parameter(weight.clone()) for weight in start]
    theirs = [torch.nn.Parameter(weight.float()) for weight in start]
    master_adamw = MasterAdamW(mine, 1e-6, 0.1)
    torch_adamw = torch.optim.AdamW(theirs, 1e-6, weight_decay=0.1)
    for _ in range(200):
        for a, b in zip(mine, theirs):
            a.grad = (torch.randn(a.shape, generator=g) + 0.5).bfloat16()
            b.grad = a.grad.float()
        master_adamw.step()
        torch_adamw.step()

    for a, b, first in zip(mine, theirs, start):
        state = master_adamw.state[a]
        moved = (b - first.float()).abs().max()
        assert (state["master"] - b).abs().max() <= 0.02 * moved
        assert moved > 5e-5
        assert torch.equal(a, state["master"].bfloat16())
        assert state["exp_avg"].dtype == torch.bfloat16
        second_moment = torch_adamw.state[b]["exp_avg_sq"]
        assert (state["exp_avg_sq"] - second_moment).abs().max() <= 1e-6


def step_with_ones(optimizer: torch.optim.Optimizer, parameters: list) -> None:
    for number, parameter in enumerate(parameters):
        parameter.grad = torch.full_like(parameter, 0.1 * (number + 1))
    optimizer.step()


def test_moments_are_made_at_once_and_change_nothing():
    torch.manual_seed(0)
    mine = torch.nn.Linear(5, 3)
    theirs = torch.nn.Linear(5, 3)
    theirs.load_state_dict(mine.state_dict())
    adamw = make_optimizer(mine, 1e-2, Settings(weight_decay=0.1))
    for parameter in mine.parameters():
        assert adamw.state[parameter]["exp_avg_sq"].shape == parameter.shape
    torch_adamw = torch.optim.AdamW(theirs.parameters(), 1e-2, weight_decay=0.1)
    for _ in range(3):
        step_with_ones(adamw, list(mine.parameters()))
        step_with_ones(torch_adamw, list(theirs.parameters()))

    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
        for name, moment in torch_adamw.state[b].items():
            assert torch.equal(adamw.state[a][name], moment)


# Trains a layer with seven steps, of which the last four on another device, from a saved state.
FROM_DEVICE_TO_DEVICE = """
from pathlib import Path
import torch
from plumbing.checkpoint import load_state, save_state
from plumbing.optimizer import make_optimizer
from plumbing.settings import Settings

def part(device, weights):
    torch.manual_seed(0)
    module = torch.nn.Linear(5, 3).to(device=device, dtype=getattr(torch, weights))
    return module, make_optimizer(module, 1e-2, Settings(dtype=weights, weights=weights))

def steps(part, count):
    module, optimizer = part
    for _ in range(count):
        for parameter in module.parameters():
            parameter.grad.fill_(0.5)
        optimizer.step()

def on(first, second, weights):
    before = part(first, weights)
    steps(before, 3)
    save_state(Path(FOLDER), 3, {"policy": before}, lambda folder: None)
    after = part(second, weights)
    assert load_state(Path(FOLDER), {"policy": after}) == 3
    steps(after, 4)
    return after[0].weight.detach().cpu()

for weights in ("float32", "bfloat16"):
    unbroken = part("cpu", weights)
    steps(unbroken, 7)
    for first, second in (("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")):
        torch.testing.assert_close(on(first, second, weights), unbroken[0].weight.detach())
print("equal")
"""


def test_a_saved_state_goes_on_on_another_device(tmp_path):
    """Against seven steps without a break. A fused AdamW, a GPU's, counts its steps there."""
    source = f"FOLDER = {str(tmp_path)!r}" + FROM_DEVICE_TO_DEVICE
    assert pretended_python(source).split() == ["equal"]
