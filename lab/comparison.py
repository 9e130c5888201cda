"""Entropy of one kind of token or sentence beside that of the others; and which sentences are rare.

Everything is compared over all responses, and again within bins of position, difficulty and length,
because kinds differ in these and entropy depends on them.
"""

from typing import Callable, Sequence

import numpy as np
import torch

from lab.exploration import Span
from lab.reading import Reading
from lab.resampling import bootstrap_problems, permutation_p

NEIGHBOURS = 5
RARE = 0.1  # share of sentences, those furthest from their neighbours
AT_ONCE = 256  # vectors whose distances exist at a time
CONFOUNDERS = ("position", "difficulty", "length in tokens")
QUARTERS = (0.25, 0.5, 0.75)
COLUMNS = ("mean", "others", "difference", "d")

Rows = dict[str, np.ndarray]  # a column per property of a span, all of one length
Record = dict[str, dict | None]  # what was compared -> figures, None if there were too few


def compare_kinds(
    readings: Sequence[Reading],
    spans: Callable[[Reading], list[Span]],
    sides: dict[str, bool],
) -> Record:
    """`compare` for the spans of all responses: exploratory kinds with the others, on the two
    `sides`, over all and in bins; then each kind with all the rest."""
    rows = measure(readings, spans)
    if rows is None:
        return {"all": None}

    on_a_side = np.isin(rows["kind"], list(sides))
    chosen = select(rows, on_a_side)
    exploratory_kinds = [kind for kind, exploratory in sides.items() if exploratory]
    exploratory = np.isin(chosen["kind"], exploratory_kinds)
    record = over_all_and_in_bins(chosen, exploratory)

    for kind in np.unique(rows["kind"]):
        record[f"kind {kind}"] = compare(rows, rows["kind"] == kind)
    return record


def compare_rare(readings: Sequence[Reading], distance: np.ndarray) -> Record:
    """`compare` for the sentences of the largest `distance` with the rest, over all and in bins;
    then within each kind."""
    rows = measure(readings, Reading.sentence_spans)
    if rows is None:
        return {"all": None}

    furthest = np.quantile(distance, 1 - RARE)
    rare = distance >= furthest  # equal sentences on the same side
    record = over_all_and_in_bins(rows, rare)

    for kind in np.unique(rows["kind"]):
        of_kind = rows["kind"] == kind
        record[f"kind {kind}"] = compare(select(rows, of_kind), rare[of_kind])
    return record


def nearest(vectors: torch.Tensor, others: torch.Tensor, k: int = NEIGHBOURS) -> torch.Tensor:
    """Mean Euclidean distance of each of `vectors` [N, d] to its k nearest `others` [M, d] (all, if
    fewer). [N]"""
    k = min(k, len(others))
    means = []
    for rows in vectors.split(AT_ONCE):
        distance = torch.cdist(rows, others)  # [AT_ONCE, M]
        closest = distance.topk(k, largest=False).values
        means.append(closest.mean(-1))
    return torch.cat(means)


def measure(readings: Sequence[Reading], spans: Callable[[Reading], list[Span]]) -> Rows | None:
    """A row for each span of each response; None if there is none."""
    rows = []
    for response, reading in enumerate(readings):
        for span in spans(reading):
            entropy = reading.entropy[span.first : span.end]
            row = {
                "entropy": entropy.mean(),
                "kind": span.kind,
                "problem": reading.problem,
                "response": response,
                "position": span.first,
                "difficulty": reading.difficulty,
                "length in tokens": span.end - span.first,
            }
            rows.append(row)
    if not rows:
        return None

    columns = {}
    for name in rows[0]:
        columns[name] = np.array([row[name] for row in rows])
    return columns


def select(rows: Rows, mask: np.ndarray) -> Rows:
    return {name: column[mask] for name, column in rows.items()}


def over_all_and_in_bins(rows: Rows, label: np.ndarray) -> Record:
    record = {"all": compare(rows, label)}
    for name in CONFOUNDERS:
        for mask in bins(rows[name]):
            inside = rows[name][mask]
            title = f"{name} {inside.min():g} to {inside.max():g}"
            record[title] = compare(select(rows, mask), label[mask])
    return record


def bins(values: np.ndarray) -> list[np.ndarray]:
    """Masks of up to four bins of about equally many; none if that is only one bin, or if a value
    is not known."""
    if np.isnan(values).any():
        return []
    edges = np.unique(np.quantile(values, QUARTERS, method="higher"))
    place = np.searchsorted(edges, values, side="right")  # the bin of each value
    masks = [place == i for i in np.unique(place)]
    if len(masks) == 1:
        return []
    return masks


def compare(rows: Rows, label: np.ndarray) -> dict | None:
    """Entropy of the labelled rows and of the others: means, difference, Cohen's d, with intervals,
    and p of a permutation test. None if there are not two of both.

    The test shuffles labels within responses. Trust the intervals more: neighbouring tokens are not
    exchangeable."""
    count = int(label.sum())
    others = len(label) - count
    if min(count, others) < 2:
        return None

    # Count, sum and sum of squares of both sides, for each problem: all figures follow from these.
    entropy = rows["entropy"]
    problem = np.unique(rows["problem"], return_inverse=True)[1]
    moments = []
    for side in (label, ~label):
        for power in (0, 1, 2):
            moments.append(np.bincount(problem, side * entropy**power))
    totals = np.column_stack(moments)  # [problems, 6]

    figures = bootstrap_problems(difference_of_means, totals)
    comparison = dict(zip(COLUMNS, figures))
    comparison["n"] = count
    comparison["n others"] = others
    comparison["p"] = permutation_p(entropy, label, rows["response"])
    return comparison


def difference_of_means(moments: np.ndarray) -> np.ndarray:
    """Count, sum and sum of squares of two sides -> COLUMNS."""
    n, total, square, n_other, total_other, square_other = moments
    mean = total / n
    mean_other = total_other / n_other
    difference = mean - mean_other
    squares = square - total**2 / n + square_other - total_other**2 / n_other
    variance = squares / (n + n_other - 2)  # pooled
    variance = np.where(variance > 1e-12, variance, np.nan)  # without spread there is no d
    return np.array([mean, mean_other, difference, difference / np.sqrt(variance)])
