"""train.py end to end: who gets what in the loop, against advantages by Python's statistics and
data recomputed alone; what a run leaves behind; what must not matter to its result."""

import contextlib
import io
import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

import train
from evaluate import count_solved
from model import load
from plumbing.batch import problems_of_step
from plumbing.seeds import seeded_generator
from plumbing.settings import Settings
from rollout import Episode, Sampler
from tasks import load_task
from tasks.countdown import Countdown
from training_runs import (
    SMALL,
    read_jsonl,
    replace_reward,
    reward_by_length,
    reward_none,
    small_run,
)


@dataclass
class Rollout:
    prompts: list[list[int]]
    samples: int
    temperature: float
    seed: int
    episodes: list[Episode]


@dataclass
class Update:
    episodes: list[Episode]
    advantage: Tensor  # [N, R]
    defaults: dict  # of the optimizer


@dataclass
class Graded:
    prompt: str
    finished: bool
    reward: float


def right(n: int) -> float:
    """The reward of the n-th answer: no period that a wrong grouping could share."""
    return 1.0 if (7 * n * n + 3 * n) % 11 < 5 else -1.0


class Recorder:
    """Records every call of Sampler.generate, train.update, train.score and the reward."""

    def __init__(self, monkeypatch) -> None:
        self.rollouts: list[Rollout] = []
        self.updates: list[Update] = []
        self.graded: list[Graded] = []
        self.scored: set[tuple[bool, float]] = set()  # (autocast, temperature)
        generate = Sampler.generate
        update = train.update
        score = train.score

        def spy_generate(sampler, prompts, samples, length, temperature, generator, **options):
            # Never stale weights.
            current = sampler.model.norm.weight.bfloat16()
            assert torch.equal(sampler.decoder.norm.weight, current)
            episodes = generate(
                sampler, prompts, samples, length, temperature, generator, **options
            )
            seed = generator.initial_seed()
            self.rollouts.append(Rollout(prompts, samples, temperature, seed, episodes))
            return episodes

        def spy_update(model, optimizer, episodes, old_logp, advantage, s):
            self.updates.append(Update(episodes, advantage.clone(), optimizer.defaults))
            return update(model, optimizer, episodes, old_logp, advantage, s)

        def spy_score(model, tokens, prompt_len, total_len, temperature, **options):
            self.scored.add((torch.is_autocast_enabled(tokens.device.type), temperature))
            return score(model, tokens, prompt_len, total_len, temperature, **options)

        def spy_reward(problem, response, finished):
            self.graded.append(Graded(problem.prompt, finished, right(len(self.graded))))
            return self.graded[-1].reward

        monkeypatch.setattr(Sampler, "generate", spy_generate)
        monkeypatch.setattr(train, "update", spy_update)
        monkeypatch.setattr(train, "score", spy_score)
        replace_reward(monkeypatch, spy_reward)


def standardised(group: list[float]) -> list[float]:
    spread = statistics.stdev(group)
    if spread == 0:
        return [0.0] * len(group)
    mean = statistics.mean(group)
    return [(reward - mean) / (spread + 1e-6) for reward in group]


def assert_update_gets(
    update: Update, episodes: list[Episode], advantage: list[float], s: Settings
) -> None:
    """These very episodes, each one's advantage at every token of it and 0 beyond."""
    for got, want in zip(update.episodes, episodes, strict=True):
        assert got is want
    for row, episode, value in zip(update.advantage.tolist(), update.episodes, advantage):
        inside = len(episode.response)
        padded = [value] * inside + [0.0] * (len(row) - inside)
        assert row == pytest.approx(padded, abs=1e-5)
    assert update.defaults["weight_decay"] == s.weight_decay == 0.3
    assert update.defaults["lr"] == s.lr == 1e-2


def test_the_wiring_of_the_loop(tmp_path, monkeypatch):
    """Three steps in bf16, at a temperature of their own, with rewards that mix right and wrong in
    every group. Four problems a step, three answers to each, two updates of two problems."""
    recorded = Recorder(monkeypatch)
    changes = dict(
        steps=3,
        samples=3,
        temperature=0.8,
        dtype="bfloat16",
        weight_decay=0.3,
        lr=1e-2,
        max_new_tokens=20,
    )
    s = Settings(out=str(tmp_path), name="a", **(SMALL | changes))
    train.train(s)

    rollouts = [
        rollout
        for rollout in recorded.rollouts
        if len(rollout.prompts) == s.prompts and rollout.samples == s.samples
    ]
    assert len(rollouts) == 3
    assert all(rollout.temperature == 0.8 for rollout in recorded.rollouts)
    seeds = {rollout.seed for rollout in recorded.rollouts}
    assert len(seeds) == len(recorded.rollouts)  # every call has a stream of its own
    assert recorded.scored == {(True, 0.8)}

    task = load_task("countdown")
    tokenizer = load("base")[1]
    validated = 5 * 4  # answers, graded before the first step
    for step, rollout in enumerate(rollouts):
        problems = problems_of_step(task.train, 4, step, 0)
        assert rollout.prompts == [task.encode(problem, tokenizer) for problem in problems]
        assert rollout.seed == seeded_generator(0, step + 1, "rollout").initial_seed()

        first = validated + 12 * step
        graded = recorded.graded[first : first + 12]
        asked = [problem.prompt for problem in problems for _ in range(3)]
        assert [answer.prompt for answer in graded] == asked
        finished = [answer.finished for answer in graded]
        assert finished == [episode.finished for episode in rollout.episodes]
        assert not all(finished)

        rewards = [answer.reward for answer in graded]
        groups = [standardised(rewards[i : i + 3]) for i in (0, 3, 6, 9)]
        first_half, second_half = recorded.updates[2 * step : 2 * step + 2]
        assert_update_gets(first_half, rollout.episodes[:6], groups[0] + groups[1], s)
        assert_update_gets(second_half, rollout.episodes[6:], groups[2] + groups[3], s)


def parameters_of(path: str | Path) -> list[Tensor]:
    return [parameter.detach() for parameter in load(str(path))[0].parameters()]


def all_equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(first, second, strict=True))


def largest_difference(first: list[Tensor], second: list[Tensor]) -> float:
    return max(float((p - q).abs().max()) for p, q in zip(first, second, strict=True))


@dataclass
class Finished:
    folder: Path
    log: list[dict]
    printed: str


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Finished:
    """A run of two steps. No sequence is left out, so that both score something."""
    out = tmp_path_factory.mktemp("runs")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        folder, log = small_run(out, "a", skip_zero=False)
    return Finished(folder, log, printed.getvalue())


def test_a_run_prints_its_table_and_keeps_its_settings(finished):
    assert "trained - base" in finished.printed
    assert str(finished.folder) in finished.printed
    assert "Pass@4" in finished.printed
    assert json.loads((finished.folder / "config.json").read_text())["alpha"] == 0.4


def test_a_log_line_holds_finite_numbers_within_their_bounds(finished):
    assert [line["step"] for line in finished.log] == [1, 2]
    needed = {
        "reward",
        "finished",
        "shaping",
        "equal_groups",
        "clip_low",
        "clip_high",
        "kl",
        "grad_norm",
        "rollout_s",
        "peak_memory_gb",
        "timeouts",
    }
    for line in finished.log:
        assert needed <= set(line)
        for name, value in line.items():
            assert name == "arm" or math.isfinite(value)
        assert line["gap_max"] <= 1e-4  # fp32 sampler against fp32 scorer
        assert 0 < line["entropy"] < math.log(112)
        assert 1 <= line["length"] <= 128
        assert 0 < line["score_s"] < line["update_s"]


def test_each_row_of_the_final_table_is_of_its_own_model(finished):
    models = json.loads((finished.folder / "validation.json").read_text())["models"]
    task = load_task("countdown")
    for name, path, step in (("base", "base", 0), ("trained", str(finished.folder), 2)):
        model, tokenizer = load(path)
        again = count_solved(
            Sampler(model, 8, 135, model.eos_ids),
            tokenizer,
            task,
            task.validation[:5],
            samples=4,
            max_new_tokens=128,
            temperature=1.0,
            top_p=1.0,
            seed=0,
            step=step,
        )
        assert models[name]["solved"] == again["solved"]
        assert models[name]["tokens"] == again["tokens"]


def test_a_runs_folder_is_the_folder_of_the_trained_model(finished):
    trained = parameters_of(finished.folder)
    base = parameters_of("base")
    assert not all_equal(trained, base)
    assert largest_difference(trained, base) < 0.01


def test_the_same_seed_gives_the_same_weights_and_evaluation_does_not_disturb_them(tmp_path):
    first, log = small_run(tmp_path, "first")
    often, log_often = small_run(tmp_path, "evaluated-often", eval_every=1)
    other, _ = small_run(tmp_path, "seed", seed=1)
    assert all_equal(parameters_of(first), parameters_of(often))
    assert not all_equal(parameters_of(first), parameters_of(other))
    assert log[1]["reward"] == log_often[1]["reward"]
    validations = read_jsonl(often / "validation.jsonl")
    assert [line["step"] for line in validations] == [0, 1, 2]


@pytest.mark.parametrize("dtypes", [dict(dtype="bfloat16"), dict(decode_dtype="bfloat16")])
def test_bf16_compute_keeps_fp32_weights_and_stays_close(tmp_path, dtypes):
    folder, log = small_run(tmp_path, "bf16", lr=1e-6, samples=8, skip_zero=False, **dtypes)
    assert 1e-5 < log[0]["gap_mean"] <= 0.02  # bf16 was used, and is close
    moved = largest_difference(parameters_of(folder), parameters_of("base"))
    assert 0 < moved < 1e-5  # below what a bf16 weight could hold


def test_train_never_touches_the_test_problems(tmp_path, monkeypatch):
    def fail_if_read(self):
        pytest.fail("the test problems were read")

    unreadable = property(fail_if_read, lambda self, problems: None)
    monkeypatch.setattr(Countdown, "test", unreadable, raising=False)
    small_run(tmp_path, "a", steps=1)


# Algorithm, weight of the entropy advantage, entropy bonus, upper clip: as the log tells them.
ARMS = {
    "grpo, alpha 0.4, entropy_coef 0.0, clip_high 0.28": dict(),
    "grpo, alpha 0.0, entropy_coef 0.0, clip_high 0.28": dict(alpha=0.0),
    "grpo, alpha 0.0, entropy_coef 0.01, clip_high 0.28": dict(alpha=0.0, entropy_coef=0.01),
    "grpo, alpha 0.4, entropy_coef 0.0, clip_high 0.2": dict(clip_high=0.2),
    "ppo, alpha 0.1, entropy_coef 0.0, clip_high 0.28": dict(algo="ppo", critic_warmup=1),
    "ppo, alpha 0.0, entropy_coef 0.0, clip_high 0.28": dict(
        algo="ppo", critic_warmup=1, alpha=0.0
    ),
}


def test_every_arm_runs_and_is_told_by_its_log_and_its_name(tmp_path, monkeypatch):
    replace_reward(monkeypatch, reward_by_length)  # so that every group teaches
    small = dict(
        out=str(tmp_path),
        steps=2,
        prompts=4,
        samples=4,
        minibatch=1,
        eval_problems=1,
        eval_samples=1,
        final_samples=1,
        slots=16,
        max_new_tokens=40,
        skip_zero=False,
        lr=1e-2,
    )
    names = set()
    weights = set()
    for told, arm in ARMS.items():
        run = train.train(Settings(**small, **arm))
        assert [line["arm"] for line in read_jsonl(run / "log.jsonl")] == [told, told]
        names.add(run.name)
        weights.add(tuple(load(str(run))[0].norm.weight.tolist()))
    assert len(names) == len(ARMS)
    assert len(weights) == len(ARMS)  # every arm does something of its own


def test_a_run_without_mixed_groups_says_so(tmp_path, monkeypatch, capsys):
    replace_reward(monkeypatch, reward_none)
    train.train(
        Settings(
            out=str(tmp_path),
            name="a",
            steps=21,
            prompts=2,
            samples=3,
            minibatch=2,
            eval_problems=2,
            eval_samples=1,
            final_samples=2,
            slots=12,
            max_new_tokens=4,
        )
    )
    said = capsys.readouterr().err
    assert said.count("no group had both right and wrong answers in 20 steps") == 1
    assert "more --samples" in said
