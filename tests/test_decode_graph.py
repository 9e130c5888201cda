"""plumbing/decode_graph.py on a pretended CUDA device, where a replay repeats the recorded operations
on the recorded memory: rollouts with graphs against the same without, and mutants of the code."""

import json

import pytest
import torch

from plumbing.decode_graph import same, tolerance_of
from pretended import ROOT, pretended_python


@pytest.fixture(scope="module")
def found():
    """What decode_graph_cases prints."""
    source = f"sys.path.append({str(ROOT / 'tests')!r}); import decode_graph_cases as cases\n"
    return json.loads(pretended_python(f"{source}cases.everything()"))


@pytest.fixture
def rollouts(found):
    return found["rollouts"]


@pytest.fixture
def mutants(found):
    return found["mutants"]


@pytest.mark.parametrize(
    "name, shapes",
    [
        ("refills", 7),  # two calls of three lengths each, and at least one smaller batch
        ("all at once", 3),
        ("top-p", 3),
        ("bf16 copy", 3),
    ],
)
def test_replayed_steps_equal_eager_ones(rollouts, name, shapes):
    """Tokens, log-probabilities and entropies to the bit, over growths of the cache, a shrinking
    tail and a second call after free(). The tokens are those of a CPU too, where no line of this is
    reached."""
    case = rollouts[name]
    assert case["equal"]
    assert case["equals the CPU"]
    assert case["said"] == ""
    assert case["captured"] >= shapes
    assert case["captured without"] == 0
    # Most steps are replays. The cache grew twice, by 32, and some rows ended long before others.
    shortest, longest = case["lengths"][0], case["lengths"][-1]
    assert case["replays"] > longest // 2
    assert longest > 64 > 4 * shortest


def test_a_rollout_waits_at_most_twice_a_round(found):
    """Once to see what has ended, once more to fetch it."""
    rounds = found["waits"]["rounds"]
    places = found["waits"]["waits"]
    waits = {place: number for place, number in places.items() if place.startswith("rollout.py")}
    assert len(waits) == 2
    assert max(waits.values()) == rounds
    assert all(place.endswith("device to host") for place in waits)


@pytest.mark.parametrize(
    "name, reason",
    [
        ("rebound token", "makes new tensors for its state"),
        ("rebound position", "makes new tensors for its state"),
        ("rebound record", "makes new tensors for its state"),
        ("a wait", "could not be recorded"),
        ("a mask of flags, which waits", "could not be recorded"),
        ("an unknown generator", "could not be recorded"),
    ],
)
def test_a_step_that_cannot_be_a_graph_goes_on_without_one(mutants, name, reason):
    """With one line that says why, and the episodes of a sampler without graphs."""
    case = mutants[name]
    assert case["noticed"]
    assert case["right"]
    assert case["said"].startswith("warning: ")
    assert reason in case["said"]
    assert case["said"].count("\n") == 1


@pytest.mark.parametrize("name", ["a number of Python's", "the same random numbers twice"])
def test_a_replay_that_differs_from_its_step_is_noticed(mutants, name):
    assert mutants[name]["noticed"]
    assert "differs" in mutants[name]["said"]


@pytest.mark.parametrize(
    "name", ["a shape without the cache", "a shape without the rows", "a shape without sizes"]
)
def test_a_graph_of_another_shape_would_give_other_episodes(mutants, name):
    """Or fail, or never end: the comparison with eager steps has the power to see it."""
    assert not mutants[name]["right"]


def test_tokens_are_compared_exactly_and_nats_nearly():
    """A rounding of a logit of 20 passes, 2^-20 in float32 and 2^-4 in bfloat16; a tenth of a nat in
    float32, a quarter in bfloat16, nan and another token do not."""
    nats = torch.tensor([1.0, 2.0])
    fine = tolerance_of(torch.float32)
    coarse = tolerance_of(torch.bfloat16)
    assert same(nats, nats + 2**-20, fine)
    assert not same(nats, nats + 0.1, fine)
    assert same(nats, nats + 2**-4, coarse)
    assert not same(nats, nats + 0.25, coarse)
    assert not same(nats, torch.tensor([1.0, torch.nan]), coarse)
    tokens = torch.tensor([3, 4])
    assert same(tokens, tokens.clone(), coarse)
    assert not same(tokens, torch.tensor([3, 5]), coarse)
