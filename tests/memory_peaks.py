"""What test_memory_plan.py has done on the pretended device, in a process of its own: two training
steps of a small random model in each of several settings, the bytes that were allocated at most in
their rollout and in their update, and the trace of all allocations. Printed as JSON."""

import gc
import json
from types import SimpleNamespace

import torch

import pretend
import rollout
import train
from model import Critic, Transformer, count_parameters
from plumbing import memory, optimizer
from plumbing.lora import add_adapters
from plumbing.settings import EvaluationSettings, Settings
from rollout import Sampler
from train import Learner, Trained

DEVICE = torch.device("cuda:0")
SHAPE = dict(
    model_type="qwen2",
    vocab_size=2000,
    hidden_size=96,
    intermediate_size=384,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    rms_norm_eps=1e-6,
    tie_word_embeddings=True,
)
LARGE_VOCABULARY = dict(vocab_size=12000, num_hidden_layers=2)
UNTIED = dict(tie_word_embeddings=False)
QWEN3 = dict(model_type="qwen3", head_dim=32, vocab_size=500)
SMALL = dict(
    prompts=4,
    eval_problems=4,
    samples=8,
    minibatch=4,
    slots=32,
    max_new_tokens=12,
    micro_tokens=512,
    chunk=128,
    skip_zero=False,
    critic_warmup=0,
)
BFLOAT16 = dict(dtype="bfloat16", weights="bfloat16")
# Changes to the model and to the settings.
SETTINGS = {
    "float32": ({}, {}),
    "autocast": ({}, dict(dtype="bfloat16")),
    "bfloat16 weights": ({}, BFLOAT16),
    "recompute": ({}, dict(recompute=True)),
    "autocast, recompute": ({}, dict(dtype="bfloat16", recompute=True)),
    "bfloat16 weights, recompute": ({}, BFLOAT16 | dict(recompute=True)),
    "ppo": ({}, dict(algo="ppo")),
    "ppo, bfloat16 weights": ({}, BFLOAT16 | dict(algo="ppo")),
    "refill": ({}, dict(slots=8)),
    "decode weights of their own": (LARGE_VOCABULARY, dict(decode_dtype="bfloat16")),
    "untied head": (UNTIED, dict(dtype="bfloat16")),
    "qwen3": (QWEN3, {}),
    "lora": ({}, dict(lora_rank=8)),
    "lora, autocast": ({}, dict(lora_rank=8, dtype="bfloat16")),
    "lora, bfloat16 weights": ({}, BFLOAT16 | dict(lora_rank=8)),
    "lora, autocast, recompute": ({}, dict(lora_rank=8, dtype="bfloat16", recompute=True)),
    "lora, ppo": ({}, dict(lora_rank=8, algo="ppo")),
}
# A rollout that takes much more than an update.
ROLLOUT_LARGER = dict(
    slots=64, samples=16, max_new_tokens=4, micro_tokens=96, chunk=16, recompute=True
)
DEEP = dict(num_hidden_layers=8, vocab_size=500)
TOP_P = {"top-p": 0.9, "no top-p": 1.0}
PROMPT = 20  # tokens
# The bank of prompts is large beside the rest: 48 prompts of 100 tokens, a third at a time.
LONG_PROMPTS = dict(vocab_size=500, num_hidden_layers=12)
MANY_PROMPTS = 48
LONG_PROMPT = 100


class Task:
    """Prompts without a meaning; every third answer is right."""

    def encode(self, problem: int, tokenizer) -> list[int]:
        return [1 + problem] * PROMPT

    def rewards(self, problems: list, responses: list[str], finished: list[bool]) -> list[float]:
        return [1.0 if i % 3 == 0 else -1.0 for i in range(len(responses))]


def make_learner(config: dict, s: Settings) -> Learner:
    torch.manual_seed(0)
    model = Transformer(config).to(getattr(torch, s.weights)).to(DEVICE)
    model.recompute = s.recompute
    if s.lora_rank:
        add_adapters(model, s.lora_rank, s.lora_alpha, s.seed)
    policy = Trained(model, optimizer.make_optimizer(model, s.lr, s))
    critic = None
    if s.algo == "ppo":
        value_model = Critic(model)
        critic = Trained(value_model, optimizer.make_optimizer(value_model, s.critic_lr, s))
    dtype = getattr(torch, s.decode_dtype or s.dtype)
    no_end = (-1,)
    return Learner(
        task=Task(),
        tokenizer=SimpleNamespace(batch_decode=lambda responses: [""] * len(responses)),
        problems=list(range(s.prompts)),
        policy=policy,
        critic=critic,
        sampler=Sampler(model, s.slots, PROMPT + s.max_new_tokens, no_end, dtype, graph=False),
        device=DEVICE,
        rank=0,
        world=1,
        validation=[],
        longest=None,
        rows=min(s.slots, s.prompts * s.samples),
    )


def peaks_of_training(config: dict, s: Settings) -> dict:
    """Bytes: at most in a rollout and in an update, and what the plan said."""
    gc.collect()
    others = pretend.memory()[0]
    learner = make_learner(config, s)
    found = {}

    class Watched(Sampler):
        def free(self) -> None:
            found["rollout"] = pretend.memory()[1] - others
            super().free()
            pretend.reset_peak()

    learner.sampler.__class__ = Watched
    for step in (1, 2):
        pretend.reset_peak()
        train.training_step(step, learner, s)
    found["update"] = pretend.memory()[1] - others

    planned = memory.TrainingMemory(
        config, count_parameters(config), s, learner.sampler.max_length, learner.rows, DEVICE
    )
    found["planned rollout"], found["planned update"] = planned.needs()
    return found


def peak_of_evaluation(top_p: float, changes: dict, count: int, length: int) -> dict:
    """Answers to `count` prompts of `length` tokens, 16 at a time."""
    gc.collect()
    others = pretend.memory()[0]
    config = SHAPE | changes
    s = EvaluationSettings(
        top_p=top_p, max_new_tokens=12, dtype="bfloat16", graph=False, temperature=0.6
    )
    model = Transformer(config).to(DEVICE, torch.bfloat16)
    pretend.reset_peak()
    sampler = Sampler(model, 16, length + s.max_new_tokens, (-1,), graph=False)
    prompts = [[1] * length for _ in range(count)]
    generator = torch.Generator(DEVICE)
    samples = max(1, 32 // count)
    sampler.generate(prompts, samples, s.max_new_tokens, s.temperature, generator, top_p)
    peak = pretend.memory()[1] - others
    size = memory.sizes_of_evaluation(
        config, count_parameters(config), s, sampler.max_length, 16, len(prompts), DEVICE
    )
    return {"evaluation": peak, "planned evaluation": sum(size.values())}


def leave_it_to_adamw(adamw: torch.optim.AdamW) -> None:
    """It makes its moments in its first step."""


def trace_of_two_rollouts(moments_first: bool) -> list:
    """(number of the allocation, its bytes, or 0 when it is given back), from the making of the
    model to the second rollout."""
    gc.collect()
    s = Settings(**SMALL | ROLLOUT_LARGER)
    pretend._c.trace(True)
    make_moments = optimizer.make_moments
    if not moments_first:
        optimizer.make_moments = leave_it_to_adamw
    learner = make_learner(SHAPE | DEEP, s)
    optimizer.make_moments = make_moments
    for step in (1, 2):
        train.training_step(step, learner, s)
    return pretend._c.trace(False)


def main() -> None:
    # The pretended device would use the slow attention in float32, where CUDA has a fast one.
    pretend.attention("flash")
    # The pretended device has neither CUDA's libraries nor its kernels.
    memory.CUDA_WORKSPACES = 0
    memory.SCRATCH_OF_LOGIT = 0
    found = {}
    for name, (shape, changes) in SETTINGS.items():
        found[name] = peaks_of_training(SHAPE | shape, Settings(**SMALL | changes, graph=False))
    for name, top_p in TOP_P.items():
        found[name] = peak_of_evaluation(top_p, LARGE_VOCABULARY, count=4, length=PROMPT)
    rollout.PREFILL_TOKENS = memory.PREFILL_TOKENS = MANY_PROMPTS // 3 * LONG_PROMPT
    found["prefills"] = peak_of_evaluation(1.0, LONG_PROMPTS, MANY_PROMPTS, LONG_PROMPT)
    found["moments first"] = trace_of_two_rollouts(moments_first=True)
    found["moments later"] = trace_of_two_rollouts(moments_first=False)
    print(json.dumps(found))
