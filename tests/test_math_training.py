"""train.py --task math, end to end: a tiny random checkpoint with a byte-level BPE tokenizer,
GSM8K's questions; and the presets against the numbers of the paper."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

import evaluate
import train
from plumbing.run import settings_of_run
from plumbing.settings import PRESETS, EvaluationSettings, Settings, parse_flags
from questions import SHARED, write
from tasks import load_task
from tasks.mathematics import Math

GSM8K = SHARED / "gsm8k_test.jsonl"


def made_row(a, b):
    """GSM8K's format, where the data is not at hand."""
    return {
        "question": f"Ann has {a} eggs and buys {b} more. How many has she?",
        "answer": f"She has {a} + {b} = <<{a}+{b}={a + b}>>{a + b} eggs.\n#### {a + b}",
    }


@pytest.fixture
def questions(tmp_path):
    """A file of questions -> (its path, its rows)."""
    if GSM8K.exists():
        rows = [json.loads(line) for line in GSM8K.read_text().splitlines()[:200]]
    else:
        rows = [made_row(a, b) for a in range(2, 12) for b in range(3, 9)]
    return write(tmp_path, "questions.jsonl", rows), rows


def checkpoint(qwen2, rows, **changes):
    """The folder of a random model that writes bytes and pieces of these questions."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator([row["question"] for row in rows], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|end|>"
    )

    folder, _ = qwen2(vocab_size=500, tokenizer=False, **changes)
    tokenizer.save_pretrained(folder)
    return folder


def has_moved(folder, start):
    """Whether training moved any weight by more than rounding."""
    after = AutoModelForCausalLM.from_pretrained(folder).parameters()
    before = AutoModelForCausalLM.from_pretrained(start).parameters()
    distances = [(a.float() - b.float()).abs().max() for a, b in zip(after, before, strict=True)]
    return any(distance > 1e-3 for distance in distances)


@pytest.fixture
def graded(monkeypatch):
    """A random model solves nothing, so a coin is the reward, or nothing would be learned. What was
    graded is kept, with the real reward: (problem, response, finished, reward)."""
    calls = []
    real = Math.reward

    def coin(self, problem, response, finished):
        calls.append((problem, response, finished, real(self, problem, response, finished)))
        return 1.0 if len(calls) % 3 else -1.0

    monkeypatch.setattr(Math, "reward", coin)
    return calls


TWO_STEPS = {
    "name": "a",
    "task": "math",
    "steps": 2,
    "prompts": 4,
    "samples": 4,
    "minibatch": 2,
    "lr": 1e-2,
    "max_new_tokens": 24,
    "max_prompt_tokens": 900,
    "eval_problems": 3,
    "eval_samples": 1,
    "final_samples": 2,
    "slots": 16,
}
BFLOAT16 = {"dtype": "bfloat16", "weights": "bfloat16"}


@pytest.mark.parametrize(
    "algo, template, family, more",
    [
        ("grpo", "qwen-math", Qwen2Config, {}),
        ("ppo", "dapo", Qwen2Config, {"critic_warmup": 1}),
        ("grpo", "none", Qwen3Config, {"recompute": True, **BFLOAT16}),
        ("ppo", "none", LlamaConfig, {"critic_warmup": 1, **BFLOAT16}),
    ],
)
def test_two_steps_on_gsm8k(
    qwen2, questions, graded, tmp_path, capsys, algo, template, family, more
):
    file, rows = questions
    folder = checkpoint(qwen2, rows, family=family, max_position_embeddings=2048)
    died = load_task("math", file, "", template).timeouts  # other tests of this process had some
    settings = Settings(
        out=str(tmp_path),
        algo=algo,
        model=str(folder),
        data=file,
        template=template,
        **TWO_STEPS,
        **more,
    )
    run = train.train(settings)

    # The log.
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["timeouts"] == died for line in lines)

    # What was graded: a validation, two rollouts, a validation.
    assert len(graded) == 3 * 2 + 2 * 16 + 3 * 2
    asked = {problem.prompt for problem, _, _, _ in graded}
    assert asked <= {row["question"].strip() for row in rows}
    assert all(finished or reward == -1.0 for _, _, finished, reward in graded)

    assert has_moved(run / "model", folder)

    # A finished run: nothing is done again.
    assert train.train(settings_of_run(str(run))) == run
    assert len((run / "log.jsonl").read_text().splitlines()) == 2
    printed = capsys.readouterr().out
    assert "math validation: 3 problems" in printed
    assert "training, " in printed

    record = evaluate.evaluate(
        EvaluationSettings(
            models=(str(folder),),
            task="math",
            data=file,
            template=template,
            problems=2,
            samples=2,
            max_new_tokens=8,
            slots=4,
        )
    )
    assert record["models"][str(folder)]["samples"] == 2


def test_a_resumed_run_has_the_prompts_that_it_began_with(qwen2, questions, tmp_path, monkeypatch):
    """A chat template with today's date in it, and a run that goes on on another day."""
    file, rows = questions
    folder = checkpoint(qwen2, rows, max_position_embeddings=2048)
    form = "{{ strftime_now('%Y-%m-%d') }} {{ messages[0].content }}"
    (folder / "chat_template.jinja").write_text(form)
    prompts = []
    real = Math.encode

    def encode(self, problem, tokenizer):
        ids = real(self, problem, tokenizer)
        prompts.append(tokenizer.decode(ids))
        return ids

    monkeypatch.setattr(Math, "encode", encode)
    settings = dict(out=str(tmp_path), model=str(folder), data=file, template="chat")
    s = Settings(**settings, **TWO_STEPS, date="2024-02-29")
    run = train.train(s)
    before = len(prompts)
    assert before > 8
    train.train(Settings(resume=str(run), steps=3))
    assert len(prompts) > before
    assert all(prompt.startswith("2024-02-29 ") for prompt in prompts)


def test_long_prompts_are_left_out_and_counted(qwen2, questions, tmp_path, capsys):
    file, rows = questions
    folder = checkpoint(qwen2, rows, max_position_embeddings=2048)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    task = load_task("math", file, "", "none")
    candidates = [*task.train, *task.validation[:2]]
    sizes = sorted(len(task.encode(problem, tokenizer)) for problem in candidates)
    limit = sizes[len(sizes) // 2]
    train.train(
        Settings(
            out=str(tmp_path),
            model=str(folder),
            task="math",
            data=file,
            template="none",
            eval_problems=2,
            max_prompt_tokens=limit,
            dry_run=True,
            prompts=2,
            samples=2,
            minibatch=2,
            max_new_tokens=8,
            slots=4,
        )
    )
    too_long = sum(size > limit for size in sizes)
    assert f"left out: {too_long} prompts over {limit} tokens" in capsys.readouterr().out


# As ../shared/DESIGN.md has them from the paper, in section 1, "Settings".
PAPER = {
    "kappa": 2.0,
    "clip_low": 0.2,
    "clip_high": 0.28,
    "lr": 1e-6,
    "prompts": 512,
    "samples": 8,
    "minibatch": 32,
    "max_new_tokens": 8192,
    "temperature": 1.0,
    "entropy_coef": 0.0,
    "template": "dapo",
    "task": "math",
}
PAPER_GRPO = {"algo": "grpo", "alpha": 0.4}
PAPER_PPO = {
    "algo": "ppo",
    "alpha": 0.1,
    "critic_lr": 2e-6,
    "critic_warmup": 10,
    "gamma": 1.0,
    "lam": 1.0,
}


def test_the_presets_are_the_papers_numbers():
    expected = {"paper-grpo": PAPER | PAPER_GRPO, "paper-ppo": PAPER | PAPER_PPO}
    assert set(expected) | {"narrow"} == set(PRESETS)  # tests/test_narrow.py has the other
    for name, numbers in expected.items():
        flags = ["--preset", name, "--model", "a/b", "--slots", "7"]
        s = parse_flags(Settings, "train", flags, PRESETS)
        assert {key: getattr(s, key) for key in numbers} == numbers
        assert (s.model, s.slots, s.preset) == ("a/b", 7, name)
        assert s.prompts // s.minibatch == 16  # updates per rollout

        # A flag beside the preset wins.
        flags = ["--preset", name, "--alpha", "0"]
        s = parse_flags(Settings, "train", flags, PRESETS)
        assert s.alpha == 0
        assert s.lr == 1e-6
