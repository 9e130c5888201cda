"""PPO: the critic against transformers, its update against a slow loop, and what the loop hands to whom."""

import json
import statistics
from collections import Counter

import pytest
import torch

import train
from checkpoint import explained
from model import Critic, load
from rollout import Episode, per_token
from train import Settings, adamw, critic_advantage, update_critic

SMALL = dict(algo="ppo", prompts=4, samples=3, minibatch=2, eval_problems=2, eval_samples=1, final_samples=2, slots=12,
             max_new_tokens=24)


def episodes_of(lengths, prompts=(2, 9, 5)):
    g = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(1, 112, (n,), generator=g)
    return [Episode(draw(p), draw(n), torch.zeros(n), torch.zeros(n), True, 0) for p in prompts for n in lengths]


def values_of(critic, episodes, s):
    counted = per_token([e.logp for e in episodes])[1]
    return critic_advantage(critic, episodes, torch.zeros(len(episodes)), counted, s)[1]


def critic_and_reference(qwen2, **changes):
    """A critic with a head that is not zero, and the same values by transformers in float64: episode -> [R]."""
    folder, reference = qwen2(**changes)
    critic, reference = Critic(load(str(folder))[0]), reference.double()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        critic.value.weight.copy_(torch.randn(critic.value.weight.shape, generator=g) * 0.3)
        critic.value.bias.fill_(0.25)
    weight, bias = (p.detach().double() for p in (critic.value.weight, critic.value.bias))

    def slow(e):
        hidden = reference.model(torch.cat((e.prompt, e.response))[None]).last_hidden_state[0]
        return hidden[len(e.prompt) - 1:-1] @ weight[0] + bias              # of the text before each response token
    return critic, reference, slow


@pytest.mark.parametrize("tied", [True, False])
def test_values_equal_transformers(qwen2, tied):
    critic, _, slow = critic_and_reference(qwen2, tie_word_embeddings=tied)
    episodes = episodes_of((3, 11, 1))
    for micro_tokens in (1, 60, 4096):
        got = values_of(critic, episodes, Settings(micro_tokens=micro_tokens))
        assert got.shape == (9, 11)
        for row, e in zip(got, episodes):
            assert torch.allclose(row[:len(e.response)].double(), slow(e).detach(), atol=1e-4)
            assert (row[len(e.response):] == 0).all()


def test_a_new_critic_says_zero_and_leaves_the_policy_alone(qwen2):
    model, _ = load(str(qwen2(tie_word_embeddings=False)[0]))
    critic = Critic(model)
    assert (values_of(critic, episodes_of((4,)), Settings()) == 0).all()
    assert not {p.data_ptr() for p in critic.parameters()} & {p.data_ptr() for p in model.parameters()}
    assert model.lm_head is not None and not any("lm_head" in name for name, _ in critic.named_parameters())


def test_the_critics_update_equals_a_slow_loop_for_any_split(qwen2):
    critic, reference, slow = critic_and_reference(qwen2)
    episodes = episodes_of((3, 11, 1))
    g = torch.Generator().manual_seed(2)
    old, ret = torch.randn(9, 15, generator=g), torch.randn(9, 15, generator=g)     # wider than these responses
    tokens, loss = sum(len(e.response) for e in episodes), 0.0
    for e, o, r in zip(episodes, old.double(), ret.double()):
        for t, v in enumerate(slow(e)):
            kept = o[t] + (v - o[t]).clamp(-0.4, 0.4)
            loss = loss + max((v - r[t]) ** 2, (kept - r[t]) ** 2) / 2 / tokens
    loss.backward()
    want = {name: p.grad for name, p in reference.model.named_parameters()}
    size = max(float(g.abs().max()) for g in want.values())
    for micro_tokens in (1, 60, 4096):
        fresh = critic_and_reference(qwen2)[0]
        before = {name: p.detach().clone() for name, p in fresh.body.named_parameters()}
        adamw(fresh, 0.0, Settings())                                       # zeroes the gradients
        sums = update_critic(fresh, torch.optim.SGD(fresh.parameters(), 1.0), episodes, old, ret,
                             Settings(micro_tokens=micro_tokens, value_clip=0.4, grad_clip=1e9))
        assert sums["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
        for name, p in fresh.body.named_parameters():
            assert (before[name] - p.detach() - want[name]).abs().max() <= 1e-5 * size, name


def test_the_wiring_of_ppo(tmp_path, monkeypatch):
    calls = []
    policy, critic = train.update, train.update_critic
    monkeypatch.setattr(train, "update", lambda m, o, e, p, a, s: calls.append(("policy", e, a.clone(), o.defaults["lr"])) or policy(m, o, e, p, a, s))
    monkeypatch.setattr(train, "update_critic", lambda c, o, e, v, r, s: calls.append(
        ("critic", e, v.clone(), r.clone(), values_of(c, e, s), o.defaults["lr"])) or critic(c, o, e, v, r, s))
    right = lambda text: 1.0 if len(text) % 3 == 0 else -1.0
    monkeypatch.setattr(type(train.load_task("countdown")), "reward", lambda self, problem, text, finished: right(text))
    run = train.train(Settings(out=str(tmp_path), name="a", steps=3, critic_warmup=1, critic_lr=3e-3, lr=1e-3, **SMALL))
    assert [c[0] for c in calls] == ["critic", "critic"] + ["critic", "policy"] * 4     # one step of warm-up
    tokenizer = load("base")[1]
    steps = {1: calls[:2], 2: calls[2:6], 3: calls[6:]}
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    for step, line in enumerate(log, 1):
        critics, policies = ([c for c in steps[step] if c[0] == kind] for kind in ("critic", "policy"))
        plain, returns, values = [], [], []
        for _, episodes, value, ret, now, lr in critics:
            assert lr == 3e-3
            if episodes is critics[0][1]:                                   # nothing has moved since the values were taken
                assert torch.allclose(value[:, :now.shape[1]], now, atol=1e-6)
            for e, v, r, text in zip(episodes, value, ret, train.texts(tokenizer, episodes)):
                n = len(e.response)
                assert r[:n].tolist() == pytest.approx([right(text)] * n, abs=1e-5) and (r[n:] == 0).all()
                plain.append([right(text) - x for x in v[:n].tolist()])
                returns += r[:n].tolist()
                values += v[:n].tolist()
        flat = [x for row in plain for x in row]
        mean, spread = statistics.mean(flat), statistics.stdev(flat)
        got = [row for _, _, a, lr in policies for row in a]
        for row, want in zip(got, plain):
            assert row[:len(want)].tolist() == pytest.approx([(x - mean) / (spread + 1e-6) for x in want], abs=1e-4)
            assert (row[len(want):] == 0).all()
        assert line["explained_variance"] == pytest.approx(1 - statistics.variance(flat) / statistics.variance(returns), abs=1e-4)
        assert (line["gap_mean"] is None) == (step == 1) and line["value_loss"] > 0
    assert log[0]["explained_variance"] == pytest.approx(0.0, abs=1e-6)     # a new critic explains nothing
    assert Settings(algo="ppo").alpha == 0.1 and Settings().alpha == 0.4 and Settings(algo="ppo", alpha=0.0).alpha == 0.0


def test_equal_returns_leave_nothing_to_explain(tmp_path, monkeypatch):
    monkeypatch.setattr(type(train.load_task("countdown")), "reward", lambda *_: -1.0)
    run = train.train(Settings(out=str(tmp_path), name="a", steps=2, critic_warmup=1, **SMALL))
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["explained_variance"] for line in log] == [None, None] and log[0]["shaping"] is None
    assert log[0]["critic_grad_norm"] > 0
    value, ret = torch.tensor([0.0, 1.0, 2.0, 5.0]), torch.tensor([0.0, 2.0, 2.0, 4.0])
    want = 1 - statistics.variance([0.0, 1.0, 0.0, -1.0]) / statistics.variance([0.0, 2.0, 2.0, 4.0])
    assert explained([Counter(loss=1.0, grad_norm=2.0), Counter(loss=2.0)], value, ret) == pytest.approx(
        {"value_loss": 1.5, "critic_grad_norm": 1.0, "explained_variance": want})


def test_discount_and_lambda_reach_gae(tmp_path, monkeypatch):
    seen, real = [], train.gae
    monkeypatch.setattr(train, "gae", lambda r, v, m, gamma, lam: seen.append((gamma, lam)) or real(r, v, m, gamma, lam))
    train.train(Settings(out=str(tmp_path), name="a", steps=1, critic_warmup=0, gamma=0.9, lam=0.7, **SMALL))
    assert seen == [(0.9, 0.7)]


def test_the_critics_values_are_fp32_in_bf16_compute(qwen2):
    critic = critic_and_reference(qwen2)[0]
    tokens = torch.randint(1, 112, (3, 9), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        low = critic(tokens)
    exact = critic(tokens)
    assert low.dtype == torch.float32 and 0 < (low - exact).abs().max() < 0.2
    assert not torch.equal(low, low.bfloat16().float())                     # the head itself did not round


def test_a_dry_run_takes_every_token_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    base = str(train.Path(train.__file__).parent / "base")
    for algo, problems in (("grpo", 1), ("ppo", 50)):                      # validations that need less room, and more
        seen = []
        original = train.update
        with monkeypatch.context() as patch:
            patch.setattr(train, "update", lambda *arguments: seen.append(original(*arguments)) or seen[-1])
            assert train.train(Settings(model=base, dry_run=True, **SMALL | {"algo": algo, "eval_problems": problems})) is None
        assert [sums["tokens"] for sums in seen] == [6 * 24, 6 * 24]       # every response at the limit, and scored
        printed = capsys.readouterr().out
        assert "12 sequences of 31 tokens, peak memory" in printed and "rollout" in printed
    assert not list(tmp_path.iterdir())


def test_a_run_without_mixed_groups_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(type(train.load_task("countdown")), "reward", lambda *_: -1.0)
    train.train(Settings(out=str(tmp_path), name="a", steps=21, **SMALL | {"algo": "grpo", "prompts": 2, "max_new_tokens": 4}))
    said = capsys.readouterr().err
    assert said.count("no group had both right and wrong answers in 20 steps") == 1 and "more --samples" in said
