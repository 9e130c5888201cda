"""What a run leaves on the disk; how its folder comes into its place, and what may be replaced.

config.json          the settings, written first
log.jsonl            a line a step
validation.jsonl     a line a validation, with the right answers of every problem
state.safetensors    weights, AdamW's moments and the step: what --resume goes on from
model/               the policy as a Hugging Face folder; with LoRA merged, and in adapter/ PEFT's
                     files
validation.json      the final table, written last

A run that is to replace another works in OUT/.NAME.work/new until it has done a step. Then the old
one goes to OUT/.NAME.work/old, the new one takes its place, and the old one is removed. So a start
that fails leaves the old run; whatever else a kill leaves, `put_in_order` mends it at the next
start."""

import os
from pathlib import Path

from plumbing import pretrained
from plumbing.checkpoint import clear_up, remove
from plumbing.lock import workplace

FILES = ("config.json", "log.jsonl", "validation.jsonl", "state.safetensors", "validation.json")
MODEL = "model"
ADAPTER = f"{MODEL}/{pretrained.ADAPTER}"  # with --lora-rank
# What pretrained.save and the tokenizers write.
MODEL_FILES = (
    f"{pretrained.ADAPTER}/adapter_config.json",
    f"{pretrained.ADAPTER}/adapter_model.safetensors",
    "added_tokens.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


def new_place(run: Path) -> Path:
    """Where a run is before it takes its place."""
    return workplace(run) / "new"


def old_place(run: Path) -> Path:
    """Where a replaced run is until it is removed."""
    return workplace(run) / "old"


def take_place(run: Path) -> None:
    """The new run for the old one. Killed between the two renames, neither is lost."""
    os.rename(run, old_place(run))
    os.rename(new_place(run), run)
    remove(old_place(run))


def put_in_order(run: Path) -> None:
    """Ends what a kill interrupted: an old run without a new one in its place goes back. Under the
    lock, at the start and at the end."""
    if old_place(run).exists() and not run.exists():
        os.rename(old_place(run), run)
    remove(old_place(run))
    remove(new_place(run))


def remove_leftovers(run: Path) -> None:
    """Of saves that were killed. Only in what is known to be a run."""
    for name in (*FILES, MODEL):
        clear_up(run / name)


def first_stranger(run: Path) -> Path | None:
    """Something in the folder that is no run's own: a link, another file, a folder."""
    leftovers = {f".{name}.{end}" for name in (*FILES, MODEL) for end in ("tmp", "old")}
    own = {run / name for name in FILES} | {run / MODEL / name for name in MODEL_FILES}
    for path in sorted(run.rglob("*")):
        is_folder = path.is_dir() and not path.is_symlink()
        is_file = path.is_file() and not path.is_symlink()
        own_file = is_file and path in own
        own_folder = is_folder and path in (run / MODEL, run / ADAPTER)
        of_a_killed_save = path.relative_to(run).parts[0] in leftovers
        if not (own_file or own_folder or of_a_killed_save):
            return path
    return None
