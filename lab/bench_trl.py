"""The same step with TRL's GRPOTrainer (pip install trl datasets).

TRL's trainer owns its loop, so what should run in turn with its steps runs in a callback of it.
TRL has no entropy advantage and scores a rollout again, where we trust the sampler.
"""

import tempfile
import time
from typing import Callable

import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from lab.bench_transformers import peer_model
from lab.bench_turns import Turns, without_first
from lab.bench_work import LIMIT, MINIBATCH, SAMPLES, encoded_prompts, rewards, wait_for_device
from model import load


class Clock(TrainerCallback):
    """Times each of TRL's steps, a rollout and `updates` optimizer steps, and after it a step of
    ours, if there is one `between`."""

    def __init__(self, updates: int, between: Callable[[], int] | None) -> None:
        self.updates = updates
        self.between = between
        self.tokens = 0  # of TRL's last rollout, which the reward function sees
        self.started = 0.0
        self.taken: Turns = {"ours": [], "TRL": []}

    def on_step_begin(self, arguments, state, control, **_) -> None:
        rollout_next = state.global_step % self.updates == 0
        if rollout_next:
            self.started = time.perf_counter()

    def on_step_end(self, arguments, state, control, model=None, **_) -> None:
        all_updates_done = state.global_step % self.updates == 0
        if not all_updates_done:
            return
        wait_for_device(model)
        self.taken["TRL"].append((time.perf_counter() - self.started, self.tokens))
        if self.between is not None:
            started = time.perf_counter()
            tokens = self.between()
            self.taken["ours"].append((time.perf_counter() - started, tokens))


def trl_steps(
    problems: int,
    turns: int,
    equal: float,
    device: torch.device,
    between: Callable[[], int] | None = None,
    at_once: int = SAMPLES,
) -> Turns:
    """TRL's steps, and `between` after each of them. TRL takes `at_once` sequences in one forward
    and backward pass, and as many of those per optimizer step as make our minibatch."""
    tokenizer = load("base")[1]
    tokenizer.padding_side = "left"
    clock = Clock(problems // MINIBATCH, between)

    def reward(completion_ids, **_) -> list[float]:
        clock.tokens = sum(len(ids) for ids in completion_ids)
        return rewards(problems, equal).tolist()

    prompts = [{"prompt": tokenizer.decode(ids)} for ids in encoded_prompts(problems)]
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=peer_model(load("base", device)[0]),
            reward_funcs=reward,
            args=trl_settings(folder, clock.updates, turns, at_once, device),
            train_dataset=Dataset.from_list(prompts),
            processing_class=tokenizer,
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()

    taken = {name: times for name, times in clock.taken.items() if times}
    return without_first(taken)


def trl_settings(
    folder: str, updates: int, turns: int, at_once: int, device: torch.device
) -> GRPOConfig:
    """train.py's defaults in TRL's words, one step more than `turns`, to warm up."""
    passes = MINIBATCH * SAMPLES // at_once  # per optimizer step
    return GRPOConfig(
        output_dir=folder,
        use_cpu=device.type == "cpu",
        max_steps=updates * (turns + 1),
        # Shape of a step.
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=passes,
        steps_per_generation=updates * passes,
        num_generations=SAMPLES,
        max_completion_length=LIMIT,
        gradient_checkpointing=False,
        bf16=False,
        # Method.
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        beta=0.0,
        epsilon=0.2,
        epsilon_high=0.28,
        loss_type="dapo",
        # The weights never change, so that every turn is the same work.
        learning_rate=0.0,
        lr_scheduler_type="constant",
        weight_decay=0.01,
        # Nothing beside the work.
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
