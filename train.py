"""The loop: sample -> reward -> advantage -> update (score, shape, loss, step). Read after
advantage.py.

`python train.py` trains the embedded model with GRPO and the paper's entropy advantage; every
setting is a flag (plumbing/settings.py). The method is `training_step` and `update`, a screen each.
GRPO compares an answer with the mean of its group; `--algo ppo` with a critic's prediction.

Scaled down from the paper:     here        paper
    prompts x samples           32 x 16     512 x 8
    updates per rollout         8           16
    response tokens             128         8K
    parameters                  0.4 M       7 B, so the learning rates differ too
kappa, alpha, clips, temperature, gamma and lambda are the paper's. What it does not state is the
field's usual: weight decay, gradient clip, value clip, a constant learning rate.

    A advantage      N answers (of the rollout in training_step, of the minibatch in update)
    s settings       B sequences of a micro-batch

Numbers per token have two layouts. [N, R]: a row per answer, column r is its response token r.
[B, T-1]: a row per sequence of prompt and response, column t is about token t+1, which the forward
pass predicts from tokens 0 to t. `Batch.align` turns the first into the second, `Batch.unalign` the
second into the first (plumbing/batch.py).
"""

import dataclasses
import math
import signal
import sys
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from advantage import (
    gae,
    group_advantage,
    policy_loss,
    shape_with_entropy,
    value_loss,
    whiten,
)
from evaluate import chosen_ks, count_solved, report
from model import Critic, Transformer, count_parameters, load_weights, make_critic, score
from plumbing.batch import collate, micro_batches, my_share, pad_responses, problems_of_step
from plumbing.distributed import clip_gradients, gather, join, sum_gradients
from plumbing.lora import add_adapters
from plumbing.memory import TrainingMemory, check_disk, count_adapters
from plumbing.method import Update, advantage_of, by_log, by_method
from plumbing.metrics import (
    StepRecord,
    Stopwatch,
    UpdateSums,
    log_line,
    shaping_sums,
    step_times,
    sum_where,
)
from plumbing.optimizer import make_optimizer
from plumbing.pretrained import Pretrained, open_pretrained, save
from plumbing.resample import resample
from plumbing.run import Run, claim, no_other_flag
from plumbing.seeds import seeded_generator
from plumbing.settings import PRESETS, Settings, check, parse_flags, pick_device
from plumbing.shard import in_lockstep
from plumbing.stop import stop
from rollout import Episode, Sampler, texts
from tasks import Problem, load_task


class Trained(NamedTuple):
    """A module and its optimizer; with *, the first two arguments of an update."""

    module: torch.nn.Module
    optimizer: torch.optim.Optimizer


@dataclass
class Learner:
    """What is trained, on what, where: all that a training step reads and changes."""

    task: object
    tokenizer: object
    problems: list[Problem]  # those to train on
    policy: Trained
    critic: Trained | None  # PPO's
    sampler: Sampler
    device: torch.device
    rank: int
    world: int  # processes
    # For validations and the dry run.
    validation: list[Problem]
    longest: Problem  # the one with the longest prompt
    rows: int  # sequences that the largest rollout or validation decodes at a time


def training_step(step: int, learner: Learner, s: Settings) -> StepRecord:
    """One step of the algorithm: a rollout, and a few optimizer steps on it."""
    record = StepRecord()

    # Sample: several answers to each of the step's problems.
    problems = problems_of_step(learner.problems, s.prompts, step - 1, s.seed)  # counted from 0
    mine = my_share(problems, s.minibatch, learner.rank, learner.world)
    episodes = sample_answers(mine, rollout_generator(step, learner, s), learner, s)
    record.episodes = episodes
    record.lap("rollout_s")

    # Reward: +1 for a right answer, -1 for any other.
    reward = reward_answers(mine, episodes, learner)  # [N]
    record.reward = reward
    record.lap("reward_s")

    # Only with --resample: problems that teach nothing give place to others (plumbing/resample.py).
    if s.resample:
        draw = partial(further_answers, step=step, learner=learner, s=s, record=record)
        record.resampled = resample(
            problems, episodes, reward, draw, candidates=learner.problems, step=step, s=s
        )
        episodes = record.resampled.episodes
        reward = record.resampled.reward

    # Advantage: how much better an answer is than its group (GRPO), or than the critic expected
    # (PPO). The sampler's own log-probabilities are the old policy's.
    old_logp, mask = pad_responses([episode.logp for episode in episodes])  # [N, R], as all below
    if not old_logp.isfinite().all():
        raise FloatingPointError("a sampled log-probability is not finite")
    if s.algo == "grpo":
        group = torch.arange(len(mine)).repeat_interleave(s.samples)  # [N]
        per_answer = advantage_of(s.method, group_advantage)(reward, group)  # [N]
        advantage = per_answer[:, None] * mask
    else:
        advantage, value, ret = critic_advantage(learner.critic.module, episodes, reward, mask, s)
        record.value = value[mask]
        record.ret = ret[mask]

    # Update: an optimizer step per minibatch. The entropy is added to the advantage in there and
    # not here, because the policy, and with it its entropy, changes from one to the next.
    critic_only = s.algo == "ppo" and step <= s.critic_warmup
    size = s.minibatch // learner.world * s.samples  # answers; those to one problem are neighbours
    for first in range(0, len(episodes), size):
        part = slice(first, first + size)
        if s.algo == "ppo":
            sums = update_critic(*learner.critic, episodes[part], value[part], ret[part], s)
            record.critic_updates.append(sums)
        if not critic_only:
            sums = update(*learner.policy, episodes[part], old_logp[part], advantage[part], s)
            record.updates.append(sums)
    learner.sampler.sync()
    record.lap("update_s")
    return record


def update(
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    episodes: list[Episode],
    old_logp: Tensor,
    advantage: Tensor,
    s: Settings,
) -> Counter:
    """One optimizer step of the policy on a minibatch; old_logp, advantage [N, R], one per response
    token, 0 beyond. Returns sums for the log, see plumbing/metrics.py."""
    sums = UpdateSums()
    device = model.head.device
    # All response tokens of this optimizer step, in all processes and also of answers without a
    # forward pass: so the loss does not depend on how the work is cut.
    denominator = sum(gather(count_tokens(episodes)))
    # The paper's shaping and loss, unless --method puts others in their place (docs/methods.md).
    paper = Update(advantage, denominator, shape_with_entropy, policy_loss, s)
    method = by_method(paper, episodes, old_logp)
    scored = needs_forward(method.advantage, method.s)
    # With --shard, in_lockstep makes all processes do equally many passes.
    for rows in in_lockstep(model, micro_batches(episodes, s.micro_tokens, among=scored)):
        batch = collate([episodes[i] for i in rows], device)  # tokens [B, T]
        old = batch.align(old_logp[rows])  # [B, T-1], as all below
        unshaped = batch.align(method.advantage[rows])

        # Score: log-probability and entropy of every token, by the policy as it is now.
        clock = Stopwatch()
        with autocast(device, s):
            logp, entropy = score(
                model,
                batch.tokens,
                batch.prompt_len,
                batch.total_len,
                s.temperature,
                chunk=s.chunk,
                entropy_grad=s.entropy_coef > 0,
            )
        sums.score_s += clock.lap()

        # Shape: the paper's one line.
        shaped = method.shape(unshaped, entropy, s.alpha, s.kappa)

        # Loss. The classical entropy bonus (entropy_coef, 0 by default) is another thing than the
        # line above: it has the gradient of H, which flattens the whole distribution, in right and
        # wrong answers alike; psi has no gradient and only rescales A. The bonus is a mean over all
        # tokens, whatever a method divides its own loss by.
        loss, statistics = method.loss(
            logp, old, shaped, batch.mask, s.clip_low, s.clip_high, method.denominator
        )
        entropy_sum = torch.where(batch.mask, entropy, 0.0).sum()
        loss = loss - s.entropy_coef * entropy_sum / denominator
        loss.backward()

        # For the log: sums over tokens. In a step's first update the weights are still the
        # sampler's, so the gap is only numerical.
        gap = (logp.detach() - old).abs()
        sums.add(statistics)
        sums.add(shaping_sums(unshaped, shaped, batch.mask, s.kappa))
        sums.add({"loss": loss.detach(), "gap": sum_where(batch.mask, gap), "gap_max": gap.max()})

    # Step.
    return optimizer_step(model, optimizer, sums, s)


def count_tokens(episodes: Sequence[Episode]) -> int:
    return sum(len(episode.response) for episode in episodes)


def needs_forward(advantage: Tensor, s: Settings) -> list[int]:
    """advantage [N, R] -> indices of the answers that need a forward pass. A = 0 on all tokens
    means no policy gradient; the entropy bonus has one everywhere."""
    if s.entropy_coef > 0 or not s.skip_zero:
        return list(range(len(advantage)))
    has_advantage = (advantage != 0).any(dim=1).tolist()
    return [i for i, some in enumerate(has_advantage) if some]


def autocast(device: torch.device, s: Settings) -> torch.autocast:
    """Forward passes in --dtype; the weights stay as they are."""
    return torch.autocast(device.type, torch.bfloat16, enabled=s.dtype == "bfloat16")


def optimizer_step(
    module: torch.nn.Module, optimizer: torch.optim.Optimizer, sums: UpdateSums, s: Settings
) -> Counter:
    """Adds up what all processes have, clips, refuses what is not finite, and steps.

    Afterwards gradients are zeros, not None: a step in which no answer has a gradient is a step
    too, for AdamW's moments and the weight decay. FloatingPointError before any weight has
    changed."""
    sum_gradients(module)
    norm = clip_gradients(module, s.grad_clip)
    sums.add({"grad_norm": norm})
    total = sums.total()
    if not math.isfinite(total["loss"] + total["grad_norm"]):
        raise FloatingPointError(
            f"the loss is {total['loss']} and the gradient norm {total['grad_norm']}"
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    return total


@torch.no_grad()
def critic_advantage(
    critic: Critic, episodes: list[Episode], reward: Tensor, mask: Tensor, s: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """PPO's advantages: reward [N], mask [N, R] -> whitened advantage, value, return, [N, R]."""
    value = torch.zeros(mask.shape)
    for rows in in_lockstep(critic, micro_batches(episodes, s.micro_tokens)):
        batch = collate([episodes[i] for i in rows], critic.value.weight.device)
        with autocast(batch.tokens.device, s):
            predicted = critic(batch.tokens)  # [B, T-1]
        value[rows] = batch.unalign(predicted, mask.shape[1])

    # The answer's reward comes with its last token.
    token_reward = torch.zeros(mask.shape)
    answers = torch.arange(len(reward))
    last_token = mask.sum(dim=1) - 1
    token_reward[answers, last_token] = reward
    advantage, ret = gae(token_reward, value, mask, s.gamma, s.lam)
    of_all_processes = torch.cat(gather(advantage[mask]))
    return whiten(advantage, mask, of_all_processes), value, ret


def update_critic(
    critic: Critic,
    optimizer: torch.optim.Optimizer,
    episodes: list[Episode],
    value: Tensor,
    ret: Tensor,
    s: Settings,
) -> Counter:
    """One optimizer step of the critic; value, ret [N, R]: what it predicted before the rollout's
    updates, and the returns to fit."""
    sums = UpdateSums()
    denominator = sum(gather(count_tokens(episodes)))
    for rows in in_lockstep(critic, micro_batches(episodes, s.micro_tokens)):
        batch = collate([episodes[i] for i in rows], critic.value.weight.device)
        old = batch.align(value[rows])  # [B, T-1], as all below
        target = batch.align(ret[rows])
        with autocast(batch.tokens.device, s):
            new = critic(batch.tokens)
        loss = value_loss(new, old, target, batch.mask, s.value_clip, denominator)
        loss.backward()
        sums.add({"loss": loss.detach()})
    return optimizer_step(critic, optimizer, sums, s)


def sample_answers(
    problems: list[Problem], generator: torch.Generator, learner: Learner, s: Settings
) -> list[Episode]:
    """s.samples answers to each problem; those to one problem are neighbours."""
    prompts = [learner.task.encode(problem, learner.tokenizer) for problem in problems]
    episodes = learner.sampler.generate(
        prompts, s.samples, s.max_new_tokens, s.temperature, generator
    )
    learner.sampler.free()  # the update needs the memory
    return episodes


def reward_answers(problems: list[Problem], episodes: list[Episode], learner: Learner) -> Tensor:
    """+1 for a right answer, -1 for any other -> [N]."""
    rewards = learner.task.rewards(
        [problems[episode.prompt_index] for episode in episodes],
        texts(learner.tokenizer, episodes),
        [episode.finished for episode in episodes],
    )
    return torch.tensor(rewards)


def further_answers(
    problems: list[Problem],
    round_number: int,
    step: int,
    learner: Learner,
    s: Settings,
    record: StepRecord,
) -> tuple[list[Episode], Tensor]:
    """A round of --resample: answers and their rewards [N], both also into the record."""
    generator = rollout_generator(step, learner, s, round_number)
    episodes = sample_answers(problems, generator, learner, s)
    # New ones: the step's own answers go on being used.
    record.episodes = [*record.episodes, *episodes]
    record.lap("rollout_s")
    reward = reward_answers(problems, episodes, learner)
    record.reward = torch.cat((record.reward, reward))
    record.lap("reward_s")
    return episodes, reward


def rollout_generator(
    step: int, learner: Learner, s: Settings, round_number: int = 0
) -> torch.Generator:
    """Random numbers of a step's rollout: others in each process, and in each round of --resample,
    from 1. The first process's are those of a run with one process."""
    stream = f"rollout {learner.rank}" if learner.rank else "rollout"
    if round_number:
        stream = f"resample {round_number} {learner.rank}"
    return seeded_generator(s.seed, step, stream, learner.device)


def train(s: Settings) -> Path | None:
    """Runs the command; returns the run's folder (None after a dry run)."""
    rank, _ = join()
    if s.dry_run:
        check(s)
        dry_run(prepare(s), s)
        return None
    with claim(s, rank) as s:  # before anything of the run is read or made
        check(s)
        return take_steps(prepare(s), s)


def take_steps(learner: Learner, s: Settings) -> Path:
    """All steps that are left, with the validations and saves between them -> the run's folder."""

    def save_model(folder: Path) -> None:
        save(learner.policy.module, learner.tokenizer, folder, base=s.model)

    parts = {"policy": learner.policy}
    if learner.critic:
        parts["critic"] = learner.critic
    run = Run(s, parts, save_model, learner.rank, len(learner.validation))
    learner.sampler.sync()  # with the weights that a resumed run has loaded
    validate_if_due(run.saved_step, run, learner, s)
    bar = tqdm(
        range(run.saved_step + 1, s.steps + 1),
        desc=run.folder.name,
        total=s.steps,
        initial=run.saved_step,
        unit="step",
        disable=True if learner.rank else None,  # None: on a terminal only
    )
    # From here on a first Ctrl-C lets the step be finished and saved (plumbing/run.py).
    stop.in_steps = True
    for step in bar:
        stop.where = f"step {step}"
        record = training_step(step, learner, by_log(s, run.log))
        timeouts = getattr(learner.task, "timeouts", 0)  # of the grader of mathematics
        line = log_line(step, record, s, learner.device, learner.tokenizer, timeouts)
        # Did any process get a signal? Asked here alone, so that all of them decide alike; a later
        # signal is for the next step.
        stopping = any(gather(stop.asked))
        run.add_step(line)
        if is_due(step, s) or stopping:
            run.save(step)
        if stopping:
            raise KeyboardInterrupt
        validate_if_due(step, run, learner, s)
        warn_if_stuck(run.log, s)
        bar.set_postfix(
            reward=f"{line['reward']:+.2f}",
            entropy=f"{line['entropy']:.2f}",
            length=f"{line['length']:.0f}",
        )
    if learner.rank == 0:
        conclude(run, learner, s)
    return run.folder


def prepare(s: Settings) -> Learner:
    """Task, model, optimizers and sampler. ValueError, before anything large is allocated, if
    there is nothing to train on or not enough memory."""
    device = pick_device(s.device)
    task = load_task(s.task, s.data, s.test_data, s.template, date=s.date)
    rank, world = join()
    pretrained = open_pretrained(s.model)

    # Problems whose prompts are short enough.
    candidates = [*task.train, *task.validation[: s.eval_problems]]
    prompt_length = {p: len(task.encode(p, pretrained.tokenizer)) for p in candidates}
    problems = [p for p in task.train if prompt_length[p] <= s.max_prompt_tokens]
    validation = [
        p for p in task.validation[: s.eval_problems] if prompt_length[p] <= s.max_prompt_tokens
    ]
    if not problems or not validation:
        raise ValueError(
            f"{s.task} has {len(problems)} training and {len(validation)} validation problems; "
            "both are needed"
        )
    longest = max([*problems, *validation], key=prompt_length.get)
    left_out = sum(length > s.max_prompt_tokens for length in prompt_length.values())

    # The memory that this will take, before it is taken.
    length = prompt_length[longest] + s.max_new_tokens
    validation_rows = len(validation) * max(s.eval_samples, s.final_samples)
    rows = min(s.slots, max(s.prompts * s.samples, validation_rows))
    parameters = count_parameters(pretrained.config)
    planned = TrainingMemory(pretrained.config, parameters, s, length, rows, device).plan()
    check_disk(s, parameters, count_adapters(pretrained.config, s.lora_rank))
    if rank == 0:
        print(f"{planned}\nleft out: {left_out} prompts over {s.max_prompt_tokens} tokens")

    policy, critic = make_trained(pretrained, device, s)
    model = policy.module
    decode_dtype = getattr(torch, s.decode_dtype or s.dtype)
    # With --shard the sampler needs whole weights: a process cannot decode alone with slices. With
    # LoRA it needs merged ones, and made from the model's they would first be there in its type too.
    own_copy = s.shard or s.lora_rank > 0
    decoder = load_weights(pretrained, device, decode_dtype) if own_copy else None
    return Learner(
        task=task,
        tokenizer=pretrained.tokenizer,
        problems=problems,
        validation=validation,
        longest=longest,
        policy=policy,
        critic=critic,
        sampler=Sampler(model, s.slots, length, model.eos_ids, decode_dtype, s.graph, decoder),
        rows=rows,
        device=device,
        rank=rank,
        world=world,
    )


def make_trained(
    pretrained: Pretrained, device: torch.device, s: Settings
) -> tuple[Trained, Trained | None]:
    """The policy, and PPO's critic."""
    model = load_weights(pretrained, device, getattr(torch, s.weights), sharded=s.shard)
    model.recompute = s.recompute
    if s.lora_rank:
        add_adapters(model, s.lora_rank, s.lora_alpha, s.seed)
    policy = Trained(model, make_optimizer(model, s.lr, s))
    if s.algo == "grpo":
        return policy, None
    critic = make_critic(model)
    return policy, Trained(critic, make_optimizer(critic, s.critic_lr, s))


def dry_run(learner: Learner, s: Settings) -> None:
    """One step in which every answer reaches the limit and has a gradient. Prints its time and
    memory."""
    learner.problems = [learner.longest]
    learner.sampler.eos_ids = (-1,)  # so no response ends
    learner.sampler.allocate(learner.rows)  # the cache of a validation may be larger
    # Every answer has a forward pass, and the policy learns from the first step on.
    largest = dataclasses.replace(s, skip_zero=False, critic_warmup=0)
    record = training_step(1, learner, largest)
    line = log_line(1, record, largest, learner.device, learner.tokenizer, timeouts=0)
    print(
        f"{len(record.episodes)} sequences of {learner.sampler.max_length} tokens, "
        f"peak memory {line['peak_memory_gb']:.2f} GB; {step_times([line])}"
    )


def is_due(step: int, s: Settings) -> bool:
    """Whether a validation and a save belong to this step."""
    return step % s.eval_every == 0 or step == s.steps


def validate_if_due(step: int, run: Run, learner: Learner, s: Settings) -> None:
    """Counts the right answers to the validation problems, if it is time and not done yet."""
    if not is_due(step, s) or run.is_validated(step):
        return
    first_or_last = step in (0, s.steps)
    shows_progress = first_or_last and learner.rank == 0
    # All is saved: a Ctrl-C need not wait.
    with stop.at_once():
        counts = count_solved(
            learner.sampler,
            learner.tokenizer,
            learner.task,
            learner.validation,
            samples=s.final_samples if first_or_last else s.eval_samples,
            max_new_tokens=s.max_new_tokens,
            temperature=s.temperature,
            top_p=1.0,
            seed=s.seed,
            step=step,
            progress=f"validation, step {step}" if shows_progress else None,
        )
    run.add_validation(step, counts)


def warn_if_stuck(log: list[dict], s: Settings) -> None:
    """Every 20 steps, if no group of them taught anything."""
    step = log[-1]["step"]
    every_group_equal = all(line["equal_groups"] == 1.0 for line in log[-20:])  # a share of them
    if s.algo == "grpo" and step % 20 == 0 and every_group_equal:
        tqdm.write(
            "no group had both right and wrong answers in 20 steps, so nothing is learned (mean "
            f"reward {log[-1]['reward']:+.2f}): try more --samples, easier problems or another "
            "--template",
            file=sys.stderr,
        )


def conclude(run: Run, learner: Learner, s: Settings) -> None:
    """The table of before and after, printed and saved."""
    results = {"base": run.validations[0], "trained": run.validations[-1]}
    table, record = report(results, chosen_ks("", s.final_samples))
    run.finish(record)
    print(
        f"\n{s.task} validation: {len(learner.validation)} problems, {s.final_samples} samples "
        f"each, temperature {s.temperature}; 95 % intervals over problems\n{table}\n"
        f"{step_times(run.log)}\nsaved in {run.folder}, the model in model/"
    )


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop.on_signal)
    with stop.in_a_sentence():
        settings = parse_flags(Settings, __doc__, presets=PRESETS)
        if settings.resume is not None:
            no_other_flag(sys.argv[1:])
        train(settings)


if __name__ == "__main__":
    main()
