"""What other problems, or other labels, would have given: a bootstrap and a permutation test.

Responses to one problem are not independent, so intervals come from drawing problems anew.
evaluate.bootstrap does that for a mean of one figure per problem; here a problem has several sums,
and the figure is any function of their totals, such as a ratio or a difference of means.
"""

import itertools
import math
from typing import Callable

import numpy as np

RESAMPLES = 2000
PERMUTATIONS = 1000


def bootstrap_problems(
    figures: Callable[[np.ndarray], np.ndarray], totals: np.ndarray
) -> list[dict]:
    """Resamples problems, with all that belongs to each -> each figure with its 95 % interval.

    totals: the sums of each problem, [problems, columns]. `figures` makes numbers [F] of sums
    [columns], and [F, N] of [columns, N]."""
    problems = len(totals)
    rng = np.random.default_rng(0)
    chance = np.full(problems, 1 / problems)
    weights = rng.multinomial(problems, chance, size=RESAMPLES)  # how often each is drawn
    with np.errstate(all="ignore"):
        points = figures(totals.sum(0))  # [F]
        resampled = figures((weights @ totals).T)  # [F, RESAMPLES]

    found = []
    for point, values in zip(points, resampled):
        values = values[np.isfinite(values)]  # a resample may have none of a kind
        interval = [math.nan, math.nan]
        if len(values):
            interval = np.percentile(values, [2.5, 97.5]).tolist()
        found.append({"mean": float(point), "interval": interval})
    return found


def permutation_p(
    values: np.ndarray, label: np.ndarray, group: np.ndarray, permutations: int = PERMUTATIONS
) -> float:
    """Two-sided p of the difference of means, if labels are shuffled within each stretch of equal
    `group`: over all arrangements, if they are no more than `permutations`, else at random. nan if
    no group has both labels."""
    cuts = np.flatnonzero(np.diff(group)) + 1
    mixed = []  # values, less their mean, and labels of each group that has both labels
    for part, labels in zip(np.split(values, cuts), np.split(label, cuts)):
        if 0 < labels.sum() < len(labels):
            mixed.append((part - part.mean(), labels))
    if not mixed:
        return math.nan

    # Each group keeps its number of labels, so the difference of means grows with the sum over the
    # labelled values.
    distance = abs(sum(part[labels].sum() for part, labels in mixed))
    tolerance = 1e-9 * (1 + distance)  # ties count as extreme, whatever their rounding
    arrangements = 1
    for _, labels in mixed:
        arrangements *= math.comb(len(labels), int(labels.sum()))
    exact = arrangements <= permutations
    if exact:
        sums = sums_of_all_arrangements(mixed)
    else:
        sums = sums_of_random_arrangements(mixed, permutations)
    extreme = int((abs(sums) >= distance - tolerance).sum())
    if exact:
        return extreme / len(sums)
    return (extreme + 1) / (permutations + 1)  # what was observed is an arrangement too


def sums_of_all_arrangements(groups: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """The sum over the labelled values, for every choice of labels in every group."""
    sums = np.zeros(1)
    for part, labels in groups:
        choices = [sum(chosen) for chosen in itertools.combinations(part, labels.sum())]
        sums = np.add.outer(sums, choices).ravel()
    return sums


def sums_of_random_arrangements(
    groups: list[tuple[np.ndarray, np.ndarray]], permutations: int
) -> np.ndarray:
    rng = np.random.default_rng(0)
    sums = np.zeros(permutations)
    for part, labels in groups:
        shuffled = rng.permuted(np.tile(part, (permutations, 1)), axis=1)  # [permutations, n]
        labelled = shuffled[:, : labels.sum()]
        sums += labelled.sum(1)
    return sums
