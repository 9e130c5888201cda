"""lab/shared_prompt.py against model.score, which pads every answer behind a prompt of its own."""

import dataclasses

import pytest
import torch

from conftest import ARCHITECTURES, dice, distance, load_model
from lab.shared_prompt import score_group
from model import score
from plumbing.batch import collate
from rollout import Episode

LENGTHS = (5, 1, 9, 3)


def answers(prompt_length=7):
    g = dice(0)
    nothing = torch.zeros(0)
    prompt = torch.randint(2, 112, (prompt_length,), generator=g)
    episodes = []
    for length in LENGTHS:
        response = torch.randint(2, 112, (length,), generator=g)
        episodes.append(Episode(prompt, response, nothing, nothing, True, 0))
    return episodes


@pytest.fixture(params=ARCHITECTURES)
def model(request, qwen2):
    folder, _ = qwen2(**request.param)
    return load_model(folder)


@pytest.mark.parametrize("prompt_length", [1, 7])
def test_a_group_is_scored_as_its_answers_are_one_by_one(model, prompt_length):
    episodes = answers(prompt_length)
    found = torch.stack(score_group(model, episodes, 0.7))  # [2, B, R]
    assert found.shape == (2, 4, 9)
    for i, episode in enumerate(episodes):
        batch = collate([episode], torch.device("cpu"))
        rows = score(model, batch.tokens, batch.prompt_len, batch.total_len, 0.7)
        want = torch.stack(rows)[:, 0, batch.mask[0]]
        assert distance(found[:, i, : LENGTHS[i]], want) < 1e-5
        assert not found[:, i, LENGTHS[i] :].any()


def test_gradients_are_those_of_score(model):
    """Of random sums of all log-probabilities and entropies."""
    episodes = answers()
    parameters = list(model.parameters())
    weights = torch.randn(2, 4, 9, generator=dice(1))

    def gradients(values):
        found = torch.autograd.grad((values * weights).sum(), parameters)
        return torch.cat([part.flatten() for part in found])

    found = gradients(torch.stack(score_group(model, episodes, 1.0)))
    batch = collate(episodes, torch.device("cpu"))
    rows = score(model, batch.tokens, batch.prompt_len, batch.total_len, 1.0, entropy_grad=True)
    # Column 6 speaks of token 7, the first of an answer.
    want = gradients(torch.stack(rows)[:, :, 6:])
    assert distance(found, want) < 2e-5 * want.abs().max()
    assert want.abs().max() > 0.01


def test_answers_to_different_prompts_are_refused(model):
    first, *others = answers()
    other = dataclasses.replace(first, prompt=first.prompt + 1)
    with pytest.raises(ValueError, match="different prompts"):
        score_group(model, [*others, other], 1.0)
