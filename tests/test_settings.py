"""plumbing/settings.py: flags as a user meets them, on the command line: what each says of itself,
and the one sentence for what makes no sense."""

import dataclasses
import json

import pytest
import torch

import train
from plumbing.run import open_run, settings_of_run
from plumbing.settings import (
    ADDED_LATER,
    Settings,
    check,
    parse_flags,
    pick_device,
    run_name,
)
from tasks.countdown import Countdown
from training_runs import refusal, run_command


def test_run_names_tell_every_setting_that_differs():
    assert run_name(Settings()) == "grpo"
    three_differ = Settings(alpha=0.0, lr=1e-3, seed=2)
    assert run_name(three_differ) == "grpo-lr=0.001-alpha=0.0-seed=2"


def test_run_names_are_folder_names_and_tell_models_apart():
    with_slash = run_name(Settings(model="a/b"))
    assert "/" not in with_slash
    assert with_slash != run_name(Settings(model="a_b"))


def test_alpha_is_the_papers_for_each_algorithm_unless_given():
    assert Settings().alpha == 0.4
    assert Settings(algo="ppo").alpha == 0.1
    assert Settings(algo="ppo", alpha=0.0).alpha == 0.0


BAD_FLAGS = {
    "--alpha -0.1": "--alpha must be at least 0; it is -0.1",
    "--alpha nan": "--alpha must be",
    "--kappa 1": "--kappa must be greater than 1",
    "--kappa inf": "--kappa must be",
    "--data " + "x" * 240: "--name must be given, as these settings make too long a name",
    "--samples 1": "a group of one has no baseline",
    "--minibatch 5": "--minibatch must be a divisor of --prompts, 32; it is 5",
    "--minibatch 0": "--minibatch",
    "--clip-low 1.5": "--clip-low",
    "--temperature 0": "--temperature must be from 0.001 to 1000",
    "--prompts 6": "a divisor of --prompts, 6; it is 4",
    "--steps -1": "--steps",
    "--prompts 0": "--prompts",
    "--model ./nowhere": "there is no model folder ./nowhere",
    "--task chess": "unknown task 'chess'",
    "--device cuda:99": "cannot be used here",
    "--device meta": "only cpu and cuda",
    "--device nonsense": "cannot be used here",
    "--lora-rank -1": "--lora-rank must be at least 0; it is -1",
    "--lora-rank 8 --lora-alpha 0": "--lora-alpha must be at least 1; it is 0",
    "--lora-rank 61": "with 61 it is 0.000422 billion numbers in place of 0.000418 billion",
    "--grad-clip inf": "--grad-clip must be a finite number; it is inf",
    "--max-new-tokens 0": "--max-new-tokens",
    "--name " + "x" * 240: "--name must have less than 240 bytes; it has 240",
    "--name " + "é" * 120: "--name must have less than 240 bytes; it has 240",
    "--name .hidden": "--name must not begin with a dot",
    "--name \udcff": "--name cannot be written in this locale's encoding, utf-8; it is '\\udcff'",
    "--data \udcff": "--data cannot be written in this locale's encoding",
    "--model ./\udcff": "--model cannot be written in this locale's encoding",
    "--samples 1000000000": "what may help: fewer --prompts or --samples",
    "--eval-samples 1000000000": "what may help: fewer --prompts or --samples",
    "--final-samples 1000000000": "what may help: fewer --prompts or --samples",
}


@pytest.mark.parametrize("flags, sentence", BAD_FLAGS.items())
def test_bad_flags_give_one_clear_sentence(monkeypatch, tmp_path, flags, sentence):
    out = tmp_path / "runs"
    message = run_command(monkeypatch, "train.py", *flags.split(), "--out", str(out))
    assert isinstance(message, str)  # which exits with 1
    assert message.startswith("train.py: ")
    assert sentence in message
    assert "\n" not in message
    assert not out.exists()


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize(
    "variables, encoding", [(ASCII, "ascii"), ({"PYTHONIOENCODING": "ascii"}, "ascii")]
)
def test_a_name_that_the_locale_cannot_write(tmp_path, variables, encoding):
    """As a file's name, or on the screen."""
    out = tmp_path / "runs"
    sentence = refusal("--name", "é", "--out", str(out), variables=variables)
    assert f"--name cannot be written in this locale's encoding, {encoding}; it is '" in sentence
    assert not out.exists()


@pytest.mark.parametrize(
    "flags", ["--alpha", "--alpha x", "--nonsense 1", "--dtype int8", "--alph 1"]
)
def test_flags_that_do_not_parse(monkeypatch, capsys, flags):
    assert run_command(monkeypatch, "train.py", *flags.split()) == 2
    assert "error:" in capsys.readouterr().err.splitlines()[-1]


def test_an_unsupported_model_type(monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    flags = ("--model", str(tmp_path), "--out", str(tmp_path / "runs"))
    assert run_command(monkeypatch, "train.py", *flags) == (
        "train.py: model type 'gpt2' is not supported; supported: qwen2, qwen3, llama"
    )


def test_evaluate_as_a_command(monkeypatch):
    too_large_k = run_command(monkeypatch, "evaluate.py", "base", "--samples", "8", "--k", "9")
    assert "does not fit --samples 8" in too_large_k
    no_folder = run_command(monkeypatch, "evaluate.py", "./nowhere", "--samples", "8", "--k", "1")
    assert "no model folder ./nowhere" in no_folder
    assert run_command(monkeypatch, "evaluate.py") == 2  # no model at all


@pytest.mark.parametrize(
    "split, command, message",
    [
        (
            "train",
            "train.py",
            "train.py: countdown has 0 training and 200 validation problems; both are needed",
        ),
        (
            "validation",
            "train.py",
            "train.py: countdown has 9247 training and 0 validation problems; both are needed",
        ),
        (
            "test",
            "evaluate.py base --split test",
            "evaluate.py: countdown has no test problems",
        ),
    ],
)
def test_a_task_without_problems(monkeypatch, tmp_path, split, command, message):
    always_empty = property(lambda self: [], lambda self, problems: None)
    monkeypatch.setattr(Countdown, split, always_empty, raising=False)
    script, *flags = command.split()
    out = tmp_path / "runs"
    if script == "train.py":
        flags += ["--out", str(out)]
    assert run_command(monkeypatch, script, *flags) == message
    assert not out.exists()


def test_every_setting_is_a_flag_with_a_line_of_documentation(capsys):
    with pytest.raises(SystemExit):
        parse_flags(Settings, train.__doc__, ["--help"])
    text = capsys.readouterr().out
    for field in dataclasses.fields(Settings):
        assert "--" + field.name.replace("_", "-") in text
        assert field.metadata["help"]


def test_flags_change_the_settings_that_they_name_and_no_other():
    flags = ["--alpha", "0", "--no-skip-zero", "--clip-high", "0.2"]
    s = parse_flags(Settings, train.__doc__, flags)
    assert s.alpha == 0.0
    assert s.skip_zero is False
    assert s.clip_high == 0.2
    assert s.kappa == 2.0
    check(s)


def test_a_gpu_has_larger_micro_batches_which_do_not_change_the_runs_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Settings().micro_tokens == Settings(device="cpu").micro_tokens == 2048
    assert Settings(device="cuda:1").micro_tokens == 8192
    assert Settings(device="cuda", micro_tokens=64).micro_tokens == 64
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert Settings().micro_tokens == 8192
    assert run_name(Settings()) == "grpo"
    assert run_name(Settings(micro_tokens=2048)) == "grpo-microtokens=2048"
    assert run_name(Settings(device="cpu")) == "grpo-device=cpu"


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_each_process_of_torchrun_takes_a_gpu_of_its_own(monkeypatch, name):
    def empty(size: int, device: str) -> Tensor:
        return Tensor(torch.device(device))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", empty)
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert pick_device(name) == torch.device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert pick_device(name) == torch.device("cuda:3")
    assert pick_device("cuda:1") == torch.device("cuda:1")
    assert current == [torch.device(f"cuda:{index}") for index in (0, 3, 1)]


@dataclasses.dataclass
class Tensor:
    device: torch.device


def test_a_run_from_before_a_setting_was_made_goes_on_with_what_it_meant(tmp_path):
    folder = open_run(Settings(out=str(tmp_path), micro_tokens=512), "run")
    config = json.loads((folder / "config.json").read_text())
    for name in ADDED_LATER:
        del config[name]
    (folder / "config.json").write_text(json.dumps(config))
    s = settings_of_run(str(folder))
    assert s.graph is True
    assert s.micro_tokens == 512
