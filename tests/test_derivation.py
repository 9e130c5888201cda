"""docs/derivation.md, by exact enumeration in float64.

A policy small enough to sum over all it can do: three words, of which 0 ends the response, at most
two tokens, so seven responses and three states in which a token is chosen (nothing yet, after 1,
after 2), each with three logits of its own. Expected gradients are sums over all responses, or over
all groups of G responses, of what advantage.py makes of them, differentiated by autograd. The
formulas of lab/multiplier.py are held against these sums.
"""

import itertools
import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from advantage import gae, group_advantage, policy_loss, shape_with_entropy
from lab.multiplier import (
    difficulty_weight,
    entropy_advantage,
    full_strength,
    multiplicative,
    multiplier,
    multiplier_of_groups,
    plain,
    two_advantages,
    without_baseline,
)

PAGE = Path("docs/derivation.md").read_text()

# The seven responses, a row each. One that ends at once has a second token that does not count.
FIRST = torch.tensor([0, 1, 1, 1, 2, 2, 2])
SECOND = torch.tensor([0, 0, 1, 2, 0, 1, 2])
WORDS = torch.stack([FIRST, SECOND], dim=1)  # [7, 2]
STATES = torch.stack([0 * FIRST, FIRST], dim=1)  # in which a token is chosen, by the word before
MASK = torch.stack([FIRST >= 0, FIRST > 0], dim=1)
IS_RIGHT = torch.tensor([True, False, False, True, False, True, False])  # "0", "1 2" and "2 1"
REWARD = torch.where(IS_RIGHT, 1.0, -1.0).double()

SHARES = [0.06, 0.3, 0.5, 0.8]
STRENGTHS = [(0.1, 2.0), (0.4, 2.0), (0.4, 1.2), (2.0, 4.0)]  # alpha, kappa


def number(x: float) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)


def assert_same(got: Tensor, want: Tensor) -> None:
    assert torch.allclose(got, want, rtol=1e-10, atol=1e-14)


def assert_near(got: Tensor, want: Tensor) -> None:
    """To 1e-5, because group_advantage adds 1e-6 to the standard deviation."""
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-9)


def normal(*shape: int, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=random)


def policy(p: float, seed: int = 0) -> Tensor:
    """Logits [3 states, 3 words] of a policy that is right with probability p: random, but for that
    of ending at once, which is right."""
    logits = normal(3, 3, seed=seed)
    logits[1, 2] -= 3.0  # the other right answers are rare
    logits[2, 1] -= 3.0
    low = -20.0
    high = 20.0
    for _ in range(80):
        logits[0, 0] = (low + high) / 2
        if chance_to_be_right(logits) < p:
            low = float(logits[0, 0])
        else:
            high = float(logits[0, 0])
    assert chance_to_be_right(logits) == pytest.approx(p, abs=1e-12)
    return logits.requires_grad_()


def token_logp(logits: Tensor) -> Tensor:
    """[7, 2]"""
    return torch.where(MASK, logits.log_softmax(dim=-1)[STATES, WORDS], 0.0)


def chances(logits: Tensor) -> Tensor:
    """The probability of each response, [7]."""
    return token_logp(logits).sum(dim=1).exp().detach()


def chance_to_be_right(logits: Tensor) -> float:
    return float(chances(logits)[IS_RIGHT].sum())


def state_entropy(logits: Tensor) -> Tensor:
    """[3 states]"""
    p = logits.detach().softmax(dim=-1)
    return -(p * p.log()).sum(dim=-1)


def entropies(logits: Tensor) -> Tensor:
    """[7, 2]"""
    return state_entropy(logits)[STATES]


def expected_gradient(logits: Tensor, advantage: Tensor) -> Tensor:
    """Of sum_t A_t log pi(o_t), over all responses; advantage [7, 2] -> [3 states, 3 words]."""
    objective = (chances(logits)[:, None] * advantage * token_logp(logits)).sum()
    return torch.autograd.grad(objective, logits)[0]


def expected_gradient_of_groups(logits: Tensor, size: int, shaping) -> Tensor:
    """The same over all 7^size groups, their advantages made by group_advantage."""
    members = torch.cartesian_prod(*[torch.arange(7)] * size)  # [groups, size], of RESPONSES
    chance = chances(logits)[members].prod(dim=1)  # [groups]
    group = torch.arange(len(members)).repeat_interleave(size)
    advantage = group_advantage(REWARD[members].flatten(), group).view(-1, size, 1)
    share = IS_RIGHT[members].double().mean(dim=1).view(-1, 1, 1)
    shaped = shaping(advantage, entropies(logits)[members], share)  # [groups, size, 2]
    objective = chance[:, None, None] * shaped * token_logp(logits)[members]
    return torch.autograd.grad(objective.sum(), logits)[0] / size


def advantages_of(p: float) -> Tensor:
    """GRPO's in a large group, [7, 2]."""
    positive, negative = two_advantages(number(p))
    return torch.where(IS_RIGHT, positive, negative)[:, None].expand(7, 2)


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / a.norm() / b.norm())


@pytest.mark.parametrize("p", SHARES)
def test_all_responses_are_there(p):
    assert float(chances(policy(p)).sum()) == pytest.approx(1, abs=1e-12)


# GRPO: M at every state.


@pytest.mark.parametrize("p", SHARES)
@pytest.mark.parametrize("alpha, kappa", STRENGTHS)
def test_a_large_group_multiplies_the_gradient_at_a_state_by_m(alpha, kappa, p):
    logits = policy(p)
    advantage = advantages_of(p)
    shaped = shape_with_entropy(advantage, entropies(logits), alpha, kappa)
    share = number(p)
    m = multiplier(entropy_advantage(alpha, kappa), share, state_entropy(logits))  # [3]
    want = m[:, None] * expected_gradient(logits, advantage)
    assert_same(expected_gradient(logits, shaped), want)


@pytest.mark.parametrize("p", SHARES)
def test_m_is_above_1_on_hard_problems_and_below_on_easy_ones(p):
    logits = policy(p)
    advantage = advantages_of(p)
    shaped = shape_with_entropy(advantage, entropies(logits), alpha=10.0, kappa=2.0)
    before = expected_gradient(logits, advantage)
    assert_same(expected_gradient(logits, shaped), (1.5 - p) * before)


def test_between_the_caps_m_is_a_straight_line_in_the_entropy():
    logits = policy(0.06)
    advantage = advantages_of(0.06)
    alpha = 1.0
    psi = alpha * state_entropy(logits)
    assert psi.min() > -advantage.min() / 2  # above the cap of wrong answers
    assert psi.max() < advantage.max() / 2  # below that of right ones
    shaped = shape_with_entropy(advantage, entropies(logits), alpha, kappa=2.0)
    m = 1 + psi * math.sqrt(0.06 * 0.94) - 0.06 / 2
    before = expected_gradient(logits, advantage)
    assert_same(expected_gradient(logits, shaped), m[:, None] * before)


def test_where_the_cap_binds_for_neither_the_gradient_is_that_of_plain_grpo():
    logits = policy(0.3)
    advantage = advantages_of(0.3)
    shaped = shape_with_entropy(advantage, entropies(logits), alpha=0.2, kappa=1.5)
    added = shaped - advantage
    assert (added < advantage.abs() / 1.5).all()
    assert added.min() > 0.05
    difference = expected_gradient(logits, shaped) - expected_gradient(logits, advantage)
    assert difference.abs().max() < 1e-15


SHAPINGS = {
    "entropy advantage": entropy_advantage(0.4, 2.0),
    "small alpha": entropy_advantage(0.1, 2.0),
    "large alpha, kappa 4": entropy_advantage(2.0, 4.0),
    "small kappa": entropy_advantage(0.4, 1.2),
    "full strength": full_strength(2.0),
    "multiplicative": multiplicative(0.4, 2.0),
    "difficulty weight": difficulty_weight(2.0),
}


@pytest.mark.parametrize("p", SHARES)
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("name", SHAPINGS)
def test_groups_of_any_size_multiply_it_by_their_own_m(name, size, p):
    """Over all groups."""
    logits = policy(p, seed=size)
    unshaped = expected_gradient_of_groups(logits, size, plain)
    shaped = expected_gradient_of_groups(logits, size, SHAPINGS[name])
    m, _ = multiplier_of_groups(SHAPINGS[name], p, state_entropy(logits), size)
    assert_near(shaped, m[:, None] * unshaped)


@pytest.mark.parametrize("p", SHARES)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_plain_grpo_itself_weighs_problems_by_their_difficulty(size, p):
    """By multiplier_of_groups' second result, against the gradient of the probability to be
    right."""
    logits = policy(p)
    of_p = expected_gradient(logits, IS_RIGHT.double()[:, None].expand(7, 2))
    _, weight = multiplier_of_groups(plain, p, state_entropy(logits), size)
    got = expected_gradient_of_groups(logits, size, plain)
    assert_near(got, weight[:, None] * of_p)


@pytest.mark.parametrize("p", SHARES)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_at_full_strength_m_is_the_same_in_groups_of_any_size(size, p):
    """1 + (1 - 2p) / kappa, and that is the difficulty weight."""
    logits = policy(p)
    unshaped = expected_gradient_of_groups(logits, size, plain)
    shaped = expected_gradient_of_groups(logits, size, full_strength(2.0))
    assert_near(shaped, (1.5 - p) * unshaped)


@pytest.mark.parametrize("p", SHARES)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_small_groups_add_something_even_below_the_cap(size, p):
    """Because A = 0 in a group of equal rewards, and whether it is one depends on the answer
    itself."""
    logits = policy(p)
    alpha = 0.1
    psi = alpha * state_entropy(logits)
    _, smallest = two_advantages(number(1 / size), size)
    assert psi.max() < -smallest / 2
    unshaped = expected_gradient_of_groups(logits, size, plain)
    shaped = expected_gradient_of_groups(logits, size, entropy_advantage(alpha, 2.0))
    _, weight = multiplier_of_groups(plain, p, state_entropy(logits), size)
    mixed_if_right = 1 - p ** (size - 1)
    mixed_if_wrong = 1 - (1 - p) ** (size - 1)
    m = 1 + psi * (mixed_if_right - mixed_if_wrong) / weight
    assert_near(shaped, m[:, None] * unshaped)


@pytest.mark.parametrize("p", SHARES)
def test_groups_with_the_same_number_right_add_what_luck_adds(p):
    """The gradient of the groups of 4 with k right alone: below the cap, it is multiplied by
    1 + alpha H (k - G p) / sqrt(k (G - k) (G - 1) / G). Over all k that is nearly a baseline; over
    the lucky alone it is not."""
    logits = policy(p)
    size = 4

    def only(shaping, right):
        def shape(advantage, entropy, share):
            chosen = share == number(right / size)
            return torch.where(chosen, shaping(advantage, entropy, share), 0.0)

        return shape

    alpha = 0.1
    for right in (1, 2, 3):
        unshaped = expected_gradient_of_groups(logits, size, only(plain, right))
        shaping = only(entropy_advantage(alpha, 2.0), right)
        shaped = expected_gradient_of_groups(logits, size, shaping)
        scale = math.sqrt(right * (size - right) * (size - 1) / size)
        m = 1 + alpha * state_entropy(logits) * (right - size * p) / scale
        assert_near(shaped, m[:, None] * unshaped)


@pytest.mark.parametrize("name", SHAPINGS)
def test_a_shaping_is_m_times_a_and_a_baseline(name):
    """Token by token, not only in expectation: what without_baseline leaves out is the same for
    right and wrong answers of a group."""
    entropy = torch.linspace(0, 3, 31, dtype=torch.float64)
    for right in range(1, 8):
        share = number(right / 8)
        left_out = []
        shaping = SHAPINGS[name]
        reweighed = without_baseline(shaping, 8)
        for advantage in two_advantages(share, 8):
            shaped = shaping(advantage, entropy, share)
            left_out.append(shaped - reweighed(advantage, entropy, share))
        assert torch.allclose(*left_out, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size, right", [(2, 1), (8, 1), (8, 5), (16, 15)])
def test_two_advantages_are_those_of_a_group(size, right):
    reward = torch.tensor([1.0] * right + [-1.0] * (size - right), dtype=torch.float64)
    got = group_advantage(reward, torch.zeros(size, dtype=torch.int64))
    positive, negative = two_advantages(number(right / size), size)
    assert float(got[0]) == pytest.approx(float(positive), rel=1e-5)
    assert float(got[-1]) == pytest.approx(float(negative), rel=1e-5)


def test_a_state_is_not_turned_but_states_are_weighed():
    """Each row of the gradient keeps its direction; all of it together does not."""
    logits = policy(0.06)
    unshaped = expected_gradient_of_groups(logits, 4, plain)
    shaped = expected_gradient_of_groups(logits, 4, entropy_advantage(0.4, 2.0))
    for before, after in zip(unshaped, shaped):
        assert cosine(before, after) == pytest.approx(1, abs=1e-9)
    assert cosine(unshaped, shaped) < 0.99999


# PPO.


def values_of(seed: int, scale: float) -> Tensor:
    """A critic's value of the state of every token, [7, 2]."""
    return (normal(3, seed=seed) * scale)[STATES]


def ppo_advantage(value: Tensor, lam: float) -> Tensor:
    """[7, 2], the reward on the last token."""
    token_reward = torch.zeros(7, 2, dtype=torch.float64)
    token_reward[torch.arange(7), MASK.sum(dim=1) - 1] = REWARD
    return gae(token_reward, value, MASK, 1.0, lam)[0]


@pytest.mark.parametrize("lam", [1.0, 0.5])
@pytest.mark.parametrize("seed, scale", [(0, 0.0), (1, 0.2), (2, 3.0), (3, 30.0)])
def test_below_the_cap_the_entropy_adds_nothing_with_any_critic(seed, scale, lam):
    logits = policy(0.3, seed)
    advantage = ppo_advantage(values_of(seed, scale), lam)
    entropy = entropies(logits)
    smallest = float((advantage.abs() / entropy)[MASK].min())
    alpha = 0.99 * smallest / 2  # the cap at kappa 2 is not reached, nearly
    shaped = shape_with_entropy(advantage, entropy, alpha, 2.0)
    assert torch.allclose((shaped - advantage)[MASK], (alpha * entropy)[MASK])
    before = expected_gradient(logits, advantage)
    difference = expected_gradient(logits, shaped) - before
    assert difference.abs().max() < 1e-14 * max(1.0, float(before.abs().max()))
    assert alpha > 1e-3


@pytest.mark.parametrize("alpha", [0.1, 0.4, 10.0])
@pytest.mark.parametrize("seed", range(4))
def test_ppo_with_lambda_1_multiplies_every_state_by_an_m_of_its_own(seed, alpha):
    """A = R - V(s), whitened by any two numbers, has two values at a state: the critic's opinion of
    the state stands where GRPO has the problem's p."""
    logits = policy(0.3, seed)
    mean = 0.1
    std = 0.7
    advantage = (ppo_advantage(values_of(seed, 0.5), lam=1.0) - mean) / std
    shaped = shape_with_entropy(advantage, entropies(logits), alpha, 2.0)
    before = expected_gradient(logits, advantage)
    after = expected_gradient(logits, shaped)
    for state, value in enumerate(normal(3, seed=seed) * 0.5):
        positive = (1 - value - mean) / std
        negative = (-1 - value - mean) / std
        psi = alpha * state_entropy(logits)[state]
        psi_positive = torch.minimum(psi, positive.abs() / 2)
        psi_negative = torch.minimum(psi, negative.abs() / 2)
        m = 1 + (psi_positive - psi_negative) / (positive - negative)
        assert_same(after[state], m * before[state])


@pytest.mark.parametrize("seed", range(4))
def test_at_full_strength_it_is_the_critics_value_that_weighs(seed):
    logits = policy(0.3, seed)
    advantage = ppo_advantage(values_of(seed, 0.1), lam=1.0)  # all values are within -1 and 1
    shaped = full_strength(2.0)(advantage, entropies(logits), None)
    m = 1 - normal(3, seed=seed) * 0.1 / 2
    before = expected_gradient(logits, advantage)
    assert_same(expected_gradient(logits, shaped), m[:, None] * before)


def test_with_a_smaller_lambda_the_cap_may_turn_a_state():
    """There A depends on the value of the next state too, and is not one of two numbers."""
    cosines = []
    for seed in range(20):
        logits = policy(0.3, seed)
        advantage = ppo_advantage(values_of(seed, 1.0), lam=0.5)
        shaped = shape_with_entropy(advantage, entropies(logits), 0.4, 2.0)
        before = expected_gradient(logits, advantage)
        after = expected_gradient(logits, shaped)
        cosines.append(cosine(before[0], after[0]))
    assert min(cosines) < 0.999
    assert max(cosines) <= 1 + 1e-12


# Several updates of a rollout.


def moved(logits: Tensor, distance: float) -> Tensor:
    """The policy after updates: plain gradient steps, as far as `distance` in the logits."""
    advantage = torch.where(IS_RIGHT, 1.5, -0.7)[:, None].expand(7, 2)
    direction = expected_gradient(logits, advantage)
    return (logits + distance * direction / direction.abs().max()).detach().requires_grad_()


def clipped_gradient(old: Tensor, new: Tensor, advantage: Tensor) -> tuple[Tensor, int]:
    """Of policy_loss on all responses, each with the old policy's probability -> the gradient of
    the objective, and how many tokens are clipped."""
    total = 0
    clipped = 0
    for i, chance in enumerate(chances(old)):
        row = slice(i, i + 1)
        loss, statistics = policy_loss(
            token_logp(new)[row],
            token_logp(old).detach()[row],
            advantage[row],
            MASK[row],
            clip_low=0.2,
            clip_high=0.28,
            denominator=1.0,
        )
        total = total - chance * loss
        clipped += int(statistics["clipped_low"] + statistics["clipped_high"])
    return torch.autograd.grad(total, new)[0], clipped


@pytest.mark.parametrize("alpha", [0.1, 0.4, 10.0])
def test_in_later_updates_m_holds_with_the_current_entropy_until_a_clip_binds(alpha):
    old = policy(0.3)
    new = moved(old, 0.15)
    advantage = advantages_of(0.3)
    shaped = shape_with_entropy(advantage, entropies(new), alpha, 2.0)
    before, clipped = clipped_gradient(old, new, advantage)
    after, _ = clipped_gradient(old, new, shaped)
    assert clipped == 0
    assert (token_logp(new) - token_logp(old)).abs().max() > 0.05  # it has moved
    m = multiplier(entropy_advantage(alpha, 2.0), number(0.3), state_entropy(new))
    assert_same(after, m[:, None] * before)


def missing_of_clipped_tokens(old: Tensor, new: Tensor, advantage: Tensor, psi: Tensor) -> Tensor:
    """sum pi_old rho psi grad log pi over the clipped tokens, with grad log pi = one hot - pi."""
    total = torch.zeros(3, 3, dtype=torch.float64)
    ratio = (token_logp(new) - token_logp(old)).exp().detach()
    weight = chances(old)[:, None] * ratio * psi * is_clipped(old, new, advantage)  # [7, 2]
    for i, t in itertools.product(range(7), range(2)):
        state = STATES[i, t]
        score = -new[state].detach().softmax(dim=0)
        score[WORDS[i, t]] += 1
        total[state] += weight[i, t] * score
    return total


def is_clipped(old: Tensor, new: Tensor, advantage: Tensor) -> Tensor:
    """[7, 2]"""
    ratio = (token_logp(new) - token_logp(old)).exp()
    return torch.where(advantage > 0, ratio > 1.28, ratio < 0.8) & MASK


def left_by_clips(distance: float) -> tuple[float, float, Tensor, Tensor]:
    """Policies `distance` apart, alpha 0.2 at kappa 1.5, where the cap binds nowhere -> the share
    of tokens that is clipped, what the entropy adds relative to the plain gradient, what it adds,
    and what it should by the clipped tokens alone."""
    old = policy(0.3)
    new = moved(old, distance)
    advantage = advantages_of(0.3)
    psi = 0.2 * entropies(new)
    assert (psi < advantage.abs() / 1.5)[MASK].all()
    shaped = shape_with_entropy(advantage, entropies(new), 0.2, 1.5)
    before, _ = clipped_gradient(old, new, advantage)
    after, _ = clipped_gradient(old, new, shaped)
    added = after - before

    weight = chances(old)[:, None] * MASK
    share = float(weight[is_clipped(old, new, advantage)].sum() / weight.sum())
    want = -missing_of_clipped_tokens(old, new, advantage, psi)
    return share, float(added.norm() / before.norm()), added, want


def test_until_a_clip_binds_the_part_below_the_cap_vanishes():
    share, relative, _, _ = left_by_clips(0.15)
    assert share == 0
    assert relative < 1e-14


@pytest.mark.parametrize("distance", [0.4, 0.6, 1.0])
def test_after_that_it_is_what_the_clipped_tokens_do_not_give_back(distance):
    share, relative, added, want = left_by_clips(distance)
    assert share > 0
    assert relative > 1e-3
    assert_same(added, want)


# What the page quotes.


def table_rows(head: str) -> list[list[str]]:
    """Of the table with this first cell."""
    block = PAGE.split(f"| {head} |")[1].split("\n\n")[0]
    return [re.split(r" *\| *", line.strip("| ")) for line in block.splitlines()[2:]]


def test_the_page_says_how_far_groups_are_from_large_ones():
    rows = table_rows("p")
    assert len(rows) == 6
    shaping = entropy_advantage(0.4, 2.0)
    entropy = torch.ones((), dtype=torch.float64)
    for p, *cells in rows:
        found = [multiplier_of_groups(shaping, float(p), entropy, size)[0] for size in (8, 16, 64)]
        share = number(float(p))
        found.append(multiplier(shaping, share, entropy))
        found.append(multiplier(full_strength(2.0), share, entropy))
        assert cells == [f"{float(m):.3f}" for m in found]


def test_the_page_says_how_much_clips_leave():
    rows = table_rows("distance in the logits")
    assert len(rows) == 4
    for distance, *cells in rows:
        share, relative, _, _ = left_by_clips(float(distance))
        assert cells == [f"{100 * share:.1f} %", f"{100 * relative:.1f} %"]
