"""plumbing/metrics.py: a log line against means by hand, explained variance against Python's
statistics."""

import statistics
from collections import Counter

import pytest
import torch

from model import load
from plumbing.metrics import (
    UpdateSums,
    count_unknown,
    critic_metrics,
    policy_metrics,
    step_times,
)
from rollout import Episode


def episode(tokens: int, entropy: float) -> Episode:
    return Episode(
        prompt=torch.zeros(1),
        response=torch.zeros(tokens),
        logp=None,
        entropy=torch.full((tokens,), entropy),
        finished=tokens < 4,
        prompt_index=0,
    )


EPISODES = [episode(2, 1.0), episode(4, 0.25)]
FIRST_UPDATE = Counter(
    tokens=2,
    kl=0.2,
    loss=-1.0,
    shaping=1.0,
    shaping_up=0.25,
    up=1,
    shaping_down=0.75,
    down=1,
    capped=1,
    gap=0.4,
    gap_max=0.3,
    grad_norm=1.0,
)
# After one, the scorer has other weights than the sampler: these gaps are no longer a check.
SECOND_UPDATE = Counter(
    tokens=6,
    kl=0.2,
    loss=0.5,
    shaping_up=0.25,
    up=4,
    clipped_high=2,
    gap=9.0,
    gap_max=5.0,
    grad_norm=2.0,
)
ONE_RIGHT = torch.tensor([1.0, -1.0])
BOTH_RIGHT = torch.tensor([1.0, 1.0])


def test_statistics_of_a_step_are_those_of_its_updates():
    line = policy_metrics(3, EPISODES, ONE_RIGHT, [FIRST_UPDATE, SECOND_UPDATE], 2)
    line["entropy"] = round(line["entropy"], 6)
    assert line == pytest.approx(
        {
            "step": 3,
            "reward": 0.0,
            "length": 3.0,
            "finished": 0.5,
            "entropy": 0.5,
            "equal_groups": 0.0,
            "shaping": 1 / 8,
            "shaping_up": 0.5 / 5,
            "shaping_down": 0.75,
            "capped": 1 / 8,
            "clip_low": 0.0,
            "clip_high": 2 / 8,
            "kl": 0.4 / 8,
            "loss": -0.25,
            "gap_mean": 0.2,
            "gap_max": 0.3,
            "grad_norm": 1.5,
            "tokens": 6,
        }
    )


def test_what_was_not_measured_is_none_and_not_0():
    warming = policy_metrics(3, EPISODES, ONE_RIGHT, [], 2)
    of_updates = (
        "shaping",
        "shaping_up",
        "capped",
        "clip_low",
        "clip_high",
        "kl",
        "loss",
        "grad_norm",
        "gap_mean",
    )
    for name in of_updates:
        assert warming[name] is None

    nothing_scored_first = policy_metrics(3, EPISODES, BOTH_RIGHT, [Counter(), SECOND_UPDATE], 2)
    assert nothing_scored_first["gap_mean"] is None
    assert nothing_scored_first["gap_max"] is None
    assert nothing_scored_first["equal_groups"] == 1.0


def test_explained_variance_is_one_minus_the_share_that_is_left():
    value = torch.tensor([0.0, 1.0, 2.0, 5.0])
    ret = torch.tensor([0.0, 2.0, 2.0, 4.0])
    left = statistics.variance([0.0, 1.0, 0.0, -1.0])
    updates = [Counter(loss=1.0, grad_norm=2.0), Counter(loss=2.0)]
    assert critic_metrics(updates, value, ret) == pytest.approx(
        {
            "value_loss": 1.5,
            "critic_grad_norm": 1.0,
            "explained_variance": 1 - left / statistics.variance([0.0, 2.0, 2.0, 4.0]),
        }
    )


def test_step_times_are_medians():
    log = [
        {"rollout_s": rollout, "reward_s": 0.5, "update_s": 4.0 * rollout, "score_s": 1.25}
        for rollout in (1.0, 2.0, 9.0)
    ]
    assert step_times(log) == (
        "median seconds of a step: rollout 2.00, reward 0.50, update 8.00 "
        "(of it 1.25 scoring, forward)"
    )


def test_tokens_that_the_tokenizer_does_not_know_are_counted():
    """They vanish from the text, so that `12` and `1?2` would be graded alike."""
    _, tokenizer = load("base")
    known = tokenizer.encode("7 * 8 = 56")
    unknown = len(tokenizer) + 3
    responses = [known, [known[0], unknown, unknown, known[1]], [unknown]]
    episodes = [
        Episode(torch.zeros(1), torch.tensor(response), None, None, True, 0)
        for response in responses
    ]
    assert count_unknown(episodes, tokenizer) == 3
    assert count_unknown(episodes[:1], tokenizer) == 0
    assert tokenizer.decode(responses[1]) == tokenizer.decode(known[:2])


def test_an_updates_sums_are_those_of_adding_up_numbers():
    """Counts, float32 and bfloat16 numbers of three micro-batches, as Python's floats, in which
    they are exact; of the largest gap, the largest."""
    parts = [(3, 0.1, 0.5), (4, 0.2, 0.25), (2**20 + 1, 1e-8, 0.75)]
    sums = UpdateSums()
    for tokens, loss, gap in parts:
        sums.add({"tokens": torch.tensor(tokens), "loss": torch.tensor(loss)})
        sums.add({"gap_max": torch.tensor(gap).bfloat16()})
    sums.add({"grad_norm": torch.tensor(2.5)})
    sums.score_s += 1.5

    in_float32 = [float(torch.tensor(loss)) for _, loss, _ in parts]
    assert sums.total() == {
        "tokens": sum(tokens for tokens, _, _ in parts),
        "loss": sum(in_float32),
        "gap_max": 0.75,
        "grad_norm": 2.5,
        "score_s": 1.5,
    }
