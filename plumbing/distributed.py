"""Several processes, each with a whole model (or, with --shard, a slice of every weight) and a
share of every minibatch's problems.

torchrun starts them. Everything that has to be the same in all of them goes through `gather`, and
the gradients through `sum_gradients`. With one process `gather` gives a list of one, and
`sum_gradients` does nothing.

When one process ends, torchrun ends the others, and those that wait for it get OthersEnded. The
first that fails says why; see `is_first_to_speak`."""

import os
from contextlib import contextmanager
from datetime import timedelta
from typing import Iterator

import torch
import torch.distributed as dist
from torch import Tensor


OTHERS_ENDED = "another process of this run has ended"


class OthersEnded(Exception):
    """A process waited for one that is no more."""


def join() -> tuple[int, int]:
    """Joins the processes that torchrun started -> rank and number of processes; 0, 1 without
    torchrun. Before anything that one process alone may refuse, so that none waits for it here."""
    started_by_torchrun = "WORLD_SIZE" in os.environ
    if started_by_torchrun and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        # A process waits for the others as long as the longest rollout takes.
        with others_needed():
            dist.init_process_group(backend, timeout=timedelta(days=1), device_id=own_gpu())
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def own_gpu() -> torch.device | None:
    """Of a process that torchrun started, if there are so many: from then on the current one."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if not torch.cuda.is_available() or local_rank >= torch.cuda.device_count():
        return None
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


@contextmanager
def others_needed() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # torch has no type of its own for it
        reason = str(error).splitlines()[0]
        told = "" if "onnection" in reason else f" ({reason})"
        raise OthersEnded(f"{OTHERS_ENDED}{told}") from None


def tells_of_others(error: Exception) -> bool:
    """Whether torch raised this because another process ended. For passes over sharded weights, which
    are not inside `others_needed`."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def gather(mine: object) -> list:
    """What each process passed, in the order of ranks; all of them must call it."""
    if not dist.is_initialized():
        return [mine]
    found = [None] * dist.get_world_size()
    with others_needed():
        dist.all_gather_object(found, mine)
    return found


def sum_gradients(module: torch.nn.Module) -> None:
    """Adds up the gradients of all processes. The sum, not the mean: each process has divided its
    loss by the tokens of all."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    with others_needed():
        for parameter in module.parameters():
            # LoRA's base has none; those of slices are added up in the backward pass.
            if parameter.requires_grad and not is_slice(parameter):
                dist.all_reduce(parameter.grad)


def clip_gradients(module: torch.nn.Module, largest: float) -> Tensor:
    """Scales the gradients to a norm of at most `largest`; returns the norm before, []."""
    if not any(is_slice(parameter) for parameter in module.parameters()):
        return torch.nn.utils.clip_grad_norm_(module.parameters(), largest)
    with others_needed():
        norm = torch.nn.utils.clip_grad_norm_(module.parameters(), largest)
        return whole(norm)


# ---- With --shard a weight is a DTensor: its shape is that of the whole weight, its numbers are this
# process's rows. Any other tensor passes through these functions unchanged.


def is_slice(tensor: Tensor) -> bool:
    """(Without importing DTensor, which takes a second.)"""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, gathered; all processes must call it."""
    if not is_slice(tensor):
        return tensor
    with others_needed():
        return tensor.full_tensor()


def own_slice(tensor: Tensor) -> Tensor:
    """This process's rows; writing into them changes the weight."""
    return tensor.to_local() if is_slice(tensor) else tensor


def slice_for(place: Tensor, content: Tensor) -> Tensor:
    """The rows of a whole `content` that belong into `place`."""
    if not is_slice(place):
        return content
    # As torch.chunk cuts: the last processes may have fewer rows, or none.
    each = -(-len(content) // dist.get_world_size())
    first = each * dist.get_rank()
    return content[first : first + each]


def is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def is_first_to_speak() -> bool:
    """Whether no other process of this run has asked this: what ends one ends all, and is told
    once. torchrun's own process keeps the count, so it outlives ours."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return True
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT")
    try:
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=5),
        )
        return store.add(f"last words {attempt}", 1) == 1
    except (RuntimeError, KeyError, ValueError):  # nobody there to ask
        return True
