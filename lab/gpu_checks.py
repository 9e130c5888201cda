"""Is what the card computes right? Each check puts a number beside its limit.

The reference is the CPU, in float64 where the arithmetic allows; the sampler as a CUDA graph is held
against the same sampler without one, bit for bit. What is expected of the card but not known (how far
bfloat16 is, whether two runs are equal) is measured, with a wide limit."""

import contextlib
import io
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

import train
from advantage import group_advantage
from lab.bench_work import encoded_prompts
from lab.gpu_report import Report, wait
from lab.gpu_shapes import QWEN, random_model
from model import Critic, Transformer, load, score
from plumbing.batch import collate, pad_responses
from plumbing.optimizer import make_optimizer
from plumbing.seeds import seeded_generator
from plumbing.settings import Settings as TrainSettings
from plumbing.stop import stop
from rollout import Episode, Sampler, sample

SMALL = QWEN | dict(
    vocab_size=112,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=2,
    tie_word_embeddings=True,
    max_position_embeddings=512,
)
LLAMA_31 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = {
    "Qwen2": SMALL,
    "Qwen3, untied": SMALL | dict(model_type="qwen3", head_dim=16, tie_word_embeddings=False),
    "Llama 3.1": SMALL | dict(model_type="llama", rope_parameters=LLAMA_31),
}


@dataclass(frozen=True)
class Work:
    """How much of it."""

    problems: int  # of the sampler's checks
    samples: int  # answers to each
    slots: int
    new_tokens: int
    draws: int
    step: dict  # settings of the training steps


FULL = Work(
    problems=16,
    samples=16,
    slots=96,
    new_tokens=128,
    draws=1_000_000,
    step=dict(prompts=16, samples=16, minibatch=4, slots=128, max_new_tokens=128),
)
LITTLE = Work(
    problems=4,
    samples=3,
    slots=6,
    new_tokens=14,
    draws=20_000,
    # With so few answers hardly one is right: the bonus leaves something to learn.
    step=dict(prompts=2, samples=4, minibatch=1, slots=8, max_new_tokens=16, entropy_coef=0.01),
)


def all_checks(report: Report, device: torch.device, work: Work) -> None:
    """Every check is a part of its own; `needs` are seconds."""
    for name, config in FAMILIES.items():
        report.run(name, "logits", partial(family_logits, report, device, config), needs=5)
    report.run("embedded", "logits", partial(embedded_logits, report, device), needs=5)
    report.run("128 words", "draws", partial(draws, report, device, work), needs=5)

    def embedded(name: str, check: Callable, needs: float, *arguments) -> None:
        report.run("embedded", name, partial(check, report, device, work, *arguments), needs)

    embedded("graph against eager", graphs, 20)
    embedded("first tokens", first_tokens, 5)
    embedded("gap", gaps, 10)
    for algo in ("grpo", "ppo"):
        embedded(f"{algo} update", update, 15, algo)
    for algo in ("grpo", "ppo"):
        embedded(f"{algo} step", step, 15, algo)
    embedded("save and resume", resume, 30)


def apart(value: Tensor, reference: Tensor) -> float:
    """||value - reference|| / ||reference||, in float64 on the CPU."""
    reference = reference.detach().double().cpu()
    return float((value.detach().double().cpu() - reference).norm() / reference.norm())


def logits_of(model: Transformer, tokens: Tensor) -> Tensor:
    """tokens [B, T] -> [B, T, V]"""
    position = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return F.linear(model(tokens, position), model.head)


@torch.no_grad()
def compare_logits(report: Report, model: Transformer, device: torch.device) -> None:
    """`model` is on the CPU, in float32."""
    random = seeded_generator(0, 0, "tokens")
    tokens = torch.randint(0, len(model.head), (4, 48), generator=random)
    on_cpu = logits_of(model.double(), tokens)
    on_card = model.to(device, torch.float32)
    found = logits_of(on_card, tokens.to(device))
    report.check("logits in float32, from the CPU's in float64", apart(found, on_cpu), 3e-5)
    in_bfloat16 = logits_of(on_card.bfloat16(), tokens.to(device))
    report.check("logits in bfloat16, the same", apart(in_bfloat16, on_cpu), 5e-2)


def family_logits(report: Report, device: torch.device, config: dict) -> None:
    model = random_model(config, torch.device("cpu"), torch.float32, std=0.1)
    compare_logits(report, model, device)


def embedded_logits(report: Report, device: torch.device) -> None:
    compare_logits(report, load("base")[0], device)


def prompts_of_all_lengths(count: int) -> list[list[int]]:
    """Countdown's, with a few random tokens before them."""
    random = seeded_generator(0, 0, "prompts")
    prompts = []
    for i, prompt in enumerate(encoded_prompts(count)):
        before = torch.randint(1, 100, (i % 37,), generator=random).tolist()
        prompts.append(before + prompt)
    return prompts


def graphs(report: Report, device: torch.device, work: Work) -> None:
    """More sequences than slots (refill), of natural lengths (a tail with fewer rows), prompts and
    responses that outgrow the first cache, twice, with free() between."""
    prompts = prompts_of_all_lengths(work.problems)
    length = max(len(prompt) for prompt in prompts) + work.new_tokens
    model = load("base", device)[0]
    for dtype in (torch.float32, torch.bfloat16):
        samplers = [
            Sampler(model, work.slots, length, model.eos_ids, dtype, graph=graph)
            for graph in (False, True)
        ]
        for top_p in (1.0, 0.9):
            for turn in range(2):
                eager, graphed = [
                    generate(sampler, prompts, work, turn, top_p=top_p) for sampler in samplers
                ]
                for sampler in samplers:
                    sampler.free()
                differing = sum(not equal(a, b) for a, b in zip(eager, graphed, strict=True))
                kind = str(dtype).removeprefix("torch.")
                what = f"graph against eager, {kind}, top-p {top_p}, call {turn + 1}"
                note = f"of {len(eager)}"
                report.check(what, differing, 0, "episodes differ", note)
        graphs_of = samplers[1].graphs
        lost = graphs_of.failed or (graphs_of.wanted and not graphs_of.captured)
        note = f"captured: {captured(samplers[1])}"
        report.check(f"samplers without their graphs, {kind}", bool(lost), 0, note=note)


def generate(
    sampler: Sampler, prompts: list, work: Work, turn: int = 0, top_p: float = 1.0
) -> list[Episode]:
    return sampler.generate(
        prompts,
        work.samples,
        work.new_tokens,
        temperature=1.0,
        generator=seeded_generator(0, turn, "lab.gpu", sampler.device),
        top_p=top_p,
    )


def equal(a: Episode, b: Episode) -> bool:
    """Bit for bit."""
    return (
        a.response.equal(b.response)
        and a.logp.equal(b.logp)
        and a.entropy.equal(b.entropy)
        and a.finished == b.finished
    )


def captured(sampler: Sampler) -> str:
    """How many graphs the sampler has captured, and why it has given them up, if so."""
    count = sampler.graphs.captured
    return f"{count}, given up: {sampler.graphs.failed}" if sampler.graphs.failed else str(count)


def chi_square(counts: Tensor, expected: Tensor) -> float:
    """Pearson's statistic of [V] counts, as a standard normal number (Wilson and Hilferty). Words
    that are expected fewer than 10 times are one together."""
    rare = expected < 10
    if rare.any():
        counts = torch.cat((counts[~rare], counts[rare].sum()[None]))
        expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    possible = expected > 0
    if counts[~possible].any():
        return float("inf")
    deviation = counts[possible] - expected[possible]
    statistic = (deviation**2 / expected[possible]).sum()
    freedom = int(possible.sum()) - 1
    spread = 2 / (9 * freedom)
    return float(((statistic / freedom) ** (1 / 3) - (1 - spread)) / spread**0.5)


def draws(report: Report, device: torch.device, work: Work) -> None:
    """rollout.sample, on the same logits again and again."""
    random = seeded_generator(0, 0, "logits")
    logits = torch.randn(128, generator=random) * 2  # [V]
    on_card = logits.to(device).expand(work.draws // 20, -1)  # [rows, V]
    generator = seeded_generator(0, 0, "draws", device)
    for top_p in (1.0, 0.8):
        counts = torch.zeros(128, dtype=torch.float64)
        for _ in range(20):
            token, _, _ = sample(on_card, 1.0, top_p, generator)
            counts += token.bincount(minlength=128).cpu()
        p = nucleus(logits.double().softmax(-1), top_p)
        score = chi_square(counts, p * counts.sum())
        what = f"chi-square of drawn tokens, top-p {top_p}"
        report.check(what, score, 4.0, "standard deviations", f"{work.draws} draws")


def nucleus(p: Tensor, top_p: float) -> Tensor:
    """The likeliest words up to the one that reaches top_p, [V]; one after the other."""
    kept = torch.zeros_like(p)
    for i in p.argsort(descending=True).tolist():
        if kept.sum() >= top_p:
            break
        kept[i] = p[i]
    return kept / kept.sum()


def first_tokens(report: Report, device: torch.device, work: Work) -> None:
    """The whole sampler, mostly as a replayed graph: first tokens of many answers to one prompt."""
    model = load("base", device)[0]
    prompt = prompts_of_all_lengths(1)[0]
    count = work.draws // 64
    sampler = Sampler(model, count // 4, len(prompt) + 1, model.eos_ids)
    random = seeded_generator(0, 0, "first tokens", device)
    episodes = sampler.generate([prompt], count, 1, 1.0, random)
    counts = torch.stack([episode.response[0] for episode in episodes])
    counts = counts.bincount(minlength=len(model.head)).double()

    reference = load("base")[0].double()
    with torch.no_grad():
        p = logits_of(reference, torch.tensor([prompt]))[0, -1].softmax(-1)
    what = "chi-square of the sampler's first tokens"
    report.check(what, chi_square(counts, p * count), 4.0, "standard deviations", f"{count} draws")


@torch.no_grad()
def gaps(report: Report, device: torch.device, work: Work) -> None:
    """|log-probability by the sampler - by the scorer|, mean over tokens. In float32 the scorer is
    the CPU's, in float64."""
    prompts = prompts_of_all_lengths(work.problems)
    length = max(len(prompt) for prompt in prompts) + work.new_tokens
    model = load("base", device)[0]

    sampler = Sampler(model, work.slots, length, model.eos_ids)
    episodes = generate(sampler, prompts, work)
    mean, most = gap(episodes, load("base")[0].double())
    what = "gap, sampler in float32 and the CPU's scorer in float64"
    report.check(what, mean, 3e-5, "nats", f"largest {most:.2g}")

    sampler = Sampler(model, work.slots, length, model.eos_ids, torch.bfloat16)
    episodes = generate(sampler, prompts, work)
    with torch.autocast(device.type, torch.bfloat16):
        mean, most = gap(episodes, model)
    report.check("gap, both in bfloat16 (autocast)", mean, 2e-2, "nats", f"largest {most:.2g}")

    model = load("base", device, torch.bfloat16)[0]
    sampler = Sampler(model, work.slots, length, model.eos_ids)
    episodes = generate(sampler, prompts, work)
    mean, most = gap(episodes, model)
    report.check("gap, both in bfloat16 (weights)", mean, 2e-2, "nats", f"largest {most:.2g}")


def gap(episodes: list[Episode], model: Transformer) -> tuple[float, float]:
    """Mean and largest, over all response tokens."""
    batch = collate(episodes, model.head.device)
    logp, _ = score(model, batch.tokens, batch.prompt_len, batch.total_len, temperature=1.0)
    sampled, mask = pad_responses([episode.logp for episode in episodes])  # [N, R]
    difference = (batch.unalign(logp.float(), mask.shape[1]) - sampled).abs()[mask]
    return float(difference.mean()), float(difference.max())


def update(report: Report, device: torch.device, work: Work, algo: str) -> None:
    """An optimizer step of train.py on the same episodes, by the card and by the CPU. AdamW's first
    moments are compared, which after one step are the gradients: its weights would blow up the
    rounding of gradients near 0."""
    cpu = torch.device("cpu")
    prompts = encoded_prompts(4)
    length = len(prompts[0]) + work.new_tokens
    model = load("base")[0]
    sampler = Sampler(model, 64, length, model.eos_ids)
    episodes = generate(sampler, prompts, work)
    on_cpu = updated(cpu, episodes, work, algo)
    on_card = updated(device, episodes, work, algo)

    for name in on_cpu.sums:
        for number in ("loss", "grad_norm"):
            what = f"{algo} update, {number} ({name})"
            found = on_card.sums[name][number]
            wanted = on_cpu.sums[name][number]
            report.check(what, abs(found - wanted), 1e-4 * max(1.0, abs(wanted)))
        what = f"{algo} update, gradient ({name})"
        report.check(what, apart(on_card.gradient[name], on_cpu.gradient[name]), 1e-3)


@dataclass
class Updated:
    sums: dict[str, Counter]
    gradient: dict[str, Tensor]  # all of a module, end to end


def updated(device: torch.device, episodes: list[Episode], work: Work, algo: str) -> Updated:
    s = TrainSettings(algo=algo, lr=1e-5, critic_lr=1e-5, grad_clip=1e9)
    model = load("base", device)[0]
    old_logp, mask = pad_responses([episode.logp for episode in episodes])  # [N, R]
    answers = torch.arange(len(episodes))
    reward = torch.where(answers % 3 == 0, 1.0, -1.0)  # [N]
    sums = {}
    gradient = {}
    if algo == "ppo":
        critic = Critic(model)
        torch.nn.init.constant_(critic.value.weight, 0.02)  # at 0 the body has no gradient
        optimizer = make_optimizer(critic, s.critic_lr, s)
        advantage, value, ret = train.critic_advantage(critic, episodes, reward, mask, s)
        sums["critic"] = train.update_critic(critic, optimizer, episodes, value, ret, s)
        gradient["critic"] = first_moments(critic, optimizer)
    else:
        advantage = group_advantage(reward, answers // work.samples)[:, None] * mask
    optimizer = make_optimizer(model, s.lr, s)
    sums["policy"] = train.update(model, optimizer, episodes, old_logp, advantage, s)
    gradient["policy"] = first_moments(model, optimizer)
    return Updated(sums, gradient)


def first_moments(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
    states = [optimizer.state[parameter] for parameter in module.parameters()]
    return torch.cat([state["exp_avg"].flatten() for state in states if state])


def step(report: Report, device: torch.device, work: Work, algo: str) -> None:
    """A whole training step on the card, in float32 and with weights in bfloat16; of GRPO also in
    bfloat16 over float32 weights, and with layers that are computed again."""
    kinds = {
        "float32": {},
        "bfloat16 weights": dict(dtype="bfloat16", weights="bfloat16"),
    }
    if algo == "grpo":
        kinds["float32, recompute"] = dict(recompute=True)
        kinds["autocast"] = dict(dtype="bfloat16")
    for name, changes in kinds.items():
        s = TrainSettings(
            algo=algo, device=str(device), critic_warmup=0, skip_zero=False, **work.step, **changes
        )
        with quietly():
            learner = train.prepare(s)
            record = train.training_step(1, learner, s)
            line = train.log_line(1, record, s, device, learner.tokenizer, timeouts=0)
        wait(device)
        limit = 1e-4 if s.dtype == "float32" else 0.05
        what = f"{algo} step, {name}: gap of sampler and scorer"
        note = (
            f"largest {line['gap_max']:.2g}; loss {line['loss']:.3g}, "
            f"gradient norm {line['grad_norm']:.3g}, reward {line['reward']:.3g}"
        )
        report.check(what, line["gap_mean"], limit, "nats", note)


def quietly():
    """What a command prints is no part of the table."""
    return contextlib.redirect_stdout(io.StringIO())


def resume(report: Report, device: torch.device, work: Work) -> None:
    """Three steps in one go, twice; and stopped after the first, as by Ctrl-C, and resumed. Where
    two runs are equal bit for bit, a resumed one must be."""
    with tempfile.TemporaryDirectory() as out:
        changes = dict(
            out=out,
            device=str(device),
            steps=3,
            eval_problems=4,
            eval_samples=2,
            final_samples=2,
            skip_zero=False,
            **work.step,
        )
        with quietly():
            train.train(TrainSettings(name="whole", **changes))
            train.train(TrainSettings(name="again", **changes))
            stop.asked = True
            try:
                train.train(TrainSettings(name="stopped", **changes))
            except KeyboardInterrupt:
                pass
            finally:
                stop.asked = False
            done = (Path(out) / "stopped" / "log.jsonl").read_text().count("\n")
            train.train(TrainSettings(resume=f"{out}/stopped"))
        if done != 1:
            raise RuntimeError(f"the run that should have stopped after a step made {done}")
        whole = saved_weights(Path(out) / "whole")
        twice = apart(saved_weights(Path(out) / "again"), whole)
        resumed = apart(saved_weights(Path(out) / "stopped"), whole)
    report.figure("the same three steps twice, weights apart", twice, "", note="0: bit for bit")
    report.check("stopped and resumed, weights apart", resumed, 10 * twice)


def saved_weights(run: Path) -> Tensor:
    state = load_file(run / "state.safetensors")
    return torch.cat([state[name].flatten() for name in sorted(state) if "weight" in name])
