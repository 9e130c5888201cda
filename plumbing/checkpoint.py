"""Files that survive: atomic writes, lines of a log, and the state that a run goes on from.

A step's log line is on the disk before the state that contains the step, and a state takes its
place in one rename. So whenever a run is killed, the log holds at least what the state holds;
--resume leaves out what is beyond it and does those steps again, with the same random numbers,
which like the data order follow from (seed, step). Nothing is pickled.
"""

import hashlib
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Iterator, Sequence

import numpy as np
import safetensors
import torch
from torch import Tensor

from plumbing.distributed import OthersEnded, own_slice, slice_for, whole

SAFETENSORS_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.uint8: "U8"}


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """`with atomic_write(path) as fresh`: what is written to `fresh`, a file or a folder, takes the
    place of `path` by a rename when it is on the disk.

    Killed before that, `path` is as it was. A folder needs two renames; killed between them, the
    earlier one is left as .NAME.old. OSError if it cannot be written."""
    workplace = path.with_name(f".{path.name}.tmp")
    old = path.with_name(f".{path.name}.old")
    remove(workplace)  # what a kill left behind
    try:
        # A folder to work in: safetensors makes a temporary file of its own name beside its target.
        workplace.mkdir(parents=True)
        fresh = workplace / path.name
        yield fresh
        flush_to_disk(workplace)
        if path.is_dir():  # which a rename cannot replace
            remove(old)
            os.rename(path, old)
        os.replace(fresh, path)
        remove(old)
    except OthersEnded:  # who had the other slices
        raise
    except Exception as error:  # on a full disk safetensors and tokenizers raise no OSError
        raise OSError(f"{path} could not be written ({error})") from None
    finally:
        remove(workplace)


def clear_up(path: Path) -> None:
    """Mends what an atomic_write that was killed has left beside `path`: an earlier one without a
    new one in its place goes back."""
    old = path.with_name(f".{path.name}.old")
    if old.exists() and not path.exists():
        os.rename(old, path)
    remove(old)
    remove(path.with_name(f".{path.name}.tmp"))


def remove(path: Path) -> None:
    """A file or a folder, if it is there; as far as that is possible."""
    if path.is_file() or path.is_symlink():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def flush_to_disk(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb") as written:
                os.fsync(written)


def read_json(path: Path) -> dict:
    """ValueError if the file does not hold a JSON object."""
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError):  # also what is not text, or nested too deep
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


def read_lines(file: Path, done: int, wanted: range, numbers: Sequence[str] = ()) -> list[dict]:
    """The lines of steps 0..done; later ones, whole or torn, will be made again. The file stays as
    it is. ValueError if one of the `wanted` steps is not there, or a line is no JSON object with a
    step after that of the line before and something measured in each of `numbers`."""
    records = []
    step = -1
    for number, record in enumerate(parse_lines(file), start=1):
        before = step
        step = record.get("step") if isinstance(record, dict) else None
        if type(step) is not int:
            raise ValueError(f"{file} is damaged: line {number} is no line of a step")
        if step <= before:
            raise ValueError(
                f"{file} is damaged: line {number} is of step {step}, and the one before it of "
                f"step {before}"
            )
        for name in numbers:
            if not isinstance(record.get(name), (int, float)):
                raise ValueError(f"{file} is damaged: line {number} has no number as its {name!r}")
        if step <= done:
            records.append(record)

    present = {record["step"] for record in records}
    for step in wanted:  # stops at the first that is missing, however many are wanted
        if step not in present:
            raise ValueError(
                f"{file} is damaged: the saved state is of step {done}, but step {step} is missing"
            )
    return records


def parse_lines(file: Path) -> list:
    """The lines of JSON up to the first torn one. ValueError if one cannot be of our making."""
    if not file.exists():
        return []
    records = []
    try:
        for line in file.read_text().splitlines():
            records.append(json.loads(line))
    except json.JSONDecodeError:  # torn
        pass
    except (ValueError, RecursionError) as error:  # not text; a number too long; nested too deep
        raise ValueError(
            f"{file} is damaged after line {len(records)} ({type(error).__name__})"
        ) from None
    return records


def keep_lines(file: Path, records: Sequence[dict]) -> None:
    """Leaves only these lines in the file."""
    kept = "".join(json.dumps(record) + "\n" for record in records)
    if kept != (file.read_text() if file.exists() else ""):
        with atomic_write(file) as fresh:
            fresh.write_text(kept)


def state_of(parts: dict[str, tuple]) -> dict[str, Tensor]:
    """All that a state holds, by name: the tensors themselves, not copies. parts: name -> (module,
    its AdamW, by optimizer.make_optimizer). Frozen weights (LoRA's base) are left out: a resumed run
    reads them from --model."""
    tensors = {}
    for part, (module, optimizer) in parts.items():
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            tensors[f"{part}/{name}/weight"] = parameter.detach()
            for key, moment in optimizer.state[parameter].items():
                tensors |= plain_tensors(f"{part}/{name}/{key}", moment)
    return tensors


def plain_tensors(name: str, moment: Tensor) -> dict[str, Tensor]:
    """The moment itself; or, of one in 8 bits (plumbing/eight_bit.py), what it is made of."""
    is_eight_bit = hasattr(moment, "codes")
    if not is_eight_bit:
        return {name: moment.detach()}
    return {f"{name}/codes": moment.codes, f"{name}/scale": moment.scale}


def digest_of_frozen(parts: dict[str, tuple]) -> dict[str, str]:
    """For the state's metadata: a digest of the frozen weights, which the state does not hold. So
    load_state can refuse it beside others. Empty without LoRA."""
    digest = hashlib.sha256()
    any_frozen = False
    for part, (module, _) in parts.items():
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                any_frozen = True
                digest.update(f"{part}/{name}\n".encode())
                digest.update(bytes_of(parameter))
    return {"frozen": digest.hexdigest()} if any_frozen else {}


def save_state(
    run: Path, step: int, parts: dict[str, tuple], save_model: Callable[[Path], None]
) -> None:
    """model/, by save_model, then the state. FloatingPointError, and nothing is written, if a
    number is not finite."""
    tensors = state_of(parts)
    refuse_not_finite(tensors)
    save_model(run / "model")
    with atomic_write(run / "state.safetensors") as fresh:
        write_tensors(tensors, fresh, {"step": str(step)} | digest_of_frozen(parts))


def refuse_not_finite(tensors: dict[str, Tensor]) -> None:
    """FloatingPointError; of slices, for this process's."""
    for name, tensor in tensors.items():
        if not own_slice(tensor).isfinite().all():
            raise FloatingPointError(f"{name} holds NaN or infinity")


def write_tensors(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
    """The safetensors file that safetensors' own save_file writes, byte for byte. That one wants all
    tensors in this machine's memory, where a state of 7B on a GPU takes 91 GB; here it is one at a
    time.

    The format: the header's length in 8 bytes; the header, JSON filled up with spaces to a multiple
    of 8; the numbers."""
    names = in_file_order(tensors)
    header: dict[str, dict] = {"__metadata__": metadata}
    end = 0
    for name in names:
        tensor = tensors[name]
        start = end
        end = start + tensor.nbytes
        header[name] = {
            "dtype": SAFETENSORS_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as out:
        out.write(len(text).to_bytes(8, "little"))
        out.write(text)
        for name in names:
            out.write(bytes_of(whole(tensors[name])))


def bytes_of(tensor: Tensor) -> np.ndarray:
    """As in a safetensors file; uint8."""
    numbers = tensor.detach().cpu().contiguous().flatten()
    return numbers.view(torch.uint8).numpy()


def lend_slices(tensors: dict[str, Tensor]) -> None:
    """What the other processes do while one is in write_tensors with these."""
    for name in in_file_order(tensors):
        whole(tensors[name])


def in_file_order(tensors: dict[str, Tensor]) -> list[str]:
    """Wide numbers first, so that each lies at a multiple of its size."""
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def load_state(run: Path, parts: dict[str, tuple]) -> int:
    """Puts the saved state into place -> its step; 0 if the run was stopped before its first save.
    ValueError if it cannot be read, does not fit the settings, or holds NaN or infinity."""
    file = run / "state.safetensors"
    if not file.exists():
        return 0
    try:
        with safetensors.safe_open(file, "pt") as saved:
            copy_into(state_of(parts), saved)
            metadata = saved.metadata()
            step = int(metadata["step"])
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file} is not a whole state of this run ({type(error).__name__}: {error})"
        ) from None
    if metadata.get("frozen") != digest_of_frozen(parts).get("frozen"):
        raise ValueError(
            f"{file} belongs to adapters of other weights than those that --model has now"
        )
    return step


def copy_into(tensors: dict[str, Tensor], saved) -> None:
    """Every saved tensor to its place; ValueError or SafetensorError if one is missing on either
    side."""
    for name in sorted({*tensors, *saved.keys()}):
        kept = saved.get_tensor(name)
        place = tensors.get(name)
        if place is None or kept.shape != place.shape:
            raise ValueError(f"{name} belongs to another model or algorithm")
        if kept.dtype != place.dtype:
            raise ValueError(f"{name} is of {kept.dtype}, and not of {place.dtype}")
        mine = slice_for(place, kept)
        if not mine.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinity")
        own_slice(place).copy_(mine)
