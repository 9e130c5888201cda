"""A run that survives: its folder, its log, its saved state, and signals. Read after model.py.

    config.json          the settings, written first
    log.jsonl            a line a step
    validation.jsonl     a line a validation, with the right answers of every problem
    state.safetensors    weights, AdamW's moments and the step: what --resume goes on from
    model/               the policy as a Hugging Face folder

A step's log line is on the disk before the state that contains the step, and a state takes its place in one rename.
So whenever a run is killed, the log holds at least what the state holds; --resume leaves out what is beyond it and does
those steps again, with the same random numbers. Nothing is pickled.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import torch

from model import read_json, write_tensors


def open_run(s, name: str) -> Path:
    """Makes the folder `name` in s.out, with the settings in config.json. FileExistsError if there is one; --overwrite
    replaces it only if it is a run, and not the one that the model comes from."""
    if name in (".", "..") or name != Path(name).name:
        raise ValueError(f"--name must be the name of a folder in --out, not a path; it is {name!r}")
    run = Path(s.out) / name
    if run.exists():
        if not s.overwrite:
            raise FileExistsError(f"the run folder {run} exists; give another --name, or --overwrite to replace it")
        if not (run / "config.json").exists() or "alpha" not in read_json(run / "config.json"):
            raise FileExistsError(f"{run} is not a run folder, so --overwrite leaves it alone; give another --name")
        if run.resolve() in (Path(s.model).resolve(), *Path(s.model).resolve().parents):
            raise ValueError(f"--overwrite would delete {s.model}, which this run starts from; give another --name")
        shutil.rmtree(run)
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(dataclasses.asdict(s), indent=2) + "\n")
    print(f"{run}: " + ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(s).items() if value != ""))
    return run


def resumed(s):
    """The settings of the run folder s.resume. FileNotFoundError if it is none; ValueError if other flags came with
    --resume, or the folder's settings are not those of this version."""
    if s != type(s)(resume=s.resume):
        raise ValueError("--resume takes all settings from the run; no other flag goes with it")
    file = Path(s.resume, "config.json")
    if not file.exists():
        raise FileNotFoundError(f"there is no run {s.resume}: it has no config.json")
    config = read_json(file)
    if set(config) != set(vars(s)):
        raise ValueError(f"{file} is not of this version of train.py")
    return type(s)(**config | {"resume": s.resume})


def append(file: Path, record: dict) -> None:
    """A line of JSON, on the disk before this returns."""
    with open(file, "a") as out:
        out.write(json.dumps(record) + "\n")
        out.flush()
        os.fsync(out.fileno())


def read_lines(file: Path, done: int) -> list[dict]:
    """The lines of steps 0..done, which are left alone in the file: a later one, whole or torn, will be made again."""
    records = []
    for text in file.read_text().splitlines() if file.exists() else ():
        try:
            record = json.loads(text)
        except json.JSONDecodeError:
            break
        records += [record] if record["step"] <= done else []
    if file.exists():
        fresh = file.with_name(file.name + ".tmp")
        fresh.write_text("".join(json.dumps(record) + "\n" for record in records))
        os.replace(fresh, file)
    return records


def save_state(run: Path, step: int, parts: dict[str, tuple]) -> None:
    """All that a resumed run needs besides config.json: weights, AdamW's moments, and the step. Data order and
    random numbers follow from (seed, step)."""
    tensors = {}
    for part, (module, optimizer) in parts.items():
        for name, parameter in module.named_parameters():
            tensors[f"{part}/{name}/weight"] = parameter
            tensors |= {f"{part}/{name}/{key}": value for key, value in optimizer.state.get(parameter, {}).items()}
    write_tensors(tensors, run / "state.safetensors", {"step": str(step)})


def load_state(run: Path, parts: dict[str, tuple]) -> int:
    """Puts the saved state into place -> its step; 0 if the run was stopped before its first save."""
    from safetensors import SafetensorError, safe_open

    file = run / "state.safetensors"
    if not file.exists():
        return 0
    try:
        saved = safe_open(file, "pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is not a readable safetensors file ({error})") from None
    with saved:
        for part, (module, optimizer) in parts.items():
            for name, parameter in module.named_parameters():
                kept = {key: saved.get_tensor(f"{part}/{name}/{key}") for key in ("weight", "step", "exp_avg", "exp_avg_sq")
                        if f"{part}/{name}/{key}" in saved.keys()}
                parameter.data.copy_(kept.pop("weight"))
                if kept:
                    optimizer.state[parameter] = {k: v if k == "step" else v.to(parameter.device) for k, v in kept.items()}
        return int(saved.metadata()["step"])


class Stop:
    """Ctrl-C or SIGTERM: a first one lets the step in hand be finished and saved; between steps, and the second time,
    it stops at once."""
    asked, in_step, run = False, False, None

    def __call__(self, number: int, frame) -> None:
        if self.asked or not self.in_step:
            raise KeyboardInterrupt
        self.asked = True


stop = Stop()
