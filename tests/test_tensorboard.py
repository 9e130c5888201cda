"""lab/tensorboard.py: what TensorBoard's own reader finds, against the files of the run."""

import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from conftest import ROOT
from lab.tensorboard import Settings, main
from training_runs import environment

# As of a first step in which nothing was scored, of a second, and of a third that a kill cut.
LINES = [
    {"step": 1, "reward": -0.5, "entropy": 0.1, "shaping": None, "tokens": 7, "arm": "grpo"},
    {"step": 2, "reward": 0.25, "entropy": 0.3, "shaping": 0.7, "tokens": 9, "arm": "grpo"},
]
VALIDATIONS = [
    {"step": 0, "solved": [1, 3], "samples": 8},
    {"step": 2, "solved": [8, 2], "samples": 8},
]


def write_run(folder, lines=LINES):
    folder.mkdir(parents=True, exist_ok=True)
    whole = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "log.jsonl").write_text(whole + '{"step": 3, "rew')
    validations = "".join(json.dumps(line) + "\n" for line in VALIDATIONS)
    (folder / "validation.jsonl").write_text(validations)
    return folder


def read_events(folder):
    """{(name, step): value}; no event twice."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    found = []
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            found.append(((name, event.step), event.value))
    assert set(Counter(key for key, _ in found).values()) <= {1}
    return dict(found)


def in_float32(lines):
    """What must be read, worked out by hand from the lines; TensorBoard stores float32."""
    want = {("validation/pass_at_1", 0): 0.25, ("validation/pass_at_1", 2): 0.625}
    for line in lines:
        for name in ("reward", "entropy", "shaping", "tokens"):
            if line[name] is not None:
                want[name, line["step"]] = float(np.float32(line[name]))
    return want


def test_the_events_are_the_log(tmp_path):
    """Of two runs, each in a folder of its name; again, after another step, without doubles."""
    pytest.importorskip("tensorboard")
    other = [line | {"reward": 1.0} for line in LINES]
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", other)]
    out = tmp_path / "out"
    main(Settings(tuple(map(str, [*runs, runs[0]])), out=str(out)))
    assert read_events(out / "a") == in_float32(LINES)
    assert read_events(out / "b") == in_float32(other)
    assert in_float32(LINES) != in_float32(other)

    longer = [*LINES, LINES[0] | {"step": 3}]
    write_run(tmp_path / "a", longer)
    main(Settings((str(runs[0]),), out=str(out)))
    assert read_events(out / "a") == in_float32(longer)


def test_what_is_refused(tmp_path):
    """In one sentence each, by the command too."""
    runs = (str(write_run(tmp_path / "x" / "a")), str(write_run(tmp_path / "y" / "a")))
    with pytest.raises(ValueError, match="^two of the runs are called a; "):
        main(Settings(runs, out=str(tmp_path / "out")))

    command = [sys.executable, "-m", "lab.tensorboard", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 1
    sentence = "is no run folder with a step in it: it has no log.jsonl"
    assert done.stderr == f"lab.tensorboard: {tmp_path} {sentence}\n"


def test_what_is_missing_is_said_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    run = str(write_run(tmp_path / "a"))
    with pytest.raises(ImportError, match="pip install tensorboard$"):
        main(Settings((run,), out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
