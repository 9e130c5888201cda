"""Trains with lab.trl_grpo in however many processes torchrun started; each writes what it sampled,
and the first the weights. Run by test_trl_grpo.py:

python tests/two_processes_trl.py FOLDER FLAGS
"""

import sys

import torch

from lab.trl_grpo import make_trainer, parse
from test_trl_grpo import remember_rollouts


def main() -> None:
    folder, *flags = sys.argv[1:]
    trainer = make_trainer(*parse([*flags, "--output_dir", f"{folder}/trl"]))
    rollouts, rewards = remember_rollouts(trainer)
    trainer.train()
    rank = trainer.accelerator.process_index
    torch.save((rollouts, rewards), f"{folder}/{rank}.pt")
    trainer.save_model()
    # Without this, a process that ends while gloo's threads still run may abort.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


main()
