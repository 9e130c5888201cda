"""How many kernels Python launches, how many bytes they move and how often it waits, counted on the
pretended device: the tables "Launches, bytes and waits" of lab/BENCHMARKS.md.

    python tests/launches.py                   of this code
    python tests/launches.py FOLDER            of another checkout's
"""

import contextlib
import inspect
import io
import sys
from pathlib import Path

TESTS = Path(__file__).parent
SHAPE = dict(
    model_type="qwen2",
    vocab_size=112,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=28,
    num_attention_heads=4,
    num_key_value_heads=2,
    rms_norm_eps=1e-6,
    tie_word_embeddings=True,
)
BFLOAT16 = dict(dtype="bfloat16", weights="bfloat16")
LOGITS = (8, 4096)  # slots and words, for sampling alone


class Counter:
    """Counts what the pretended device does for the code of a folder."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.rows: list[tuple] = []

    def of(self, name: str, function, *arguments):
        import pretend

        with pretend.Record(self.folder) as record:
            result = function(*arguments)
        launches = sum(record.kernels.values())
        gigabytes = sum(record.traffic.values()) / 1e9
        waits = sum(record.waits.values())
        print(f"| {name} | {launches:,} | {gigabytes:.3g} | {waits:,} |", flush=True)
        return result


def count(folder: str) -> None:
    """Runs on the pretended device, with the modules of the folder."""
    import pretend

    # It would use the slow attention in float32, where CUDA has a fast one.
    pretend.attention("flash")
    print("| | launches | GB | waits |\n|---|---|---|---|")
    counter = Counter(folder)
    rollouts(counter)
    decode_step(counter)
    for weights, changes in {"float32": {}, "bfloat16": BFLOAT16}.items():
        updates(counter, weights, changes)
    sampling(folder)


def eager(rollout, *arguments):
    """A sampler without CUDA graphs, also of code that has none."""
    known = inspect.signature(rollout.Sampler.__init__).parameters
    options = dict(graph=False) if "graph" in known else {}
    return rollout.Sampler(*arguments, **options)


def rollouts(counter: Counter) -> None:
    import torch

    import rollout
    from model import load

    model, tokenizer = load("base", "cuda")
    many = [f"{a} {b} 3 4 -> 38 ?" for a in range(1, 9) for b in range(1, 5)]
    few = ["1 2 3 4 -> 38 ?", "1 2 3 -> 6 ?", "7 5 3 4 -> 38 ?"]
    for texts, samples, slots in ((many, 16, 512), (few, 32, 32)):
        prompts = [tokenizer.encode(text) for text in texts]
        rounds = count_rounds(rollout)
        random = torch.Generator("cuda").manual_seed(0)
        name = f"rollout: {len(prompts) * samples} sequences, {slots} slots"
        sampler = eager(rollout, model, slots, 180, model.eos_ids)
        counter.of(name, sampler.generate, prompts, samples, 128, 1.0, random)
        print(f"| (rounds of it: {len(rounds)}) | | | |")


def count_rounds(rollout) -> list:
    """A list that grows by one in every round of a sampler."""
    rounds = []
    harvest = rollout.Slots.harvest

    def counted(slots):
        rounds.append(1)
        return harvest(slots)

    rollout.Slots.harvest = counted
    return rounds


def decode_step(counter: Counter) -> None:
    import torch

    import rollout
    from model import Transformer

    model = Transformer(SHAPE).to("cuda", torch.bfloat16)
    sampler = eager(rollout, model, 4, 40, (0,))
    with torch.no_grad():
        slots = rollout.Slots(sampler, [[1, 2, 3]], 4, 20)
        slots.refill()
        random = torch.Generator("cuda").manual_seed(0)
        slots.decode(1.0, 1.0, random)
        counter.of("a decode step, 28 layers, bfloat16", slots.decode, 1.0, 1.0, random)


def updates(counter: Counter, weights: str, changes: dict) -> None:
    """Each kind of pass once, over three micro-batches, in a step in which it was done before."""
    import train
    from plumbing.settings import Settings

    sizes = dict(prompts=8, samples=16, minibatch=4, micro_tokens=2048, skip_zero=False, steps=4)
    validation = dict(eval_problems=2, eval_samples=1, final_samples=1)
    s = Settings(device="cuda", algo="ppo", critic_warmup=1, **sizes, **validation, **changes)
    with contextlib.redirect_stdout(io.StringIO()):
        learner = train.prepare(s)
    last = {}

    def watched(name, function):
        def remember(*arguments):
            last[name] = (function, arguments)
            return function(*arguments)

        return remember

    whole = {name: getattr(train, name) for name in ("update", "update_critic", "critic_advantage")}
    for name, function in whole.items():
        setattr(train, name, watched(name, function))
    train.training_step(2, learner, s)
    for name, function in whole.items():
        setattr(train, name, function)
    for name, (function, arguments) in last.items():
        counter.of(f"{name}, {weights} weights", function, *arguments)


def sampling(folder: str) -> None:
    """rollout.sample of bfloat16 logits at temperature 1. A pass reads or writes a byte at least of
    every logit."""
    import pretend
    import torch

    import rollout

    print("\n| sample | launches | passes | bytes per logit |\n|---|---|---|---|")
    number = LOGITS[0] * LOGITS[1]
    for top_p in (1.0, 0.9):
        logits = torch.randn(LOGITS, device="cuda").to(torch.bfloat16)
        random = torch.Generator("cuda")
        with pretend.Record(folder, detail=True) as record:
            rollout.sample(logits, 1.0, top_p, random)
        moved = [read + written for _, _, _, read, written, _ in record.order]
        passes = sum(count >= number for count in moved)
        print(f"| top-p {top_p} | {len(moved)} | {passes} | {sum(moved) / number:.0f} |")


def main() -> None:
    from pretended import ROOT, pretended_python

    folder = str(Path(sys.argv[1]).resolve()) if len(sys.argv) > 1 else str(ROOT)
    source = (
        f"sys.path.insert(0, {folder!r}); sys.path.append({str(TESTS)!r})\n"
        f"import launches; launches.count({folder!r})"
    )
    print(pretended_python(source), end="")


if __name__ == "__main__":
    main()
