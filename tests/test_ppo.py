"""PPO: the critic's values against transformers in float64, its update against a slow loop, and
what the loop hands to whom against Python's statistics."""

import statistics
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import train
from model import Critic, load
from plumbing.batch import pad_responses
from plumbing.optimizer import make_optimizer
from plumbing.settings import Settings
from rollout import Episode, texts
from train import critic_advantage, update_critic
from training_runs import ROOT, read_jsonl, replace_reward, reward_by_length, reward_none

SMALL = dict(
    algo="ppo",
    prompts=4,
    samples=3,
    minibatch=2,
    eval_problems=2,
    eval_samples=1,
    final_samples=2,
    slots=12,
    max_new_tokens=24,
)


def make_episodes(response_lengths: tuple[int, ...]) -> list[Episode]:
    """Random tokens: for each of three prompts, a response of each length."""
    g = torch.Generator().manual_seed(0)
    episodes = []
    for prompt_length in (2, 9, 5):
        for length in response_lengths:
            prompt = torch.randint(1, 112, (prompt_length,), generator=g)
            response = torch.randint(1, 112, (length,), generator=g)
            zeros = torch.zeros(length)
            episodes.append(Episode(prompt, response, zeros, zeros, True, 0))
    return episodes


def values_of(critic: Critic, episodes: list[Episode], s: Settings) -> Tensor:
    """[N, R]"""
    _, counted = pad_responses([episode.logp for episode in episodes])
    reward = torch.zeros(len(episodes))
    _, value, _ = critic_advantage(critic, episodes, reward, counted, s)
    return value


@dataclass
class Reference:
    """The same values by transformers in float64."""

    model: torch.nn.Module
    weight: Tensor
    bias: Tensor

    def values(self, episode: Episode) -> Tensor:
        """[R], each of the text before a response token."""
        text = torch.cat((episode.prompt, episode.response))
        hidden = self.model(text[None]).last_hidden_state[0]
        return hidden[len(episode.prompt) - 1 : -1] @ self.weight + self.bias


def critic_and_reference(qwen2, **changes) -> tuple[Critic, Reference]:
    """A critic with a head that is not zero."""
    folder, theirs = qwen2(**changes)
    critic = Critic(load(str(folder))[0])
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        drawn = torch.randn(critic.value.weight.shape, generator=g)
        critic.value.weight.copy_(drawn * 0.3)
        critic.value.bias.fill_(0.25)
    weight = critic.value.weight.detach().double()[0]
    bias = critic.value.bias.detach().double()
    return critic, Reference(theirs.double().model, weight, bias)


@pytest.mark.parametrize("tied", [True, False])
def test_values_equal_transformers(qwen2, tied):
    critic, reference = critic_and_reference(qwen2, tie_word_embeddings=tied)
    episodes = make_episodes((3, 11, 1))
    for micro_tokens in (1, 60, 4096):
        got = values_of(critic, episodes, Settings(micro_tokens=micro_tokens))
        assert got.shape == (9, 11)
        for row, episode in zip(got, episodes):
            inside = len(episode.response)
            want = reference.values(episode).detach()
            assert torch.allclose(row[:inside].double(), want, atol=1e-4)
            assert (row[inside:] == 0).all()


def test_a_new_critic_says_zero_and_leaves_the_policy_alone(qwen2):
    model, _ = load(str(qwen2(tie_word_embeddings=False)[0]))
    critic = Critic(model)
    assert (values_of(critic, make_episodes((4,)), Settings()) == 0).all()
    critics_memory = {parameter.data_ptr() for parameter in critic.parameters()}
    policys_memory = {parameter.data_ptr() for parameter in model.parameters()}
    assert not critics_memory & policys_memory
    assert model.lm_head is not None
    assert not any("lm_head" in name for name, _ in critic.named_parameters())


def test_the_critics_update_equals_a_slow_loop_for_any_split(qwen2):
    _, reference = critic_and_reference(qwen2)
    episodes = make_episodes((3, 11, 1))
    g = torch.Generator().manual_seed(2)
    old = torch.randn(9, 15, generator=g)  # wider than these responses
    ret = torch.randn(9, 15, generator=g)
    tokens = sum(len(episode.response) for episode in episodes)
    loss = 0.0
    for episode, old_row, ret_row in zip(episodes, old.double(), ret.double()):
        for t, value in enumerate(reference.values(episode)):
            moved = value - old_row[t]
            kept = old_row[t] + moved.clamp(-0.4, 0.4)
            error = (value - ret_row[t]) ** 2
            error_of_kept = (kept - ret_row[t]) ** 2
            loss = loss + max(error, error_of_kept) / 2 / tokens
    loss.backward()
    want = {name: parameter.grad for name, parameter in reference.model.named_parameters()}
    size = max(float(gradient.abs().max()) for gradient in want.values())

    for micro_tokens in (1, 60, 4096):
        critic, _ = critic_and_reference(qwen2)
        before = {name: p.detach().clone() for name, p in critic.body.named_parameters()}
        make_optimizer(critic, 0.0, Settings())  # zeroes the gradients
        sgd = torch.optim.SGD(critic.parameters(), 1.0)
        s = Settings(micro_tokens=micro_tokens, value_clip=0.4, grad_clip=1e9)
        sums = update_critic(critic, sgd, episodes, old, ret, s)
        assert sums["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
        for name, parameter in critic.body.named_parameters():
            got = before[name] - parameter.detach()
            assert (got - want[name]).abs().max() <= 1e-5 * size, name


@dataclass
class CriticCall:
    episodes: list[Episode]
    value: Tensor  # [N, R], as handed over
    ret: Tensor
    now: Tensor  # the critic's values at the moment of the call
    lr: float


@dataclass
class PolicyCall:
    advantage: Tensor  # [N, R]
    lr: float


def record_updates(monkeypatch) -> list[CriticCall | PolicyCall]:
    """Every call of update and update_critic, in their order."""
    calls = []
    update = train.update
    update_critic = train.update_critic

    def spy_update(model, optimizer, episodes, old_logp, advantage, s):
        calls.append(PolicyCall(advantage.clone(), optimizer.defaults["lr"]))
        return update(model, optimizer, episodes, old_logp, advantage, s)

    def spy_update_critic(critic, optimizer, episodes, value, ret, s):
        now = values_of(critic, episodes, s)
        lr = optimizer.defaults["lr"]
        calls.append(CriticCall(episodes, value.clone(), ret.clone(), now, lr))
        return update_critic(critic, optimizer, episodes, value, ret, s)

    monkeypatch.setattr(train, "update", spy_update)
    monkeypatch.setattr(train, "update_critic", spy_update_critic)
    return calls


@dataclass
class SlowStep:
    plain: list[list[float]]  # of each answer, of each token: return - value
    returns: list[float]  # of all tokens
    mean: float  # of all of `plain`
    variance: float


def slow_step(critic_calls: list[CriticCall], tokenizer) -> SlowStep:
    """Advantages before they are whitened. At gamma = lambda = 1 every token's return is the
    answer's reward."""
    plain = []
    returns = []
    for call in critic_calls:
        responses = texts(tokenizer, call.episodes)
        for episode, value, ret, text in zip(call.episodes, call.value, call.ret, responses):
            inside = len(episode.response)
            reward = reward_by_length(None, text, True)
            assert ret[:inside].tolist() == pytest.approx([reward] * inside, abs=1e-5)
            assert (ret[inside:] == 0).all()
            plain.append([reward - v for v in value[:inside].tolist()])
            returns += ret[:inside].tolist()
    flat = sum(plain, [])
    return SlowStep(plain, returns, statistics.mean(flat), statistics.variance(flat))


def assert_whitened(policy_calls: list[PolicyCall], slow: SlowStep) -> None:
    rows = [row for call in policy_calls for row in call.advantage]
    spread = slow.variance**0.5 + 1e-6
    for row, plain in zip(rows, slow.plain):
        want = [(x - slow.mean) / spread for x in plain]
        assert row[: len(want)].tolist() == pytest.approx(want, abs=1e-4)
        assert (row[len(want) :] == 0).all()


def test_the_wiring_of_ppo(tmp_path, monkeypatch):
    calls = record_updates(monkeypatch)
    replace_reward(monkeypatch, reward_by_length)
    s = Settings(
        out=str(tmp_path),
        name="a",
        steps=3,
        critic_warmup=1,
        critic_lr=3e-3,
        lr=1e-3,
        **SMALL,
    )
    run = train.train(s)
    # One step of warm-up, in which only the critic learns.
    kinds = [type(call) for call in calls]
    assert kinds == [CriticCall, CriticCall] + [CriticCall, PolicyCall] * 4

    tokenizer = load("base")[1]
    log = read_jsonl(run / "log.jsonl")
    for line, part in zip(log, (calls[:2], calls[2:6], calls[6:]), strict=True):
        critic_calls = [call for call in part if isinstance(call, CriticCall)]
        policy_calls = [call for call in part if isinstance(call, PolicyCall)]
        assert all(call.lr == 3e-3 for call in critic_calls)
        # At the step's first call nothing has moved since the values were taken.
        first = critic_calls[0]
        assert torch.allclose(first.value[:, : first.now.shape[1]], first.now, atol=1e-6)

        slow = slow_step(critic_calls, tokenizer)
        assert_whitened(policy_calls, slow)
        explained = 1 - slow.variance / statistics.variance(slow.returns)
        assert line["explained_variance"] == pytest.approx(explained, abs=1e-4)
        assert (line["gap_mean"] is None) == (line["step"] == 1)
        assert line["value_loss"] > 0
    assert log[0]["explained_variance"] == pytest.approx(0.0, abs=1e-6)  # a new critic: nothing


def test_equal_returns_leave_nothing_to_explain(tmp_path, monkeypatch):
    replace_reward(monkeypatch, reward_none)
    s = Settings(out=str(tmp_path), name="a", steps=2, critic_warmup=1, **SMALL)
    log = read_jsonl(train.train(s) / "log.jsonl")
    assert [line["explained_variance"] for line in log] == [None, None]
    assert log[0]["shaping"] is None
    assert log[0]["critic_grad_norm"] > 0


def test_discount_and_lambda_reach_gae(tmp_path, monkeypatch):
    seen = []
    gae = train.gae

    def spy_gae(reward, value, mask, gamma, lam):
        seen.append((gamma, lam))
        return gae(reward, value, mask, gamma, lam)

    monkeypatch.setattr(train, "gae", spy_gae)
    s = Settings(
        out=str(tmp_path),
        name="a",
        steps=1,
        critic_warmup=0,
        gamma=0.9,
        lam=0.7,
        **SMALL,
    )
    train.train(s)
    assert seen == [(0.9, 0.7)]


def test_the_critics_values_are_fp32_in_bf16_compute(qwen2):
    critic, _ = critic_and_reference(qwen2)
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 112, (3, 9), generator=g)
    with torch.autocast("cpu", torch.bfloat16):
        low = critic(tokens)
    exact = critic(tokens)
    assert low.dtype == torch.float32
    assert 0 < (low - exact).abs().max() < 0.2
    assert not torch.equal(low, low.bfloat16().float())  # the head itself did not round


# A validation of one problem needs less room than the rollout, one of fifty more.
@pytest.mark.parametrize("algo, eval_problems", [("grpo", 1), ("ppo", 50)])
def test_a_dry_run_takes_every_token_and_leaves_nothing(
    tmp_path, monkeypatch, capsys, algo, eval_problems
):
    scored = []
    update = train.update

    def spy_update(*arguments):
        sums = update(*arguments)
        scored.append(sums["tokens"])
        return sums

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "update", spy_update)
    changes = {"algo": algo, "eval_problems": eval_problems}
    base = str(ROOT / "base")
    assert train.train(Settings(model=base, dry_run=True, **SMALL | changes)) is None
    assert scored == [6 * 24, 6 * 24]  # every response at the limit, and scored
    printed = capsys.readouterr().out
    assert "12 sequences of 31 tokens, peak memory" in printed
    assert "rollout" in printed
    assert not list(tmp_path.iterdir())
