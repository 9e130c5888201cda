"""What lab.gpu finds, row by row: each part on its own, within the time there is, and on the disk at
once, so that neither a failing part nor a kill costs the others' rows."""

import dataclasses
import gc
import json
import math
import signal
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Iterator

import torch

from lab.bench_turns import markdown

OK = "ok"
FAILED = "FAILED"
SKIPPED = "skipped"


class OutOfTime(Exception):
    pass


@dataclasses.dataclass
class Row:
    shape: str
    what: str
    value: float | None
    unit: str = ""
    # A figure's floor in the same unit (what the card's measured ceilings allow), and how many
    # times that it is.
    floor: float | None = None
    ratio: float | None = None
    note: str = ""
    verdict: str = ""  # of a check, or of a part that did not end

    def cells(self) -> list[str]:
        times = "" if self.ratio is None else f"{self.ratio:.3g}"
        note = ": ".join(part for part in (self.verdict, self.note) if part)
        value = f"{number(self.value)} {self.unit}".strip()
        return [self.shape, self.what, value, number(self.floor), times, note]


def number(value: float | None) -> str:
    if value is None:
        return ""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


class Report:
    """`seconds`: the budget. `file`: where the JSON goes after every part, if anywhere."""

    def __init__(self, machine: dict, seconds: float, file: str) -> None:
        self.machine = machine
        self.file = file
        self.rows: list[Row] = []
        self.started = time.perf_counter()
        self.seconds = seconds
        self.shape = ""  # of the part that runs

    def left(self) -> float:
        return self.seconds - (time.perf_counter() - self.started)

    def run(self, shape: str, name: str, part: Callable[[], None], needs: float) -> None:
        """Calls the part, unless less than the `needs` seconds are left that it may take. Whatever
        it raises is a row."""
        self.shape = shape
        if self.left() < needs:
            note = f"{self.left():.0f} s left, it may need {needs:.0f}"
            self.add(Row(shape, name, None, verdict=SKIPPED, note=note))
            self.write()
            return
        before = self.left()
        try:
            with time_limit(self.left()):
                part()
        except Exception as error:  # the other parts go on
            said = str(error).strip().splitlines() or [""]
            # Some of torch's messages say what happened only in their last lines.
            note = f"{type(error).__name__}: {said[0]}"[:300]
            self.add(Row(shape, name, None, verdict=FAILED, note=note))
        give_back_memory()
        print(f"    ({name}: {before - self.left():.1f} s)", flush=True)
        self.write()

    def check(self, what: str, value: float, limit: float, unit: str = "", note: str = "") -> None:
        """A row that is good if the value is at most the limit; nan never is."""
        verdict = OK if value <= limit else FAILED
        words = f"at most {limit:.3g}" if limit else "exactly 0"
        note = "; ".join(part for part in (words, note) if part)
        self.add(Row(self.shape, what, float(value), unit, note=note, verdict=verdict))

    def figure(
        self, what: str, value: float, unit: str, floor: float | None = None, note: str = ""
    ) -> None:
        """A row of something measured; `floor`: the least that it could be."""
        ratio = value / floor if floor else None
        self.add(Row(self.shape, what, float(value), unit, floor, ratio, note))

    def ours_against(self, what: str, speed: float, unit: str = "tokens/s") -> str:
        """How many times the speed of a peer an earlier row `what` of this shape has, for a note."""
        for row in self.rows:
            if (row.shape, row.what, row.unit) == (self.shape, what, unit) and row.value:
                return f"{what}: {row.value / speed:.3g} times as fast"
        return ""

    def add(self, row: Row) -> None:
        self.rows.append(row)
        print(" | ".join(cell for cell in row.cells() if cell), flush=True)

    def failures(self) -> list[Row]:
        return [row for row in self.rows if row.verdict == FAILED]

    def record(self) -> dict:
        return {
            "machine": self.machine,
            "seconds": self.seconds - self.left(),
            "rows": [plain(row) for row in self.rows],
        }

    def write(self) -> None:
        if self.file:
            Path(self.file).write_text(json.dumps(self.record(), indent=1) + "\n")

    def table(self) -> str:
        """All rows, each with the card's name."""
        heads = ["shape", "what", "measured", "floor", "times the floor", "note"]
        rows = [[self.machine["card"], *row.cells()] for row in self.rows]
        return markdown(heads, rows)


def plain(row: Row) -> dict:
    """Without nan and infinity, which JSON does not have."""
    record = dataclasses.asdict(row)
    for name, value in record.items():
        if isinstance(value, float) and not math.isfinite(value):
            record[name] = str(value)
    return record


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """OutOfTime in the block, once Python has the word after so many seconds."""

    def on_alarm(*_) -> None:
        raise OutOfTime("the time given to lab.gpu was over")

    before = signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, max(0.1, seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def give_back_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    wait(device)
    started = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - started


def median_seconds(
    work: Callable[[], object], device: torch.device, repeats: int, warm_up: int = 1
) -> float:
    for _ in range(warm_up):
        work()
    taken = sorted(seconds_of(work, device) for _ in range(repeats))
    return taken[len(taken) // 2]
