"""lab/trl_grpo.py: TRL's weights after its steps against train.update on the same answers, and its
loss of shaped advantages against the formula."""

import dataclasses
import math
import re
import subprocess
import sys

import pytest
import torch

from advantage import group_advantage
from conftest import ROOT, entropy_of, picked
from lab.trl_grpo import Settings, main, make_trainer, parse
from model import load, score
from plumbing.batch import collate, pad_responses
from plumbing.settings import Settings as TrainSettings
from rollout import Episode
from tasks import load_task
from train import update
from training_runs import environment

TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# A third of the answers is right, so that almost every group teaches something; and prompts have a
# token in front that their text has not, as with many a BOS.
BY_LENGTH = """
from tasks.countdown import Countdown

class ByLength(Countdown):
    def encode(self, problem, tokenizer):
        return [tokenizer.unk_token_id, *tokenizer.encode(problem.prompt)]

    def reward(self, problem, response, finished):
        return 1.0 if (len(response) + finished) % 3 == 0 else -1.0
"""
# SGD, because AdamW's first step has the size of the learning rate whatever the gradient is; and no
# clipping, which would hide a factor of the loss.
LR = 0.5
FLAGS = f"""--use_cpu --bf16 false --gradient_checkpointing false --num_generations 8
    --max_completion_length 24 --optim sgd --learning_rate {LR} --max_grad_norm 1e9
    --save_strategy no --report_to none --disable_tqdm true"""


@pytest.fixture
def own_task(tmp_path):
    (tmp_path / "by_length.py").write_text(BY_LENGTH)
    return f"{tmp_path}/by_length.py:ByLength"


@pytest.fixture
def trainer_of(tmp_path, own_task):
    """trainer_of("more flags") -> TRL's trainer, on the embedded model."""
    pytest.importorskip("trl")
    pytest.importorskip("datasets")

    def make(flags):
        common = f"{FLAGS} --output_dir {tmp_path}/trl --task {own_task}"
        return make_trainer(*parse(f"{common} {flags}".split()))

    return make


def remember_rollouts(trainer):
    """Has the trainer put aside what it samples: rollouts, and the reward of each answer."""
    rollouts = []
    rewards = []
    generate = trainer._generate_and_score_completions
    grade = trainer._calculate_rewards

    def generate_and_remember(inputs):
        rollouts.append(generate(inputs))
        return rollouts[-1]

    def grade_and_remember(*arguments):
        rewards.append(grade(*arguments)[:, 0])
        return rewards[-1][:, None]

    trainer._generate_and_score_completions = generate_and_remember
    trainer._calculate_rewards = grade_and_remember
    return rollouts, rewards


def episodes_of(rollout):
    """TRL's padded answers -> ours. Their log-probabilities and entropies are not known: nan."""
    episodes = []
    for i in range(len(rollout["prompt_ids"])):
        prompt = rollout["prompt_ids"][i][rollout["prompt_mask"][i].bool()]
        response = rollout["completion_ids"][i][rollout["completion_mask"][i].bool()]
        unknown = torch.full(response.shape, math.nan)
        finished = bool(response[-1] == 0)
        episodes.append(Episode(prompt, response, unknown, unknown, finished, i // 8))
    return episodes


def tokens_of(episodes):
    return sum(len(episode.response) for episode in episodes)


def grouped(reward, small):
    """(r - mean) / (std + small) of groups of eight, [N]."""
    group = reward.view(-1, 8)
    centred = group - group.mean(dim=1, keepdim=True)
    return (centred / (group.std(dim=1, keepdim=True) + small)).flatten()


def our_way(minibatches, temperature=1.0, alpha=0.4, factors=None):
    """What the embedded model's weights become (`way`) by train.update on these (episodes,
    advantage [N]) in turn, all sampled before the first; `factors` of the learning rate."""
    model, _ = load("base")
    settings = TrainSettings(temperature=temperature, alpha=alpha, grad_clip=1e9)
    prepared = []
    for episodes, advantage in minibatches:
        batch = collate(episodes, torch.device("cpu"))
        with torch.no_grad():
            scored = score(model, batch.tokens, batch.prompt_len, batch.total_len, temperature)
        _, mask = pad_responses([episode.logp for episode in episodes])
        old_logp = batch.unalign(scored[0], mask.shape[1])
        prepared.append((episodes, old_logp, advantage[:, None] * mask, settings))

    clipped = 0
    for factor, minibatch in zip(factors or [1.0] * len(prepared), prepared, strict=True):
        sums = update(model, torch.optim.SGD(model.parameters(), LR * factor), *minibatch)
        clipped += sums["clipped_low"] + sums["clipped_high"]
    return way(model.state_dict()), clipped


def way(state):
    """From the embedded model to this one, all weights in a vector."""
    start = load("base")[0].state_dict()
    return torch.cat([(state[name] - start[name]).flatten() for name in sorted(start)])


def way_of(trainer):
    state = trainer.model.state_dict()
    return way({name.removeprefix("model."): tensor for name, tensor in state.items()})


def distance(ours, theirs):
    """Of two ways, relative to their length."""
    return float((ours - theirs).norm() / theirs.norm())


FOUR_PASSES = "--per_device_train_batch_size 8 --gradient_accumulation_steps 4"


@pytest.mark.parametrize(
    ("flags", "steps", "temperature"),
    [
        ("--per_device_train_batch_size 16", 1, 1.0),
        ("--per_device_train_batch_size 16 --temperature 0.8", 1, 0.8),
        (FOUR_PASSES, 1, 1.0),
        (f"{FOUR_PASSES} --num_iterations 3 --temperature 0.8", 3, 0.8),
    ],
    ids=["one pass", "temperature", "four passes", "three updates"],
)
def test_the_weights_after_a_rollout(trainer_of, flags, steps, temperature):
    """TRL against train.update: with TRL's 1e-4 in the standard deviation the same to rounding
    (after three updates also in which ratios reach the clip), with our 1e-6 to that 1e-4, and
    without the entropy advantage something else."""
    trainer = trainer_of(f"{flags} --max_steps {steps}")
    rollouts, rewards = remember_rollouts(trainer)
    trainer.train()
    [rollout] = rollouts
    [reward] = rewards
    episodes = episodes_of(rollout)
    like_trl = grouped(reward, 1e-4)
    group = torch.arange(len(reward)) // 8
    like_ours = group_advantage(reward, group)

    theirs = way_of(trainer)
    same, clipped = our_way([(episodes, like_trl)] * steps, temperature)
    ours, _ = our_way([(episodes, like_ours)] * steps, temperature)
    rounding = 4e-5 if steps == 1 else 1e-4
    assert distance(same, theirs) < rounding
    assert 5e-5 < distance(ours, theirs) < 1e-3
    assert (clipped > 0) == (steps > 1)
    plain, _ = our_way([(episodes, like_trl)] * steps, temperature, alpha=0.0)
    assert distance(plain, theirs) > 0.05


def test_two_optimizer_steps_on_a_rollout(trainer_of):
    """TRL cuts a shuffled rollout, and divides each step by the mean token count of the two: with
    that as a factor of the learning rate, train.update does the same."""
    trainer = trainer_of("--per_device_train_batch_size 16 --steps_per_generation 2 --max_steps 2")
    trainer.train()
    minibatches = []
    for part in trainer._buffered_inputs:
        minibatches.append((episodes_of(part), part["advantages"]))
    tokens = [tokens_of(episodes) for episodes, _ in minibatches]
    assert tokens[0] != tokens[1]
    factors = [2 * count / sum(tokens) for count in tokens]

    theirs = way_of(trainer)
    same, _ = our_way(minibatches, factors=factors)
    assert distance(same, theirs) < 4e-5
    ours, _ = our_way(minibatches)
    assert distance(ours, theirs) > 1e-3


def test_two_processes(tmp_path, own_task):
    """torchrun's two, each with half of the answers, against train.update on all of them."""
    pytest.importorskip("trl")
    pytest.importorskip("datasets")
    flags = f"{FLAGS} --task {own_task} --per_device_train_batch_size 8 --max_steps 1"
    done = subprocess.run(
        [*TWO, "tests/two_processes_trl.py", str(tmp_path), *flags.split()],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    minibatch = []
    for rank in (0, 1):
        # Of each rollout only this process's answers, of the rewards all.
        [rollout], [reward] = torch.load(tmp_path / f"{rank}.pt")
        minibatch += episodes_of(rollout)
    theirs = way(load(str(tmp_path / "trl"))[0].state_dict())
    same, _ = our_way([(minibatch, grouped(reward, 1e-4))])
    assert len(minibatch) == len(reward) == 16
    assert distance(same, theirs) < 4e-5


def test_the_loss_and_that_nothing_accumulates(trainer_of):
    """TRL's own loss of the advantages as shaped, against the formula on the model's logits; and
    the same again when TRL takes the same batch again."""
    trainer = trainer_of("--per_device_train_batch_size 8 --loss_type grpo")
    trainer.current_gradient_accumulation_steps = 1
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(2, 112, (4, 8), generator=generator)
    completion = torch.randint(2, 112, (4, 9), generator=generator)
    mask = (torch.arange(9) < torch.tensor([[9], [4], [1], [7]])).long()
    plain = torch.tensor([1.5, -0.5, -0.5, 0.0])

    tokens = torch.cat((prompt, completion), dim=1)
    with torch.no_grad():
        logits = trainer.model(tokens).logits[:, 7:-1]
    words = logits.log_softmax(-1)
    logp = picked(words, completion)
    old = logp + 0.3 * torch.randn(logp.shape, generator=generator)
    inputs = {
        "prompt_ids": prompt,
        "prompt_mask": torch.ones_like(prompt),
        "completion_ids": completion,
        "completion_mask": mask,
        "advantages": plain,
        "old_per_token_logps": old,
    }

    def loss_of(advantage):
        ratio = (logp - old).exp()
        objective = torch.min(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
        return float(((-objective * mask).sum(1) / mask.sum(1)).mean())

    psi = torch.minimum(0.4 * entropy_of(words), plain.abs()[:, None] / 2)
    want = loss_of(plain[:, None] + psi)
    losses = [trainer._compute_loss(trainer.model, inputs).item() for _ in range(2)]
    assert losses == pytest.approx([want, want], abs=1e-5)
    assert torch.equal(inputs["advantages"], plain)
    assert abs(want - loss_of(plain[:, None])) > 1e-2


def test_prompts_and_rewards_are_the_tasks_own(trainer_of, own_task):
    """What TRL samples from is task.encode's, what it trains on task.reward's of each answer."""
    trainer = trainer_of("--per_device_train_batch_size 16 --max_steps 1")
    rollouts, rewards = remember_rollouts(trainer)
    trainer.train()
    task = load_task(own_task)
    tokenizer = load("base")[1]
    problem_of = {tuple(task.encode(p, tokenizer)): p for p in task.train}
    want = []
    for episode in episodes_of(rollouts[0]):
        problem = problem_of[tuple(episode.prompt.tolist())]
        text = tokenizer.decode(episode.response, skip_special_tokens=True)
        want.append(task.reward(problem, text, episode.finished))
    assert rewards[0].tolist() == want
    assert len(set(want)) == 2


def test_the_command_trains_two_steps(tmp_path, own_task):
    """The saved model is one that ours loads, with other weights."""
    pytest.importorskip("trl")
    pytest.importorskip("datasets")
    flags = f"{FLAGS} --per_device_train_batch_size 16 --max_steps 2 --task {own_task}"
    command = [sys.executable, "-m", "lab.trl_grpo", *flags.split()]
    done = subprocess.run(
        [*command, "--output_dir", str(tmp_path / "trl")],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("'train_loss'") == 1
    model, _ = load(str(tmp_path / "trl"))
    assert 1e-3 < way(model.state_dict()).norm() < 10


def test_the_commands_of_the_page():
    """docs/engines.md: each flag is a field of ours or of TRL's, and its value is taken."""
    trl = pytest.importorskip("trl")
    fields = [*dataclasses.fields(Settings), *dataclasses.fields(trl.GRPOConfig)]
    names = {f"--{field.name}" for field in fields}
    page = (ROOT / "docs/engines.md").read_text()
    commands = re.findall(r"^ {4}.* -m lab.trl_grpo (.*)$", page, re.M)
    assert len(commands) == 2
    for flags in commands:
        given = {flag for flag in flags.split() if flag.startswith("--")}
        assert given <= names
    _, config = parse(commands[0].split())
    assert config.steps_per_generation * config.per_device_train_batch_size == 32 * 16


def test_what_is_missing_is_said_in_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.setattr(sys, "argv", ["lab.trl_grpo"])
    with pytest.raises(SystemExit, match=r"^lab.trl_grpo: .*: pip install trl datasets$"):
        main()
