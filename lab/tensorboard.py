"""Runs as TensorBoard draws them: `python -m lab.tensorboard runs/a runs/b`, then
`tensorboard --logdir runs/tensorboard` (needs tensorboard).

Made from log.jsonl, so training needs no tracker. Said again, it replaces what it wrote: a run that
goes on can be looked at, too.
"""

import dataclasses
import sys
from pathlib import Path

from lab.plot import pass_at_1, read_whole_lines
from plumbing.settings import flag, parse_flags


@dataclasses.dataclass
class Settings:
    runs: tuple = flag((), "run folders", nargs="+", type=str)
    out: str = flag("runs/tensorboard", "folder for a folder of each run's name")


def scalars(run: Path) -> list[tuple[str, float, int]]:
    """(name, value, step) of every number in the log, and Pass@1 of every validation. What was not
    measured has no value; text is no curve. FileNotFoundError if the folder is no run's."""
    log = run / "log.jsonl"
    if not log.exists():
        raise FileNotFoundError(f"{run} is no run folder with a step in it: it has no log.jsonl")
    found = []
    for line in read_whole_lines(log):
        for name, value in line.items():
            is_number = isinstance(value, (int, float))
            if is_number and name != "step":
                found.append((name, value, line["step"]))
    for validation in read_whole_lines(run / "validation.jsonl"):
        found.append(("validation/pass_at_1", pass_at_1(validation), validation["step"]))
    return found


def write(run: Path, folder: Path) -> None:
    """The run's events, in place of those in the folder. ImportError without tensorboard."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ImportError("event files need tensorboard: pip install tensorboard") from None
    found = scalars(run)
    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
    with SummaryWriter(str(folder)) as writer:
        for name, value, step in found:
            writer.add_scalar(name, value, step)


def main(s: Settings) -> None:
    """ValueError for two runs of one name, which would be one in TensorBoard."""
    runs = list(dict.fromkeys(Path(run).resolve() for run in s.runs))  # each once
    names = [run.name for run in runs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two of the runs are called {name}; give them one --out each")
    for run in runs:
        folder = Path(s.out, run.name)
        write(run, folder)
        print(folder)


if __name__ == "__main__":
    try:
        main(parse_flags(Settings, __doc__))
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"lab.tensorboard: {error}")
