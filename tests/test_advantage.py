"""advantage.py against hand-computed tables, and the properties of the paper's line."""

import math
import statistics

import pytest
import torch

from advantage import gae, group_advantage, policy_loss, shape_with_entropy, value_loss, whiten


def test_group_advantage_equals_the_formula():
    rewards = {7: [1.0, -1.0, -1.0, -1.0], 3: [1.0, 1.0, 0.5, -1.0], 9: [0.1] * 4}
    labels = [7, 3, 9, 3, 7, 9, 9, 3, 7, 7, 3, 9]                           # groups interleaved, any integers
    left = {k: list(v) for k, v in rewards.items()}
    reward = torch.tensor([left[g].pop(0) for g in labels])
    got = group_advantage(reward, torch.tensor(labels))
    for r, g, a in zip(reward.tolist(), labels, got.tolist()):
        spread = statistics.stdev(rewards[g])
        want = 0.0 if spread == 0 else (r - statistics.mean(rewards[g])) / (spread + 1e-6)
        assert a == pytest.approx(want, abs=1e-5)


def test_equal_rewards_give_exactly_zero():
    """In fp32, 0.1 minus the mean of many 0.1 is not 0: dividing that by a std of 1e-8 makes an advantage."""
    for value in (-1.0, 1.0, 0.1, 1 / 3):
        for n in (2, 3, 7, 16, 100):
            got = group_advantage(torch.full((n,), value), torch.zeros(n, dtype=torch.int64))
            assert got.tolist() == [0.0] * n


def test_group_advantage_of_sixteen_with_one_success():
    reward = -torch.ones(16)
    reward[5] = 1
    got = group_advantage(reward, torch.zeros(16, dtype=torch.int64))
    assert got[5].item() == pytest.approx(3.75, abs=1e-4) and got[0].item() == pytest.approx(-0.25, abs=1e-4)


def test_the_papers_line_by_hand():
    # alpha 0.4, kappa 2:   A     H     alpha H  |A|/2  -> A + min
    table = [(2.0, 1.0, 2.4), (2.0, 9.0, 3.0), (-1.0, 0.5, -0.8), (-1.0, 9.0, -0.5), (0.0, 9.0, 0.0), (1.0, 0.0, 1.0)]
    advantage, entropy, want = map(torch.tensor, zip(*table))
    assert torch.allclose(shape_with_entropy(advantage, entropy, 0.4, 2.0), want)


@pytest.mark.parametrize("kappa", [1.01, 1.5, 2.0, 4.0])
def test_properties_of_the_papers_line(kappa):
    g = torch.Generator().manual_seed(0)
    advantage, entropy = torch.randn(64, 50, generator=g) * 3, torch.rand(64, 50, generator=g) * 12
    advantage[0] = 0
    before = advantage.clone()
    shaped = shape_with_entropy(advantage, entropy, 0.4, kappa)
    psi = shaped - advantage
    assert torch.equal(advantage, before)                                   # out of place ...
    assert torch.equal(shape_with_entropy(advantage, entropy, 0.4, kappa), shaped)      # ... so it cannot accumulate
    assert (psi >= 0).all() and (psi <= advantage.abs() / kappa + 1e-6).all()
    assert torch.equal(shaped.sign(), advantage.sign())
    assert (shaped[0] == 0).all()
    factor = (shaped / advantage)[1:]
    positive = advantage[1:] > 0
    assert factor[positive].min() >= 1 and factor[positive].max() <= 1 + 1 / kappa + 1e-6
    assert factor[~positive].max() <= 1 and factor[~positive].min() >= 1 - 1 / kappa - 1e-6
    assert torch.equal(shape_with_entropy(advantage, entropy, 0.0, kappa), advantage)   # alpha 0 is plain GRPO


def test_no_gradient_through_psi():
    entropy = torch.rand(3, 4, requires_grad=True)
    advantage = torch.randn(3, 4, requires_grad=True)
    shaped = shape_with_entropy(advantage, entropy, 0.4, 1e9)               # psi would be |A| / kappa: nearly none
    assert torch.autograd.grad(shaped.sum(), entropy, allow_unused=True)[0] is None
    shaped = shape_with_entropy(advantage.detach(), entropy, 0.4, 2.0)
    assert not shaped.requires_grad


def test_a_group_no_longer_sums_to_zero():
    advantage = group_advantage(torch.tensor([1.0, -1, -1, -1]), torch.zeros(4, dtype=torch.int64))
    assert advantage.sum().abs() < 1e-5 and shape_with_entropy(advantage, torch.ones(4), 0.4, 2.0).sum() > 0.5


@pytest.mark.parametrize("correct, positive, negative", [(1, 3.09, 0.44), (4, 1.17, 1.17), (7, 0.44, 3.09)])
def test_entropy_at_which_the_cap_binds(correct, positive, negative):
    """DESIGN.md's table: alpha 0.4, kappa 2, a group of 8."""
    reward = torch.tensor([1.0] * correct + [-1.0] * (8 - correct))
    advantage = group_advantage(reward, torch.zeros(8, dtype=torch.int64))
    for a, limit in ((advantage[0], positive), (advantage[-1], negative)):
        for entropy, capped in ((limit - 0.02, False), (limit + 0.02, True)):
            psi = shape_with_entropy(a, torch.tensor(entropy), 0.4, 2.0) - a
            assert (abs(psi - a.abs() / 2) < 1e-5) == capped


@pytest.mark.parametrize("advantage, ratio, gradient", [
    # d(objective)/d(logp) = ratio * A where it counts, 0 where the clip cuts it; clip 0.2 / 0.28
    (1.5, 0.70, 0.70 * 1.5), (1.5, 1.00, 1.5), (1.5, 1.25, 1.25 * 1.5), (1.5, 1.30, 0.0),
    (-1.5, 0.70, 0.0), (-1.5, 0.90, 0.90 * -1.5), (-1.5, 1.00, -1.5), (-1.5, 1.30, 1.30 * -1.5)])
def test_the_clips_gradient_table(advantage, ratio, gradient):
    logp = torch.tensor([[math.log(ratio)]], requires_grad=True)
    a, mask = torch.tensor([[advantage]]), torch.tensor([[True]])
    loss, statistics_ = policy_loss(logp, torch.zeros(1, 1), a, mask, 0.2, 0.28, 4.0)
    loss.backward()
    assert logp.grad.item() == pytest.approx(-gradient / 4, abs=1e-6)
    assert int(statistics_["clipped_high"]) == (advantage > 0 and ratio > 1.28)
    assert int(statistics_["clipped_low"]) == (advantage < 0 and ratio < 0.8)


def test_policy_loss_ignores_padding_and_adds_up():
    g = torch.Generator().manual_seed(1)
    logp, old, a = (torch.randn(6, 9, generator=g) for _ in range(3))
    mask = torch.arange(9) < torch.tensor([9, 5, 1, 0, 3, 7])[:, None]
    loss, sums = policy_loss(logp, old, a, mask, 0.2, 0.28, 25)
    want = kl = 0.0                                                         # a slow loop
    for i in range(6):
        for t in range(9):
            if mask[i, t]:
                r = math.exp(logp[i, t] - old[i, t])
                want -= min(r * a[i, t].item(), min(max(r, 0.8), 1.28) * a[i, t].item()) / 25
                kl += r - 1 - math.log(r)
    assert loss.item() == pytest.approx(want, rel=1e-5) and sums["kl"].item() == pytest.approx(kl, rel=1e-5)
    assert int(sums["tokens"]) == 25
    noise = torch.where(mask, logp, torch.full_like(logp, 1e4))             # whatever stands in the padding
    assert torch.equal(policy_loss(noise, old, a, mask, 0.2, 0.28, 25)[0], loss)
    parts = [policy_loss(logp[i:i + 2], old[i:i + 2], a[i:i + 2], mask[i:i + 2], 0.2, 0.28, 25) for i in (0, 2, 4)]
    assert sum(p[0] for p in parts).item() == pytest.approx(loss.item(), rel=1e-5)
    assert all(sum(p[1][k] for p in parts).item() == pytest.approx(sums[k].item(), rel=1e-5) for k in sums)


def test_the_docstring_example():
    import doctest
    import advantage
    assert doctest.testmod(advantage).attempted and doctest.testmod(advantage).failed == 0


def slow_gae(reward, value, gamma, lam):
    """One row, from the definition: A_t = sum over l of (gamma lam)^l delta_(t+l)."""
    n = len(reward)
    delta = [reward[t] + gamma * (value[t + 1] if t + 1 < n else 0.0) - value[t] for t in range(n)]
    return [sum((gamma * lam) ** (u - t) * delta[u] for u in range(t, n)) for t in range(n)]


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (0.9, 0.8), (1.0, 0.0), (0.0, 1.0), (0.99, 0.95)])
@pytest.mark.parametrize("left, right", [(0, 0), (3, 0), (0, 5), (2, 4)])
def test_gae_equals_a_slow_loop_for_any_padding(gamma, lam, left, right):
    g = torch.Generator().manual_seed(0)
    lengths, width = [5, 1, 8, 3], 8
    rows = [(torch.randn(n, generator=g), torch.randn(n, generator=g)) for n in lengths]
    shape = (len(rows), left + width + right)
    reward, value = torch.full(shape, 9.0), torch.full(shape, -7.0)         # padding that would do harm
    mask = torch.zeros(shape, dtype=torch.bool)
    for i, (r, v) in enumerate(rows):
        reward[i, left:left + len(r)], value[i, left:left + len(r)], mask[i, left:left + len(r)] = r, v, True
    advantage, ret = gae(reward, value, mask, gamma, lam)
    for i, (r, v) in enumerate(rows):
        want = slow_gae(r.tolist(), v.tolist(), gamma, lam)
        assert advantage[i, mask[i]].tolist() == pytest.approx(want, abs=1e-5)
        assert ret[i, mask[i]].tolist() == pytest.approx([a + b for a, b in zip(want, v.tolist())], abs=1e-5)
    assert (advantage[~mask] == 0).all() and (ret[~mask] == 0).all()


def test_gae_without_discount_is_the_reward_minus_the_value():
    """A reward on the last token only, of a right answer and of one that was cut: the same rule for both."""
    value = torch.tensor([[0.5, -0.25, 0.125], [0.0, 0.75, 0.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    advantage, ret = gae(torch.tensor([[0.0, 0.0, 1.0], [0.0, -1.0, 0.0]]), value, mask, 1.0, 1.0)
    assert advantage.tolist() == [[0.5, 1.25, 0.875], [-1.0, -1.75, 0.0]]
    assert ret.tolist() == [[1.0, 1.0, 1.0], [-1.0, -1.0, 0.0]]


def test_whitening_ignores_padding():
    x = torch.tensor([[1.0, 3.0, 100.0], [8.0, -50.0, 7.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    values = [1.0, 3.0, 8.0]
    want = [(v - 4.0) / (statistics.stdev(values) + 1e-6) for v in values]
    got = whiten(x, mask)
    assert got[mask].tolist() == pytest.approx(want, abs=1e-6) and (got[~mask] == 0).all()
    assert whiten(torch.full((2, 3), 0.1), mask)[mask].abs().max() < 1e-2   # equal values: rounding is not blown up
    assert whiten(torch.tensor([[5.0, 1.0]]), torch.tensor([[True, False]])).tolist() == [[0.0, 0.0]]


def test_value_loss_and_its_gradient_by_hand():
    # clip 0.5   value  old  return  kept  larger square         gradient of half of it
    table = [(0.20, 0.0, 1.0, 0.20, 0.8 ** 2, -0.8),            # within the clip
             (0.80, 0.0, 1.0, 0.50, 0.5 ** 2, 0.0),             # moved far enough towards the return: cut
             (-0.80, 0.0, 1.0, -0.50, 1.8 ** 2, -1.8),          # moved away from it: pulled back
             (2.00, 0.0, 1.0, 0.50, 1.0 ** 2, 1.0),             # overshot by more than the clip is short
             (9.00, 0.0, 1.0, 0.50, None, None)]                # padding
    value, old, ret = (torch.tensor(column) for column in list(zip(*table))[:3])
    value.requires_grad_()
    mask = torch.tensor([True] * 4 + [False])
    loss = value_loss(value, old, ret, mask, 0.5, 8)
    assert loss.item() == pytest.approx(sum(row[4] for row in table[:4]) / 2 / 8, abs=1e-6)
    loss.backward()
    assert value.grad.tolist() == pytest.approx([row[5] / 8 for row in table[:4]] + [0.0], abs=1e-6)
