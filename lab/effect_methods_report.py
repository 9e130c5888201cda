"""The tables of lab.effect_methods, of saved products. The figures are explained in that file."""

import math

import numpy as np

from lab.effect_report import FEWEST, cell, cosine_of_halves, quadratic
from lab.gradients import unpack
from lab.resampling import bootstrap_problems
from lab.tables import table

HARD = 0.25  # of the answers are right, in an easier problem at least
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
        every_token, *bands = self.products
        # Title -> which tokens, which blocks.
        columns = {every_token: (every_token, share >= 0)}
        columns |= {band: (band, share >= 0) for band in bands}
        columns["hard problems"] = (every_token, share < HARD)
        columns["other problems"] = (every_token, share >= HARD)
        self.columns = {}
        for title, (label, chosen) in columns.items():
            square = self.products[label]["itself"][0].diagonal()
            if (square[chosen] > 0).sum() >= FEWEST:
                self.columns[title] = (label, chosen)

    def figures(self, method: int, column: str) -> list[dict]:
        """Cosine with the first method, and relative length, with their intervals."""
        label, chosen = self.columns[column]
        cross = self.products[label]["plain"][method]  # [blocks, blocks]
        itself = self.products[label]["itself"][method]
        plain = self.products[label]["itself"][0]

        def of_weights(drawn: np.ndarray) -> np.ndarray:
            weight = (drawn.T * chosen).T  # [blocks] or [blocks, N]
            square = quadratic(itself, weight)
            plain_square = quadratic(plain, weight)
            cosine = quadratic(cross, weight) / np.sqrt(square * plain_square)
            return np.stack([cosine, np.sqrt(square / plain_square)])

        return bootstrap_problems(of_weights, np.eye(len(chosen)))

    def floor(self, column: str) -> dict:
        """The cosine between plain GRPO's gradients in two halves of the problems, and what 95 % of
        halves lie between."""
        label, chosen = self.columns[column]
        matrix = self.products[label]["itself"][0][np.ix_(chosen, chosen)]
        mean, interval = cosine_of_halves(matrix, len(matrix))
        return {"mean": mean, "interval": interval}


def tables(records: dict[str, dict]) -> str:
    """Markdown, of every model."""
    parts = []
    for name, record in records.items():
        for place, title in PLACES.items():
            parts += place_tables(f"{name}, {title}", Place(record, record["places"][place]))
    return "\n\n".join(parts)


def place_tables(title: str, place: Place) -> list[str]:
    """Cosines, then lengths."""
    columns = list(place.columns)
    floor = [shown(place.floor(column)) for column in columns]
    cosines = [["`grpo`, in two halves of the problems", *floor, ""]]
    lengths = []
    for i, method in enumerate(place.methods[1:], start=1):
        figures = [place.figures(i, column) for column in columns]
        label = f"`{method}`" if " " not in method else method
        cosines.append([label, *[shown(cosine) for cosine, _ in figures], f"{place.cut[i]:.2%}"])
        lengths.append([label, *[shown(length) for _, length in figures]])
    return [
        table([f"{title}: cosine", *columns, "cut"], cosines),
        table([f"{title}: length", *columns], lengths),
    ]


def shown(figure: dict) -> str:
    """Nothing if there is no gradient."""
    return "" if math.isnan(figure["mean"]) else cell(figure)
