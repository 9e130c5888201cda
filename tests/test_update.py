"""The policy's update: its gradient against a slow loop over tokens in float64, on transformers'
logits; its step against torch's own AdamW."""

import itertools
import math
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model import Transformer, load, score
from plumbing.batch import collate, pad_responses
from plumbing.seeds import seeded_generator
from plumbing.settings import Settings
from rollout import Episode, Sampler
from train import update

# An advantage for each of twelve episodes; the second group of four teaches nothing.
MIXED = torch.tensor([1.5, -0.5, -0.5, -0.5, 0, 0, 0, 0, 0.87, 0.87, -0.87, -0.87])
TEMPERATURE = 0.9
ALPHA = 0.05
KAPPA = 3.0  # the cap binds where |A| = 0.5
CLIP_LOW = 0.15
CLIP_HIGH = 0.35


def end_often(decoder: torch.nn.Module) -> None:
    """Makes the end token likelier. Its id is 0, which padding has too."""
    with torch.no_grad():
        decoder.embed_tokens.weight[0] *= 3


def fresh_model(folder: Path) -> Transformer:
    model, _ = load(str(folder))
    end_often(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return model


def make_episodes(model: Transformer, prompts: int = 3) -> list[Episode]:
    """Real episodes, four of each prompt, but with an old policy that differs from the model's, so
    that ratios lie on both sides of the clip."""
    g = torch.Generator().manual_seed(0)
    lengths = (2, 9, 5)[:prompts]
    prompt_ids = [torch.randint(1, 112, (length,), generator=g).tolist() for length in lengths]
    sampler = Sampler(model, 8, 60, (0,))
    episodes = sampler.generate(prompt_ids, 4, 40, 1.0, seeded_generator(0, 0, "test"))
    if prompts == 3:
        assert {episode.finished for episode in episodes} == {True, False}
        assert len({len(episode.response) for episode in episodes}) > 3
    shifted = []
    for episode in episodes:
        shift = 0.3 * torch.randn(episode.logp.shape, generator=g)
        shifted.append(replace(episode, logp=episode.logp + shift))
    return shifted


def run_update(
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    episodes: list[Episode],
    advantage: Tensor,
    s: Settings,
) -> Counter:
    """An update with one advantage per episode, [N]."""
    old_logp, counted = pad_responses([episode.logp for episode in episodes])
    return update(model, optimizer, episodes, old_logp, advantage[:, None] * counted, s)


def sgd(model: Transformer, lr: float = 1.0) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr)


def copy_parameters(model: Transformer) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@dataclass
class SlowUpdate:
    """The loss, with its graph, and what is counted on the way."""

    loss: Tensor | float = 0.0
    outside_clip: int = 0
    gap_max: float = 0.0
    # psi / |A| of every token with a positive and with a negative advantage.
    shaping: dict[str, list[float]] = field(default_factory=lambda: {"up": [], "down": []})


def slow_update(reference, episodes: list[Episode], beta: float) -> SlowUpdate:
    slow = SlowUpdate()
    tokens = sum(len(episode.response) for episode in episodes)
    for episode, a in zip(episodes, MIXED.tolist()):
        text = torch.cat((episode.prompt, episode.response))
        logits = reference(text[None]).logits[0, len(episode.prompt) - 1 : -1] / TEMPERATURE
        # Every response token, the end token included.
        for t, token in enumerate(episode.response):
            logp = logits[t].log_softmax(-1)
            entropy = -(logp.exp() * logp).sum()
            shaped = a + min(ALPHA * float(entropy.detach()), abs(a) / KAPPA)
            ratio = (logp[token] - episode.logp[t].double()).exp()
            clipped = ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH)
            objective = torch.min(ratio * shaped, clipped * shaped) + beta * entropy
            slow.loss = slow.loss - objective / tokens

            if not 1 - CLIP_LOW < float(ratio.detach()) < 1 + CLIP_HIGH:
                slow.outside_clip += 1
            if a != 0:
                slow.shaping["up" if a > 0 else "down"].append((shaped - a) / abs(a))
            if a != 0 or beta:
                gap = abs(math.log(float(ratio.detach())))
                slow.gap_max = max(slow.gap_max, gap)
    return slow


def assert_equal_sums(sums: Counter, slow: SlowUpdate, scored: list[Episode]) -> None:
    assert sums["loss"] == pytest.approx(slow.loss.item(), abs=1e-5)
    assert sums["tokens"] == sum(len(episode.response) for episode in scored)
    both = [*slow.shaping["up"], *slow.shaping["down"]]
    assert sums["shaping"] == pytest.approx(sum(both), rel=1e-4)
    assert sums["capped"] == sum(share > 0.9999 / KAPPA for share in both)
    assert 0 < sums["capped"] < len(both)
    for side, shares in slow.shaping.items():
        assert sums[side] == len(shares) > 0
        assert sums[f"shaping_{side}"] == pytest.approx(sum(shares), rel=1e-4)


@pytest.mark.parametrize("beta", [0.0, 0.7])
def test_gradient_equals_a_slow_loop_for_any_split_with_or_without_zero_advantage_sequences(
    qwen2, beta
):
    folder, reference = qwen2()
    reference = reference.double()
    end_often(reference.model)
    episodes = make_episodes(fresh_model(folder))
    slow = slow_update(reference, episodes, beta)
    slow.loss.backward()
    assert slow.outside_clip > 10
    want = {name.removeprefix("model."): p.grad for name, p in reference.named_parameters()}
    size = max(float(gradient.abs().max()) for gradient in want.values())
    assert size > 0.01

    splits = itertools.product(
        (1, 150, 10_000),  # micro_tokens
        (True, False),  # skip_zero
        (5, 2048),  # chunk
    )
    for micro_tokens, skip_zero, chunk in splits:
        s = Settings(
            grad_clip=1e9,
            micro_tokens=micro_tokens,
            chunk=chunk,
            skip_zero=skip_zero,
            temperature=TEMPERATURE,
            alpha=ALPHA,
            kappa=KAPPA,
            clip_low=CLIP_LOW,
            clip_high=CLIP_HIGH,
            entropy_coef=beta,
        )
        model = fresh_model(folder)
        before = copy_parameters(model)
        sums = run_update(model, sgd(model), make_episodes(model), MIXED, s)

        # SGD with a rate of 1 moves the weights by minus the gradient.
        for name, after in model.named_parameters():
            got = before[name] - after.detach()
            assert (got - want[name]).abs().max() <= 1e-5 * size, (name, micro_tokens, skip_zero)
        all_scored = not skip_zero or beta
        scored = [episode for episode, a in zip(episodes, MIXED) if a != 0 or all_scored]
        assert_equal_sums(sums, slow, scored)
        assert sums["gap_max"] >= slow.gap_max - 1e-4
        if skip_zero:
            assert sums["gap_max"] < slow.gap_max + 1e-4


def test_the_gradient_is_clipped(qwen2):
    model = fresh_model(qwen2()[0])
    episodes = make_episodes(model)
    before = copy_parameters(model)
    sums = run_update(model, sgd(model), episodes, MIXED, Settings(grad_clip=1e-3))
    squares = 0.0
    for name, after in model.named_parameters():
        moved = after.detach() - before[name]
        squares += float((moved**2).sum())
    assert math.sqrt(squares) == pytest.approx(1e-3, rel=0.02)
    assert sums["grad_norm"] > 0.1


def test_a_loss_that_is_not_finite_stops_the_run_before_the_step(qwen2):
    model = fresh_model(qwen2()[0])
    episodes = make_episodes(model)
    with torch.no_grad():
        model.norm.weight[0] = math.nan
    before = copy_parameters(model)
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        run_update(model, sgd(model), episodes, MIXED, Settings())
    for name, after in model.named_parameters():
        if name != "norm.weight":  # nan is not equal to nan
            assert torch.equal(after, before[name])


def test_an_update_without_live_sequences_still_steps(qwen2):
    """Zero gradients, not None: AdamW's momentum goes on as if the gradient were 0."""
    model = fresh_model(qwen2()[0])
    episodes = make_episodes(model)
    reference = [torch.nn.Parameter(p.detach().clone()) for p in model.parameters()]
    mine = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.01)
    theirs = torch.optim.AdamW(reference, 1e-2, weight_decay=0.01)

    def hand_over_gradients(*_) -> None:
        for theirs_parameter, parameter in zip(reference, model.parameters()):
            theirs_parameter.grad = parameter.grad.clone()

    mine.register_step_pre_hook(hand_over_gradients)
    for advantage in (MIXED, torch.zeros(12), torch.zeros(12)):
        sums = run_update(model, mine, episodes, advantage, Settings())
        theirs.step()
        assert (sums["tokens"] > 0) == bool(advantage.any()) == (sums["grad_norm"] > 0)
    for parameter, theirs_parameter in zip(model.parameters(), reference, strict=True):
        assert torch.equal(parameter, theirs_parameter)


def test_a_right_answer_becomes_likelier_its_end_token_too(qwen2):
    model = fresh_model(qwen2()[0])
    episodes = make_episodes(model, prompts=1)
    ended = next(i for i, e in enumerate(episodes) if e.finished and len(e.response) > 1)
    advantage = torch.zeros(4)
    advantage[ended] = 1.0

    def logp_of_the_answer() -> Tensor:
        batch = collate([episodes[ended]], torch.device("cpu"))
        logp, _ = score(model, batch.tokens, batch.prompt_len, batch.total_len, 1.0)
        return logp[0].detach()

    before = logp_of_the_answer()
    run_update(model, sgd(model, 0.05), episodes, advantage, Settings(clip_high=100.0, alpha=0.0))
    after = logp_of_the_answer()
    assert after.sum() > before.sum()
    assert after[-1] > before[-1]
