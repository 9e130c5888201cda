"""plumbing/batch.py: micro-batches and data order against what they promise; the two layouts of a
number per token against a slow loop over lengths."""

import torch

from plumbing.batch import collate, micro_batches, my_share, problems_of_step
from rollout import Episode


def test_micro_batches_hold_everything_once_within_the_budget():
    lengths = [5, 60, 7, 7, 30, 100, 2, 59]
    episodes = [
        Episode(torch.zeros(2), torch.zeros(length - 2), None, None, True, 0) for length in lengths
    ]
    for budget in (1, 64, 130, 1000):
        batches = micro_batches(episodes, budget)
        everything = sorted(i for batch in batches for i in batch)
        assert everything == list(range(8))
        for batch in batches:
            longest = max(lengths[i] for i in batch)
            assert len(batch) * longest <= budget or len(batch) == 1
    assert len(micro_batches(episodes, 1000)) == 1
    assert micro_batches([], 10) == []


def problems_of_steps(problems: list, seed: int) -> list:
    """Those of five steps of four problems each."""
    steps = [problems_of_step(problems, 4, step, seed) for step in range(5)]
    return sum(steps, [])


def test_data_order_visits_every_problem_once_an_epoch():
    problems = list(range(10))
    drawn = problems_of_steps(problems, seed=3)
    first_epoch = drawn[:10]
    second_epoch = drawn[10:]
    assert sorted(first_epoch) == sorted(second_epoch) == problems
    assert first_epoch != second_epoch


def test_any_step_alone_has_the_same_problems_as_in_a_whole_run():
    problems = list(range(10))
    assert problems_of_step(problems, 4, 2, seed=3) == problems_of_steps(problems, seed=3)[8:12]


def test_another_seed_is_another_data_order():
    problems = list(range(10))
    assert problems_of_steps(problems, seed=4) != problems_of_steps(problems, seed=3)


def test_processes_share_every_minibatch_evenly_and_leave_nothing_out():
    problems = list(range(12))
    shares = [my_share(problems, 4, rank, world=2) for rank in range(2)]
    assert shares == [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11]]


def test_a_number_per_response_token_gets_to_its_column_and_back():
    lengths = [(2, 3), (5, 1), (1, 4)]  # of prompt and response
    episodes = [
        Episode(torch.ones(p).long(), torch.ones(r).long(), None, None, True, 0) for p, r in lengths
    ]
    batch = collate(episodes, torch.device("cpu"))
    values = torch.arange(1.0, 16.0).view(3, 5)  # wider than the longest response

    columns = batch.align(values)
    want = torch.zeros(3, 5)  # six tokens at most, so five columns
    for row, (prompt, response) in enumerate(lengths):
        for token in range(response):
            want[row, prompt + token - 1] = values[row, token]
    assert torch.equal(columns, want)
    assert torch.equal(batch.mask, want != 0)

    back = batch.unalign(columns, 5)
    for row, (_, response) in enumerate(lengths):
        assert torch.equal(back[row, :response], values[row, :response])
        assert not back[row, response:].any()
