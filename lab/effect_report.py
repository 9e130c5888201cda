"""What lab.effect has found: lengths, angles and projections of saved products, as tables to print
and as a picture. The figures are explained in lab/effect.py."""

import itertools
import math
from pathlib import Path
from typing import Callable, Sequence

import numpy as np
import torch

from lab.gradients import PARTS, unpack
from lab.multiplier import entropy_advantage, multiplier
from lab.resampling import bootstrap_problems

# Bands of entropy, in nats: from, to.
BANDS = {
    "H below 0.5": (-math.inf, 0.5),
    "H 0.5 to 1": (0.5, 1.0),
    "H of 1 and more": (1.0, math.inf),
}
# Shares of a group that are right: from, to.
SHARES = {
    "under 1/4 right": (0.0, 0.25),
    "1/4 to 1/2 right": (0.25, 0.5),
    "1/2 and more right": (0.5, 1.0),
}
SHOWN = ("cosine", "length", "projection", "M predicts")  # in every table
NOISE = ("expected projection", "variance", "noise")  # over all, and by the share right
FIGURES = (*SHOWN, *NOISE)
HALVES = 1000
HIGHEST = 2.4  # alpha H of the map
FEWEST = 3  # problems, or blocks of them, of a row and of a point of the map
LEAST_WEIGHT = 0.05  # of its problems' weight, for the tokens of a point of the map
NAME_WIDTH = 32
CELL_WIDTH = 20


def sum_of_parts(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {kind: sum(part[kind] for part in parts) for kind in ("plain", "itself")}


class Measured:
    """A saved record, ready for questions: all matrices, by the tokens or parameters they are of."""

    def __init__(self, record: dict) -> None:
        self.record = record
        self.settings = record["settings"]
        self.shapings = record["shapings"]
        self.blocks = len(record["blocks"])
        # Problems of equal answers, in blocks too: without a gradient, but a resample may draw them.
        mixed = sum(len(block) for block in record["blocks"])
        self.problems = len(record["right"])
        self.equal = round((self.problems - mixed) / self.settings["block"])
        right = np.array(record["right"])
        counts = np.array([right[block].mean() for block in record["blocks"]])
        self.share = counts / self.settings["samples"]

        self.products = {}
        for label, both in record["products"].items():
            unpacked = {kind: unpack(found, self.blocks) for kind, found in both.items()}
            self.products[label] = unpacked
        self.sums = {}
        for band, sums in record["sums"].items():
            self.sums[band] = {name: np.array(values) for name, values in sums.items()}

        # What holds of all tokens follows from the parts, and from the bands.
        self.bands = [band for band in BANDS if band in self.sums]
        self.parts = [part for part in PARTS if part in self.products]
        if self.parts:
            self.products["all"] = sum_of_parts([self.products[part] for part in PARTS])
            of_bands = [self.sums[band] for band in BANDS]
            of_all = {name: sum(sums[name] for sums in of_bands) for name in of_bands[0]}
            self.sums |= dict.fromkeys(("all", *PARTS), of_all)

    def with_share(self, label: str) -> np.ndarray:
        """Which blocks have a share right as in SHARES; "all" is every one."""
        low, high = SHARES.get(label, (0.0, 1.0))
        return (self.share >= low) & (self.share < high)

    def figures(self, shaping: int, label: str, chosen: np.ndarray) -> Callable:
        """A function that makes FIGURES of how often each block is drawn, those of equal answers at
        the end, [all blocks] or [all blocks, N]. `label`: of which tokens or parameters; `chosen`:
        of which blocks."""
        both = self.products[label]
        cross = both["plain"][shaping]  # [blocks, blocks]
        itself = both["itself"][shaping]
        unchanged = both["itself"][0]
        sums = self.sums[label]
        predicted = sums["weight M"][shaping]

        def of_weights(drawn: np.ndarray) -> np.ndarray:
            weight = (drawn[: self.blocks].T * chosen).T  # [blocks] or [blocks, N]
            square = quadratic(itself, weight)
            plain_square = quadratic(unchanged, weight)
            product = quadratic(cross, weight)

            # The noise: without a problem's product with itself there is none, in expectation.
            expected = between_problems(itself, weight)
            plain_expected = between_problems(unchanged, weight)
            number = drawn.sum(axis=0)
            spread = itself.diagonal() @ weight - square / number
            plain_spread = unchanged.diagonal() @ weight - plain_square / number
            variance = spread / plain_spread
            return np.stack(
                [
                    product / np.sqrt(square * plain_square),
                    np.sqrt(square / plain_square),
                    product / plain_square,
                    (predicted @ weight) / (sums["weight"] @ weight),
                    between_problems(cross, weight) / plain_expected,
                    variance,
                    variance * plain_expected / expected,
                ]
            )

        return of_weights

    def row(self, shaping: int, label: str, share: str) -> dict[str, dict]:
        """FIGURES with their intervals. The bootstrap over problems is that of lab/resampling.py:
        with the unit matrix as its sums, what it hands on is how often each problem is drawn.

        A resample holds some problems twice, so it has more noise than the batch has; the intervals
        of cosine and length lean that way."""
        figures = self.figures(shaping, label, self.with_share(share))
        return dict(zip(FIGURES, bootstrap_problems(figures, np.eye(self.blocks + self.equal))))

    def between_shares(self, first: str, second: str) -> dict:
        """The cosine between the plain gradients of two of SHARES, with its interval: of different
        problems, so noise makes it smaller, never larger."""
        matrix = self.products["all"]["itself"][0]
        chosen = [self.with_share(label) for label in (first, second)]

        def figures(drawn: np.ndarray) -> np.ndarray:
            one, other = [(drawn[: self.blocks].T * mask).T for mask in chosen]
            across = (other * (matrix @ one)).sum(axis=0)
            return (across / np.sqrt(quadratic(matrix, one) * quadratic(matrix, other)))[None]

        return bootstrap_problems(figures, np.eye(self.blocks + self.equal))[0]

    def halves(self) -> tuple[float, list[float]]:
        """The cosine between the plain gradients of two halves of the problems: mean over random
        halves, and what 95 % of them lie between."""
        return cosine_of_halves(self.products["all"]["itself"][0], self.blocks + self.equal)


def cosine_of_halves(matrix: np.ndarray, number: int) -> tuple[float, list[float]]:
    """As `Measured.halves`, of the products [n, n] of n problems; the others of `number` have no
    gradient."""
    rng = np.random.default_rng(0)
    halves = np.tile(np.arange(number) < number // 2, (HALVES, 1))
    first = rng.permuted(halves, axis=1).T[: len(matrix)].astype(float)  # [n, HALVES]
    second = 1 - first
    across = (second * (matrix @ first)).sum(axis=0)
    with np.errstate(invalid="ignore"):  # a half of few problems may have no gradient
        cosines = across / np.sqrt(quadratic(matrix, first) * quadratic(matrix, second))
    return float(np.nanmean(cosines)), np.nanpercentile(cosines, [2.5, 97.5]).tolist()


def quadratic(matrix: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The product of two sums of gradients, given the products of their terms: [n, n], and [n] or
    [n, N] -> a number or [N]."""
    return (weight * (matrix @ weight)).sum(axis=0)


def between_problems(matrix: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The same without the products of a problem with itself: in expectation, that of two expected
    gradients."""
    return quadratic(matrix, weight) - matrix.diagonal() @ weight**2


def tables(records: dict[str, dict]) -> str:
    """All that is printed, of every model."""
    blocks = []
    for name, record in records.items():
        measured = Measured(record)
        blocks.append(heading(name, measured))
        for share in ("all", *SHARES):
            blocks.append(table(name, measured, "all", share, SHOWN))
            blocks.append(table(name, measured, "all", share, NOISE))
        blocks += [
            table(name, measured, label, "all", SHOWN)
            for label in (*measured.bands, *measured.parts)
        ]
    return "\n\n".join(blocks)


def heading(name: str, measured: Measured) -> str:
    s = measured.settings
    right = sum(measured.record["right"]) / measured.problems / s["samples"]
    all_sums = measured.sums["all"]
    bands = []
    for label in measured.bands:
        sums = measured.sums[label]
        tokens = sums["tokens"].sum() / all_sums["tokens"].sum()
        weight = sums["weight"].sum() / all_sums["weight"].sum()
        bands.append(f"{label} {tokens:.0%}, {weight:.0%} of the weight")
    sizes = np.array([len(block) for block in measured.record["blocks"]])
    shares = [f"{label} {sizes[measured.with_share(label)].sum()}" for label in SHARES]
    mean, (low, high) = measured.halves()
    two_batches = 2 * mean / (1 + mean)  # Spearman and Brown: of twice as many problems each
    lines = [
        f"{name}: {s['task']}, {measured.problems} problems × {s['samples']} answers, {right:.3f} "
        f"right; kappa {s['kappa']:g}; 95 % intervals over problems",
        f"{sizes.sum()} problems have right and wrong answers: {', '.join(shares)}",
        f"noise floor: two halves of the problems have plain gradients of cosine {mean:.3f} "
        f"(95 % of halves: {low:.3f} to {high:.3f}); two such batches would have about "
        f"{two_batches:.3f}",
    ]
    for first, second in itertools.combinations(SHARES, 2):
        if min(measured.with_share(label).sum() for label in (first, second)) >= FEWEST:
            cosine = cell(measured.between_shares(first, second))
            lines.append(f"plain gradients of {first} and of {second}: cosine {cosine}")
    if bands:
        lines.append(f"their tokens: {'; '.join(bands)}")
    if s["block"] > 1:
        lines.append(f"{s['block']} problems at a time are taken as one")
    return "\n".join(lines)


def table(name: str, measured: Measured, label: str, share: str, columns: Sequence[str]) -> str:
    subset = ", ".join(part for part in (label, share) if part != "all")
    lines = [line(f"{name}, {subset or 'all'}", columns)]
    if measured.with_share(share).sum() < FEWEST:
        return f"{lines[0]}\ntoo few problems"
    for i, shaping in enumerate(measured.shapings[1:], start=1):
        row = measured.row(i, label, share)
        lines.append(line(shaping, [cell(row[column]) for column in columns]))
    return "\n".join(lines)


def line(name: str, cells: Sequence[str]) -> str:
    return f"{name:{NAME_WIDTH}}" + "".join(f"  {text:>{CELL_WIDTH}}" for text in cells)


def cell(figure: dict) -> str:
    low, high = figure["interval"]
    return f"{figure['mean']:.3f} [{low:.3f}, {high:.3f}]"


def draw(records: dict[str, dict], file: Path) -> None:
    """M(p, alpha H) as a map, and the measured projections in the colours of the same scale: a
    point for each share right and, unless the record is brief, band of entropies, at their means.
    Every alpha fits in, because M depends on alpha H alone."""
    from matplotlib.colors import TwoSlopeNorm  # which only this picture needs
    from matplotlib.figure import Figure

    kappa = next(iter(records.values()))["settings"]["kappa"]
    scale = dict(cmap="RdBu_r", norm=TwoSlopeNorm(1.0, 1 - 1 / kappa, 1 + 1 / kappa))
    shares = torch.linspace(0.005, 0.995, 199)
    heights = torch.linspace(0, HIGHEST, 240)  # alpha H
    m = multiplier(entropy_advantage(1.0, kappa), shares, heights[:, None])
    grid = (shares.numpy(), heights.numpy(), m.numpy())  # m [heights, shares]

    figure = Figure((6.2 * len(records), 5), layout="constrained")
    axes = figure.subplots(1, len(records), sharey=True, squeeze=False)[0]
    for axis, (name, record) in zip(axes, records.items()):
        colours = axis.contourf(*grid, np.linspace(1 - 1 / kappa, 1 + 1 / kappa, 42), **scale)
        for point in cells(Measured(record)):
            place = (point["share"], point["alpha H"])
            axis.scatter(*place, 130, point["projection"], edgecolors="0", zorder=2, **scale)
            interval = f"[{point['low']:.2f}, {point['high']:.2f}]"
            text = f"{point['projection']:.2f}\n{interval}\nM: {point['M predicts']:.2f}"
            below = dict(xytext=(0, -8), textcoords="offset points", ha="center", va="top")
            axis.annotate(text, place, fontsize=8, **below)
        axis.set(title=name, xlabel="p, share of the answers that are right", xlim=(0, 1))
        axis.set_ylim(0, HIGHEST)
    axes[0].set_ylabel("α H")
    label = f"M(p, H) for κ = {kappa:g}; points: measured projections"
    ticks = np.linspace(1 - 1 / kappa, 1 + 1 / kappa, 5)
    figure.colorbar(colours, ax=axes, label=label, ticks=ticks)
    figure.savefig(file, dpi=100)


def cells(measured: Measured) -> list[dict]:
    """The measured points: where they lie, what was measured, what M predicts."""
    s = measured.settings
    found = []
    for i, strength in enumerate((s["alpha"], 5 * s["alpha"]), start=1):
        for band in measured.bands or ["all"]:
            for share in SHARES:
                chosen = measured.with_share(share)
                sums = measured.sums[band]
                weight = sums["weight"][chosen].sum()
                of_all = measured.sums["all"]["weight"][chosen].sum()
                if chosen.sum() < FEWEST or weight < LEAST_WEIGHT * of_all:
                    continue
                mean_entropy = sums["weight H"][chosen].sum() / weight
                row = measured.row(i, band, share)
                found.append(
                    {
                        "share": float(measured.share[chosen].mean()),
                        "alpha H": float(strength * mean_entropy),
                        "projection": row["projection"]["mean"],
                        "low": row["projection"]["interval"][0],
                        "high": row["projection"]["interval"][1],
                        "M predicts": row["M predicts"]["mean"],
                    }
                )
    return found
