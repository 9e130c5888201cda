"""What test_pretended.py has done on the pretended device, in processes of their own: each function
does the same on `cuda` and on the CPU, and prints how far apart the two are, as JSON.

The pretended device runs the CPU's kernels and draws the CPU's random numbers. Attention and norms
go another way, so float32 results differ by roundings."""

import contextlib
import importlib.util
import io
import json
import os
import signal
from pathlib import Path

import torch
from safetensors.torch import load_file

import rollout
import train
from advantage import group_advantage
from evaluate import evaluate
from model import Critic, load
from plumbing.batch import pad_responses
from plumbing.optimizer import make_optimizer
from plumbing.seeds import seeded_generator
from plumbing.settings import EvaluationSettings, Settings
from rollout import Sampler

DEVICES = ("cuda", "cpu")
SLOTS = 6
NEW_TOKENS = 24
ENDS = (0, 30, 60, 90)  # tokens that end a response: some responses, and at different lengths
KINDS = {
    "float32": {},
    "recompute": dict(recompute=True),
    "autocast": dict(dtype="bfloat16"),
    "bfloat16 weights": dict(dtype="bfloat16", weights="bfloat16"),
}
TRAINING = dict(
    steps=3,
    prompts=2,
    samples=4,
    minibatch=1,
    slots=6,
    max_new_tokens=12,
    eval_every=2,
    eval_problems=2,
    eval_samples=2,
    final_samples=2,
    entropy_coef=0.01,  # so that every answer has a gradient
)


def apart(value, reference) -> float:
    """||value - reference|| / ||reference||"""
    value = value.detach().double().cpu()
    reference = reference.detach().double().cpu()
    return float((value - reference).norm() / reference.norm())


def mixes_devices() -> bool:
    """Whether an operation over both devices passes, as it would if `cuda` were the CPU."""
    try:
        torch.ones(2, device="cuda") + torch.ones(2)
    except RuntimeError:
        return False
    return True


def prompts() -> list[list[int]]:
    """Of lengths 1 to 33."""
    random = seeded_generator(0, 0, "prompts")
    lengths = (1, 33, 9, 17, 2)
    return [torch.randint(1, 100, (n,), generator=random).tolist() for n in lengths]


def sampled(device: str, top_p: float, dtype: torch.dtype) -> dict:
    """Episodes of two calls with free() between, and what the sampler went through."""
    model = load("base", device)[0]
    sampler = Sampler(model, SLOTS, 33 + NEW_TOKENS, ENDS, dtype)
    rows = []
    grown = []
    replaced = {"with_rows": rows, "lengthened": grown}
    for name, calls in replaced.items():
        setattr(sampler, name, counting(getattr(sampler, name), calls))
    episodes = []
    for turn in range(2):
        random = seeded_generator(0, turn, "rollout", sampler.device)
        episodes += sampler.generate(prompts(), 3, NEW_TOKENS, 1.0, random, top_p=top_p)
        sampler.free()
    return {
        "episodes": episodes,
        "shrunk": len(rows),
        "grown": len(grown),
        "graphs": sampler.graphs,
    }


def counting(function, calls: list):
    def counted(*arguments):
        calls.append(arguments)
        return function(*arguments)

    return counted


def sampler() -> None:
    """More sequences than slots, caches that grow, a tail with fewer rows, twice."""
    # As long as the CPU's, so that matrix products are the same; and short, so that they grow.
    rollout.GROW_BY = rollout.GROW_BY_ON_GPU = 8
    found = {"mixes devices": mixes_devices()}
    for name, dtype in {"float32": None, "bfloat16": torch.bfloat16}.items():
        for top_p in (1.0, 0.8):
            card, cpu = [sampled(device, top_p, dtype) for device in DEVICES]
            pairs = list(zip(card["episodes"], cpu["episodes"], strict=True))
            found[f"{name}, top-p {top_p}"] = {
                "sequences": len(pairs),
                "differing": sum(not a.response.equal(b.response) for a, b in pairs),
                "ended": sum(b.finished for _, b in pairs),
                "apart": max(
                    float((getattr(a, kind) - getattr(b, kind)).abs().max())
                    for a, b in pairs
                    if a.response.equal(b.response)
                    for kind in ("logp", "entropy")
                ),
                "shrunk": card["shrunk"],
                "grown": card["grown"],
                "captured": card["graphs"].captured,
                "failed": card["graphs"].failed,
            }
    print(json.dumps(found))


def updated(device: str, episodes: list, algo: str, changes: dict) -> dict:
    """train.py's update of policy and critic -> their sums and the gradients, which are AdamW's
    first moments after one step."""
    s = Settings(algo=algo, device=device, grad_clip=1e9, micro_tokens=300, **changes)
    model = load("base", device, getattr(torch, s.weights))[0]
    model.recompute = s.recompute
    old_logp, mask = pad_responses([episode.logp for episode in episodes])
    answers = torch.arange(len(episodes))
    reward = torch.where(answers % 3 == 0, 1.0, -1.0)
    found = {}
    advantage = group_advantage(reward, answers // 4)[:, None] * mask
    if algo == "ppo":
        critic = Critic(model)
        torch.nn.init.constant_(critic.value.weight, 0.02)  # at 0 the body has no gradient
        optimizer = make_optimizer(critic, s.critic_lr, s)
        advantage, value, ret = train.critic_advantage(critic, episodes, reward, mask, s)
        sums = train.update_critic(critic, optimizer, episodes, value, ret, s)
        found["critic"] = (sums, moments(critic, optimizer))
    optimizer = make_optimizer(model, s.lr, s)
    sums = train.update(model, optimizer, episodes, old_logp, advantage, s)
    found["policy"] = (sums, moments(model, optimizer))
    return found


def moments(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    states = [optimizer.state[parameter] for parameter in module.parameters()]
    return torch.cat([state["exp_avg"].flatten() for state in states])


def update() -> None:
    model = load("base")[0]
    task_prompts = [prompt + [5] * (i % 3) for i, prompt in enumerate(prompts()) if len(prompt) > 1]
    drawer = Sampler(model, 16, 80, model.eos_ids)
    random = seeded_generator(0, 0, "rollout")
    episodes = drawer.generate(task_prompts, 4, NEW_TOKENS, 1.0, random)
    found = {}
    for algo in ("grpo", "ppo"):
        for kind, changes in KINDS.items():
            card, cpu = [updated(device, episodes, algo, changes) for device in DEVICES]
            for part, (sums, gradient) in card.items():
                reference, moment = cpu[part]
                found[f"{algo}, {kind}, {part}"] = {
                    "loss": abs(sums["loss"] - reference["loss"]),
                    "grad_norm": abs(sums["grad_norm"] / reference["grad_norm"] - 1),
                    "gradient": apart(gradient, moment),
                    "of": float(reference["grad_norm"]),
                }
    print(json.dumps(found))


def training(out: str, name: str, **changes) -> Settings:
    return Settings(out=out, name=name, device="cuda", **(TRAINING | changes))


KILLED_RUNS = {
    "grpo": {},
    "ppo": dict(algo="ppo", critic_warmup=1),
    "bfloat16": dict(dtype="bfloat16", weights="bfloat16"),
}


def start_and_die(out: str) -> None:
    """Three runs; each is killed in its last step, and the last kill is real."""
    training_step = train.training_step
    last = list(KILLED_RUNS)[-1]

    def deadly_step(step: int, learner, s):
        if step == s.steps:
            if s.name == last:
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyboardInterrupt
        return training_step(step, learner, s)

    train.training_step = deadly_step
    for name, changes in KILLED_RUNS.items():
        with contextlib.suppress(KeyboardInterrupt):
            train.train(training(out, name, **changes))


def resume(out: str) -> None:
    """Goes on with the killed runs, and makes the same ones in one go."""
    found = {}
    with contextlib.redirect_stdout(io.StringIO()):
        for name, changes in KILLED_RUNS.items():
            found[f"{name}: steps before"] = steps_of(out, name)
            train.train(Settings(resume=f"{out}/{name}"))
            train.train(training(out, f"{name}-whole", **changes))
            resumed = load_file(Path(out) / name / "state.safetensors")
            whole = load_file(Path(out) / f"{name}-whole" / "state.safetensors")
            differing = [key for key in whole if not whole[key].equal(resumed[key])]
            found[f"{name}: differing"] = differing
            found[f"{name}: tensors"] = len(whole)
            found[f"{name}: steps"] = steps_of(out, name)
    found |= commands(out)
    print(json.dumps(found))


def steps_of(out: str, name: str) -> list[int]:
    lines = (Path(out) / name / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def commands(out: str) -> dict:
    """evaluate.py and lab/analyze.py over a model that was trained there."""
    models = ("base", f"{out}/grpo")
    sizes = dict(problems=3, samples=3, max_new_tokens=24)
    found = {}
    with contextlib.redirect_stdout(io.StringIO()):
        for device in DEVICES:
            s = EvaluationSettings(models=models, device=device, slots=4, k="1", **sizes)
            found[f"evaluate, {device}"] = evaluate(s)["models"]
        if importlib.util.find_spec("matplotlib"):
            from lab.analyze import Settings as AnalysisSettings
            from lab.analyze import analyze

            for device in DEVICES:
                s = AnalysisSettings(models=models, device=device, out=f"{out}/{device}", **sizes)
                found[f"analyze, {device}"] = analyze(s)
                del found[f"analyze, {device}"]["settings"]
    return found
