"""`train.py --shard`: of every weight, gradient and moment each process keeps a slice (FSDP2, torch's
fully_shard), and does its share of the problems as without it.

The weights of a layer are gathered when a pass comes to it, and dropped behind it. Its gradients are
added up over the processes as soon as they are there, and each keeps its slice. So all processes must
pass the same layers in the same order (`in_lockstep`), and none can decode alone with such weights: the
sampler has a whole copy, refreshed after the updates of a rollout.

What is to be done with a single slice is in plumbing/distributed.py: whole, own_slice, slice_for."""

import warnings
from typing import Iterator

import torch
import torch.distributed as dist
from torch import nn

from plumbing.distributed import gather


def shard(module: nn.Module, device: torch.device) -> None:
    """Slices the weights of a model.Transformer or model.Critic that is on the meta device: on
    `device`, where to_empty then makes them, there are only slices. All processes must call it."""
    # Imported here: a second, for sharded runs alone.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    # FSDP2 warns of a critic's results, which are views: that matters only to who writes into them.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    units = [*module.body.layers, module.value] if is_critic(module) else [*module.layers]
    for unit in units:
        fully_shard(unit, mesh=mesh)
    # What is left is a unit too: embedding, last norm, head. A policy's stay gathered from the
    # forward pass to the end of the backward pass: model.score uses the head between the two. A
    # critic's are dropped at once, or its passes without gradients would leave them gathered.
    fully_shard(module, mesh=mesh, reshard_after_forward=is_critic(module))
    for unit in module.modules():
        if isinstance(unit, FSDPModule):
            # The sum, not the mean: each process has divided its loss by the tokens of all.
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
            # A pass over nothing gives the head no gradient; its sum needs this process all the same.
            unit.set_reduce_scatter_unused_params(True)


def is_critic(module: nn.Module) -> bool:
    return hasattr(module, "body")


def is_sharded(module: nn.Module) -> bool:
    return hasattr(module, "unshard")  # of a module that fully_shard has had


def in_lockstep(module: nn.Module, batches: list) -> Iterator:
    """The micro-batches, for a pass of the module over each. If it is sharded, then as many passes over
    nothing as the busiest process has more: it needs our slices."""
    most = len(batches)
    if is_sharded(module):
        most = max(gather(len(batches)))
    yield from batches
    for _ in range(most - len(batches)):
        pass_over_nothing(module)


def pass_over_nothing(module: nn.Module) -> None:
    """Forward, and backward unless gradients are off; all gradients are 0."""
    device = next(module.parameters()).device
    tokens = torch.zeros(1, 2, dtype=torch.int64, device=device)
    result = module(tokens) if is_critic(module) else module(tokens, position=tokens)
    if torch.is_grad_enabled():
        (0.0 * result).sum().backward()
