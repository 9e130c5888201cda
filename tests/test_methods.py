"""lab/methods.py: every method against the code of an engine that has it (verl 0.9.1's results are
saved, TRL is called) and against an example worked out by hand; and what --method does in train.py."""

import dataclasses
import functools
import math
import re
import statistics
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import plumbing.method
import train
import verl_reference
from advantage import policy_loss, shape_with_entropy
from conftest import dice, distance
from lab.difficulty import weighted_group_advantage
from lab.methods import (
    METHODS,
    adaptive_entropy,
    answers,
    centred,
    cispo,
    clip_cov,
    entropy_weighted_reward,
    find,
    gspo,
    gspo_token,
    gtpo,
    kl_cov,
    leave_one_out,
    maximum_likelihood,
    most_tokens,
    multiplied,
    top_entropy,
    whitened,
)
from model import load, score
from plumbing.batch import collate, pad_responses
from plumbing.method import Step, Update, by_log, by_method
from plumbing.run import to_be_stored
from plumbing.settings import Settings, check
from rollout import Episode
from train import update
from training_runs import SMALL, replace_reward, reward_by_length, small_run

PAGE = Path("docs/methods.md").read_text()
VERL = load_file(verl_reference.TARGET)
LOGP = VERL["logp"]
OLD_LOGP = VERL["old_logp"]
ADVANTAGE = VERL["advantage"]
MASK = VERL["mask"]
LENGTHS = VERL["lengths"]
TOKENS = int(MASK.sum())
ENTROPY = 2 * torch.rand(MASK.shape, generator=dice(5))
CLIPS = (verl_reference.CLIP_LOW, verl_reference.CLIP_HIGH)
GSPO_CLIPS = (verl_reference.GSPO_CLIP_LOW, verl_reference.GSPO_CLIP_HIGH)


def step_of(logp, advantage=ADVANTAGE):
    """The batch as a step in which the sampler's log-probabilities were these, [B, T]."""
    return Step(advantage[MASK], logp[MASK], ENTROPY[MASK], LENGTHS, VERL["group"])


def back(tokens):
    """[M] -> [B, T]."""
    return torch.zeros(MASK.shape).masked_scatter(MASK, tokens)


def gradient(loss, advantage=ADVANTAGE, clips=CLIPS, denominator=TOKENS):
    """Of one of our losses, with respect to the log-probabilities; and the loss."""
    logp = LOGP.clone().requires_grad_()
    total, _ = loss(logp, OLD_LOGP, advantage, MASK, *clips, denominator)
    total.backward()
    return logp.grad, total.detach()


# ---- Against verl.


def test_the_saved_results_are_those_of_the_version_that_the_page_names():
    with safe_open(verl_reference.TARGET, "pt") as file:
        assert file.metadata()["verl"] == "0.9.1"
    assert "verl 0.9.1" in PAGE


def test_the_batch_is_clipped_on_both_sides():
    """Else a loss without any clip would have passed the tests below."""
    ratio = (LOGP - OLD_LOGP).exp()[MASK]
    assert ((ratio < 1 - CLIPS[0]) & (ADVANTAGE[MASK] < 0)).sum() > 5
    assert ((ratio > 1 + CLIPS[1]) & (ADVANTAGE[MASK] > 0)).sum() > 5
    cut = (VERL["gspo.gradient"] == 0) & MASK
    assert 5 < cut.sum() < TOKENS - 5


# Name in the file, our loss, its clips, what it is divided by, and the largest difference allowed.
LOSSES = {
    "vanilla": (policy_loss, CLIPS, TOKENS),
    "cispo": (cispo, CLIPS, TOKENS),
    "kl_cov": (kl_cov(step_of(OLD_LOGP), verl_reference.KL_SHARE), CLIPS, TOKENS),
    "gspo": (gspo_token, GSPO_CLIPS, len(MASK)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_their_gradients_are_verls(name):
    loss, clips, denominator = LOSSES[name]
    found, total = gradient(loss, clips=clips, denominator=denominator)
    assert distance(found, VERL[f"{name}.gradient"]) <= 4e-9
    assert distance(total, VERL[f"{name}.loss"]) <= 1e-7


def test_gspo_has_the_gradient_of_gspo_token_where_an_answer_has_one_advantage():
    found, _ = gradient(gspo, clips=GSPO_CLIPS, denominator=len(MASK))
    assert distance(found, VERL["gspo.gradient"]) <= 4e-9


def test_clip_cov_has_verls_gradient():
    """verl takes the current policy's covariances, so here the step has the current policy's. The
    losses themselves differ by the tokens that the ratio clips already: they are not drawn there, and
    have no gradient anyway."""
    low, high = verl_reference.CLIP_BOUNDS
    weighed = clip_cov(step_of(LOGP), verl_reference.CLIP_SHARE, low, high)
    found, _ = gradient(policy_loss, back(weighed))
    usual, _ = gradient(policy_loss)
    assert distance(found, VERL["clip_cov.gradient"]) <= 4e-9
    assert (found != usual).sum() > 10


def test_dr_grpo_divides_as_verl_does():
    def a_log_pi(logp, old_logp, advantage, mask, clip_low, clip_high, denominator):
        return -(advantage * logp * mask).sum() / denominator, {}

    s = Settings(max_new_tokens=verl_reference.MOST_TOKENS)
    found, _ = gradient(a_log_pi, denominator=most_tokens(step_of(LOGP), s))
    assert distance(found, VERL["dr_grpo.gradient"]) <= 4e-9


@pytest.mark.parametrize("name", ["rloo", "reinforce++", "dr_grpo"])
def test_advantages_are_verls(name):
    """(verl's whitening adds 1e-8 to the variance, ours 1e-6 to the standard deviation.)"""
    method = METHODS[name.replace("_", "-")]
    per_answer = method.advantage(VERL["reward"], VERL["group"])
    found = per_answer[:, None] * MASK
    if method.weigh is not None:
        found = back(method.weigh(step_of(LOGP, found)))
    assert distance(found, VERL[f"{name}.advantage"]) <= 4e-6


# ---- Against TRL.


class OneProcess:
    """In place of accelerate's Accelerator."""

    num_processes = 1
    sync_gradients = True

    def gather(self, tensor):
        return tensor

    def reduce(self, tensor, reduction):
        return tensor

    def pad_across_processes(self, tensor, dim, pad_index):
        return tensor


def trl_trainer(**changes):
    """What TRL's loss asks a trainer for: the batch's log-probabilities and entropies, no model."""
    trl = pytest.importorskip("trl")
    args = SimpleNamespace(
        delta=None,
        steps_per_generation=1,
        entropy_target=0.2,
        entropy_coef_delta=0.005,
        entropy_coef_min=0.0,
        entropy_coef_max=1.0,
    )
    trainer = SimpleNamespace(
        accelerator=OneProcess(),
        args=args,
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        beta=0.0,
        use_vllm=False,
        off_policy_mask_threshold=None,
        current_gradient_accumulation_steps=1,
        max_completion_length=verl_reference.MOST_TOKENS,
        importance_sampling_level="token",
        top_entropy_quantile=1.0,
        loss_type="dapo",
        epsilon_low=CLIPS[0],
        epsilon_high=CLIPS[1],
        entropy_coef=0.0,
        use_adaptive_entropy=False,
        _entropy_bonus_enabled=False,
        _last_world_entropy=math.inf,
        _entropy_window_stats=None,
        _metrics={"train": defaultdict(list)},
    )
    vars(trainer).update(changes)
    trainer.get_high_entropy_mask = trl.GRPOTrainer.get_high_entropy_mask.__get__(trainer)
    return trainer


def trl_gradient(trainer, entropy=ENTROPY):
    from trl import GRPOTrainer

    logp = LOGP.clone().requires_grad_()
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logp, entropy, None)
    inputs = {
        "prompt_ids": torch.zeros(len(MASK), 1, dtype=torch.int64),
        "prompt_mask": torch.ones(len(MASK), 1),
        "completion_ids": torch.zeros(MASK.shape, dtype=torch.int64),
        "completion_mask": MASK.float(),
        "advantages": ADVANTAGE[:, 0],
        "old_per_token_logps": OLD_LOGP,
        "num_items_in_batch": MASK.sum().float(),
    }
    # Without the decorators, which want a whole trainer.
    compute = getattr(GRPOTrainer._compute_loss, "__wrapped__", GRPOTrainer._compute_loss)
    compute(trainer, None, inputs).backward()
    return logp.grad


def test_the_usual_loss_is_trls():
    found, _ = gradient(policy_loss)
    assert distance(found, trl_gradient(trl_trainer())) <= 4e-9


def test_80_20_selects_trls_tokens_and_has_its_gradient():
    weighed = back(top_entropy(step_of(OLD_LOGP)))
    trainer = trl_trainer(top_entropy_quantile=0.2)
    chosen = trainer.get_high_entropy_mask(ENTROPY, MASK.float(), 0.8)
    assert torch.equal(weighed != 0, chosen)
    found, _ = gradient(policy_loss, weighed)
    assert distance(found, trl_gradient(trainer)) <= 4e-9


def test_gspo_is_trls():
    trainer = trl_trainer(
        importance_sampling_level="sequence",
        loss_type="grpo",
        epsilon_low=GSPO_CLIPS[0],
        epsilon_high=GSPO_CLIPS[1],
    )
    found, _ = gradient(gspo, clips=GSPO_CLIPS, denominator=len(MASK))
    assert distance(found, trl_gradient(trainer)) <= 4e-9


def test_cispo_is_trls_which_has_no_lower_bound():
    trainer = trl_trainer(loss_type="cispo", epsilon_high=1.15)
    found, _ = gradient(cispo, clips=(0.999, 0.15))
    assert distance(found, trl_gradient(trainer)) <= 4e-9


def test_dr_grpos_loss_is_trls():
    s = Settings(max_new_tokens=verl_reference.MOST_TOKENS)
    found, _ = gradient(policy_loss, denominator=most_tokens(step_of(LOGP), s))
    assert distance(found, trl_gradient(trl_trainer(loss_type="dr_grpo"))) <= 4e-9


def test_adaptive_entropy_follows_trls_controller():
    """Entropies around the target, so that the weight rises, falls, and stops at both ends."""
    entropies = [0.15, 0.1, 0.2, 0.1, 0.5, 0.3, 0.3, 0.3, 0.3, 0.1, 0.1, 0.19, 0.1, 0.1, 0.1, 0.9]
    trainer = trl_trainer(use_adaptive_entropy=True, _entropy_bonus_enabled=True)
    trainer.args.entropy_coef_max = 0.02
    applied = []
    for entropy in entropies:
        trl_gradient(trainer, torch.full(MASK.shape, entropy))
        low = trainer._last_world_entropy <= trainer.args.entropy_target
        applied.append(trainer.entropy_coef if low else 0.0)
    found = [adaptive_entropy(entropies[: k + 1], most=0.02) for k in range(len(entropies))]
    assert found == pytest.approx(applied, abs=1e-12)
    assert max(found) == 0.02
    assert adaptive_entropy([]) == 0.0


# ---- By hand.

REWARD = torch.tensor([1.0, -1.0, -1.0, -1.0, 1.0, 1.0, -1.0, -1.0])
GROUP = torch.tensor([7, 7, 7, 7, 2, 2, 3, 3])
HALVES = [1.5, -0.5, -0.5, -0.5]
BY_HAND = {
    # A quarter is right, all are, none is.
    centred: [*HALVES, 0, 0, 0, 0],
    leave_one_out: [2, -2 / 3, -2 / 3, -2 / 3, 0, 0, 0, 0],
    maximum_likelihood: [3, -1, -1, -1, 0, 0, 0, 0],
    # GRPO's 1.5 and -0.5 are divided by 1, the std; M(1/4) = 1 + (1 - 1/2) / 2.
    weighted_group_advantage: [1.875, -0.625, -0.625, -0.625, 0, 0, 0, 0],
}


@pytest.mark.parametrize("function", BY_HAND, ids=lambda function: function.__name__)
def test_advantages_by_hand(function):
    assert function(REWARD, GROUP).tolist() == pytest.approx(BY_HAND[function], abs=2e-6)


@pytest.mark.parametrize("p", [0.05, 0.3, 0.9])
def test_maxrl_is_on_average_the_gradient_that_its_paper_proves(p):
    """Over all groups of 5 answers, each right with probability p: (1 - (1-p)^4) / p times the
    gradient of p, with respect to the logit of p."""
    n = 5
    total = 0.0
    for right in range(n + 1):
        reward = torch.tensor([1.0] * right + [-1.0] * (n - right), dtype=torch.float64)
        advantage = maximum_likelihood(reward, torch.zeros(n, dtype=torch.int64))
        log_gradient = torch.where(reward > 0, 1 - p, -p)  # of log pi, with respect to the logit
        chance = math.comb(n, right) * p**right * (1 - p) ** (n - right)
        total += chance * float((advantage * log_gradient).mean())
    gradient_of_p = p * (1 - p)
    assert total == pytest.approx((1 - (1 - p) ** (n - 1)) / p * gradient_of_p)


TEN = Step(
    advantage=torch.tensor([1.0, 1, 1, 1, 1, -1, -1, -1, -1, -1]),
    old_logp=torch.tensor([0.0, -1, -2, -3, -4, 0, -1, -2, -3, -4]),
    entropy=torch.tensor([0.1, 0.9, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.2, 1.0]),
    lengths=torch.tensor([5, 5]),
    group=torch.tensor([0, 0]),
)
# Both means are known, 0 and -2: the covariances are 2 1 0 -1 -2, and the same with other signs.


def test_80_20_by_hand():
    assert top_entropy(TEN).tolist() == [0, 1, 0, 0, 0, 0, 0, 0, 0, -1]


# Three answers to a problem: right ones of one and two tokens, a wrong one of two. Then another
# problem: two wrong ones and a right one; and a third, whose answers are all right.
WEIGHED = Step(
    advantage=torch.tensor([1.0, 1, 1, -1, -1, -1, -1, 1, 0, 0]),
    old_logp=torch.zeros(10),
    entropy=torch.tensor([0.3, 0.1, 0.7, 0.2, 0.0, 0.5, 0.25, 2.0, 1.0, 3.0]),
    lengths=torch.tensor([1, 2, 2, 1, 1, 1, 1, 1]),
    group=torch.tensor([4, 4, 4, 9, 9, 9, 6, 6]),
)


def test_gtpos_reward_by_hand():
    """At the first place 0.3 and 0.1, of mean 0.2; a token without a rival is its own mean. Of wrong
    answers 1/H: 2 and 4, of mean 3."""
    found = entropy_weighted_reward(WEIGHED, base=1.0, bonus=0.1)
    want = [1.15, 1.05, 1.1, -1.1, -1.1, -1 - 0.2 / 3, -1 - 0.4 / 3, 1.1]
    assert found[:8].tolist() == pytest.approx(want)


def test_gtpo_by_hand():
    """Problem 9: rewards -1.0667, -1.1333 and 1.1; mean -1.1 / 3. Problem 6 teaches nothing."""
    found = gtpo(WEIGHED).tolist()
    rewards = [-1 - 0.2 / 3, -1 - 0.4 / 3, 1.1]
    mean = -1.1 / 3
    std = math.sqrt(sum((reward - mean) ** 2 for reward in rewards) / 3)
    assert found[5:8] == pytest.approx([(reward - mean) / std for reward in rewards], abs=1e-5)
    assert found[8:] == [0, 0]


def test_gtpo_apart_by_hand():
    """Of 1.15, 1.05 and 1.1 the mean is 1.1: 1, -1 and 0 times sqrt(3 / 2). What is alone, or like all
    others of its kind, has exactly 0."""
    found = gtpo(WEIGHED, apart=True).tolist()
    assert found[:3] == pytest.approx([math.sqrt(1.5), -math.sqrt(1.5), 0], abs=1e-5)
    assert found[3:5] == [0, 0]
    assert found[5:7] == pytest.approx([1, -1], abs=1e-5)
    assert found[7:] == [0, 0, 0]


def slow_rewards(step):
    """Of every answer a list, answer by answer and place by place."""
    entropies = [part.tolist() for part in step.entropy.split(step.lengths.tolist())]
    kinds = slow_kinds(step)
    rewards = []
    for kind, row in zip(kinds, entropies):
        alike = [other for other, its_kind in zip(entropies, kinds) if its_kind == kind]
        _, is_right = kind
        of_answer = []
        for place, entropy in enumerate(row):
            there = [other[place] for other in alike if place < len(other)]
            if is_right:
                of_answer.append(1 + 0.1 * len(there) * entropy / sum(there))
            else:
                inverses = [1 / other for other in there]
                of_answer.append(-1 - 0.1 * len(there) * (1 / entropy) / sum(inverses))
        rewards.append(of_answer)
    return rewards


def slow_kinds(step):
    """Of every answer its problem, and whether it is right."""
    signs = [part[0] > 0 for part in step.advantage.split(step.lengths.tolist())]
    return list(zip(step.group.tolist(), map(bool, signs)))


def slow_gtpo(step, apart):
    rewards = slow_rewards(step)
    kinds = slow_kinds(step)
    advantage = []
    for (problem, is_right), of_answer in zip(kinds, rewards):
        pool = []
        for (other_problem, other_is_right), of_other in zip(kinds, rewards):
            if other_problem == problem and (other_is_right == is_right or not apart):
                pool += of_other
        mean = statistics.mean(pool)
        std = statistics.pstdev(pool)
        alone = std < 1e-9
        advantage += [0.0 if alone else (reward - mean) / std for reward in of_answer]
    return torch.tensor(advantage)


@pytest.mark.parametrize("apart", [False, True])
def test_gtpo_is_its_formula_read_aloud(apart):
    step = step_of(OLD_LOGP)
    want = slow_gtpo(step, apart)
    assert distance(gtpo(step, apart), want) < 1e-4
    assert want.unique().numel() > 50


def test_right_answers_have_a_mean_of_0_in_gtpo_apart():
    """As wrong ones have, whatever base and bonus are; not so in GTPO with one mean for both."""
    step = step_of(OLD_LOGP)
    right = step.advantage > 0
    apart = gtpo(step, apart=True)
    assert abs(apart[right].mean()) < 1e-5
    assert abs(apart[step.advantage < 0].mean()) < 1e-5
    assert apart.std() > 0.5
    assert distance(gtpo(step, apart=True, base=5.0, bonus=0.7), apart) < 1e-5
    assert gtpo(step)[right].min() > 0


def test_rounding_of_entropies_is_not_made_an_advantage():
    """Two right answers of the same text, of which two decode steps have rounded H differently; and
    sure tokens of wrong answers."""
    entropy = WEIGHED.entropy.clone()
    entropy[:4] = torch.tensor([0.5, 0.5 + 1e-6, 0.7, -1e-6])
    entropy[5:7] = torch.tensor([0.0, 1e-6])
    found = gtpo(WEIGHED._replace(entropy=entropy), apart=True)
    assert found.tolist() == [0] * 10


def test_whitening_by_hand():
    lopsided = TEN._replace(advantage=torch.tensor([3.0, -1, -1, -1]))
    assert whitened(lopsided).tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-5)


def test_clip_cov_by_hand():
    """Above 0.5 and below 1.5 are the second token and the last but one."""
    all_drawn = clip_cov(TEN, share=1.0, low=0.5, high=1.5)
    assert all_drawn.tolist() == [1, 0, 1, 1, 1, -1, -1, -1, 0, -1]
    one_drawn = clip_cov(TEN, share=0.1, low=0.5, high=1.5)
    assert (one_drawn == 0).sum() == 1
    assert torch.equal(clip_cov(TEN, share=0.1, low=0.5, high=1.5), one_drawn)
    assert torch.equal(clip_cov(TEN, low=2.0), TEN.advantage)  # nothing is above


def test_clip_cov_draws_every_token_between_the_bounds_alike():
    found = set()
    for seed in range(20):
        drawn = clip_cov(TEN, 0.1, 0.5, 1.5, dice(seed)) == 0
        found.add(int(drawn.nonzero()))
    assert found == {1, 8}


def test_kl_cov_by_hand():
    """Of ten tokens, two: the first and the last, whose covariance is 2. Their ratios are 2 and 1/2."""
    log_ratio = torch.zeros(1, 10)
    log_ratio[0, 0] = math.log(2)
    log_ratio[0, 9] = -math.log(2)
    log_ratio[0, 1] = math.log(3)  # not held, and not clipped
    old = TEN.old_logp[None]
    logp = (old + log_ratio).requires_grad_()
    loss, _ = kl_cov(TEN, share=0.2, weight=0.7)(
        logp, old, TEN.advantage[None], torch.ones(1, 10, dtype=torch.bool), 0.2, 0.2, 10.0
    )
    ratios = 2 + 3 + 3 - 4 - 0.5  # times A, summed
    assert float(loss.detach()) == pytest.approx((-ratios + 2 * 0.7 * math.log(2)) / 10)
    loss.backward()
    assert logp.grad[0, :3].tolist() == pytest.approx([(-2 + 0.7) / 10, -0.3, -0.1])
    assert logp.grad[0, 9].item() == pytest.approx((0.5 - 0.7) / 10)


def test_multiplied_by_hand():
    advantage = torch.tensor([2.0, -2.0, -2.0, 0.0])
    entropy = torch.tensor([0.5, 0.5, 9.0, 9.0], requires_grad=True)
    shaped = multiplied(advantage, entropy, 0.4, 2.0)
    assert shaped.tolist() == pytest.approx([2.4, -2.4, -3.0, 0.0])
    assert not shaped.requires_grad


# An answer of two tokens with ratios 2 and 1/2, so s = 1; one of one token with ratio 2, and padding.
TWO_ANSWERS = dict(
    old_logp=torch.tensor([[-3.0, -1.0], [-2.0, math.nan]]),
    mask=torch.tensor([[True, True], [True, False]]),
)
TWO_LOGP = torch.tensor([[-3.0 + math.log(2), -1.0 - math.log(2)], [-2.0 + math.log(2), 0.0]])
# By the advantages 1 and 3, with clips of 0.2 and 0.5; the gradients are those of minus the loss.
HAND_LOSSES = {
    # (1 + 3 * 1.5) / 2 answers; the second is clipped.
    gspo: (-(1 + 4.5) / 2, [[0.25, 0.25], [0, 0]], 2.0),
    gspo_token: (-(1 + 4.5) / 2, [[0.25, 0.25], [0, 0]], 2.0),
    # Weights 1.5, 0.8 and 1.5, times A, by three tokens.
    cispo: (
        -(1.5 * TWO_LOGP[0, 0] + 0.8 * TWO_LOGP[0, 1] + 4.5 * TWO_LOGP[1, 0]).item() / 3,
        [[0.5, 0.8 / 3], [1.5, 0]],
        3.0,
    ),
}


@pytest.mark.parametrize("function", HAND_LOSSES, ids=lambda function: function.__name__)
def test_losses_by_hand(function):
    want, want_gradient, denominator = HAND_LOSSES[function]
    logp = TWO_LOGP.clone().requires_grad_()
    advantage = torch.tensor([[1.0, 1.0], [3.0, 0.0]])
    loss, statistics = function(
        logp,
        TWO_ANSWERS["old_logp"],
        advantage,
        TWO_ANSWERS["mask"],
        clip_low=0.2,
        clip_high=0.5,
        denominator=denominator,
    )
    loss.backward()
    assert float(loss.detach()) == pytest.approx(want)
    flat = [-number for row in logp.grad.tolist() for number in row]
    assert flat == pytest.approx([number for row in want_gradient for number in row], abs=1e-7)
    assert statistics["tokens"] == 3


def test_gspo_token_takes_advantages_that_differ_within_an_answer():
    """Unclipped: A_t s_i / |o_i| / answers."""
    logp = OLD_LOGP.clone().requires_grad_()
    advantage = torch.randn(MASK.shape, generator=dice(1))
    loss, _ = gspo_token(logp, OLD_LOGP, advantage, MASK, 0.1, 0.1, float(len(MASK)))
    loss.backward()
    want = -advantage / LENGTHS[:, None] / len(MASK) * MASK
    assert distance(logp.grad, want) < 1e-8


def test_denominators_by_hand():
    assert most_tokens(TEN, Settings(max_new_tokens=30)) == 60.0
    assert answers(TEN, Settings()) == 2.0


# ---- In train.py.


@functools.cache
def make_episodes():
    """Twelve random answers, four to each prompt, as a policy a little off the embedded model would
    have sampled them: ratios lie on both sides of the clip."""
    g = dice(9)
    nothing = torch.zeros(0)
    episodes = []
    prompts = torch.randint(2, 112, (3, 6), generator=g)
    for i, length in enumerate(torch.randint(3, 30, (12,), generator=g).tolist()):
        response = torch.randint(2, 112, (length,), generator=g)
        episodes.append(Episode(prompts[i // 4], response, nothing, nothing, True, i // 4))

    model, _ = load("base")
    batch = collate(episodes, torch.device("cpu"))
    with torch.no_grad():
        logp, entropy = score(model, batch.tokens, batch.prompt_len, batch.total_len, 1.0)
    sampled = []
    for row, episode in enumerate(episodes):
        noise = 0.3 * torch.randn(len(episode.response), generator=g)
        sampled.append(
            dataclasses.replace(
                episode,
                logp=logp[row][batch.mask[row]] + noise,
                entropy=entropy[row][batch.mask[row]],
            )
        )
    return sampled


def tensors_of(episodes):
    """old_logp and an advantage, [N, R]; the middle group teaches nothing."""
    old_logp, mask = pad_responses([episode.logp for episode in episodes])
    per_answer = torch.randn(len(episodes), generator=dice(4))
    per_answer[4:8] = 0.0
    return old_logp, per_answer[:, None] * mask


def weights_after(advantage=None, **settings):
    """The embedded model's, after one update by SGD, in one row."""
    episodes = make_episodes()
    old_logp, usual = tensors_of(episodes)
    model, _ = load("base")
    s = Settings(grad_clip=1e9, samples=4, **settings)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    update(model, optimizer, episodes, old_logp, usual if advantage is None else advantage, s)
    return flat(model)


def flat(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_method_grpo_is_alpha_0():
    assert torch.equal(weights_after(method="grpo"), weights_after(alpha=0.0))


def plain(advantage, entropy, alpha, kappa):
    return advantage


def many_clipped(step):
    return clip_cov(step, share=0.5, low=0.1)


def many_held(step):
    return kl_cov(step, share=0.5)


# What each method is made of: shape, loss, what that is divided by, and the tokens' advantages.
PIECES = {
    "80-20": (plain, policy_loss, sum, top_entropy),
    "clip-cov": (plain, policy_loss, sum, many_clipped),
    "kl-cov": (plain, many_held, sum, None),
    "multiplied": (multiplied, policy_loss, sum, None),
    "gtpo": (plain, policy_loss, sum, gtpo),
    "gtpo-apart": (plain, policy_loss, sum, functools.partial(gtpo, apart=True)),
    "reinforce++": (plain, policy_loss, sum, whitened),
    "gspo": (plain, gspo, len, None),
    "gspo-token": (plain, gspo_token, len, None),
    "cispo": (plain, cispo, sum, None),
}


@pytest.mark.parametrize("name", PIECES)
def test_an_update_is_made_of_the_methods_pieces(monkeypatch, name):
    """Put together here for all answers at once, none left out. Clip-Cov and KL-Cov with more tokens
    than are theirs by default, which would be one."""
    find.cache_clear()
    monkeypatch.setitem(METHODS, "clip-cov", METHODS["clip-cov"]._replace(weigh=many_clipped))
    monkeypatch.setitem(METHODS, "kl-cov", METHODS["kl-cov"]._replace(loss_of=many_held))
    shape, loss, divide, weigh = PIECES[name]
    episodes = make_episodes()
    old_logp, advantage = tensors_of(episodes)
    entropy, mask = pad_responses([episode.entropy for episode in episodes])
    lengths = [len(episode.response) for episode in episodes]
    group = torch.arange(12) // 4
    step = Step(advantage[mask], old_logp[mask], entropy[mask], torch.tensor(lengths), group)
    if weigh is not None:
        advantage = torch.zeros(mask.shape).masked_scatter(mask, weigh(step))
    if name == "kl-cov":
        loss = loss(step)

    model, _ = load("base")
    start = flat(model)
    batch = collate(episodes, torch.device("cpu"))
    logp, current = score(model, batch.tokens, batch.prompt_len, batch.total_len, 1.0)
    shaped = shape(batch.align(advantage), current, 0.4, 2.0)
    clips = (0.2, 0.28)
    total, _ = loss(logp, batch.align(old_logp), shaped, batch.mask, *clips, float(divide(lengths)))
    total.backward()
    want = -torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    found = weights_after(method=name) - start
    find.cache_clear()
    assert distance(found, want) < 1e-4 * want.abs().max()
    usual = weights_after(alpha=0.0) - start
    assert distance(usual, want) > 1e-2 * want.abs().max()


def test_the_other_pieces_are_these():
    """What neither verl's advantages nor the updates above have shown."""
    assert METHODS["maxrl"].advantage is maximum_likelihood
    assert METHODS["difficulty"].advantage is weighted_group_advantage
    assert METHODS["dr-grpo"].denominator is most_tokens
    assert METHODS["clip-cov"].weigh is clip_cov
    assert METHODS["kl-cov"].loss_of is kl_cov


def test_a_run_has_the_methods_advantages(tmp_path, monkeypatch):
    """`difficulty` against python -m lab.difficulty --alpha 0, bit for bit."""
    replace_reward(monkeypatch, reward_by_length)
    sizes = SMALL | dict(max_new_tokens=16)
    folder, _ = small_run(tmp_path, "method", method="difficulty", **sizes)
    monkeypatch.setattr(train, "group_advantage", weighted_group_advantage)
    patched, _ = small_run(tmp_path, "patched", alpha=0.0, **sizes)
    file = "model/model.safetensors"
    assert (folder / file).read_bytes() == (patched / file).read_bytes()


@pytest.mark.parametrize("name", METHODS)
def test_the_cut_into_micro_batches_changes_nothing(name):
    """One answer at a time, in place of all at once."""
    whole = weights_after(method=name, micro_tokens=10_000)
    cut = weights_after(method=name, micro_tokens=1)
    model, _ = load("base")
    moved = distance(whole, flat(model))
    assert moved > 0
    assert distance(whole, cut) < 1e-4 * moved


def test_80_20_in_an_update_is_an_update_with_the_other_tokens_at_0():
    """The quantile by sorting: a fifth of all tokens, whichever answer they are in."""
    episodes = make_episodes()
    _, advantage = tensors_of(episodes)
    entropy, mask = pad_responses([episode.entropy for episode in episodes])
    found = entropy[mask].sort(descending=True).values
    least = found[int(0.2 * (len(found) - 1))]
    by_hand = torch.where(mask & (entropy >= least), advantage, 0.0)
    assert torch.equal(
        weights_after(method="80-20"), weights_after(by_hand, alpha=0.0, skip_zero=True)
    )


OF_A_STEP = ["80-20", "clip-cov", "reinforce++", "gtpo", "kl-cov", "gspo", "dr-grpo"]


@pytest.mark.parametrize("name", OF_A_STEP)
def test_two_processes_see_the_step_that_one_sees(monkeypatch, name):
    """Each has half of the answers; what a method makes of a step is the same as in one process."""
    episodes = make_episodes()
    old_logp, advantage = tensors_of(episodes)
    s = Settings(method=name, samples=2)
    usual = Update(advantage, 100.0, shape_with_entropy, policy_loss, s)
    alone = by_method(usual, episodes, old_logp)
    halves = [slice(0, 6), slice(6, 12)]
    parts = []

    def note(mine):
        parts.append(mine)
        return [mine, mine]

    monkeypatch.setattr(plumbing.method, "gather", note)
    for rank, half in enumerate(halves):
        monkeypatch.setattr(plumbing.method, "join", lambda rank=rank: (rank, 2))
        by_method(usual._replace(advantage=advantage[half]), episodes[half], old_logp[half])

    monkeypatch.setattr(plumbing.method, "gather", lambda mine: parts)
    for rank, half in enumerate(halves):
        monkeypatch.setattr(plumbing.method, "join", lambda rank=rank: (rank, 2))
        mine = by_method(usual._replace(advantage=advantage[half]), episodes[half], old_logp[half])
        assert torch.equal(mine.advantage, alone.advantage[half])
        assert mine.denominator == alone.denominator
        if name == "kl-cov":
            logp = old_logp + 0.1
            mask = torch.ones(old_logp.shape, dtype=torch.bool)
            arguments = (logp, old_logp, advantage, mask, 0.2, 0.2, 1.0)
            assert mine.loss(*arguments)[0] == alone.loss(*arguments)[0]


def test_answers_that_are_no_groups_are_refused():
    old_logp, advantage = tensors_of(make_episodes())
    s = Settings(method="gtpo", samples=5)
    usual = Update(advantage, 1.0, shape_with_entropy, policy_loss, s)
    with pytest.raises(AssertionError, match="not in groups of --samples"):
        by_method(usual, make_episodes(), old_logp)


def test_adaptive_entropy_goes_by_the_log():
    s = Settings(method="adaptive-entropy")
    log = [{"entropy": 0.1}, {"entropy": 0.1}]
    assert by_log(s, []).entropy_coef == 0.0
    assert by_log(s, log).entropy_coef == 0.01
    assert by_log(Settings(), log) == Settings()


OWN = """
from plumbing.method import Method

def tilted(advantage, entropy, alpha, kappa):
    return advantage * (1 + (alpha * entropy.detach()).clamp(max=1 / kappa))

mine = Method(shape=tilted)
half = 0.5
"""


@pytest.fixture
def own_file(tmp_path):
    file = tmp_path / "my_method.py"
    file.write_text(OWN)
    return file


def test_a_method_from_outside_is_a_function_and_a_line(tmp_path, own_file, monkeypatch):
    """It trains as the built-in method of this formula does, bit for bit, and as no other."""
    replace_reward(monkeypatch, reward_by_length)
    sizes = SMALL | dict(max_new_tokens=16)
    runs = {}
    for i, method in enumerate([f"{own_file}:mine", "multiplied", "grpo"]):
        folder, log = small_run(tmp_path, f"run{i}", method=method, **sizes)
        runs[method] = load_file(folder / "model/model.safetensors")
        assert log[0]["arm"].startswith(method)
    mine, multiplied_run, grpo = runs.values()
    assert all(torch.equal(mine[name], multiplied_run[name]) for name in mine)
    assert not all(torch.equal(mine[name], grpo[name]) for name in mine)


def test_the_pages_own_method_is_one(tmp_path):
    [block] = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    file = tmp_path / "my_method.py"
    file.write_text(block)
    method = find(f"{file}:mine")
    assert method.shape(torch.tensor([2.0]), torch.tensor([3.0]), 0.4, 2.0) == 6.0


def test_a_run_remembers_where_the_method_is(own_file, monkeypatch):
    monkeypatch.chdir(own_file.parent)
    stored = to_be_stored(Settings(method="my_method.py:mine"))
    assert stored["method"] == f"{own_file}:mine"
    assert to_be_stored(Settings(method="reinforce++"))["method"] == "reinforce++"


def test_what_is_refused(own_file):
    refused = {
        "chess": "unknown method 'chess'; the methods are grpo, 80-20, ",
        "nowhere.py:mine": "--method nowhere.py:mine: there is no file 'nowhere.py'",
        f"{own_file}:half": f"--method {own_file}:half: {own_file} has no Method 'half'",
    }
    for method, sentence in refused.items():
        with pytest.raises((ValueError, FileNotFoundError), match=re.escape(sentence)):
            check(Settings(method=method))
    own_file.write_text(f"{OWN}\n1 / 0")
    with pytest.raises(ValueError, match="ZeroDivisionError in line 10: division by zero"):
        check(Settings(method=f"{own_file}:other"))
    with pytest.raises(ValueError, match="--method must be left out with --algo ppo"):
        check(Settings(method="gspo", algo="ppo"))


def test_the_page_has_a_row_for_every_method():
    rows = re.findall(r"^\| `([^`]+)` \|", PAGE, re.M)
    assert rows == list(METHODS)
