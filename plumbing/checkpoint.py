"""Files that survive: atomic writes, lines of a log, and the state that a run goes on from.

A step's log line is on the disk before the state that contains the step, and a state takes its
place in one rename. So whenever a run is killed, the log holds at least what the state holds;
--resume leaves out what is beyond it and does those steps again, with the same random numbers,
which like the data order follow from (seed, step). Nothing is pickled.
"""

import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Iterator

import safetensors
import safetensors.torch
import torch
from torch import Tensor


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """`with atomic_write(path) as fresh`: what is written to `fresh`, a file or a folder, takes the
    place of `path` by a rename when it is on the disk.

    Killed before that, `path` is as it was. A folder needs two renames; killed between them, the
    earlier one is left as .NAME.old. OSError if it cannot be written."""
    workplace = path.with_name(f".{path.name}.tmp")
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(workplace, ignore_errors=True)  # what a kill left behind
    try:
        # A folder to work in: safetensors makes a temporary file of its own name beside its target.
        workplace.mkdir(parents=True)
        fresh = workplace / path.name
        yield fresh
        flush_to_disk(workplace)
        if path.is_dir():  # which a rename cannot replace
            shutil.rmtree(old, ignore_errors=True)
            os.rename(path, old)
        os.replace(fresh, path)
        shutil.rmtree(old, ignore_errors=True)
    except Exception as error:  # on a full disk safetensors and tokenizers raise no OSError
        raise OSError(f"{path} could not be written ({error})") from None
    finally:
        shutil.rmtree(workplace, ignore_errors=True)


def flush_to_disk(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb") as written:
                os.fsync(written)


def read_json(path: Path) -> dict:
    """ValueError if the file does not hold a JSON object."""
    try:
        content = json.loads(path.read_text())
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return content


def append_line(file: Path, record: dict) -> None:
    """A line of JSON, on the disk before this returns."""
    try:
        with open(file, "a") as out:
            print(json.dumps(record), file=out, flush=True)
            os.fsync(out)
    except OSError as error:
        raise OSError(f"{file} could not be written ({error.strerror})") from None


def read_lines(file: Path, done: int, wanted: range) -> list[dict]:
    """The lines of steps 0..done, which alone are left in the file: a later one, whole or torn,
    will be made again. ValueError, and the file stays as it is, if one of the `wanted` steps is
    not there."""
    text = file.read_text() if file.exists() else ""
    records = [record for record in parse_lines(text) if record["step"] <= done]

    missing = sorted(set(wanted) - {record["step"] for record in records})
    if missing:
        raise ValueError(
            f"{file} is damaged: the saved state is of step {done}, "
            f"but step {missing[0]} is missing"
        )

    kept = "".join(json.dumps(record) + "\n" for record in records)
    if kept != text:
        with atomic_write(file) as fresh:
            fresh.write_text(kept)
    return records


def parse_lines(text: str) -> list[dict]:
    """The lines of JSON up to the first torn one."""
    records = []
    for line in text.splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def state_of(parts: dict[str, tuple]) -> dict[str, Tensor]:
    """All that a state holds, by name: the tensors themselves, not copies. parts: name -> (module,
    its AdamW). An optimizer that has not made a step gets its moments here, as AdamW starts them."""
    tensors = {}
    for part, (module, optimizer) in parts.items():
        for name, parameter in module.named_parameters():
            moments = optimizer.state[parameter]
            if not moments:
                moments["step"] = torch.tensor(0.0)
                moments["exp_avg"] = torch.zeros_like(parameter)
                moments["exp_avg_sq"] = torch.zeros_like(parameter)
            tensors[f"{part}/{name}/weight"] = parameter.detach()
            for key, moment in moments.items():
                tensors[f"{part}/{name}/{key}"] = moment.detach()
    return tensors


def save_state(
    run: Path, step: int, parts: dict[str, tuple], save_model: Callable[[Path], None]
) -> None:
    """model/, by save_model, then the state. FloatingPointError, and nothing is written, if a
    number is not finite."""
    tensors = state_of(parts)
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise FloatingPointError(f"{name} holds NaN or infinity")
    save_model(run / "model")
    with atomic_write(run / "state.safetensors") as fresh:
        copies = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        safetensors.torch.save_file(copies, fresh, {"step": str(step)})


def load_state(run: Path, parts: dict[str, tuple]) -> int:
    """Puts the saved state into place -> its step; 0 if the run was stopped before its first save.
    ValueError if it cannot be read, does not fit the settings, or holds NaN or infinity."""
    file = run / "state.safetensors"
    if not file.exists():
        return 0
    try:
        with safetensors.safe_open(file, "pt") as saved:
            copy_into(state_of(parts), saved)
            return int(saved.metadata()["step"])
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file} is not a whole state of this run ({type(error).__name__}: {error})"
        ) from None


def copy_into(tensors: dict[str, Tensor], saved) -> None:
    """Every saved tensor to its place; ValueError or SafetensorError if one is missing on either
    side."""
    for name in sorted({*tensors, *saved.keys()}):
        kept = saved.get_tensor(name)
        place = tensors.get(name)
        if place is None or kept.shape != place.shape:
            raise ValueError(f"{name} belongs to another model or algorithm")
        if not kept.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinity")
        place.copy_(kept)
