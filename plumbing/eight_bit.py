"""AdamW with moments of 8 bits, by torchao: `--optimizer adamw8bit`.

The moments are codes, with a scale for every 256 of them (arXiv 2110.02861). There is no float32
master of the bfloat16 weights: a step that is smaller than what they resolve moves a weight to one of
its two neighbours, with the probability that is right on average (stochastic rounding). With the
gradient 2 + 2 + 1 + 1 = 6 bytes per weight; weights of fewer than 4096 numbers keep bfloat16 moments.
"""

from contextlib import nullcontext

import torch
from torchao.optim import AdamW8bit

from plumbing.seeds import seeded_generator


class SeededAdamW8bit(AdamW8bit):
    """torchao rounds by torch's global random numbers. Here every step has those of (seed, number of
    the step): a resumed run rounds as the first would have, and so do all processes."""

    def __init__(self, parameters, lr: float, weight_decay: float, seed: int) -> None:
        super().__init__(parameters, lr, weight_decay=weight_decay, bf16_stochastic_round=True)
        self.seed = seed
        # What torchao would make in the first step, when a saved state must already have its place.
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter] = {
                "step": torch.zeros(()),
                "exp_avg": self._new_buffer(parameter, signed=True),
                "exp_avg_sq": self._new_buffer(parameter, signed=False),
            }

    def step(self) -> None:
        parameter = self.param_groups[0]["params"][0]
        number = int(self.state[parameter]["step"])
        seed = seeded_generator(self.seed, number, "rounding").initial_seed()
        gpus = [parameter.device] if parameter.is_cuda else []
        # torchao compiles the step. On a CPU that takes minutes, and a C++ compiler. (The stance is
        # set when the object is made: so only there.)
        compiling = nullcontext() if gpus else torch.compiler.set_stance("force_eager")
        with torch.random.fork_rng(gpus), compiling:
            torch.manual_seed(seed)
            super().step()
