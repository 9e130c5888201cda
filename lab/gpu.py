"""Is this code right and fast on your GPU? `python -m lab.gpu --json gpu.json`: one command, one card, ten minutes.

Correctness first (lab/gpu_checks.py), then figures (lab/gpu_figures.py): the card's own ceilings, the
embedded model, and random weights in the shapes of a 135M, a 1.5B and a 7B model. Results are printed
as they come, and last a table for lab/BENCHMARKS.md. Parts are done in the order of their size, and
those for which the time or the memory does not suffice are left out, with a row that says so. The
exit code is 1 if a check failed.

    lab/gpu_report.py   rows, time limit, JSON, table
    lab/gpu_shapes.py   the models
    lab/gpu_tables.py   the tables of lab/BENCHMARKS.md: --table FILE
"""

import dataclasses
import platform
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch

from lab import gpu_checks, gpu_figures
from lab.bench import machine
from lab.gpu_report import Report
from lab.gpu_shapes import SHAPES
from lab.gpu_tables import all_tables, read_record
from plumbing.settings import check_numbers, flag, parse_flags, pick_device

PARTS = ("all", "checks", "figures")
REAL_SHAPES = "embedded,135M,1.5B,7B"


@dataclasses.dataclass
class Settings:
    device: str = flag("auto", "cuda, cuda:1 ...; auto takes a GPU if there is one")
    seconds: float = flag(540.0, "what takes longer is left out, the largest shapes first")
    only: str = flag("all", "all, checks or figures", choices=PARTS)
    shapes: str = flag(
        REAL_SHAPES,
        f"of {', '.join(SHAPES)}, separated by commas; with tiny all else is tiny too: a rehearsal",
    )
    json: str = flag("", "also write all rows to this file, after every part")
    table: str = flag("", "measure nothing: print the tables of such a file")


def check(s: Settings) -> list[str]:
    """The shapes' names. ValueError, in one sentence, for settings that make no sense."""
    check_numbers(s)
    names = s.shapes.split(",")
    for name in names:
        if name not in SHAPES:
            raise ValueError(f"--shapes must be of {', '.join(SHAPES)}; one is {name!r}")
    if s.json and not Path(s.json).absolute().parent.is_dir():
        raise ValueError(f"--json {s.json} names a folder that does not exist")
    return names


def measure(s: Settings) -> Report:
    names = check(s)
    device = pick_device(s.device)
    # Otherwise float32 products might be of TF32.
    torch.set_float32_matmul_precision("highest")
    report = Report(describe(device), s.seconds, s.json)
    print(report.machine, flush=True)
    rehearsal = "tiny" in names
    if s.only != "figures":
        work = gpu_checks.LITTLE if rehearsal else gpu_checks.FULL
        gpu_checks.all_checks(report, device, work)
    if s.only != "checks":
        effort = gpu_figures.LITTLE if rehearsal else gpu_figures.FULL
        ceilings = gpu_figures.Ceilings()
        report.run("", "ceilings", partial(ceilings.measure, report, device, effort), needs=10)
        if rehearsal or "embedded" in names:
            gpu_figures.embedded_figures(report, device, effort)
        for name in names:
            gpu_figures.shape_figures(report, device, effort, SHAPES[name], ceilings)
    return report


def describe(device: torch.device) -> dict:
    """What the figures were measured on."""
    card = "no GPU"
    if device.type == "cuda":
        card = torch.cuda.get_device_name(device)
    try:
        import transformers

        peer = transformers.__version__
    except ImportError:
        peer = "none"
    return {
        "card": card,
        "driver": driver(),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "transformers": peer,
        "python": platform.python_version(),
        "host": machine(device),
    }


def driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.check_output(command, text=True, timeout=20).splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def main() -> None:
    try:
        s = parse_flags(Settings, __doc__)
        if s.table:
            print(all_tables(read_record(s.table)))
            return
        report = measure(s)
    except (ValueError, OSError, ImportError, KeyboardInterrupt) as error:
        sys.exit(f"lab.gpu: {str(error) or 'stopped'}")
    print(f"\n{report.table()}\n\n{all_tables(report.record())}")
    failures = report.failures()
    if failures:
        sys.exit(f"lab.gpu: {len(failures)} of {len(report.rows)} rows failed")


if __name__ == "__main__":
    main()
