"""A run that survives: its folder for it alone, and the order in which things are written to it.

plumbing/folder.py says what is in the folder, checkpoint.py how each of it is written, lock.py how
a second process is kept out, and stop.py what a signal does."""

import dataclasses
import json
import os
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Callable, Iterator, Sequence

from plumbing.checkpoint import (
    append_line,
    atomic_write,
    flush_to_disk,
    keep_lines,
    lend_slices,
    load_state,
    read_json,
    read_lines,
    refuse_not_finite,
    remove,
    save_state,
    state_of,
)
from plumbing.distributed import gather
from plumbing.folder import (
    first_stranger,
    new_place,
    put_in_order,
    remove_leftovers,
    take_place,
)
from plumbing.lock import lock, remove_empty, workplace
from plumbing.pretrained import EMBEDDED, named_as_in_transformers
from plumbing.settings import ADDED_LATER, Settings, check_text, run_name
from plumbing.shard import is_sharded
from plumbing.stop import stop

# What a resumed run reads of its old lines, besides the step.
LOG_NUMBERS = ("reward", "equal_groups", "rollout_s", "reward_s", "update_s", "score_s")
VALIDATION_NUMBERS = ("samples", "tokens", "finished")


def folder_of(s: Settings) -> Path:
    """Where the run is, or is going to be. FileNotFoundError; ValueError for a name that cannot be
    a folder's."""
    if s.resume is not None:
        folder = Path(s.resume)
        if not s.resume or not folder.parent.is_dir():
            raise no_run(s.resume)
        return folder

    check_text(s)
    name = s.name or run_name(s)
    if name == ".." or name != Path(s.out, name).name:
        raise ValueError(
            f"--name must be the name of a folder in --out, not a path; it is {name!r}"
        )
    if name.startswith("."):
        raise ValueError(
            f"--name must not begin with a dot, as what is not finished does; it is {name!r}"
        )
    if len(os.fsencode(name)) >= 240 and not s.name:
        raise ValueError(
            f"--name must be given, as these settings make too long a name; it is {s.name}"
        )
    if len(os.fsencode(name)) >= 240:
        raise ValueError(f"--name must have less than 240 bytes; it has {len(os.fsencode(name))}")
    return Path(s.out, name)


def no_run(folder: str) -> FileNotFoundError:
    return FileNotFoundError(f"there is no run {folder!r}: it has no config.json")


@contextmanager
def claim(s: Settings, rank: int) -> Iterator[Settings]:
    """`with claim(s, rank) as s`: the run's folder is in order, and is for this process alone (of
    several, for the first and those that were started with it). Gives the settings, which a run
    that is resumed has in its folder.

    A finished run goes on if s.steps, which may come with s.resume, is more than it has.

    BlockingIOError if another process has it; FileExistsError, FileNotFoundError and ValueError as
    from open_run, settings_of_run and with_steps."""
    run = folder_of(s)
    with ExitStack() as until_the_end:
        if rank == 0:
            until_the_end.enter_context(lock(run))
            until_the_end.callback(put_in_order, run)
            put_in_order(run)
            if s.resume is None:
                may_make(run, s)
        gather(None)  # nobody reads before the first process has the lock

        if s.resume is not None:
            saved = settings_of_run(s.resume)
            s = with_steps(saved, s.steps)
        gather(None)  # nor does it change anything while others read
        if rank == 0 and s.resume is not None:
            remove_leftovers(run)
        yield s


class Run:
    """A run's folder. Only the first process writes; all of them know what is in it.

    parts: name -> (module, its AdamW), see checkpoint.state_of; save_model writes the policy;
    problems: how many a validation has."""

    def __init__(
        self,
        s: Settings,
        parts: dict[str, tuple],
        save_model: Callable[[Path], None],
        rank: int,
        problems: int,
    ) -> None:
        self.parts = parts
        self.save_model = save_model
        self.writes = rank == 0
        self.folder = folder_of(s)
        place = self.folder
        if self.writes and s.resume is None:
            place = open_run(s, self.folder.name)
        # Where it is written: the folder, unless that is still another run's.
        self.place = gather(place)[0]

        self.saved_step = load_state(self.place, parts)  # 0 for a new run
        kept = None
        if self.writes:
            kept = self.read_kept(s, problems)
            if s.resume is not None:
                store_longer(self.place, s)
        self.log, self.validations = gather(kept)[0]  # the first process's
        stop.saved = self.saved_step
        stop.run = self.folder if self.is_in_place() else None

    def read_kept(self, s: Settings, problems: int) -> tuple[list[dict], list[dict]]:
        """The log and the validations, up to the saved state: what is later will be made again, and
        is taken out of the files once all is found to be whole. ValueError."""
        done = self.saved_step
        if not 0 <= done <= s.steps:
            raise ValueError(
                f"{self.place}/state.safetensors is of step {done}, but the run has {s.steps} steps"
            )
        # The validation of the saved step itself comes after its save.
        validated = range(0, done, s.eval_every)
        log_file = self.place / "log.jsonl"
        validation_file = self.place / "validation.jsonl"
        log = read_lines(log_file, done, range(1, done + 1), LOG_NUMBERS)
        validations = read_lines(validation_file, done, validated, VALIDATION_NUMBERS)
        for validation in validations:
            check_validation(validation, validation_file, problems)
        keep_lines(log_file, log)
        keep_lines(validation_file, validations)
        return log, validations

    def is_in_place(self) -> bool:
        return self.place == self.folder

    def add_step(self, line: dict) -> None:
        """Writes the log line, which must be on the disk before the state that contains the step."""
        self.log.append(line)
        if self.writes:
            append_line(self.place / "log.jsonl", line)
        if not self.is_in_place():
            self.replace_old_run()

    def replace_old_run(self) -> None:
        """The first step is done: this run is no failed start."""
        if self.writes:
            check_replaceable(self.folder)  # still: that was some time ago
            take_place(self.folder)
        self.place = self.folder
        stop.run = self.folder

    def save(self, step: int) -> None:
        if self.writes:
            save_state(self.place, step, self.parts, self.save_model)
        else:
            self.help_to_save()
        gather(None)  # so that all of them know when it is saved
        stop.saved = step

    def help_to_save(self) -> None:
        """The first process, while it is in save_state, needs the others' slices."""
        state = state_of(self.parts)
        refuse_not_finite(state)
        policy, _ = self.parts["policy"]
        if not is_sharded(policy):
            return  # and LoRA's weights are merged for the file alone
        lend_slices(named_as_in_transformers(policy))
        lend_slices(state)

    def is_validated(self, step: int) -> bool:
        return any(validation["step"] == step for validation in self.validations)

    def add_validation(self, step: int, counts: dict) -> None:
        self.validations.append({"step": step} | counts)
        if self.writes:
            append_line(self.place / "validation.jsonl", self.validations[-1])

    def finish(self, record: dict) -> None:
        with atomic_write(self.place / "validation.json") as fresh:
            fresh.write_text(json.dumps(record) + "\n")


def check_validation(validation: dict, file: Path, problems: int) -> None:
    """ValueError if its counts cannot be compared with those of a validation of today."""
    step = validation["step"]
    solved = validation.get("solved")
    samples = validation["samples"]
    if not isinstance(solved, list) or not all(type(count) is int for count in solved):
        raise ValueError(f"{file} is damaged: step {step} has no counts of right answers")
    if not all(0 <= count <= samples for count in solved):
        raise ValueError(f"{file} is damaged: step {step} has impossible counts of right answers")
    if len(solved) != problems:
        raise ValueError(
            f"{file} is of {len(solved)} validation problems in step {step}, and now there are "
            f"{problems}; has the data changed?"
        )


def open_run(s: Settings, name: str) -> Path:
    """Makes the run's folder, `name` in s.out, with the settings in config.json -> where it is: in
    its place, or beside it if it is to replace another run. FileExistsError and ValueError as from
    may_make."""
    run = folder_of(dataclasses.replace(s, name=name))
    replaces = run.exists()
    may_make(run, s)
    new = new_place(run)
    remove(new)
    new.mkdir(parents=True)
    (new / "config.json").write_text(json.dumps(to_be_stored(s), indent=2) + "\n")
    flush_to_disk(new)
    told = [f"{key} {value}" for key, value in vars(s).items() if value not in ("", None)]
    print(f"{run}: " + ", ".join(told))
    if replaces:
        return new
    os.replace(new, run)  # so a run folder never lacks its settings
    remove_empty([workplace(run)])
    return run


def to_be_stored(s: Settings) -> dict:
    """The settings, with full paths: --resume may be said in another working directory. Hub ids,
    and `base`, are as they are."""
    settings = dataclasses.asdict(s)
    for name in ("model", "data", "test_data"):
        value = settings[name]
        if value not in ("", EMBEDDED) and Path(value).exists():
            settings[name] = str(Path(value).resolve())
    for flag in ("task", "method"):
        file, colon, name_in_it = settings[flag].rpartition(":")
        if colon:
            settings[flag] = f"{Path(file).resolve()}:{name_in_it}"
    return settings


def may_make(run: Path, s: Settings) -> None:
    """FileExistsError if there is something in the run's place; with --overwrite ValueError unless it
    is a run and nothing else, and not the one that the model comes from."""
    if not run.exists():
        return
    if not s.overwrite:
        raise FileExistsError(
            f"{run} exists; give another --name, go on by --resume {run}, or --overwrite it"
        )
    check_replaceable(run)
    if Path(s.model).resolve().is_relative_to(run.resolve()):
        raise ValueError(f"--overwrite would delete {run}, which holds the --model")


def check_replaceable(run: Path) -> None:
    """ValueError unless the folder is a run (no other config.json has all settings of train.py, and
    nothing else), and holds nothing else."""
    if run.is_symlink():
        raise ValueError(f"--overwrite would delete {run}, which is a link")
    try:
        settings_of_run(str(run))
    except (ValueError, OSError):
        raise ValueError(
            f"--overwrite would delete {run}, which is no run folder of this version of train.py"
        ) from None
    stranger = first_stranger(run)
    if stranger:
        raise ValueError(f"--overwrite would delete {stranger}, which is no file of a run")


def no_other_flag(arguments: Sequence[str]) -> None:
    """ValueError if flags besides --steps come with --resume."""
    for argument in arguments:
        flag = argument.split("=")[0]
        if flag.startswith("--") and flag not in ("--resume", "--steps"):
            raise ValueError(
                "--resume takes all settings from the run; no other flag goes with it, but for a "
                "larger --steps"
            )


def with_steps(saved: Settings, steps: int | None) -> Settings:
    """The settings of a run, which is to have this many steps (None: as many as it has).
    ValueError for fewer."""
    if steps is None:
        return saved
    if steps < saved.steps:
        raise ValueError(
            f"--steps must be at least {saved.steps} here, those of the run {saved.resume}; "
            f"it is {steps}"
        )
    return dataclasses.replace(saved, steps=steps)


def store_longer(run: Path, s: Settings) -> None:
    """Settings with more steps, if they have, in place of the run's own, once nothing refuses them.
    The final table is no longer its last file, and goes first: killed in between, the run makes it
    again."""
    config = read_json(run / "config.json")
    if config["steps"] == s.steps:
        return
    remove(run / "validation.json")
    config["steps"] = s.steps
    with atomic_write(run / "config.json") as fresh:
        fresh.write_text(json.dumps(config, indent=2) + "\n")


def settings_of_run(folder: str, arguments: Sequence[str] = ()) -> Settings:
    """The settings of a run folder. FileNotFoundError if it is none; ValueError if other flags came
    with --resume, or these settings are not ones that this version knows."""
    no_other_flag(arguments)
    file = Path(folder, "config.json")
    if not folder or not file.exists():
        raise no_run(folder)
    config = ADDED_LATER | read_json(file)
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
    if config["dry_run"]:
        raise ValueError(f"{file}: dry_run cannot be True; a dry run leaves no folder")
    return Settings(**config | {"resume": folder})


def fits(value: object, default: object, choices: Sequence | None) -> bool:
    """Whether a saved value is of its flag's type, and one of its choices."""
    right_type = default is None or type(value) is type(default)
    whole_number_for_float = type(default) is float and type(value) is int
    if not (right_type or whole_number_for_float):
        return False
    return choices is None or value == default or value in choices
