"""checkpoint.py: runs that are killed, filled up, interrupted and broken, and go on as if nothing had happened."""

import dataclasses
import json
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from checkpoint import append, load_state, open_run, read_lines, resumed, save_run
from model import load, save
from train import Settings, adamw

FLAGS = ("--steps 6 --prompts 4 --samples 4 --minibatch 2 --eval-problems 4 --eval-samples 2 --final-samples 4 --slots 8 "
         "--max-new-tokens 48 --no-skip-zero --critic-warmup 2").split()
TIMES = {"rollout_s", "reward_s", "score_s", "update_s", "peak_memory_gb"}
# Kills itself at the n-th thing that a save does to model/ or the state: a file half written, or a rename not yet made.
KILLED_IN_A_SAVE = """
import os, runpy, signal, sys
import safetensors.torch
left = int(sys.argv.pop(1))
def deadly(function):
    def wrapped(*arguments, **options):
        global left
        target = str(arguments[1])
        if "model" in os.path.basename(target) or "state" in os.path.basename(target):
            left -= 1
            if left == 0:
                if function is save_file:
                    with open(os.path.dirname(target) + "/.tmpXYZ", "wb") as half:
                        half.write(bytes(1000))
                os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return wrapped
save_file = safetensors.torch.save_file
safetensors.torch.save_file, os.rename, os.replace = map(deadly, (save_file, os.rename, os.replace))
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
"""


def start(*arguments, program=("train.py",), **options):
    return subprocess.Popen([sys.executable, *program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, **options)


def finish(process):
    """-> (exit code, last line of what it said of an error)"""
    error = process.communicate()[1]
    assert "Traceback" not in error, error
    return process.returncode, error.strip().splitlines()[-1] if error.strip() else ""


def wait_for_lines(process, file, count=1):
    while process.poll() is None and not (file.exists() and len(file.read_text().splitlines()) >= count):
        time.sleep(0.01)


def lines(file):
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in file.read_text().splitlines()]


def assert_equal_runs(a, b, validated=(0, 6)):
    """Bit for bit: weights, critic, moments; log and validations but for times and memory; and nothing left over."""
    first, second = load_file(a / "state.safetensors"), load_file(b / "state.safetensors")
    assert set(first) == set(second) and any(name.endswith("exp_avg_sq") for name in first)
    assert all(first[name].equal(second[name]) for name in first)
    for run in (a, b):
        assert load_file(run / "model/model.safetensors")["model.norm.weight"].equal(first["policy/norm.weight/weight"])
        assert {file.name for file in run.iterdir()} == {"config.json", "log.jsonl", "validation.jsonl", "validation.json",
                                                         "state.safetensors", "model"}
        assert not list((run / "model").glob(".*"))
    assert lines(a / "log.jsonl") == lines(b / "log.jsonl")
    assert [line["step"] for line in lines(a / "log.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines(b / "validation.jsonl")] == list(validated)
    assert (a / "validation.json").read_text() == (b / "validation.json").read_text()


GRPO = pytest.mark.parametrize("whole", ["grpo"], indirect=True)            # where the algorithm makes no difference


@pytest.fixture(scope="module", params=["grpo", "ppo"])
def whole(request, tmp_path_factory):
    """A run of six steps in one go, saved once at the end: -> (its folder, the flags of its algorithm)"""
    out = tmp_path_factory.mktemp(request.param)
    flags = [*FLAGS, "--algo", request.param, "--out", str(out)]
    assert finish(start(*flags, "--name", "whole"))[0] == 0
    return out / "whole", flags


def test_six_steps_are_three_and_three(whole):
    folder, flags = whole
    process, halves = start(*flags, "--name", "halves", "--eval-every", "3"), folder.parent / "halves"
    wait_for_lines(process, halves / "log.jsonl", 4)                        # in step 5: step 4 will be done again
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL and (halves / "state.safetensors").exists()
    assert finish(start("--resume", str(halves)))[0] == 0
    assert_equal_runs(folder, halves, (0, 3, 6))


def test_kill_9_at_random_moments(whole):
    """Up to five times, and then until it is through; a save after every step."""
    folder, flags = whole
    seed = time.time_ns()
    run, moment, kills = folder.parent / "killed", random.Random(seed), 0
    arguments = [*flags, "--name", "killed", "--eval-every", "1"]
    while True:
        process, before = start(*arguments), (run / "log.jsonl").read_text() if (run / "log.jsonl").exists() else ""
        wait_for_lines(process, run / "log.jsonl", len(before.splitlines()) + 1)            # it is at work
        if kills < 5:
            time.sleep(moment.random() * 0.8)
            process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, f"random seed {seed}"
        arguments = ["--resume", str(run)]
    assert kills > 0
    assert_equal_runs(folder, run, range(7))


@pytest.mark.parametrize("whole, call", [("grpo", 3), ("grpo", 7), ("grpo", 8), ("ppo", 8)], indirect=["whole"])
def test_kill_9_inside_a_save(whole, call):
    """The first save writes the model (1), renames it (2), writes the state (3) and renames it (4); the second writes the
    model (5), moves the old one away (6), renames the new one (7), writes the state (8) and renames it (9)."""
    folder, flags = whole
    run = folder.parent / f"inside-{call}"
    process = start(str(call), *flags, "--name", run.name, "--eval-every", "3", program=("-c", KILLED_IN_A_SAVE))
    process.communicate()
    assert process.returncode == -signal.SIGKILL and (run / "state.safetensors").exists() == (call > 4)
    assert call != 7 or (run / ".model.old/config.json").exists() and not (run / "model").exists()
    assert call == 7 or list(run.glob("*/.tmpXYZ"))                         # a file half written
    assert finish(start("--resume", str(run)))[0] == 0
    assert_equal_runs(folder, run, (0, 3, 6))


@GRPO
def test_a_full_disk_loses_nothing(whole):
    """A limit on the size of files fails a save as a full disk would: below the size of the model, then between it and
    that of the state."""
    folder, flags = whole
    run = folder.parent / "full"
    process = start(*flags, "--name", "full", "--eval-every", "1")
    while process.poll() is None and not (run / "state.safetensors").exists():
        time.sleep(0.01)
    process.kill()
    process.communicate()
    before = (run / "state.safetensors").read_bytes()
    for limit, file in ((1_000_000, "model"), (3_000_000, "state.safetensors")):
        limited = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        code, error = finish(start("--resume", str(run), preexec_fn=limited))
        assert code == 1 and error.startswith(f"train.py: {run}/{file} could not be written (")
        assert (run / "state.safetensors").read_bytes() == before and not list(run.glob("*.tmp"))
    assert finish(start("--resume", str(run)))[0] == 0
    assert_equal_runs(folder, run, range(7))


def test_a_full_disk_in_small_files(tmp_path):
    with pytest.raises(OSError, match="/dev/full could not be written .No space left on device"):
        append(Path("/dev/full"), {})
    model, tokenizer = load("base")
    save(model, tokenizer, tmp_path / "model")

    class Full:
        def save_pretrained(self, folder):                                  # what tokenizers raises there
            raise Exception("No space left on device (os error 28)")
    with pytest.raises(OSError, match="model could not be written .No space left"):
        save(model, Full(), tmp_path / "model")
    load(str(tmp_path / "model"))
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


@GRPO
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_step_be_saved_and_says_how_to_go_on(whole, number):
    folder, flags = whole
    run = folder.parent / f"stopped-{number.name}"
    process = start(*flags, "--name", run.name)                             # without a signal, only step 6 is saved
    wait_for_lines(process, run / "log.jsonl")
    process.send_signal(number)
    code, error = finish(process)
    done = len(lines(run / "log.jsonl"))
    assert code == 1 and error == f"train.py: stopped; go on from step {done} with: python train.py --resume {run}"
    assert load_state(run, parts_of("base")) == done >= 1
    assert finish(start("--resume", str(run)))[0] == 0
    assert_equal_runs(folder, run)


def test_a_second_signal_stops_at_once(tmp_path):
    process = start("--out", str(tmp_path), "--name", "run", "--eval-problems", "1", "--final-samples", "1", "--steps", "1")
    wait_for_lines(process, tmp_path / "run/validation.jsonl")              # now in the first step, of 512 sequences
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    code, error = finish(process)
    assert code == 1 and error == f"train.py: stopped; go on from step 0 with: python train.py --resume {tmp_path}/run"
    assert not (tmp_path / "run/log.jsonl").exists()


@GRPO
def test_a_finished_run_prints_its_table_again_and_changes_nothing(whole):
    folder, _ = whole
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    process = start("--resume", str(folder))
    assert "trained - base" in process.communicate()[0]
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


def test_weights_that_are_not_finite_stop_the_run_and_are_not_saved(tmp_path):
    """An absurd learning rate; the groups may all be equal then, and no loss be there to look at."""
    absurd = ["--skip-zero", "--lr", "1e30", "--eval-every", "1", "--name", "run", "--out", str(tmp_path)]
    code, error = finish(start(*FLAGS, *absurd))
    assert code == 1 and error.startswith("train.py: stopped in step ") and ("finite" in error or "nan" in error.lower())
    saved = (tmp_path / "run/state.safetensors").exists()
    assert (f"--model {tmp_path}/run/model" in error) == saved == (tmp_path / "run/model").exists()
    assert ("nothing was saved yet" in error) != saved
    for file in tmp_path.rglob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(file).values())


@GRPO
def test_what_cannot_be_resumed(whole, tmp_path):
    folder, _ = whole
    for missing in (tmp_path / "nowhere", ""):
        with pytest.raises(FileNotFoundError, match="there is no run .*: it has no config.json"):
            resumed(str(missing), ["--resume", str(missing)], Settings)
    for flags in (["--lr", "1"], ["--algo=grpo"], ["--overwrite"]):         # defaults too
        with pytest.raises(ValueError, match="no other flag goes with it"):
            resumed(str(folder), ["--resume", str(folder), *flags], Settings)
    good = json.loads((folder / "config.json").read_text())
    for change, match in (({"beta": 1}, "another version of train.py: the two differ in beta"),
                          ({"steps": "6"}, "steps cannot be '6'"), ({"prompts": 2.0}, "prompts cannot be 2.0"), ({"algo": "dapo"}, "algo cannot be 'dapo'"),
                          ({"lr": None}, "lr cannot be None")):
        (tmp_path / "config.json").write_text(json.dumps(good | change))
        with pytest.raises(ValueError, match=match):
            resumed(str(tmp_path), [], Settings)
    (tmp_path / "config.json").write_text(json.dumps(good | {"lr": 1}))     # a whole number is a number
    assert resumed(str(tmp_path), [], Settings).lr == 1


def parts_of(model="base"):
    model = load(model)[0]
    return {"policy": (model, adamw(model, 0.1, Settings()))}


@GRPO
def test_a_damaged_state_is_refused_in_a_sentence(whole, tmp_path):
    folder, _ = whole
    good, step = load_file(folder / "state.safetensors"), {"step": "6"}
    assert load_state(folder, parts_of()) == 6 and load_state(tmp_path, parts_of()) == 0
    name = "policy/norm.weight/"
    bad = {"lacks a tensor": ({k: v for k, v in good.items() if k != name + "weight"}, step),
           "lacks a moment": ({k: v for k, v in good.items() if k != name + "exp_avg"}, step),
           "holds NaN": (good | {name + "weight": torch.full((96,), torch.nan)}, step),
           "belongs to another model": (good | {name + "weight": torch.ones(5)}, step),
           "or algorithm": (good | {"critic/value.bias/weight": torch.ones(1)}, step),
           "no metadata": (good, None), "no step": (good, {"step": "x"})}
    for match, (tensors, metadata) in bad.items():
        save_file(tensors, tmp_path / "state.safetensors", metadata=metadata)
        with pytest.raises(ValueError, match="is not a whole state of this run" + (f".*{match}" if match in (
                "holds NaN", "belongs to another model", "or algorithm") else "")):
            load_state(tmp_path, parts_of())
    (tmp_path / "state.safetensors").write_bytes((folder / "state.safetensors").read_bytes()[:100_000])
    with pytest.raises(ValueError, match="is not a whole state"):
        load_state(tmp_path, parts_of())
    parts = parts_of()
    with torch.no_grad():
        parts["policy"][0].norm.weight[0] = torch.inf
    with pytest.raises(FloatingPointError, match="policy/norm.weight/weight holds NaN or infinity"):
        save_run(tmp_path / "new", 1, parts, None)
    assert not (tmp_path / "new").exists()


def test_a_log_is_cut_where_the_state_ends_and_a_damaged_one_is_left_alone(tmp_path):
    file = tmp_path / "log.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "rew')
    assert read_lines(file, 2, range(1, 3)) == [{"step": 1}, {"step": 2}]
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n'
    torn = '{"step": 1}\n{"st\n{"step": 3}\n'
    file.write_text(torn)
    with pytest.raises(ValueError, match="the saved state is of step 3, but step 2 is missing"):
        read_lines(file, 3, range(1, 4))
    assert file.read_text() == torn
    assert read_lines(tmp_path / "none", 0, range(0)) == []
    with pytest.raises(ValueError, match="step 0 is missing"):
        read_lines(tmp_path / "none", 3, range(0, 3, 3))


def test_a_run_folder_never_lacks_its_settings(tmp_path, monkeypatch):
    s = Settings(out=str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            open_run(s, "run")
    assert not (tmp_path / "run").exists()
    assert json.loads((open_run(s, "run") / "config.json").read_text()) == dataclasses.asdict(s)
    assert [file.name for file in tmp_path.iterdir()] == ["run"]
    with pytest.raises(FileExistsError, match="--resume"):
        open_run(s, "run")


ARMS = {"grpo, alpha 0.4, entropy_coef 0.0, clip_high 0.28": {},
        "grpo, alpha 0.0, entropy_coef 0.0, clip_high 0.28": dict(alpha=0.0),
        "grpo, alpha 0.0, entropy_coef 0.01, clip_high 0.28": dict(alpha=0.0, entropy_coef=0.01),
        "grpo, alpha 0.4, entropy_coef 0.0, clip_high 0.2": dict(clip_high=0.2),
        "ppo, alpha 0.1, entropy_coef 0.0, clip_high 0.28": dict(algo="ppo", critic_warmup=1),
        "ppo, alpha 0.0, entropy_coef 0.0, clip_high 0.28": dict(algo="ppo", critic_warmup=1, alpha=0.0)}


def test_every_arm_runs_and_is_told_by_its_log_and_its_name(tmp_path, monkeypatch):
    mixed = lambda self, problem, text, finished: 1.0 if len(text) % 3 == 0 else -1.0      # so that every group teaches
    monkeypatch.setattr(type(train.load_task("countdown")), "reward", mixed)
    small = dict(out=str(tmp_path), steps=2, prompts=4, samples=4, minibatch=1, eval_problems=1, eval_samples=1,
                 final_samples=1, slots=16, max_new_tokens=40, skip_zero=False, lr=1e-2)
    runs = [train.train(Settings(**small, **arm)) for arm in ARMS.values()]
    assert [[line["arm"] for line in lines(run / "log.jsonl")] for run in runs] == [[name] * 2 for name in ARMS]
    assert len({run.name for run in runs}) == len(ARMS)
    weights = [load(str(run))[0].norm.weight for run in runs]
    assert len({tuple(w.tolist()) for w in weights}) == len(ARMS)           # and every arm does something of its own
