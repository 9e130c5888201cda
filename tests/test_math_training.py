"""train.py --task math, end to end: a tiny random checkpoint with a byte-level BPE tokenizer, GSM8K's questions."""

import json
import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen3Config

import evaluate
import train
from train import PRESETS, Settings

GSM8K = Path(os.environ.get("SHARED_DATA", "../shared/data"), "gsm8k_test.jsonl")
MADE = [{"question": f"Ann has {a} eggs and buys {b} more. How many has she?",
         "answer": f"She has {a} + {b} = <<{a}+{b}={a + b}>>{a + b} eggs.\n#### {a + b}"}
        for a in range(2, 12) for b in range(3, 9)]                        # GSM8K's format, where the data is not at hand


@pytest.fixture
def questions(tmp_path):
    rows = [json.loads(line) for line in GSM8K.read_text().splitlines()[:200]] if GSM8K.exists() else MADE
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file, rows


def checkpoint(qwen2, rows, **changes):
    """A random model that writes bytes and pieces of these questions."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator([row["question"] for row in rows], trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    folder, _ = qwen2(vocab_size=500, tokenizer=False, **changes)
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|end|>").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("algo, template, family, more", [
    ("grpo", "qwen-math", Qwen2Config, {}), ("ppo", "dapo", Qwen2Config, dict(critic_warmup=1)),
    ("grpo", "none", Qwen3Config, dict(dtype="bfloat16", weights="bfloat16", recompute=True)),
    ("ppo", "none", LlamaConfig, dict(critic_warmup=1, dtype="bfloat16", weights="bfloat16"))])
def test_two_steps_on_gsm8k(qwen2, questions, tmp_path, monkeypatch, capsys, algo, template, family, more):
    """A random model solves nothing, so the reward is the real one plus a coin, or nothing would be learned from."""
    file, rows = questions
    folder = checkpoint(qwen2, rows, family=family, max_position_embeddings=2048)
    task = train.load_task("math", str(file), "", template)
    graded, real, before = [], type(task).reward, type(task).timeouts       # other tests of this process had some
    monkeypatch.setattr(type(task), "reward", lambda self, p, text, done: graded.append(
        (p, text, done, real(self, p, text, done))) or (1.0 if len(graded) % 3 else -1.0))
    run = train.train(Settings(
        out=str(tmp_path), name="a", algo=algo, model=str(folder), task="math", data=str(file), template=template, steps=2,
        prompts=4, samples=4, minibatch=2, lr=1e-2, max_new_tokens=24, max_prompt_tokens=900, eval_problems=3, eval_samples=1,
        final_samples=2, slots=16, **more))
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and all(line["timeouts"] == before for line in lines)
    assert len(graded) == 3 * 2 + 2 * 16 + 3 * 2 and {g[0].prompt for g in graded} <= {row["question"].strip() for row in rows}
    assert all(done or reward == -1.0 for _, _, done, reward in graded)
    trained = AutoModelForCausalLM.from_pretrained(run / "model")
    assert any((a.float() - b.float()).abs().max() > 1e-3 for a, b in zip(
        trained.parameters(), AutoModelForCausalLM.from_pretrained(folder).parameters(), strict=True))
    again = train.train(train.resumed(str(run), [], Settings))              # a finished run: nothing is done again
    assert again == run and len((run / "log.jsonl").read_text().splitlines()) == 2
    printed = capsys.readouterr().out
    assert "math validation: 3 problems" in printed and "training, " in printed
    record = evaluate.evaluate(evaluate.Settings(models=(str(folder),), task="math", data=str(file), template=template,
                                                 problems=2, samples=2, max_new_tokens=8, slots=4))
    assert record["models"][str(folder)]["samples"] == 2


def test_long_prompts_are_left_out_and_counted(qwen2, questions, tmp_path, capsys):
    file, rows = questions
    folder = checkpoint(qwen2, rows, max_position_embeddings=2048)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    task = train.load_task("math", str(file), "", "none")
    sizes = sorted(len(task.encode(p, tokenizer)) for p in (*task.train, *task.validation[:2]))
    limit = sizes[len(sizes) // 2]
    train.train(Settings(out=str(tmp_path), model=str(folder), task="math", data=str(file), template="none", eval_problems=2,
                         max_prompt_tokens=limit, dry_run=True, prompts=2, samples=2, minibatch=2, max_new_tokens=8, slots=4))
    assert f"left out: {sum(size > limit for size in sizes)} prompts over {limit} tokens" in capsys.readouterr().out


def test_the_presets_are_the_papers_numbers():
    """DESIGN.md, section 1, "Settings", which has them from the paper."""
    same = dict(kappa=2.0, clip_low=0.2, clip_high=0.28, lr=1e-6, prompts=512, samples=8, minibatch=32, max_new_tokens=8192,
                temperature=1.0, entropy_coef=0.0, template="dapo", task="math")
    want = {"paper-grpo": same | dict(algo="grpo", alpha=0.4),
            "paper-ppo": same | dict(algo="ppo", alpha=0.1, critic_lr=2e-6, critic_warmup=10, gamma=1.0, lam=1.0)}
    assert set(want) == set(PRESETS)
    for name, numbers in want.items():
        s = evaluate.parse_flags(Settings, "train", ["--preset", name, "--model", "a/b", "--slots", "7"], PRESETS)
        assert {key: getattr(s, key) for key in numbers} == numbers and (s.model, s.slots, s.preset) == ("a/b", 7, name)
        assert s.prompts // s.minibatch == 16                              # updates per rollout
        one = evaluate.parse_flags(Settings, "train", ["--preset", name, "--alpha", "0"], PRESETS)
        assert one.alpha == 0 and one.lr == 1e-6                           # a flag beside the preset wins
