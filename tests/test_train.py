"""train.py: the gradient of an update against a slow loop, the loop end to end, and what it refuses."""

import json
import math
import runpy
import shutil
import signal
import statistics
import subprocess
import sys
import time

import pytest
import torch

import train
from evaluate import parse_flags
from model import load
from rollout import Episode, Sampler, per_token, seeded_generator
from task import Countdown
from train import Settings, check, draw, micro_batches, run_name, summary, update


def make_episodes(model, prompts=3, samples=4):
    """Real episodes of a random model, whose end token has the id 0 that padding has, and an old policy that
    differs from the model's, so that ratios lie on both sides of the clip."""
    g = torch.Generator().manual_seed(0)
    lists = [torch.randint(1, 112, (n,), generator=g).tolist() for n in (2, 9, 5)[:prompts]]
    with torch.no_grad():
        model.embed_tokens.weight[0] *= 3
    episodes = Sampler(model, 8, 60, (0,)).generate(lists, samples, 40, 1.0, seeded_generator(0, 0, "test"))
    assert prompts < 3 or ({e.finished for e in episodes} == {True, False} and len({len(e.response) for e in episodes}) > 3)
    return [Episode(e.prompt, e.response, e.logp + 0.3 * torch.randn(e.logp.shape, generator=g), e.entropy, e.finished,
                    e.prompt_index) for e in episodes]


def gradient(folder, episodes_of, advantage, **changes):
    """What one update does to the weights under SGD with lr 1: minus the gradient."""
    model, _ = load(str(folder))
    episodes = episodes_of(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = [p.detach().clone() for p in model.parameters()]
    sums = update(model, torch.optim.SGD(model.parameters(), 1.0), episodes, *spread(episodes, advantage),
                  Settings(grad_clip=1e9, **changes))
    return {name: b - p.detach() for (name, p), b in zip(model.named_parameters(), before)}, sums


def spread(episodes, advantage):
    """An advantage per response -> the old log-probabilities and the advantage per response token, [N, R], 0 beyond."""
    old_logp, counted = per_token([e.logp for e in episodes])
    return old_logp, advantage[:, None] * counted


MIXED = torch.tensor([1.5, -0.5, -0.5, -0.5, 0, 0, 0, 0, 0.87, 0.87, -0.87, -0.87])


@pytest.mark.parametrize("beta", [0.0, 0.7])
def test_gradient_equals_a_slow_loop_for_any_split_with_or_without_zero_advantage_sequences(qwen2, beta):
    folder, reference = qwen2()
    reference = reference.double()
    with torch.no_grad():
        reference.model.embed_tokens.weight[0] *= 3
    episodes = make_episodes(load(str(folder))[0])
    temperature, alpha, kappa, low, high = 0.9, 0.05, 3.0, 0.15, 0.35     # the cap binds where |A| = 0.5
    tokens = sum(len(e.response) for e in episodes)
    loss, clipped, gap_max, shaping = 0.0, 0, 0.0, {"up": [], "down": []}      # psi / |A|, of positive and negative A
    for e, a in zip(episodes, MIXED.tolist()):
        z = reference(torch.cat((e.prompt, e.response))[None]).logits[0, len(e.prompt) - 1:-1] / temperature
        for t, token in enumerate(e.response):              # every response token, the end token included
            logp = z[t].log_softmax(-1)
            entropy = -(logp.exp() * logp).sum()
            h = float(entropy.detach())
            shaped = a + min(alpha * h, abs(a) / kappa)
            ratio = (logp[token] - e.logp[t].double()).exp()
            clipped += not 1 - low < float(ratio.detach()) < 1 + high
            loss = loss - torch.min(ratio * shaped, ratio.clamp(1 - low, 1 + high) * shaped) / tokens - beta * entropy / tokens
            if a != 0 or beta:
                shaping["up" if a > 0 else "down"] += [(shaped - a) / abs(a)] if a else []
                gap_max = max(gap_max, abs(math.log(float(ratio.detach()))))
    loss.backward()
    assert clipped > 10
    want = {name.removeprefix("model."): p.grad for name, p in reference.named_parameters()}
    size = max(float(g.abs().max()) for g in want.values())
    assert size > 0.01
    for micro_tokens in (1, 150, 10_000):
        for skip_zero in (True, False):
            for chunk in (5, 2048):
                got, sums = gradient(folder, make_episodes, MIXED, micro_tokens=micro_tokens, chunk=chunk,
                                           skip_zero=skip_zero, temperature=temperature, alpha=alpha, kappa=kappa,
                                           clip_low=low, clip_high=high, entropy_coef=beta)
                for name in want:
                    assert (got[name] - want[name]).abs().max() <= 1e-5 * size, (name, micro_tokens, skip_zero)
                assert sums["loss"] == pytest.approx(loss.item(), abs=1e-5)
                live = [e for e, a in zip(episodes, MIXED) if a != 0 or not skip_zero or beta]
                assert sums["tokens"] == sum(len(e.response) for e in live)
                both = [*shaping["up"], *shaping["down"]]
                assert sums["shaping"] == pytest.approx(sum(both), rel=1e-4)
                assert sums["capped"] == sum(share > 0.9999 / kappa for share in both) and 0 < sums["capped"] < len(both)
                for side, shares in shaping.items():
                    assert sums[side] == len(shares) > 0 and sums[f"shaping_{side}"] == pytest.approx(sum(shares), rel=1e-4)
                assert sums["gap_max"] >= gap_max - 1e-4 and (not skip_zero or sums["gap_max"] < gap_max + 1e-4)


def test_the_gradient_is_clipped_and_a_bad_one_stops_the_run(qwen2):
    folder, _ = qwen2()
    model, _ = load(str(folder))
    episodes = make_episodes(model)
    before = [p.detach().clone() for p in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    sums = update(model, torch.optim.SGD(model.parameters(), 1.0), episodes, *spread(episodes, MIXED), Settings(grad_clip=1e-3))
    moved = math.sqrt(sum(float(((p.detach() - b) ** 2).sum()) for p, b in zip(model.parameters(), before)))
    assert moved == pytest.approx(1e-3, rel=0.02) and sums["grad_norm"] > 0.1
    with torch.no_grad():
        model.norm.weight[0] = math.nan
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        update(model, torch.optim.SGD(model.parameters(), 1.0), episodes, *spread(episodes, MIXED), Settings())
    assert all(torch.equal(p, b) for p, b in zip(list(model.parameters())[:-1], before[:-1]))     # no step was taken


def test_micro_batches_hold_everything_once_within_the_budget():
    lengths = [5, 60, 7, 7, 30, 100, 2, 59]
    episodes = [Episode(torch.zeros(2), torch.zeros(n - 2), None, None, True, 0) for n in lengths]
    for budget in (1, 64, 130, 1000):
        batches = micro_batches(episodes, budget)
        assert sorted(i for b in batches for i in b) == list(range(8))
        assert all(len(b) * max(lengths[i] for i in b) <= budget or len(b) == 1 for b in batches)
    assert len(micro_batches(episodes, 1000)) == 1 and micro_batches([], 10) == []


def test_an_update_without_live_sequences_still_steps(qwen2):
    """Zero gradients, not None: AdamW's momentum goes on as if the gradient were 0."""
    model, _ = load(str(qwen2()[0]))
    episodes = make_episodes(model)
    reference = [torch.nn.Parameter(p.detach().clone()) for p in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    mine = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.01)
    theirs = torch.optim.AdamW(reference, 1e-2, weight_decay=0.01)
    for advantage in (MIXED, torch.zeros(12), torch.zeros(12)):
        recorded = []
        handle = mine.register_step_pre_hook(lambda *_: recorded.extend(p.grad.clone() for p in model.parameters()))
        sums = update(model, mine, episodes, *spread(episodes, advantage), Settings())
        handle.remove()
        for parameter, grad in zip(reference, recorded):
            parameter.grad = grad
        theirs.step()
        assert (sums["tokens"] > 0) == bool(advantage.any()) == (sums["grad_norm"] > 0)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), reference))


def test_a_right_answer_becomes_likelier_its_end_token_too(qwen2):
    model, _ = load(str(qwen2()[0]))
    episodes = make_episodes(model, prompts=1)
    ended = next(i for i, e in enumerate(episodes) if e.finished and len(e.response) > 1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    advantage = torch.zeros(4)
    advantage[ended] = 1.0

    def logp():
        tokens, prompt_len, total_len, _ = train.collate([episodes[ended]], torch.device("cpu"))
        return train.score(model, tokens, prompt_len, total_len, 1.0)[0][0].detach()
    before = logp()
    update(model, torch.optim.SGD(model.parameters(), 0.05), episodes, *spread(episodes, advantage),
           Settings(clip_high=100.0, alpha=0.0))
    assert logp().sum() > before.sum() and logp()[-1] > before[-1]


def test_data_order_visits_every_problem_once_an_epoch():
    problems = list(range(10))
    drawn = [p for step in range(5) for p in draw(problems, 4, step, seed=3)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == problems and drawn[:10] != drawn[10:]
    assert draw(problems, 4, 2, seed=3) == drawn[8:12]                      # any step alone, for a resumed run
    assert [p for step in range(5) for p in draw(problems, 4, step, seed=4)] != drawn


def test_statistics_of_a_step_are_those_of_its_updates():
    e = [Episode(torch.zeros(1), torch.zeros(n), None, torch.full((n,), h), n < 4, 0) for n, h in ((2, 1.0), (4, 0.25))]
    updates = [train.Counter(tokens=2, kl=0.2, loss=-1.0, shaping=1.0, shaping_up=0.25, up=1, shaping_down=0.75, down=1,
                             capped=1, gap=0.4, gap_max=0.3, grad_norm=1.0),
               train.Counter(tokens=6, kl=0.2, loss=0.5, shaping_up=0.25, up=4, clipped_high=2, gap=9.0, gap_max=5.0, grad_norm=2.0)]
    line = summary(3, e, torch.tensor([1.0, -1.0]), updates, 2)
    assert line | {"entropy": round(line["entropy"], 6)} == pytest.approx({
        "step": 3, "reward": 0.0, "length": 3.0, "finished": 0.5, "entropy": 0.5, "equal_groups": 0.0, "shaping": 1 / 8,
        "shaping_up": 0.5 / 5, "shaping_down": 0.75, "capped": 1 / 8,
        "clip_low": 0.0, "clip_high": 2 / 8, "kl": 0.4 / 8, "loss": -0.25, "gap_mean": 0.2, "gap_max": 0.3,
        "grad_norm": 1.5, "tokens": 6})
    nothing = summary(3, e, torch.tensor([1.0, 1.0]), [train.Counter(), updates[1]], 2)
    warming = summary(3, e, torch.tensor([1.0, -1.0]), [], 2)
    assert all(warming[name] is None for name in ("shaping", "shaping_up", "capped", "clip_low", "clip_high", "kl", "loss", "grad_norm", "gap_mean"))
    assert nothing["gap_mean"] is nothing["gap_max"] is None and nothing["equal_groups"] == 1.0     # not measured is not 0


def test_the_wiring_of_the_loop(tmp_path, monkeypatch):
    """Who gets what: every rollout, reward and update of three steps in bf16, at a temperature of their own, with
    rewards that mix right and wrong in every group, recorded and compared with a slow computation."""
    calls, rewards, autocast = {"generate": [], "update": []}, [], []
    right = lambda n: 1.0 if (7 * n * n + 3 * n) % 11 < 5 else -1.0         # no period that a wrong grouping could share
    generate, original_update, original_score = Sampler.generate, train.update, train.score

    def spy_generate(self, prompts, samples, max_new, temperature, generator, *rest):
        assert torch.equal(self.decoder.norm.weight, self.model.norm.weight.bfloat16())     # never stale weights
        episodes = generate(self, prompts, samples, max_new, temperature, generator, *rest)
        calls["generate"].append((prompts, samples, temperature, generator.initial_seed(), episodes))
        return episodes

    def spy_update(model, optimizer, episodes, old_logp, advantage, s):
        calls["update"].append((episodes, advantage.clone(), optimizer.defaults))
        return original_update(model, optimizer, episodes, old_logp, advantage, s)

    def spy_score(*arguments):
        autocast.append((torch.is_autocast_enabled("cpu"), arguments[4]))
        return original_score(*arguments)

    def fake_reward(self, problem, response, finished):
        rewards.append((problem.prompt, response, finished))
        return right(len(rewards) - 1)

    monkeypatch.setattr(Sampler, "generate", spy_generate)
    monkeypatch.setattr(train, "update", spy_update)
    monkeypatch.setattr(train, "score", spy_score)
    monkeypatch.setattr(type(train.load_task("countdown")), "reward", fake_reward)
    s = Settings(out=str(tmp_path), name="a", **(SMALL | dict(steps=3, samples=3, temperature=0.8, dtype="bfloat16",
                                                             weight_decay=0.3, lr=1e-2, max_new_tokens=20)))
    train.train(s)
    rollouts = [c for c in calls["generate"] if len(c[0]) == s.prompts and c[1] == s.samples]
    assert len(rollouts) == 3 and all(c[2] == 0.8 for c in calls["generate"])
    assert len({c[3] for c in calls["generate"]}) == len(calls["generate"])     # every call has a stream of its own
    task, tokenizer = train.load_task("countdown"), load("base")[1]
    graded = 5 * 4                                                              # the validation of the base comes first
    for step, (prompts, _, _, seed, episodes) in enumerate(rollouts):
        problems = draw(task.train, 4, step, 0)
        assert prompts == [task.encode(p, tokenizer) for p in problems]
        assert seed == seeded_generator(0, step + 1, "rollout").initial_seed()
        mine = rewards[graded:graded + 12]
        assert [m[0] for m in mine] == [p.prompt for p in problems for _ in range(3)]
        assert [m[2] for m in mine] == [e.finished for e in episodes] and not all(m[2] for m in mine)
        values = [right(n) for n in range(graded, graded + 12)]
        for half in range(2):
            got, advantage, defaults = calls["update"][2 * step + half]
            assert all(a is b for a, b in zip(got, episodes[6 * half:6 * half + 6], strict=True))
            want = []
            for group in (values[6 * half:][:3], values[6 * half:][3:6]):
                spread = statistics.stdev(group)
                want += [(v - statistics.mean(group)) / (spread + 1e-6) if spread else 0.0 for v in group]
            for row, e, value in zip(advantage.tolist(), got, want):
                assert row == pytest.approx([value] * len(e.response) + [0.0] * (len(row) - len(e.response)), abs=1e-5)
            assert defaults["weight_decay"] == 0.3 and defaults["lr"] == 1e-2
        graded += 12
    assert set(autocast) == {(True, 0.8)}


SMALL = dict(steps=2, prompts=4, samples=4, minibatch=2, eval_problems=5, eval_samples=2, final_samples=4, slots=8)


def run(tmp_path, name, **changes):
    torch.manual_seed(len(name))                                            # global randomness must not matter
    folder = train.train(Settings(out=str(tmp_path), name=name, **(SMALL | changes)))
    return folder, [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_run_leaves_what_it_says(tmp_path, capsys):
    folder, lines = run(tmp_path, "a", skip_zero=False)                     # so that every step scores something
    printed = capsys.readouterr().out
    assert "trained - base" in printed and str(folder) in printed and "Pass@4" in printed
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert all(math.isfinite(v) for name, v in line.items() if name != "arm")
        assert line["gap_max"] <= 1e-4                                      # fp32 sampler against fp32 scorer
        assert 0 < line["entropy"] < math.log(112) and 1 <= line["length"] <= 128
        assert {"reward", "finished", "shaping", "equal_groups", "clip_low", "clip_high", "kl", "grad_norm", "rollout_s",
                "peak_memory_gb", "timeouts"} <= set(line)
        assert 0 < line["score_s"] < line["update_s"]
    assert json.loads((folder / "config.json").read_text())["alpha"] == 0.4
    models = json.loads((folder / "validation.json").read_text())["models"]
    for name, path in (("base", "base"), ("trained", str(folder))):             # each row is of its own model
        model, tokenizer = load(path)
        task, step = train.load_task("countdown"), 2 if name == "trained" else 0
        sampler = Sampler(model, 8, 135, model.eos_ids)
        fresh = train.count_solved(sampler, tokenizer, task, task.validation[:5], 4, 128, 1.0, 1.0, 0, step)
        assert models[name]["solved"] == fresh["solved"] and models[name]["tokens"] == fresh["tokens"]
    trained, base = load(str(folder))[0], load("base")[0]                   # the run's folder is a model folder
    assert any(not torch.equal(p, q) for p, q in zip(trained.parameters(), base.parameters()))
    assert max(float((p - q).detach().abs().max()) for p, q in zip(trained.parameters(), base.parameters())) < 0.01


def test_the_same_seed_gives_the_same_weights_and_evaluation_does_not_disturb_them(tmp_path):
    weights = lambda folder: load(str(folder))[0].state_dict()
    first, lines = run(tmp_path, "first")
    often, lines_often = run(tmp_path, "evaluated-often", eval_every=1)
    other, _ = run(tmp_path, "seed", seed=1)
    assert all(torch.equal(a, b) for a, b in zip(weights(first).values(), weights(often).values()))
    assert not all(torch.equal(a, b) for a, b in zip(weights(first).values(), weights(other).values()))
    assert lines[1]["reward"] == lines_often[1]["reward"]
    assert [json.loads(v)["step"] for v in (often / "validation.jsonl").read_text().splitlines()] == [0, 1, 2]


@pytest.mark.parametrize("dtypes", [dict(dtype="bfloat16"), dict(decode_dtype="bfloat16")])
def test_bf16_compute_keeps_fp32_weights_and_stays_close(tmp_path, dtypes):
    folder, lines = run(tmp_path, "bf16", lr=1e-6, samples=8, skip_zero=False, **dtypes)
    assert 1e-5 < lines[0]["gap_mean"] <= 0.02                              # bf16 was used, and is close
    trained, base = load(str(folder))[0], load("base")[0]
    moved = torch.cat([(p - q).abs().flatten() for p, q in zip(trained.parameters(), base.parameters())])
    assert 0 < moved.max() < 1e-5                                           # below what a bf16 weight could hold


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compile_changes_only_the_rounding(tmp_path, monkeypatch):
    monkeypatch.setattr(Countdown, "reward", lambda self, problem, text, finished: 1.0 if len(text) % 3 == 0 else -1.0)
    folders = [run(tmp_path, name, steps=1, samples=8, lr=1e-4, compile=name == "compiled") for name in ("plain", "compiled")]
    (plain, [line]), (compiled, [other]) = [(load(str(folder))[0].state_dict(), lines) for folder, lines in folders]
    assert other["reward"] == line["reward"] and other["gap_max"] == pytest.approx(line["gap_max"], abs=1e-4)
    assert max((plain[name] - compiled[name]).abs().max() for name in plain) < 2.1e-4      # one step of AdamW either way
    assert other["loss"] == pytest.approx(line["loss"], rel=1e-3) and other["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-3)
    assert any(not plain[name].equal(compiled[name]) for name in plain)                     # it did something


def test_train_never_touches_the_test_problems(tmp_path, monkeypatch):
    read = property(lambda self: pytest.fail("the test problems were read"), lambda self, problems: None)
    monkeypatch.setattr(Countdown, "test", read, raising=False)
    run(tmp_path, "a", steps=1)


def test_run_names_tell_every_setting_that_differs():
    assert run_name(Settings()) == "grpo"
    assert run_name(Settings(alpha=0.0, lr=1e-3, seed=2)) == "grpo-lr=0.001-alpha=0.0-seed=2"
    assert "/" not in run_name(Settings(model="a/b")) and run_name(Settings(model="a/b")) != run_name(Settings(model="a_b"))


def command(monkeypatch, script, *arguments):
    """Runs a script as a command -> (exit code or message, whether it is an error)."""
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(script, run_name="__main__")
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), handlers):
        signal.signal(number, handler)
    return stop.value.code


@pytest.mark.parametrize("flags, sentence", [
    ("--alpha -0.1", "--alpha must be at least 0; it is -0.1"), ("--alpha nan", "--alpha must be"),
    ("--kappa 1", "--kappa must be greater than 1"), ("--kappa inf", "--kappa must be"),
    ("--data " + "x" * 240, "--name must be given, as these settings make too long a name"),
    ("--samples 1", "a group of one has no baseline"), ("--minibatch 5", "--minibatch must be a divisor of --prompts, 32; it is 5"),
    ("--minibatch 0", "--minibatch"), ("--clip-low 1.5", "--clip-low"), ("--temperature 0", "--temperature must be from 0.001 to 1000"), ("--prompts 6", "a divisor of --prompts, 6; it is 4"),
    ("--steps -1", "--steps"), ("--prompts 0", "--prompts"), ("--model ./nowhere", "there is no model folder ./nowhere"),
    ("--task chess", "unknown task 'chess'"), ("--device cuda:99", "cannot be used here"),
    ("--device meta", "only cpu and cuda"), ("--device nonsense", "cannot be used here"),
    ("--grad-clip inf", "--grad-clip must be a finite number; it is inf"), ("--max-new-tokens 0", "--max-new-tokens")])
def test_bad_flags_give_one_clear_sentence(monkeypatch, tmp_path, flags, sentence):
    message = command(monkeypatch, "train.py", *flags.split(), "--out", str(tmp_path / "runs"))
    assert isinstance(message, str) and message.startswith("train.py: ") and sentence in message    # a string exits with 1
    assert "\n" not in message and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("flags", ["--alpha", "--alpha x", "--nonsense 1", "--dtype int8", "--alph 1"])
def test_flags_that_do_not_parse(monkeypatch, capsys, flags):
    assert command(monkeypatch, "train.py", *flags.split()) == 2
    assert "error:" in capsys.readouterr().err.splitlines()[-1]


def test_an_unsupported_model_type(monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    message = command(monkeypatch, "train.py", "--model", str(tmp_path), "--out", str(tmp_path / "runs"))
    assert message == "train.py: model type 'gpt2' is not supported; supported: qwen2, qwen3, llama"


def test_evaluate_as_a_command(monkeypatch):
    assert "does not fit --samples 8" in command(monkeypatch, "evaluate.py", "base", "--samples", "8", "--k", "9")
    assert "no model folder ./nowhere" in command(monkeypatch, "evaluate.py", "./nowhere", "--samples", "8", "--k", "1")
    assert command(monkeypatch, "evaluate.py") == 2                         # no model at all


def test_an_existing_run_is_not_overwritten(monkeypatch, tmp_path):
    (tmp_path / "grpo").mkdir()
    (tmp_path / "grpo" / "log.jsonl").write_text("precious")
    message = command(monkeypatch, "train.py", "--out", str(tmp_path), "--name", "grpo")
    assert "exists" in message and "--overwrite" in message
    assert (tmp_path / "grpo" / "log.jsonl").read_text() == "precious"


def test_overwrite_replaces_runs_and_nothing_else(monkeypatch, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("precious")
    tried = {"thesis": "is no run folder", ".": "not a path", "..": "not a path", "a/b": "not a path",
             str(tmp_path / "thesis"): "not a path"}
    for name, sentence in tried.items():
        message = command(monkeypatch, "train.py", "--out", str(tmp_path), "--name", name, "--overwrite")
        assert sentence in message and (tmp_path / "thesis" / "chapter.tex").read_text() == "precious"
    folder, _ = run(tmp_path, "a", steps=1)
    for model in (folder, folder / "model"):
        message = command(monkeypatch, "train.py", "--out", str(tmp_path), "--name", "a", "--overwrite", "--model", str(model))
        assert "would delete" in message and (folder / "model" / "config.json").exists()
    folder, lines = run(tmp_path, "a", overwrite=True)
    assert len(lines) == 2                                                  # of the new run alone


def test_a_run_folder_that_cannot_be_made(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    message = command(monkeypatch, "train.py", "--out", str(tmp_path / "file"))
    assert message.startswith("train.py: ") and "\n" not in message


@pytest.mark.parametrize("split, flags, message", [
    ("train", "train.py", "train.py: countdown has 0 training and 200 validation problems; both are needed"),
    ("validation", "train.py", "train.py: countdown has 9247 training and 0 validation problems; both are needed"),
    ("test", "evaluate.py base --split test", "evaluate.py: countdown has no test problems")])
def test_a_task_without_problems(monkeypatch, tmp_path, split, flags, message):
    monkeypatch.setattr(Countdown, split, property(lambda self: [], lambda self, problems: None), raising=False)
    where = ["--out", str(tmp_path / "runs")] if flags == "train.py" else []
    assert command(monkeypatch, *flags.split(), *where) == message
    assert not (tmp_path / "runs").exists()


def test_step_times_are_medians():
    log = [{"rollout_s": r, "reward_s": 0.5, "update_s": 4.0 * r, "score_s": 1.25} for r in (1.0, 2.0, 9.0)]
    assert train.step_times(log) == ("median seconds of a step: rollout 2.00, reward 0.50, update 8.00 "
                                     "(of it 1.25 scoring, forward)")


def test_every_setting_is_a_flag_with_a_line_of_documentation(capsys):
    with pytest.raises(SystemExit):
        parse_flags(Settings, train.__doc__, ["--help"])
    text = capsys.readouterr().out
    for field in train.dataclasses.fields(Settings):
        assert "--" + field.name.replace("_", "-") in text and field.metadata["help"]
    s = parse_flags(Settings, train.__doc__, ["--alpha", "0", "--no-skip-zero", "--clip-high", "0.2"])
    assert (s.alpha, s.skip_zero, s.clip_high, s.kappa) == (0.0, False, 0.2, 2.0)
    check(s)
