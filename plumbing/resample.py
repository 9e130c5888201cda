"""Dynamic sampling (DAPO, arXiv 2503.14476): a problem whose answers are all right or all wrong
teaches nothing, and another problem takes its place. Read it when you want --resample; without the
flag, train.py uses nothing of this.

A *place* is a number from 0 in the list of a step's problems. It says which process has the problem,
and which minibatch. It is *open* as long as all rewards of its group of answers are equal. A round
draws a further problem for each open place; a group that teaches takes the place, any other is
dropped. A place that is still open after the last round keeps the group that was first there: its
A is 0, and its tokens count in the denominator of the loss as those of any such group do.
"""

import itertools
from typing import TYPE_CHECKING, Callable, NamedTuple, Sequence

import torch
from torch import Tensor

from plumbing.batch import my_share
from plumbing.distributed import gather, join
from plumbing.seeds import seeded_generator

if TYPE_CHECKING:  # they import this file, or what imports it
    from plumbing.settings import Settings
    from rollout import Episode

# Problems and the number of the round, from 1 -> answers, `samples` to each problem in turn, and
# their rewards.
Draw = Callable[[Sequence, int], tuple[list["Episode"], Tensor]]


class Group(NamedTuple):
    """The answers to one problem."""

    episodes: list["Episode"]
    reward: Tensor  # [samples]

    @property
    def teaches(self) -> bool:
        return bool(self.reward.max() > self.reward.min())


class Resampled(NamedTuple):
    """What this process learns from."""

    episodes: list["Episode"]  # as many as without --resample, in the order of their places
    reward: Tensor  # [N]
    rounds: int  # that were used


def resample(
    problems: Sequence,
    episodes: list["Episode"],
    reward: Tensor,
    draw: Draw,
    candidates: Sequence,
    step: int,
    s: "Settings",
) -> Resampled:
    """Up to s.resample rounds. `problems`: those of the step, of all processes; `episodes` and
    `reward` [N]: this process's answers to its share of them; `candidates`: what further problems
    are taken from. All processes must call it."""
    rank, world = join()
    my_places = my_share(range(len(problems)), s.minibatch, rank, world)
    groups = dict(zip(my_places, groups_of(episodes, reward, s.samples)))
    drawn = list(problems)
    rounds = 0
    while rounds < s.resample:
        # Every process knows all open places, and so which further problem belongs to each.
        my_open = [place for place, group in groups.items() if not group.teaches]
        all_open = sorted(itertools.chain.from_iterable(gather(my_open)))
        if not all_open:
            break
        rounds += 1
        order = seeded_generator(s.seed, step, f"further problems {rounds}")
        further = further_problems(candidates, drawn, len(all_open), order)
        drawn += further
        problem_at = dict(zip(all_open, further))

        # A process that needs no more has nothing to sample, but goes on to agree with the others.
        if my_open:
            answers, rewards = draw([problem_at[place] for place in my_open], rounds)
            new_groups = groups_of(answers, rewards, s.samples)
            groups |= {place: new for place, new in zip(my_open, new_groups) if new.teaches}

    kept = list(groups.values())
    answers = [episode for group in kept for episode in group.episodes]
    rewards = torch.cat([group.reward for group in kept])
    return Resampled(answers, rewards, rounds)


def groups_of(episodes: list["Episode"], reward: Tensor, samples: int) -> list[Group]:
    """reward [N]; the answers to one problem are neighbours."""
    return [
        Group(episodes[first : first + samples], reward[first : first + samples])
        for first in range(0, len(episodes), samples)
    ]


def further_problems(
    candidates: Sequence, drawn: Sequence, count: int, order: torch.Generator
) -> list:
    """`count` of the candidates, shuffled by `order`: first those that are not among the `drawn`,
    then the others, and all of them again if that is not enough."""
    shuffled = torch.randperm(len(candidates), generator=order).tolist()
    distinct = dict.fromkeys(candidates[i] for i in shuffled)
    known = set(drawn)
    fresh = [problem for problem in distinct if problem not in known]
    again = [problem for problem in distinct if problem in known]
    return list(itertools.islice(itertools.cycle(fresh + again), count))
