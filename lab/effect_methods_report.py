"""The tables of lab.effect_methods, of saved products. The figures are explained in that file."""

import math

import numpy as np

from lab.effect_report import FEWEST, between_problems, cell, cosine_of_halves, quadratic
from lab.gradients import unpack
from lab.resampling import bootstrap_problems
from lab.tables import table

HARD = 0.25  # of the answers are right, in an easier problem at least
HALVES = "`grpo`, in two halves of the problems"  # the row of the noise floor
PLACES = {"first": "the first update of a rollout", "last": "the last"}


class Place:
    """What was measured at one place, ready for questions."""

    def __init__(self, record: dict, place: dict) -> None:
        self.methods = record["methods"]
        self.cut = place["cut"]
        blocks = record["blocks"]
        self.products = {}
        for label, both in place["products"].items():
            unpacked = {kind: unpack(found, len(blocks)) for kind, found in both.items()}
            self.products[label] = unpacked

        right = np.array(record["right"]) / record["settings"]["samples"]
        share = np.array([right[block].mean() for block in blocks])
        everything = np.full(len(blocks), True)
        every_token, *bands = self.products
        # Title -> which tokens, which blocks.
        columns = {every_token: (every_token, everything)}
        columns |= {band: (band, everything) for band in bands}
        columns["hard problems"] = (every_token, share < HARD)
        columns["other problems"] = (every_token, share >= HARD)
        self.columns = {}
        for title, (label, chosen) in columns.items():
            square = self.products[label]["itself"][0].diagonal()
            if (square[chosen] > 0).sum() >= FEWEST:
                self.columns[title] = (label, chosen)

    def figures(self, method: int, column: str) -> list[dict]:
        """Cosine with the first method, relative length, and the cosine of the expected gradients (nan
        unless 97.5 % of the resamples have one), with their intervals."""
        label, chosen = self.columns[column]
        cross = self.products[label]["plain"][method]  # [blocks, blocks]
        itself = self.products[label]["itself"][method]
        plain = self.products[label]["itself"][0]

        def of_weights(drawn: np.ndarray) -> np.ndarray:
            weight = (drawn.T * chosen).T  # [blocks] or [blocks, N]
            square = quadratic(itself, weight)
            plain_square = quadratic(plain, weight)
            cosine = quadratic(cross, weight) / np.sqrt(square * plain_square)
            # In products of different problems the noise averages to 0. More noise than gradient may
            # leave a negative square, and no cosine.
            squares = [between_problems(matrix, weight) for matrix in (itself, plain)]
            is_known = np.min(squares, axis=0) > 0
            expected = between_problems(cross, weight) / np.sqrt(squares[0] * squares[1])
            expected = np.where(is_known, expected, math.nan)
            length = np.sqrt(square / plain_square)
            return np.stack([cosine, length, expected, is_known.astype(float)])

        cosine, length, expected, known = bootstrap_problems(of_weights, np.eye(len(chosen)))
        known_in_most_resamples = known["interval"][0] == 1
        if not known_in_most_resamples:
            expected = {"mean": math.nan, "interval": [math.nan, math.nan]}
        return [cosine, length, expected]

    def noise_floor(self, column: str) -> dict:
        """The cosine between plain GRPO's gradients in two halves of the problems, and what 95 % of
        halves lie between."""
        label, chosen = self.columns[column]
        matrix = self.products[label]["itself"][0][np.ix_(chosen, chosen)]
        mean, interval = cosine_of_halves(matrix, len(matrix))
        return {"mean": mean, "interval": interval}


def summary(records: dict[str, dict]) -> str:
    """Markdown: the cosine of every method over all tokens, a column for each model and place."""
    columns = {}
    for name, record in records.items():
        for which, measured in record["places"].items():
            columns[f"{name}, {which}"] = Place(record, measured)
    first, *_ = columns.values()
    every_token, *_ = first.columns

    noise_floor = [shown(place.noise_floor(every_token)) for place in columns.values()]
    rows = [[HALVES, *noise_floor]]
    for i, method in enumerate(first.methods[1:], start=1):
        cosines = [place.figures(i, every_token)[0] for place in columns.values()]
        rows.append([row_label(method), *map(shown, cosines)])
    return table(["cosine with plain GRPO's update", *columns], rows)


def tables(records: dict[str, dict]) -> str:
    """Markdown, of every model."""
    parts = []
    for name, record in records.items():
        parts.append(heading(name, record))
        for which, measured in record["places"].items():
            parts += place_tables(f"{name}, {PLACES[which]}", Place(record, measured))
    return "\n\n".join(parts)


def heading(name: str, record: dict) -> str:
    s = record["settings"]
    right = np.array(record["right"]) / s["samples"]
    with_both = int(((right > 0) & (right < 1)).sum())
    together = f"; {s['block']} at a time are taken as one" if s["block"] > 1 else ""
    return (
        f"**{name}**: {s['task']}, {len(right)} problems × {s['samples']} answers, {right.mean():.3f} "
        f"right, {record['tokens']:,} tokens. {with_both} problems have right and wrong answers; of "
        f"{(right < HARD).sum()} less than a quarter is right{together}."
    )


def place_tables(title: str, place: Place) -> list[str]:
    """Cosines, then lengths."""
    every_token, *others = place.columns
    noise_floor = [shown(place.noise_floor(column)) for column in place.columns]
    floor_of_all, *floor_of_others = noise_floor
    cosines = [[HALVES, floor_of_all, "", *floor_of_others, f"{place.cut[0]:.2%}"]]
    lengths = []
    for i, method in enumerate(place.methods[1:], start=1):
        found = {column: place.figures(i, column) for column in place.columns}
        cosine = {column: shown(figures[0]) for column, figures in found.items()}
        length = [shown(figures[1]) for figures in found.values()]
        expected = shown(found[every_token][2])
        of_others = [cosine[column] for column in others]
        label = row_label(method)
        cosines.append([label, cosine[every_token], expected, *of_others, f"{place.cut[i]:.2%}"])
        lengths.append([label, *length])
    return [
        table([f"{title}: cosine", every_token, "expected", *others, "cut"], cosines),
        table([f"{title}: length", *place.columns], lengths),
    ]


def row_label(method: str) -> str:
    """As code if it is a --method of train.py."""
    return method if " " in method else f"`{method}`"


def shown(figure: dict) -> str:
    """Nothing if there is no gradient."""
    return "" if math.isnan(figure["mean"]) else cell(figure)
