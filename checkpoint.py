"""A run that survives: its folder, its log, its saved state, and signals. Read after model.py.

    config.json          the settings, written first
    log.jsonl            a line a step
    validation.jsonl     a line a validation, with the right answers of every problem
    state.safetensors    weights, AdamW's moments and the step: what --resume goes on from
    model/               the policy as a Hugging Face folder

A step's log line is on the disk before the state that contains the step, and a state takes its place in one rename. So
whenever a run is killed, the log holds at least what the state holds; --resume leaves out what is beyond it and does
those steps again, with the same random numbers, which like the data order follow from (seed, step). Nothing is pickled.
"""

import dataclasses
import json
import os
import resource
import shutil
import statistics
import sys
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Callable, Iterator

import safetensors.torch
import torch
from torch import Tensor


def open_run(s, name: str) -> Path:
    """Makes the folder `name` in s.out, with the settings in config.json. FileExistsError if there is one; --overwrite
    replaces it only if it is a run, and not the one that the model comes from."""
    run = Path(s.out, name)
    if name == ".." or name != run.name:
        raise ValueError(f"--name must be the name of a folder in --out, not a path; it is {name!r}")
    if run.exists():
        if not s.overwrite:
            raise FileExistsError(f"{run} exists; give another --name, go on by --resume {run}, or --overwrite it")
        is_run = (run / "config.json").exists() and "alpha" in read_json(run / "config.json")
        if not is_run or Path(s.model).resolve().is_relative_to(run.resolve()):
            raise ValueError(f"--overwrite would delete {run}, which is no run folder or holds the --model")
    with whole(run) as fresh:                               # so a run folder never lacks its settings
        fresh.mkdir()
        (fresh / "config.json").write_text(json.dumps(dataclasses.asdict(s), indent=2) + "\n")
    print(f"{run}: " + ", ".join(f"{key} {value}" for key, value in vars(s).items() if value not in ("", None)))
    return run


def resumed(folder: str, arguments: list[str], settings_class):
    """The settings of a run folder. FileNotFoundError if it is none; ValueError if other flags came with --resume, or
    these settings are not ones that this version knows."""
    if any(a.startswith("--") and a.split("=")[0] != "--resume" for a in arguments):
        raise ValueError("--resume takes all settings from the run; no other flag goes with it")
    file = Path(folder, "config.json")
    if not folder or not file.exists():
        raise FileNotFoundError(f"there is no run {folder!r}: it has no config.json")
    config, usual = read_json(file), settings_class()
    if odd := sorted(set(config) ^ set(vars(usual))):
        raise ValueError(f"{file} is of another version of train.py: the two differ in {', '.join(odd)}")
    for field in dataclasses.fields(settings_class):
        value, default = config[field.name], getattr(usual, field.name)
        fits = default is None or type(value) is type(default) or (type(default), type(value)) == (float, int)
        if not fits or value not in [default, *(field.metadata.get("choices") or [value])]:
            raise ValueError(f"{file}: {field.name} cannot be {value!r}")
    return settings_class(**config | {"resume": folder})


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """`with whole(path) as fresh`: what is written to fresh, a file or a folder, takes the place of `path` by a rename
    when it is on the disk. Until then the earlier one is there, whatever happens; a folder, if killed between its two
    renames, as .NAME.old. OSError if it cannot be written."""
    beside, old = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")
    shutil.rmtree(beside, ignore_errors=True)               # what a kill left behind
    try:
        beside.mkdir(parents=True)                          # a folder: safetensors makes a file of its own name in it
        yield beside / path.name
        for file in (f for f in beside.rglob("*") if f.is_file()):
            with open(file, "rb") as written:
                os.fsync(written)
        if path.is_dir():                                   # which a rename cannot replace
            shutil.rmtree(old, ignore_errors=True)
            os.rename(path, old)
        os.replace(beside / path.name, path)
        shutil.rmtree(old, ignore_errors=True)
    except Exception as error:                              # full disk: safetensors and tokenizers raise no OSError
        raise OSError(f"{path} could not be written ({error})") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def read_json(path: Path) -> dict:
    with suppress(ValueError):
        if isinstance(content := json.loads(path.read_text()), dict):
            return content
    raise ValueError(f"{path} does not hold a JSON object")


def append(file: Path, record: dict) -> None:
    """A line of JSON, on the disk before this returns."""
    try:
        with open(file, "a") as out:
            print(json.dumps(record), file=out, flush=True)
            os.fsync(out)
    except OSError as error:
        raise OSError(f"{file} could not be written ({error.strerror})") from None


def read_lines(file: Path, done: int, wanted: range) -> list[dict]:
    """The lines of steps 0..done, which alone are left in the file: a later one, whole or torn, will be made again.
    ValueError, and the file stays as it is, if one of the `wanted` steps is not there."""
    text, records = file.read_text() if file.exists() else "", []
    with suppress(json.JSONDecodeError):                    # a torn line ends it
        for line in text.splitlines():
            records.append(json.loads(line))
    records = [record for record in records if record["step"] <= done]
    if missing := sorted(set(wanted) - {record["step"] for record in records}):
        raise ValueError(f"{file} is damaged: the saved state is of step {done}, but step {missing[0]} is missing")
    if (kept := "".join(json.dumps(record) + "\n" for record in records)) != text:
        with whole(file) as fresh:
            fresh.write_text(kept)
    return records


def state_of(parts: dict[str, tuple]) -> dict[str, Tensor]:
    """All that a state holds, by name: the tensors themselves, not copies. parts: name -> (module, its AdamW), whose
    moments start here as AdamW starts them, if it has not made a step."""
    tensors = {}
    for part, (module, optimizer) in parts.items():
        for name, parameter in module.named_parameters():
            moments = optimizer.state[parameter]
            if not moments:
                moments |= {"step": torch.tensor(0.0)}
                moments |= {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
            tensors |= {f"{part}/{name}/{key}": x.detach() for key, x in {"weight": parameter, **moments}.items()}
    return tensors


def save_run(run: Path, step: int, parts: dict[str, tuple], save_model: Callable[[Path], None]) -> None:
    """model/, by save_model, then the state. FloatingPointError, and nothing is written, if a number is not finite."""
    tensors = state_of(parts)
    if bad := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise FloatingPointError(f"{bad[0]} holds NaN or infinity")
    save_model(run / "model")
    with whole(run / "state.safetensors") as fresh:
        copies = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        safetensors.torch.save_file(copies, fresh, {"step": str(step)})


def load_state(run: Path, parts: dict[str, tuple]) -> int:
    """Puts the saved state into place -> its step; 0 if the run was stopped before its first save. ValueError if it
    cannot be read, does not fit the settings, or holds NaN or infinity."""
    file = run / "state.safetensors"
    if not file.exists():
        return 0
    try:
        with safetensors.safe_open(file, "pt") as saved:
            tensors = state_of(parts)
            for name in sorted({*tensors, *saved.keys()}):
                kept, place = saved.get_tensor(name), tensors.get(name)
                if place is None or kept.shape != place.shape or not kept.isfinite().all():
                    raise ValueError(f"{name} belongs to another model or algorithm, or holds NaN or infinity")
                place.copy_(kept)
            return int(saved.metadata()["step"])
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is not a whole state of this run ({type(error).__name__}: {error})") from None


def mean(updates: list[Counter], name: str, per: str = "") -> float | None:
    """The sums called `name`, per update or per one of what was counted as `per`; None if there was none."""
    count = sum(sums[per] for sums in updates) if per else len(updates)
    return sum(sums[name] for sums in updates) / count if count else None


def summary(step: int, episodes: list, reward: Tensor, updates: list[Counter], samples: int) -> dict:
    """The log line of a step: entropy and length of all tokens of the rollout.Episodes; shaping, clip fractions and KL of
    the scored ones; the gap between sampler and scorer of the first update. None: nothing was scored."""
    tokens, first = sum(len(e.response) for e in episodes), updates[:1]
    return {"step": step, "reward": float(reward.mean()), "length": tokens / len(episodes),
            "finished": sum(e.finished for e in episodes) / len(episodes),
            "entropy": float(torch.cat([e.entropy for e in episodes]).mean()),
            "equal_groups": float((reward.view(-1, samples) == reward[::samples, None]).all(1).float().mean()),
            "shaping": mean(updates, "shaping", "tokens"), "shaping_up": mean(updates, "shaping_up", "up"),
            "shaping_down": mean(updates, "shaping_down", "down"), "capped": mean(updates, "capped", "tokens"),
            "clip_low": mean(updates, "clipped_low", "tokens"), "clip_high": mean(updates, "clipped_high", "tokens"),
            "kl": mean(updates, "kl", "tokens"), "loss": mean(updates, "loss"), "grad_norm": mean(updates, "grad_norm"),
            "gap_max": max((sums["gap_max"] for sums in first if sums["tokens"]), default=None),
            "gap_mean": mean(first, "gap", "tokens"), "tokens": tokens}


def explained(updates: list[Counter], value: Tensor, ret: Tensor) -> dict:
    """The critic's part of a log line; value, ret [tokens]. Equal returns leave no variance to explain: None."""
    spread = float(ret.var()) if len(ret) > 1 else 0.0
    return {"value_loss": mean(updates, "loss"), "critic_grad_norm": mean(updates, "grad_norm"),
            "explained_variance": 1 - float((ret - value).var()) / spread if spread > 1e-8 else None}


def step_times(log: list[dict]) -> str:
    """Where the time of a step goes. On a GPU the share of scoring is not exact: nobody waits for the card there."""
    median = {key: statistics.median(line[key] for line in log) for key in log[0] if key.endswith("_s")}
    return ("median seconds of a step: rollout {rollout_s:.2f}, reward {reward_s:.2f}, update {update_s:.2f} "
            "(of it {score_s:.2f} scoring, forward)".format(**median))


def peak_memory(device: torch.device) -> float:
    """GB: of the card's allocations on a GPU, else of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    with suppress(OSError, IndexError):     # where Linux tells it: in getrusage a child inherits its parent's peak
        return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


class Stop:
    """Where the run is, for whoever stops it. A first Ctrl-C or SIGTERM lets the step in hand be finished and saved; a
    second one, or a first while nothing would be lost, stops at once."""
    asked, in_steps, run, saved, where = False, False, None, 0, ""

    def __call__(self, number: int, frame) -> None:
        if self.asked or not self.in_steps:
            raise KeyboardInterrupt
        self.asked = True
        os.write(2, b"\nfinishing this step and saving; once more stops at once\n")

    def way_on(self) -> str:
        return f"; go on from step {self.saved} with: python train.py --resume {self.run}" if self.run else ""

    def way_back(self) -> str:
        good = f"the last good state is of step {self.saved} (--model {self.run}/model)"
        return f"{good if self.saved else 'nothing was saved yet'}; a new run with a lower --lr may help"


stop = Stop()
