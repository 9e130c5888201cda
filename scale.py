"""What a model needs that outgrows a laptop: memory that is known beforehand, bfloat16 weights, several processes. Read
after checkpoint.py.
Departs from the paper: it trains with a framework that shards the model over many cards. Here every process holds all of
it and a share of the prompts, so more processes save time, not memory.
"""

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from model import Transformer, head_size


def plan(config: dict, s, length: int, rows: int, device: torch.device) -> str:
    """A table in GB for `rows` sequences of `length` tokens under train.py's settings `s`; ValueError if that is more than
    a GPU has free or this machine has. Activations are estimated from what a layer keeps; the rest is counted."""
    free = (torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else
            os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    with torch.device("meta"):
        count = sum(p.numel() for p in Transformer(config).parameters())
    models, half, mixed = 1 + (s.algo == "ppo"), s.weights == "bfloat16", s.dtype != s.weights
    width, d, layers = config["hidden_size"], head_size(config), config["num_hidden_layers"]
    q, kv = config["num_attention_heads"] * d, config["num_key_value_heads"] * d
    layer = (2 if s.dtype == "bfloat16" else 4) * (6 * width + 3 * q + 2 * kv + 4 * config["intermediate_size"]) \
        + width * (14 * mixed or 10 * half)     # bytes that a token leaves in a layer; norms keep float32 copies
    kept = layer + 4 * width * layers if s.recompute else layer * layers
    size = {"weights": models * count * (2 if half else 4), "gradients": models * count * (2 if half else 4),
            "optimizer": models * count * (10 if half else 8),
            "decode weights": count * 2 * ((s.decode_dtype or s.dtype) != s.weights),
            "KV cache": rows * length * layers * 2 * kv * (2 if (s.decode_dtype or s.dtype) == "bfloat16" else 4),
            "activations": max(s.micro_tokens, length) * kept + 5 * 4 * s.chunk * config["vocab_size"] + 2 * count * mixed}
    update, rollout = sum(size.values()) - size["KV cache"], sum(size.values()) - size["activations"]
    table = (f"memory in GB for {count / 1e9:.3g} billion weights: "
             + ", ".join(f"{name} {value / 1e9:.3g}" for name, value in size.items() if value)
             + f"; a rollout needs {rollout / 1e9:.3g}, an update {update / 1e9:.3g}")
    if max(update, rollout) > free:
        raise ValueError(f"{table}, but there are {free / 1e9:.3g}; what may help: fewer --slots, less --micro-tokens or "
                         "--chunk, --recompute, --weights bfloat16 --dtype bfloat16, --algo grpo, a smaller model")
    return table


class MasterAdamW(torch.optim.Optimizer):
    """AdamW for bfloat16 weights, in which a step of 1e-6 would be lost: each is the rounded copy of a float32 master.
    The first moment is bfloat16; the second stays float32, because bfloat16 does not resolve 1 - 0.999. 14 bytes per
    weight with its gradient, instead of 16."""

    def __init__(self, parameters, lr: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})
        for p in self.param_groups[0]["params"]:
            self.state[p] = {"step": torch.zeros(()), "master": p.detach().to(torch.float32, copy=True),
                             "exp_avg": torch.zeros_like(p, dtype=torch.bfloat16),
                             "exp_avg_sq": torch.zeros_like(p, dtype=torch.float32)}

    @torch.no_grad()
    def step(self) -> None:
        lr, decay = (self.param_groups[0][name] for name in ("lr", "weight_decay"))
        for p, state in self.state.items():
            state["step"] += 1
            gradient, t = p.grad.float(), float(state["step"])
            mean = state["exp_avg"].float().lerp_(gradient, 1 - 0.9)
            square = state["exp_avg_sq"].mul_(0.999).addcmul_(gradient, gradient, value=1 - 0.999)
            root = (square / (1 - 0.999 ** t)).sqrt_().add_(1e-8)
            state["master"].mul_(1 - lr * decay).addcdiv_(mean, root, value=-lr / (1 - 0.9 ** t))
            state["exp_avg"].copy_(mean)
            p.copy_(state["master"])


def join(device: torch.device) -> tuple[int, int]:
    """Joins the processes that torchrun started -> rank, how many; 0, 1 without torchrun."""
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=1))
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def everyone(mine: object) -> list:
    """What each process passed, in the order of ranks; all of them must call it."""
    if not dist.is_initialized():
        return [mine]
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found
