"""advantage.py against the statistics module, slow loops from the definitions, tables by hand, and
the properties that the paper states of its entropy advantage."""

import doctest
import math
import statistics
from collections import Counter

import pytest
import torch
from pytest import approx

import advantage as module
from advantage import gae, group_advantage, policy_loss, shape_with_entropy, value_loss, whiten
from conftest import dice


def one_group(rewards):
    """The advantages of a single group."""
    group = torch.zeros(len(rewards), dtype=torch.int64)
    return group_advantage(torch.tensor(rewards), group)


def test_group_advantage_equals_the_formula():
    # Any integers, interleaved.
    group = torch.tensor([7, 3, 9, 3, 7, 9, 9, 3, 7, 7, 3, 9])
    reward = torch.zeros(12)
    reward[group == 7] = torch.tensor([1.0, -1.0, -1.0, -1.0])
    reward[group == 3] = torch.tensor([1.0, 1.0, 0.5, -1.0])
    reward[group == 9] = 0.1
    got = group_advantage(reward, group)
    for i in range(12):
        of_group = reward[group == group[i]].tolist()
        mean = statistics.mean(of_group)
        spread = statistics.stdev(of_group)
        want = (reward[i].item() - mean) / (spread + 1e-6)
        assert got[i].item() == approx(want, abs=1e-5)


@pytest.mark.parametrize("value", [-1.0, 1.0, 0.1, 1 / 3])
def test_equal_rewards_give_exactly_zero(value):
    """In fp32, 0.1 minus the mean of many 0.1 is not 0: dividing that by a std of 1e-8 makes an
    advantage."""
    for n in (2, 3, 7, 16, 100):
        assert one_group([value] * n).tolist() == [0.0] * n


def test_group_advantage_of_sixteen_with_one_success():
    rewards = [-1.0] * 16
    rewards[5] = 1.0
    got = one_group(rewards).tolist()
    success = got.pop(5)
    assert success == approx(3.75, abs=1e-4)
    for failure in got:
        assert failure == approx(-0.25, abs=1e-4)


def test_the_entropy_advantage_by_hand():
    table = [
        # A, H, A + min(0.4 H, |A| / 2)
        (2.0, 1.0, 2.4),
        (2.0, 9.0, 3.0),
        (-1.0, 0.5, -0.8),
        (-1.0, 9.0, -0.5),
        (0.0, 9.0, 0.0),
        (1.0, 0.0, 1.0),
    ]
    advantage, entropy, want = torch.tensor(table).T
    got = shape_with_entropy(advantage, entropy, alpha=0.4, kappa=2.0)
    assert torch.allclose(got, want)


class Shaping:
    """Random advantages of both signs, the first row 0, and what becomes of them."""

    def __init__(self, kappa):
        self.kappa = kappa
        self.advantage = 3 * torch.randn(64, 50, generator=dice(0))
        self.advantage[0] = 0
        self.entropy = 12 * torch.rand(64, 50, generator=dice(1))
        self.before = self.advantage.clone()
        self.shaped = self.shape()

    def shape(self, alpha=0.4):
        return shape_with_entropy(self.advantage, self.entropy, alpha, self.kappa)


@pytest.fixture(params=[1.01, 1.5, 2.0, 4.0])
def shaping(request):
    return Shaping(kappa=request.param)


def test_shaping_is_out_of_place_and_cannot_accumulate(shaping):
    assert torch.equal(shaping.advantage, shaping.before)
    assert torch.equal(shaping.shape(), shaping.shaped)


def test_psi_is_positive_and_capped(shaping):
    psi = shaping.shaped - shaping.advantage
    cap = shaping.advantage.abs() / shaping.kappa
    assert (psi >= 0).all()
    assert (psi <= cap + 1e-6).all()


def test_shaping_keeps_the_sign_and_the_zero(shaping):
    assert torch.equal(shaping.shaped.sign(), shaping.advantage.sign())
    assert (shaping.shaped[0] == 0).all()


def test_right_answers_are_rewarded_more_and_wrong_ones_punished_less(shaping):
    factor = (shaping.shaped / shaping.advantage)[1:]
    positive = shaping.advantage[1:] > 0
    most = 1 / shaping.kappa
    assert factor[positive].min() >= 1
    assert factor[positive].max() <= 1 + most + 1e-6
    assert factor[~positive].max() <= 1
    assert factor[~positive].min() >= 1 - most - 1e-6


def test_alpha_0_is_plain_grpo(shaping):
    assert torch.equal(shaping.shape(alpha=0.0), shaping.advantage)


def test_no_gradient_through_psi():
    entropy = torch.rand(3, 4, requires_grad=True)
    advantage = torch.randn(3, 4, requires_grad=True)
    # psi itself would be |A| / kappa: nearly none.
    shaped = shape_with_entropy(advantage, entropy, alpha=0.4, kappa=1e9)
    shaped.sum().backward()
    assert entropy.grad is None
    shaped = shape_with_entropy(advantage.detach(), entropy, alpha=0.4, kappa=2.0)
    assert not shaped.requires_grad


def test_a_group_no_longer_sums_to_zero():
    advantage = one_group([1.0, -1.0, -1.0, -1.0])
    shaped = shape_with_entropy(advantage, torch.ones(4), alpha=0.4, kappa=2.0)
    assert advantage.sum().abs() < 1e-5
    assert shaped.sum() > 0.5


@pytest.mark.parametrize(
    "right, positive, negative",
    [
        (1, 3.09, 0.44),
        (4, 1.17, 1.17),
        (7, 0.44, 3.09),
    ],
)
def test_entropy_at_which_the_cap_binds(right, positive, negative):
    """For alpha 0.4, kappa 2 and a group of 8, by the number of right answers: the entropy of an
    answer with positive and of one with negative advantage."""
    wrong = 8 - right
    advantage = one_group([1.0] * right + [-1.0] * wrong)
    assert not is_capped(advantage[0], positive - 0.02)
    assert is_capped(advantage[0], positive + 0.02)
    assert not is_capped(advantage[-1], negative - 0.02)
    assert is_capped(advantage[-1], negative + 0.02)


def is_capped(advantage, entropy):
    shaped = shape_with_entropy(advantage, torch.tensor(entropy), alpha=0.4, kappa=2.0)
    psi = shaped - advantage
    cap = advantage.abs() / 2
    return abs(psi - cap) < 1e-5


@pytest.mark.parametrize(
    "advantage, ratio, gradient",
    [
        # d(objective)/d(logp) = ratio * A where it counts, 0 where the clip cuts it: 0.2, 0.28
        (1.5, 0.70, 0.70 * 1.5),
        (1.5, 1.00, 1.5),
        (1.5, 1.25, 1.25 * 1.5),
        (1.5, 1.30, 0.0),
        (-1.5, 0.70, 0.0),
        (-1.5, 0.90, 0.90 * -1.5),
        (-1.5, 1.00, -1.5),
        (-1.5, 1.30, 1.30 * -1.5),
    ],
)
def test_the_clips_gradient_table(advantage, ratio, gradient):
    log_ratio = math.log(ratio)
    logp = torch.tensor([[log_ratio]], requires_grad=True)
    loss, sums = policy_loss(
        logp,
        old_logp=torch.zeros(1, 1),
        advantage=torch.tensor([[advantage]]),
        mask=torch.tensor([[True]]),
        clip_low=0.2,
        clip_high=0.28,
        denominator=4.0,
    )
    loss.backward()
    assert logp.grad.item() == approx(-gradient / 4, abs=1e-6)
    assert int(sums["clipped_high"]) == (advantage > 0 and ratio > 1.28)
    assert int(sums["clipped_low"]) == (advantage < 0 and ratio < 0.8)


def mask_of(lengths, columns):
    """The first `length` columns of each row."""
    length = torch.tensor(lengths)[:, None]
    return torch.arange(columns) < length


class RaggedLoss:
    """policy_loss on rows of 9, 5, 1, 0, 3 and 7 tokens, 25 in all."""

    def __init__(self):
        g = dice(1)
        self.logp = torch.randn(6, 9, generator=g)
        self.old_logp = torch.randn(6, 9, generator=g)
        self.advantage = torch.randn(6, 9, generator=g)
        self.mask = mask_of([9, 5, 1, 0, 3, 7], columns=9)

    def of(self, rows=slice(None)):
        return policy_loss(
            self.logp[rows],
            self.old_logp[rows],
            self.advantage[rows],
            self.mask[rows],
            clip_low=0.2,
            clip_high=0.28,
            denominator=25,
        )


def test_policy_loss_equals_a_slow_loop():
    ragged = RaggedLoss()
    loss, sums = ragged.of()
    want = 0.0
    kl = 0.0
    for i, t in ragged.mask.nonzero().tolist():
        log_ratio = ragged.logp[i, t] - ragged.old_logp[i, t]
        ratio = math.exp(log_ratio)
        clipped = min(max(ratio, 0.8), 1.28)
        a = ragged.advantage[i, t].item()
        want -= min(ratio * a, clipped * a) / 25
        kl += ratio - 1 - math.log(ratio)
    assert loss.item() == approx(want, rel=1e-5)
    assert sums["kl"].item() == approx(kl, rel=1e-5)
    assert int(sums["tokens"]) == 25


def test_policy_loss_ignores_whatever_stands_in_the_padding():
    ragged = RaggedLoss()
    loss, _ = ragged.of()
    ragged.logp[~ragged.mask] = 1e4
    noisy_loss, _ = ragged.of()
    assert torch.equal(noisy_loss, loss)


def test_policy_loss_adds_up_over_micro_batches():
    ragged = RaggedLoss()
    loss, sums = ragged.of()
    added_loss = 0.0
    added_sums = Counter()
    for rows in (slice(0, 2), slice(2, 4), slice(4, 6)):
        loss_of_part, sums_of_part = ragged.of(rows)
        added_loss += loss_of_part.item()
        for key, value in sums_of_part.items():
            added_sums[key] += value.item()
    assert added_loss == approx(loss.item(), rel=1e-5)
    assert added_sums.keys() == sums.keys()
    for key, value in sums.items():
        assert added_sums[key] == approx(value.item(), rel=1e-5)


def test_the_docstring_example():
    outcome = doctest.testmod(module)
    assert outcome.attempted
    assert outcome.failed == 0


def slow_gae(reward, value, gamma, lam):
    """One row, from the definition: A_t = sum over l of (gamma lam)^l delta_(t+l)."""
    next_value = [*value[1:], 0.0]
    advantage = []
    for t in range(len(reward)):
        total = 0.0
        for u in range(t, len(reward)):
            delta = reward[u] + gamma * next_value[u] - value[u]
            total += (gamma * lam) ** (u - t) * delta
        advantage.append(total)
    return advantage


@pytest.mark.parametrize(
    "gamma, lam",
    [
        (1.0, 1.0),
        (0.9, 0.8),
        (1.0, 0.0),
        (0.0, 1.0),
        (0.99, 0.95),
    ],
)
@pytest.mark.parametrize(
    "left, right",
    [
        (0, 0),
        (3, 0),
        (0, 5),
        (2, 4),
    ],
)
def test_gae_equals_a_slow_loop_for_any_padding(gamma, lam, left, right):
    g = dice(0)
    shape = (4, left + 8 + right)
    reward = torch.full(shape, 9.0)  # padding that would do harm
    value = torch.full(shape, -7.0)
    mask = torch.zeros(shape, dtype=torch.bool)
    for row, length in enumerate([5, 1, 8, 3]):
        inside = slice(left, left + length)
        reward[row, inside] = torch.randn(length, generator=g)
        value[row, inside] = torch.randn(length, generator=g)
        mask[row, inside] = True

    advantage, ret = gae(reward, value, mask, gamma, lam)
    for row in range(4):
        inside = mask[row]
        rewards = reward[row, inside].tolist()
        values = value[row, inside].tolist()
        want = slow_gae(rewards, values, gamma, lam)
        want_return = [a + v for a, v in zip(want, values)]
        assert advantage[row, inside].tolist() == approx(want, abs=1e-5)
        assert ret[row, inside].tolist() == approx(want_return, abs=1e-5)
    assert (advantage[~mask] == 0).all()
    assert (ret[~mask] == 0).all()


def test_gae_without_discount_is_the_reward_minus_the_value():
    """A reward on the last token only, of a right answer and of one that was cut: the same rule for
    both."""
    reward = [[0.0, 0.0, 1.0], [0.0, -1.0, 0.0]]
    value = [[0.5, -0.25, 0.125], [0.0, 0.75, 0.0]]
    advantage, ret = gae(
        torch.tensor(reward),
        torch.tensor(value),
        mask_of([3, 2], columns=3),
        gamma=1.0,
        lam=1.0,
    )
    assert advantage.tolist() == [[0.5, 1.25, 0.875], [-1.0, -1.75, 0.0]]
    assert ret.tolist() == [[1.0, 1.0, 1.0], [-1.0, -1.0, 0.0]]


def test_whitening_ignores_padding():
    mask = mask_of([2, 1], columns=3)
    x = torch.tensor([[1.0, 3.0, 100.0], [8.0, -50.0, 7.0]])
    inside = [1.0, 3.0, 8.0]
    spread = statistics.stdev(inside) + 1e-6
    want = [(number - 4.0) / spread for number in inside]
    got = whiten(x, mask)
    assert got[mask].tolist() == approx(want, abs=1e-6)
    assert (got[~mask] == 0).all()


def test_whitening_equal_values_blows_up_no_rounding():
    mask = mask_of([2, 1], columns=3)
    equal = torch.full((2, 3), 0.1)
    got = whiten(equal, mask)
    assert got[mask].abs().max() < 1e-2


def test_whitening_a_single_value_gives_zero():
    mask = mask_of([1], columns=2)
    x = torch.tensor([[5.0, 1.0]])
    assert whiten(x, mask).tolist() == [[0.0, 0.0]]


def test_value_loss_and_its_gradient_by_hand():
    table = [
        # value, larger square, gradient of half of it. Old value 0, return 1, clip 0.5.
        (0.20, 0.8**2, -0.8),  # within the clip
        (0.80, 0.5**2, 0.0),  # moved far enough towards the return, kept at 0.5: cut
        (-0.80, 1.8**2, -1.8),  # moved away from it: pulled back
        (2.00, 1.0**2, 1.0),  # overshot by more than the clip is short
        (9.00, 0.0, 0.0),  # padding
    ]
    value, square, gradient = torch.tensor(table).T
    value.requires_grad_()
    loss = value_loss(
        value,
        old_value=torch.zeros(5),
        ret=torch.ones(5),
        mask=torch.arange(5) < 4,
        clip=0.5,
        denominator=8,
    )
    loss.backward()
    want_loss = square.sum().item() / 2 / 8
    want_gradient = gradient / 8
    assert loss.item() == approx(want_loss, abs=1e-6)
    assert value.grad.tolist() == approx(want_gradient.tolist(), abs=1e-6)
