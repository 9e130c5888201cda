"""AdamW, also for weights that are kept in bfloat16.

A step of 1e-6 is lost in a bfloat16 weight of 0.02, so somewhere there must be a float32 copy of
it, the master. Either the weights themselves are float32 (and computed with in bfloat16, by
autocast), or MasterAdamW holds the master."""

import torch

# torch.optim.AdamW's own defaults, which both optimizers here use.
BETA_1 = 0.9
BETA_2 = 0.999
EPSILON = 1e-8


class MasterAdamW(torch.optim.Optimizer):
    """AdamW for bfloat16 weights: each is the rounded copy of a float32 master.

    The first moment is bfloat16; the second stays float32, because bfloat16 does not resolve
    1 - 0.999. With the gradient 2 + 2 + 4 + 2 + 4 = 14 bytes per weight; AdamW in float32: 16."""

    def __init__(self, parameters, lr: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter] = {
                "step": torch.zeros(()),
                "master": parameter.detach().to(torch.float32, copy=True),
                "exp_avg": torch.zeros_like(parameter, dtype=torch.bfloat16),
                "exp_avg_sq": torch.zeros_like(parameter, dtype=torch.float32),
            }

    @torch.no_grad()
    def step(self) -> None:
        lr = self.param_groups[0]["lr"]
        decay = self.param_groups[0]["weight_decay"]
        for parameter, state in self.state.items():
            state["step"] += 1
            t = float(state["step"])
            gradient = parameter.grad.float()
            mean = state["exp_avg"].float().lerp_(gradient, 1 - BETA_1)
            square = state["exp_avg_sq"]
            square.mul_(BETA_2).addcmul_(gradient, gradient, value=1 - BETA_2)
            # Both moments start at 0: undo that, as Adam does.
            denominator = (square / (1 - BETA_2**t)).sqrt_().add_(EPSILON)
            step_size = lr / (1 - BETA_1**t)
            state["master"].mul_(1 - lr * decay).addcdiv_(mean, denominator, value=-step_size)
            state["exp_avg"].copy_(mean)
            parameter.copy_(state["master"])


def make_optimizer(module: torch.nn.Module, lr: float, s) -> torch.optim.Optimizer:
    """AdamW for train.py's settings `s`. Gradients start as zeros, because a step without any
    sequence to learn from is a step too, and None would leave it out."""
    # All but LoRA's frozen base. Its A and B are float32 also beside bfloat16 weights.
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    if s.optimizer == "adamw8bit":
        from plumbing.eight_bit import SeededAdamW8bit  # torchao's

        return SeededAdamW8bit(trained, lr, s.weight_decay, s.seed)
    if trained[0].dtype == torch.bfloat16:
        return MasterAdamW(trained, lr, weight_decay=s.weight_decay)
    # On a GPU one kernel for all weights, and without copies of them on the way.
    fused = trained[0].is_cuda
    adamw = torch.optim.AdamW(trained, lr, weight_decay=s.weight_decay, fused=fused)
    make_moments(adamw)
    return adamw


def make_moments(adamw: torch.optim.AdamW) -> None:
    """The zeros that AdamW would make in its first step. By then the cache of the first rollout has
    been given back, and they would lie where it was: a GPU would have no room in one piece for the
    cache of the second."""
    [group] = adamw.param_groups
    for parameter in group["params"]:
        # A fused step counts its steps on the GPU.
        device = parameter.device if group["fused"] else "cpu"
        adamw.state[parameter] = {
            "step": torch.zeros((), device=device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
