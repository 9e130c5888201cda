"""Several processes, each with a whole model and a share of every minibatch's problems.

torchrun starts them. Everything that has to be the same in all of them goes through `gather`, and
the gradients through `sum_gradients`. With one process `gather` gives a list of one, and
`sum_gradients` does nothing."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist


def join(device: torch.device) -> tuple[int, int]:
    """Joins the processes that torchrun started -> rank and number of processes; 0, 1 without
    torchrun."""
    started_by_torchrun = "WORLD_SIZE" in os.environ
    if started_by_torchrun and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        # A process waits for the others as long as the longest rollout takes.
        dist.init_process_group(backend, timeout=timedelta(days=1))
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def gather(mine: object) -> list:
    """What each process passed, in the order of ranks; all of them must call it."""
    if not dist.is_initialized():
        return [mine]
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found


def sum_gradients(module: torch.nn.Module) -> None:
    """Adds up the gradients of all processes. The sum, not the mean: each process has divided its
    loss by the tokens of all."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    for parameter in module.parameters():
        dist.all_reduce(parameter.grad)
