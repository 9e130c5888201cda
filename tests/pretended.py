"""Runs code on a pretended CUDA device: a real `cuda:0` whose kernels run on the CPU, and which raises
where CUDA raises. The tool is not part of this repository (../shared/tools/pretend_cuda, README
there); where it or a compiler is missing, the tests that need it are skipped."""

import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
TOOL = Path(os.environ.get("PRETEND_CUDA", ROOT.parent / "shared" / "tools" / "pretend_cuda"))
NEEDED = ("g++", "ninja")  # to build it

# Before torch is imported, which looks once whether there is an accelerator. And what the tool leaves
# out: the card's name, and what an allocator would reserve.
BEFORE = f"""
import sys
sys.path[:0] = [{str(TOOL)!r}, {str(ROOT)!r}]
import pretend, emulate, torch
torch.cuda.get_device_name = lambda device=None: "a pretended card"
torch.cuda.memory_reserved = torch.cuda.memory_allocated
torch.cuda.max_memory_reserved = torch.cuda.max_memory_allocated
"""
# The countdown problems are made once in a process, and only some are there to train on.
FEW_PROBLEMS = """
import functools
import tasks
load_all = tasks.load_task

@functools.cache
def load_few(*arguments, **options):
    task = load_all(*arguments, **options)
    task.train = task.train[:400]
    return task

tasks.load_task = load_few
"""


@functools.cache
def build() -> Path:
    """The folder of the tool's library for this torch, built if it is not there yet (a minute)."""
    if not (TOOL / "pretend.cpp").exists():
        pytest.skip(f"the pretended device is not at {TOOL}")
    source = (TOOL / "pretend.cpp").read_bytes()
    versions = f"{torch.__version__} {sys.version}".encode()
    key = hashlib.sha256(source + versions).hexdigest()[:16]
    folder = Path(tempfile.gettempdir(), f"pretend_cuda_{key}")
    if (folder / "pretend_cuda.so").exists():
        return folder

    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for program in NEEDED:
        if shutil.which(program, path=environment["PATH"]) is None:
            pytest.skip(f"the pretended device cannot be built without {program}")
    # Elsewhere, and then renamed: a build that was killed is not taken for a whole one.
    fresh = tempfile.mkdtemp(prefix=f"{folder.name}_")
    command = [sys.executable, str(TOOL / "build.py")]
    environment["PRETEND_CUDA_BUILD"] = fresh
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the pretended device could not be built\n{done.stdout}\n{done.stderr}")
    try:
        os.rename(fresh, folder)
    except OSError:  # another process was faster
        shutil.rmtree(fresh)
    return folder


def pretended_python(source: str, timeout: float = 1200) -> str:
    """What this Python code prints, run in a process of its own with one thread, where `cuda:0` is
    the pretended device and torch.cuda.CUDAGraph the emulated one. `pretend`, `emulate` and
    `torch` are imported already. RuntimeError with what the process said, if it fails."""
    environment = os.environ | {
        "PRETEND_CUDA_BUILD": str(build()),
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [sys.executable, "-c", BEFORE + source]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
    )
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout
