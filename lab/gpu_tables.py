"""The tables of lab/BENCHMARKS.md from what `python -m lab.gpu --json FILE` wrote: one line for what
several rows say together, each with the card's name. `python -m lab.gpu --table FILE` prints them."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from lab.bench_turns import markdown
from lab.gpu_figures import (
    bytes_of_step,
    name_of_update,
    operations_of_step,
    planned_memory,
    update_operations,
)
from lab.gpu_report import FAILED, OK, number
from lab.gpu_shapes import SHAPES, Shape, config_of
from lab.saved import read_packed

CARD = torch.device("cuda")  # for what is planned on one; none need be there


def read_record(file: str | Path) -> dict:
    """ValueError or OSError for a file that lab.gpu did not write."""
    is_packed = str(file).endswith(".gz")
    record = read_packed(file) if is_packed else json.loads(Path(file).read_bytes())
    if not isinstance(record, dict) or not {"machine", "rows"} <= record.keys():
        raise ValueError(f"{file} is not what lab.gpu writes")
    return record


@dataclass
class Found:
    """The rows of a record, by shape, what they are, and unit."""

    record: dict

    def value(self, shape: str, what: str, unit: str) -> float | None:
        """None where that was not measured."""
        for row in self.record["rows"]:
            if (row["shape"], row["what"], row["unit"]) == (shape, what, unit):
                return row["value"]
        return None

    @property
    def card(self) -> str:
        return self.record["machine"]["card"]

    def shapes(self) -> list[Shape]:
        """Those that were measured."""
        return [shape for name, shape in SHAPES.items() if self.value(name, "weights", "billion")]


Line = dict[str, float | str | None]  # head of the column -> what stands there


def as_table(found: Found, lines: list[Line]) -> str:
    """With the card's name before each line; "" without a line."""
    if not lines:
        return ""
    rows = []
    for line in lines:
        cells = [value if isinstance(value, str) else number(value) for value in line.values()]
        rows.append([found.card, *cells])
    return markdown(list(lines[0]), rows)


def times(value: float | None, of: float | None) -> str:
    if value is None or of is None:
        return ""
    return f"{value / of:.3g}"


def all_tables(record: dict) -> str:
    found = Found(record)
    parts = {
        "Checks": checks(found),
        "A decode step": decode(found),
        "Sampling, natural lengths": refill(found),
        "A whole step": whole_step(found),
        "The update": update(found),
        "Memory": memory(found),
    }
    tables = {name: as_table(found, lines) for name, lines in parts.items()}
    return "\n\n".join(f"{name}\n\n{table}" for name, table in tables.items() if table)


def checks(found: Found) -> list[Line]:
    """One line for checks that differ only in what comes after the first comma."""
    groups: dict[tuple[str, str, str], list[dict]] = {}
    for row in found.record["rows"]:
        is_check = row["verdict"] in (OK, FAILED) and row["value"] is not None
        if is_check:
            limit, _, _ = row["note"].partition(";")
            subject, _, _ = row["what"].partition(",")
            groups.setdefault((subject, row["unit"], limit), []).append(row)
    lines = []
    for (subject, unit, limit), rows in groups.items():
        largest = max(float(row["value"]) for row in rows)
        failed = [row for row in rows if row["verdict"] == FAILED]
        line = {
            "check": rows[0]["what"] if len(rows) == 1 else subject,
            "times": str(len(rows)),
            "largest": f"{number(largest)} {unit}".strip(),
            "limit": limit,
            "failed": str(len(failed)),
        }
        lines.append(line)
    return lines


def decode(found: Found) -> list[Line]:
    """Two floors of a step: its bytes over the copy's bandwidth, and its products over the rate of
    large products. At 512 slots the second can be the larger."""
    bandwidth = found.value("", "copy, bytes read and written", "GB/s")
    lines = []
    for shape in found.shapes():
        config = config_of(shape)
        for slots in shape.slots:
            what = f"decode, {slots} slots"
            graph = found.value(shape.name, f"{what}, graph, a step", "ms")
            eager = found.value(shape.name, f"{what}, eager, a step", "ms")
            speed = found.value(shape.name, f"{what}, graph", "tokens/s")
            peer = found.value(shape.name, f"transformers' generate, {slots} slots", "tokens/s")
            if graph is None or bandwidth is None:
                continue
            moving = bytes_of_step(shape, config, slots) / bandwidth / 1e6
            multiplying = operations_of_step(config, slots) / rate(found, shape) / 1e9
            line = {
                "model": shape.name,
                "slots": str(slots),
                "graph, ms": graph,
                "eager, ms": eager,
                "eager / graph": times(eager, graph),
                "floor by bytes, ms": moving,
                "floor by products, ms": multiplying,
                "graph / larger floor": times(graph, max(moving, multiplying)),
                "graph, tokens/s": speed,
                "generate, tokens/s": peer,
                "graph / generate": times(speed, peer),
            }
            lines.append(line)
    return lines


def rate(found: Found, shape: Shape) -> float:
    """TFLOP/s of large products in the type of the weights."""
    name = str(shape.dtype).removeprefix("torch.")
    for row in found.record["rows"]:
        if row["unit"] == "TFLOP/s" and row["what"].endswith(name):
            return row["value"]
    return math.nan


def refill(found: Found) -> list[Line]:
    lines = []
    for row in found.record["rows"]:
        what = row["what"]
        if not (what.startswith("refill, ") and what.endswith(", graph")):
            continue
        _, slots, dtype, _ = what.split(", ")
        graph = row["value"]
        eager = found.value("embedded", f"refill, {slots}, {dtype}, eager", "tokens/s")
        of_peer = f"transformers' generate in static batches, {dtype}"
        peer = found.value("embedded", of_peer, "tokens/s")
        line = {
            "type": dtype,
            "at a time": slots,
            "graph, tokens/s": graph,
            "eager, tokens/s": eager,
            "generate, tokens/s": peer,
            "graph / eager": times(graph, eager),
            "graph / generate": times(graph, peer),
        }
        lines.append(line)
    return lines


def whole_step(found: Found) -> list[Line]:
    lines = []
    for dtype in ("float32", "bfloat16"):
        what = f"GRPO step, default flags, {dtype}"
        whole = found.value("embedded", what, "s")
        if whole is None:
            continue
        line: Line = {"--dtype": dtype, "whole, s": whole}
        for part in ("rollout", "rewards", "update"):
            line[f"{part}, s"] = found.value("embedded", f"{what}: {part}", "s")
        lines.append(line)
    return lines


def update(found: Found) -> list[Line]:
    lines = []
    for shape in found.shapes():
        what = name_of_update(shape)
        speed = found.value(shape.name, what, "tokens/s")
        seconds = found.value(shape.name, f"{what}, seconds", "s")
        peer = found.value(shape.name, "the same loss over transformers' model", "tokens/s")
        if seconds is None:
            continue
        floor = update_operations(shape, config_of(shape)) / rate(found, shape) / 1e12
        line = {
            "model": shape.name,
            "an optimizer step over": what.removeprefix("update of "),
            "seconds": seconds,
            "floor by products": floor,
            "times the floor": times(seconds, floor),
            "tokens/s": speed,
            "transformers' model, tokens/s": peer,
            "ours / theirs": times(speed, peer),
        }
        lines.append(line)
    return lines


def memory(found: Found) -> list[Line]:
    """GB that were taken, beside what today's plan says."""
    lines = []
    for shape in found.shapes():
        planned = planned_memory(shape, config_of(shape), CARD)
        for part, gb in planned.items():
            allocated = found.value(shape.name, f"memory of {part}, allocated", "GB")
            if allocated is None:
                continue
            line = {
                "model": shape.name,
                "part": part,
                "planned, GB": gb,
                "allocated, GB": allocated,
                "planned / allocated": times(gb, allocated),
                "reserved, GB": found.value(shape.name, f"memory of {part}, reserved", "GB"),
            }
            lines.append(line)
    return lines
