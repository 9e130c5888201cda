"""How fast is the card with this code? Every figure stands beside its floor: the fewest bytes that
the work must move over the measured bandwidth, or its fewest operations over the measured rate of
matrix products."""

import math
import statistics
from dataclasses import dataclass
from functools import partial

import torch

import train
from lab.bench_transformers import peer_generate, peer_generate_batches, peer_loss
from lab.bench_work import count_tokens, encoded_prompts
from lab.gpu_checks import captured, quietly
from lab.gpu_report import Report, median_seconds, seconds_of, wait
from lab.gpu_shapes import Shape, make_model, peer_of
from model import Transformer, count_parameters, load
from plumbing.batch import micro_batches
from plumbing.memory import GB, TrainingMemory
from plumbing.optimizer import make_optimizer
from plumbing.pretrained import head_size
from plumbing.seeds import seeded_generator
from plumbing.settings import Settings as TrainSettings
from rollout import Episode, Sampler

NEVER = (-1,)  # end tokens of responses that go on to the limit
MODES = {"graph": True, "eager": False}


@dataclass(frozen=True)
class Effort:
    matrix: int  # rows and columns of the matrices whose product is timed
    copied: int  # bytes of the copy that is timed
    repeats: int
    refill_slots: int
    refill_problems: int
    refill_tokens: int
    step: dict  # settings of a whole training step that are not the defaults
    steps: int


FULL = Effort(
    matrix=8192,
    copied=4 * 2**30,
    repeats=3,
    refill_slots=512,
    refill_problems=128,
    refill_tokens=128,
    step={},
    steps=5,
)
LITTLE = Effort(
    matrix=64,
    copied=2**16,
    repeats=1,
    refill_slots=16,
    refill_problems=8,
    refill_tokens=16,
    step=dict(prompts=2, samples=4, minibatch=1, slots=8, max_new_tokens=16),
    steps=1,
)


class Ceilings:
    """What the card can do, measured: bytes per second, and operations per second by type. nan until
    `measure` has found them."""

    def __init__(self) -> None:
        self.bandwidth = math.nan
        self.rate = {torch.float32: math.nan, torch.bfloat16: math.nan}

    def measure(self, report: Report, device: torch.device, effort: Effort) -> None:
        source = torch.randn(effort.copied // 4, device=device)
        target = torch.empty_like(source)
        copy = partial(target.copy_, source)
        seconds = median_seconds(copy, device, repeats=9, warm_up=3)
        self.bandwidth = 2 * effort.copied / seconds
        report.figure("copy, bytes read and written", self.bandwidth / 1e9, "GB/s")
        del source, target, copy

        for dtype in self.rate:
            size = (effort.matrix, effort.matrix)
            a = torch.randn(size, device=device, dtype=dtype)
            b = torch.randn(size, device=device, dtype=dtype)
            product = partial(torch.matmul, a, b)
            seconds = median_seconds(product, device, repeats=9, warm_up=3)
            self.rate[dtype] = 2 * effort.matrix**3 / seconds
            name = str(dtype).removeprefix("torch.")
            what = f"product of two {effort.matrix} x {effort.matrix} matrices, {name}"
            report.figure(what, self.rate[dtype] / 1e12, "TFLOP/s")


def embedded_figures(report: Report, device: torch.device, effort: Effort) -> None:
    """What only a model with a task can show: responses of natural lengths, and a whole step."""
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        work = partial(refill, report, device, effort, dtype)
        report.run("embedded", f"refill, {name}", work, needs=15)
    for name in ("float32", "bfloat16"):
        work = partial(whole_step, report, device, effort, name)
        report.run("embedded", f"GRPO step, {name}", work, needs=20)


def shape_figures(
    report: Report, device: torch.device, effort: Effort, shape: Shape, ceilings: Ceilings
) -> None:
    """The parts of a shape share its model, which is gone afterwards."""
    made: list[Transformer] = []
    make = partial(add_model, report, made, shape, device)
    report.run(shape.name, "weights", make, needs=shape.decode_seconds)
    if not made:
        return
    [model] = made
    for slots in shape.slots:
        work = partial(decode, report, device, effort, shape, model, slots, ceilings)
        report.run(shape.name, f"decode, {slots} slots", work, needs=shape.decode_seconds / 2)
        work = partial(peer_decode, report, device, effort, shape, model, slots)
        name = f"transformers' generate, {slots} slots"
        report.run(shape.name, name, work, needs=shape.decode_seconds / 2)
    work = partial(update, report, device, effort, shape, model, ceilings)
    report.run(shape.name, "update", work, needs=shape.update_seconds)
    for parameter in model.parameters():
        parameter.grad = None
    work = partial(peer_update, report, device, effort, shape, model)
    report.run(shape.name, "update over transformers' model", work, needs=shape.update_seconds)


def add_model(report: Report, made: list[Transformer], shape: Shape, device: torch.device) -> None:
    model = make_model(shape, device)
    model.recompute = shape.recompute
    made.append(model)
    parameters = count_parameters(model.config)
    report.figure("weights", parameters / 1e9, "billion", note=str(shape.dtype))


def random_prompts(shape: Shape, model: Transformer, count: int) -> list[list[int]]:
    random = seeded_generator(0, 0, "prompts")
    return torch.randint(1, len(model.head), (count, shape.prompt), generator=random).tolist()


def bytes_of_step(shape: Shape, config: dict, slots: int) -> float:
    """Of a decode step that reads each weight once (of an untied embedding only some rows), and of
    each sequence's cache what is there, on average over the steps that are timed."""
    size = shape.dtype.itemsize
    numbers = 2 * config["num_key_value_heads"] * head_size(config)
    of_token = config["num_hidden_layers"] * numbers * size
    cached = slots * (shape.prompt + sum(shape.steady) / 2)
    return multiplied_weights(config) * size + cached * of_token


def operations_of_step(config: dict, slots: int) -> float:
    """Of a decode step's products with weights: a multiplication and an addition each."""
    return 2 * slots * multiplied_weights(config)


def multiplied_weights(config: dict) -> int:
    """All but an embedding that is only looked up."""
    weights = count_parameters(config)
    if not config["tie_word_embeddings"]:
        weights -= config["vocab_size"] * config["hidden_size"]
    return weights


def decode_floor(shape: Shape, config: dict, slots: int, ceilings: Ceilings) -> float:
    """Seconds of a decode step that is bound by the larger of its bytes and its products."""
    moving = bytes_of_step(shape, config, slots) / ceilings.bandwidth
    multiplying = operations_of_step(config, slots) / ceilings.rate[shape.dtype]
    return max(moving, multiplying)


def decode(
    report: Report,
    device: torch.device,
    effort: Effort,
    shape: Shape,
    model: Transformer,
    slots: int,
    ceilings: Ceilings,
) -> None:
    prompts = random_prompts(shape, model, slots)
    floor = decode_floor(shape, model.config, slots, ceilings)
    short, long = shape.steady
    longest = max(shape.new_tokens, long)
    tokens = slots * shape.new_tokens
    for name, graph in MODES.items():
        sampler = Sampler(model, slots, shape.prompt + longest, NEVER, graph=graph)
        work = partial(generate, sampler, prompts, 1)
        reset_peak(device)
        first = seconds_of(partial(work, shape.new_tokens), device)
        timed = partial(median_seconds, device=device, repeats=effort.repeats, warm_up=0)
        seconds = timed(partial(work, shape.new_tokens))
        step = (timed(partial(work, long)) - timed(partial(work, short))) / (long - short)

        what = f"decode, {slots} slots, {name}"
        note = f"first call {first:.3g} s; peak {peak_text(device)}"
        report.figure(what, tokens / seconds, "tokens/s", note=note)
        note = f"graphs captured in all: {captured(sampler)}" if graph else ""
        report.figure(f"{what}, a step", 1e3 * step, "ms", 1e3 * floor, note)
        # In training the memory is given back after every rollout.
        sampler.free()
        again = seconds_of(partial(work, shape.new_tokens), device)
        report.figure(f"{what}, after free()", tokens / again, "tokens/s")


def generate(
    sampler: Sampler, prompts: list[list[int]], samples: int, new_tokens: int, turn: int = 0
) -> list[Episode]:
    random = seeded_generator(0, turn, "lab.gpu", sampler.device)
    return sampler.generate(prompts, samples, new_tokens, 1.0, random)


def peer_decode(
    report: Report,
    device: torch.device,
    effort: Effort,
    shape: Shape,
    model: Transformer,
    slots: int,
) -> None:
    """With its dynamic cache: a static one is compiled first, which takes minutes."""
    peer = peer_of(model)
    prompts = random_prompts(shape, model, slots)
    peer_generate(peer, prompts, 4, eos=None)  # warms up
    work = partial(peer_generate, peer, prompts, shape.new_tokens, eos=None)
    seconds = seconds_of(work, device)
    what = f"transformers' generate, {slots} slots"
    speed = slots * shape.new_tokens / seconds
    note = report.ours_against(f"decode, {slots} slots, graph", speed)
    report.figure(what, speed, "tokens/s", note=note)
    report.figure(f"{what}, a step", 1e3 * seconds / shape.new_tokens, "ms")


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_text(device: torch.device) -> str:
    allocated, reserved = peak(device)
    return f"{allocated:.3g} GB allocated, {reserved:.3g} reserved"


def peak(device: torch.device) -> tuple[float, float]:
    """GB allocated and reserved at the most since reset_peak; nan without a card."""
    if device.type != "cuda":
        return math.nan, math.nan
    allocated = torch.cuda.max_memory_allocated(device)
    return allocated / GB, torch.cuda.max_memory_reserved(device) / GB


def update(
    report: Report,
    device: torch.device,
    effort: Effort,
    shape: Shape,
    model: Transformer,
    ceilings: Ceilings,
) -> None:
    """An optimizer step of train.py; and the memory of a rollout and an update with all that
    training keeps, beside what the plan says of them."""
    s = training_settings(shape, device)
    optimizer = make_optimizer(model, s.lr, s)
    episodes = made_up_episodes(shape, model)
    old_logp, advantage = made_up_advantage(shape, model)
    work = partial(train.update, model, optimizer, episodes, old_logp, advantage, s)
    work()

    reset_peak(device)
    seconds = median_seconds(work, device, effort.repeats, warm_up=0)
    of_update = peak(device)
    tokens = shape.answers * sum(shape.lengths)
    floor = update_operations(shape, model.config) / ceilings.rate[shape.dtype]
    what = name_of_update(shape)
    note = f"micro-batches of {s.micro_tokens} tokens; peak {peak_text(device)}"
    if shape.recompute:
        note += "; recomputes, which the floor does not count"
    report.figure(what, tokens / seconds, "tokens/s")
    report.figure(f"{what}, seconds", seconds, "s", floor, note)

    slots = shape.slots[-1]
    prompts = random_prompts(shape, model, slots)
    length = shape.prompt + shape.new_tokens
    sampler = Sampler(model, slots, length, NEVER)
    reset_peak(device)
    generate(sampler, prompts, 1, shape.new_tokens)
    of_rollout = peak(device)
    planned_gb = planned_memory(shape, model.config, device)
    for name, (allocated, reserved) in {"rollout": of_rollout, "update": of_update}.items():
        # The plan says what will be allocated; what the allocator reserves for it is more.
        report.figure(f"memory of {name}, planned", planned_gb[name], "GB")
        report.figure(f"memory of {name}, allocated", allocated, "GB", planned_gb[name])
        report.figure(f"memory of {name}, reserved", reserved, "GB", planned_gb[name])


def name_of_update(shape: Shape) -> str:
    return f"update of {shape.answers} answers of {sum(shape.lengths)} tokens"


def training_settings(shape: Shape, device: torch.device) -> TrainSettings:
    name = str(shape.dtype).removeprefix("torch.")
    return TrainSettings(
        device=str(device),
        lr=1e-6,
        dtype=name,
        weights=name,
        recompute=shape.recompute,
        slots=shape.slots[-1],
        prompts=shape.slots[-1],
        max_new_tokens=shape.new_tokens,
    )


def update_operations(shape: Shape, config: dict) -> float:
    """Two operations per weight and token forward, four backward. Prompt tokens do not meet the
    head; the products of attention are left out."""
    head = config["vocab_size"] * config["hidden_size"]
    body = multiplied_weights(config) - head
    prompt, response = shape.lengths
    return 6 * shape.answers * (body * (prompt + response) + head * response)


def made_up_episodes(shape: Shape, model: Transformer) -> list[Episode]:
    random = seeded_generator(0, 0, "episodes")
    prompt, response = shape.lengths
    episodes = []
    for i in range(shape.answers):
        tokens = torch.randint(1, len(model.head), (prompt + response,), generator=random)
        episode = Episode(
            prompt=tokens[:prompt],
            response=tokens[prompt:],
            logp=torch.full((response,), -math.log(len(model.head))),
            entropy=torch.full((response,), math.log(len(model.head))),
            finished=False,
            prompt_index=i,
        )
        episodes.append(episode)
    return episodes


def made_up_advantage(shape: Shape, model: Transformer) -> tuple[torch.Tensor, torch.Tensor]:
    """Old log-probability and advantage, [N, R]; none is 0, so every answer has a forward pass."""
    size = (shape.answers, shape.lengths[1])
    old_logp = torch.full(size, -math.log(len(model.head)))
    sign = torch.where(torch.arange(shape.answers) % 2 == 0, 1.0, -1.0)  # [N]
    return old_logp, sign[:, None].expand(size).clone()


def planned_memory(shape: Shape, config: dict, device: torch.device) -> dict[str, float]:
    """GB that the plan says for a rollout and an update, which differ in length here."""
    s = training_settings(shape, device)
    parameters = count_parameters(config)
    length = shape.prompt + shape.new_tokens
    rollout, _ = TrainingMemory(config, parameters, s, length, s.slots, device).needs()
    longest = sum(shape.lengths)
    _, of_update = TrainingMemory(config, parameters, s, longest, s.slots, device).needs()
    return {"rollout": rollout / GB, "update": of_update / GB}


def peer_update(
    report: Report, device: torch.device, effort: Effort, shape: Shape, model: Transformer
) -> None:
    """The same loss over transformers' model, with torch's AdamW in the weights' own type."""
    peer = peer_of(model)
    if shape.recompute:
        peer.gradient_checkpointing_enable({"use_reentrant": False})
        peer.train()
    s = training_settings(shape, device)
    optimizer = torch.optim.AdamW(peer.parameters(), s.lr)
    work = partial(peer_step, peer, optimizer, shape, model, s)
    seconds = median_seconds(work, device, effort.repeats)
    what = "the same loss over transformers' model"
    speed = shape.answers * sum(shape.lengths) / seconds
    note = report.ours_against(name_of_update(shape), speed)
    report.figure(what, speed, "tokens/s", note=note)


def peer_step(
    peer, optimizer: torch.optim.Optimizer, shape: Shape, model: Transformer, s: TrainSettings
) -> None:
    episodes = made_up_episodes(shape, model)
    old_logp, advantage = made_up_advantage(shape, model)
    for rows in micro_batches(episodes, s.micro_tokens):
        chosen = [episodes[i] for i in rows]
        loss = peer_loss(peer, chosen, old_logp[rows], advantage[rows], s, old_logp.numel())
        loss.backward()
    torch.nn.utils.clip_grad_norm_(peer.parameters(), s.grad_clip)
    optimizer.step()
    optimizer.zero_grad()


def refill(report: Report, device: torch.device, effort: Effort, dtype: torch.dtype) -> None:
    """Four times as many sequences as slots, of natural lengths; beside it generate in static
    batches."""
    model = load("base", device, dtype)[0]
    prompts = encoded_prompts(effort.refill_problems)
    samples = 4 * effort.refill_slots // len(prompts)
    length = len(prompts[0]) + effort.refill_tokens
    name = str(dtype).removeprefix("torch.")
    for mode, graph in MODES.items():
        sampler = Sampler(model, effort.refill_slots, length, model.eos_ids, graph=graph)
        speeds = []
        for turn in range(effort.repeats + 1):
            tokens = 0

            def work() -> None:
                nonlocal tokens
                episodes = generate(sampler, prompts, samples, effort.refill_tokens, turn)
                tokens = count_tokens(episodes)

            seconds = seconds_of(work, device)
            speeds.append(tokens / seconds)
        note = f"first call {speeds[0]:.3g} tokens/s"
        if graph:
            note += f"; graphs captured: {captured(sampler)}"
        speed = statistics.median(speeds[1:])
        what = f"refill, {effort.refill_slots} slots, {name}, {mode}"
        report.figure(what, speed, "tokens/s", note=note)

    peer = peer_of(model)
    peer_generate(peer, prompts, 4, eos=None)  # warms up
    batches = partial(
        peer_generate_batches,
        peer,
        prompts,
        samples=samples,
        slots=effort.refill_slots,
        new_tokens=effort.refill_tokens,
        eos=model.eos_ids[0],
    )
    tokens = 0

    def peer_work() -> None:
        nonlocal tokens
        tokens = batches()

    seconds = seconds_of(peer_work, device)
    what = f"transformers' generate in static batches, {name}"
    ours = f"refill, {effort.refill_slots} slots, {name}, graph"
    note = report.ours_against(ours, tokens / seconds)
    report.figure(what, tokens / seconds, "tokens/s", note=note)


def whole_step(report: Report, device: torch.device, effort: Effort, dtype: str) -> None:
    """train.py with its default flags, but for the precision: medians after one step to warm up."""
    s = TrainSettings(device=str(device), dtype=dtype, **effort.step)
    with quietly():
        learner = train.prepare(s)
    reset_peak(device)
    lines = []
    for number in range(1, effort.steps + 2):
        with quietly():
            record = train.training_step(number, learner, s)
            wait(device)
            line = train.log_line(number, record, s, device, learner.tokenizer, timeouts=0)
        lines.append(line)
    lines = lines[1:]
    tokens = statistics.median(line["tokens"] for line in lines)
    rollout = statistics.median(line["rollout_s"] for line in lines)
    reward = statistics.median(line["reward_s"] for line in lines)
    of_update = statistics.median(line["update_s"] for line in lines)
    total = rollout + reward + of_update
    what = f"GRPO step, default flags, {dtype}"
    note = (
        f"{tokens:.0f} response tokens; micro-batches of {s.micro_tokens} tokens; "
        f"peak {peak_text(device)}"
    )
    report.figure(what, total, "s", note=note)
    report.figure(f"{what}: rollout", rollout, "s", note=f"{rollout / total:.0%} of the step")
    report.figure(f"{what}: rewards", reward, "s", note=f"{reward / total:.0%} of the step")
    report.figure(f"{what}: update", of_update, "s", note=f"{of_update / total:.0%} of the step")
    report.figure(f"{what}: rollout", tokens / rollout, "tokens/s")
    report.figure(f"{what}: update", tokens / of_update, "tokens/s")
