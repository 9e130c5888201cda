"""train.py as a command, but it kills itself at the n-th thing that a save does to the model or the
state: with a file half written, or before a rename. Run by test_checkpoint.py:

python tests/killed_in_a_save.py N FLAGS OF TRAIN.PY
"""

import os
import runpy
import signal
import sys
from pathlib import Path

import safetensors.torch

from plumbing import checkpoint

save_file = safetensors.torch.save_file
write_tensors = checkpoint.write_tensors
left = int(sys.argv.pop(1))


def deadly(function):
    """All four functions have what they write to as their second argument."""

    def wrapped(*arguments, **options):
        global left
        target = Path(arguments[1])
        if "model" in target.name or "state" in target.name:
            left -= 1
            if left == 0:
                die(function, target)
        return function(*arguments, **options)

    return wrapped


def die(function, target: Path) -> None:
    if function is save_file:
        # safetensors writes to a file of its own name, and renames it.
        target.with_name(".tmpXYZ").write_bytes(bytes(1000))
    if function is write_tensors:
        target.write_bytes(bytes(1000))
    os.kill(os.getpid(), signal.SIGKILL)


safetensors.torch.save_file = deadly(save_file)
checkpoint.write_tensors = deadly(write_tensors)
os.rename = deadly(os.rename)
os.replace = deadly(os.replace)
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
