"""A run that survives: its folder, the order in which things are written to it, and signals.

config.json          the settings, written first
log.jsonl            a line a step
validation.jsonl     a line a validation, with the right answers of every problem
state.safetensors    weights, AdamW's moments and the step: what --resume goes on from
model/               the policy as a Hugging Face folder
validation.json      the final table, written last
"""

import dataclasses
import json
import os
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Iterator, Sequence

from plumbing.checkpoint import (
    append_line,
    atomic_write,
    load_state,
    read_json,
    read_lines,
    save_state,
)
from plumbing.distributed import gather
from plumbing.settings import Settings, run_name


class Stop:
    """The handler of Ctrl-C and SIGTERM, and what its messages need to know. A first Ctrl-C or SIGTERM lets the step in hand be
    finished and saved; a second one, or a first while nothing would be lost, stops at once."""

    asked = False
    in_steps = False  # a step is being computed, whose work would be lost
    run: Path | None = None
    saved = 0  # the step of the last save
    where = ""  # in the training, for the message about a number that is not finite

    def on_signal(self, number: int, frame) -> None:
        if self.asked or not self.in_steps:
            raise KeyboardInterrupt
        self.asked = True
        # print is not safe in a signal handler.
        os.write(2, b"\nfinishing this step and saving; once more stops at once\n")

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """While all is saved, a first signal may stop the program at once."""
        before = self.in_steps
        self.in_steps = False
        yield
        self.in_steps = before

    def how_to_resume(self) -> str:
        if self.run is None:
            return ""
        return f"; go on from step {self.saved} with: python train.py --resume {self.run}"

    def what_may_help(self) -> str:
        last = "nothing was saved yet"
        if self.saved:
            last = f"the last good state is of step {self.saved} (--model {self.run}/model)"
        return f"{last}; a new run with a lower --lr may help"


stop = Stop()


class Run:
    """A run's folder. Only the first process writes; all of them know what is in it.

    parts: name -> (module, its AdamW), see checkpoint.state_of; save_model writes the policy."""

    def __init__(
        self,
        s: Settings,
        parts: dict[str, tuple],
        save_model: Callable[[Path], None],
        rank: int,
    ) -> None:
        self.parts = parts
        self.save_model = save_model
        self.writes = rank == 0
        self.folder = Path(s.resume or Path(s.out, s.name or run_name(s)))
        if self.writes and not s.resume:
            open_run(s, s.name or run_name(s))
        gather(None)  # nobody looks before the folder is there

        self.saved_step = load_state(self.folder, parts)  # 0 for a new run
        kept = None
        if self.writes:
            kept = self.read_kept(s.eval_every)
        self.log, self.validations = gather(kept)[0]  # the first process's
        stop.run = self.folder
        stop.saved = self.saved_step

    def read_kept(self, eval_every: int) -> tuple[list[dict], list[dict]]:
        """The log and the validations, up to the saved state."""
        steps = range(1, self.saved_step + 1)
        # The validation of the saved step itself comes after its save.
        validated = range(0, self.saved_step, eval_every)
        log = read_lines(self.folder / "log.jsonl", self.saved_step, steps)
        validations = read_lines(self.folder / "validation.jsonl", self.saved_step, validated)
        return log, validations

    def add_step(self, line: dict) -> None:
        """Writes the log line, which must be on the disk before the state that contains the step."""
        self.log.append(line)
        if self.writes:
            append_line(self.folder / "log.jsonl", line)

    def save(self, step: int) -> None:
        if not self.writes:
            return
        save_state(self.folder, step, self.parts, self.save_model)
        stop.saved = step

    def is_validated(self, step: int) -> bool:
        return any(validation["step"] == step for validation in self.validations)

    def add_validation(self, step: int, counts: dict) -> None:
        self.validations.append({"step": step} | counts)
        if self.writes:
            append_line(self.folder / "validation.jsonl", self.validations[-1])

    def finish(self, record: dict) -> None:
        with atomic_write(self.folder / "validation.json") as fresh:
            fresh.write_text(json.dumps(record) + "\n")


def open_run(s: Settings, name: str) -> Path:
    """Makes the folder `name` in s.out, with the settings in config.json. FileExistsError if there
    is one; --overwrite replaces it only if it is a run, and not the one that the model comes from.
    """
    run = Path(s.out, name)
    if name == ".." or name != run.name:
        raise ValueError(
            f"--name must be the name of a folder in --out, not a path; it is {name!r}"
        )
    if run.exists():
        may_replace(run, s)
    with atomic_write(run) as fresh:  # so a run folder never lacks its settings
        fresh.mkdir()
        settings = json.dumps(dataclasses.asdict(s), indent=2)
        (fresh / "config.json").write_text(settings + "\n")
    told = [f"{key} {value}" for key, value in vars(s).items() if value not in ("", None)]
    print(f"{run}: " + ", ".join(told))
    return run


def may_replace(run: Path, s: Settings) -> None:
    if not s.overwrite:
        raise FileExistsError(
            f"{run} exists; give another --name, go on by --resume {run}, or --overwrite it"
        )
    has_settings = (run / "config.json").exists()
    if not has_settings or "alpha" not in read_json(run / "config.json"):
        raise ValueError(f"--overwrite would delete {run}, which is no run folder")
    if Path(s.model).resolve().is_relative_to(run.resolve()):
        raise ValueError(f"--overwrite would delete {run}, which holds the --model")


def settings_of_run(folder: str, arguments: Sequence[str] = ()) -> Settings:
    """The settings of a run folder. FileNotFoundError if it is none; ValueError if other flags came
    with --resume, or these settings are not ones that this version knows."""
    for argument in arguments:
        if argument.startswith("--") and argument.split("=")[0] != "--resume":
            raise ValueError("--resume takes all settings from the run; no other flag goes with it")
    file = Path(folder, "config.json")
    if not folder or not file.exists():
        raise FileNotFoundError(f"there is no run {folder!r}: it has no config.json")
    config = read_json(file)
    known = {field.name for field in dataclasses.fields(Settings)}
    differ = sorted(set(config) ^ known)
    if differ:
        raise ValueError(
            f"{file} is of another version of train.py: the two differ in {', '.join(differ)}"
        )
    usual = Settings()
    for field in dataclasses.fields(Settings):
        if not fits(config[field.name], getattr(usual, field.name), field.metadata.get("choices")):
            raise ValueError(f"{file}: {field.name} cannot be {config[field.name]!r}")
    return Settings(**config | {"resume": folder})


def fits(value: object, default: object, choices: Sequence | None) -> bool:
    """Whether a saved value is of its flag's type, and one of its choices."""
    right_type = default is None or type(value) is type(default)
    whole_number_for_float = type(default) is float and type(value) is int
    if not (right_type or whole_number_for_float):
        return False
    return choices is None or value == default or value in choices
