"""plumbing/optimizer.py: MasterAdamW against torch's AdamW on float32 copies of the weights."""

import torch

from plumbing.optimizer import MasterAdamW


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
