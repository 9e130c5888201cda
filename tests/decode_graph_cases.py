"""What tests/test_decode_graph.py runs on the pretended device: rollouts with and without graphs, and
mutants of the code. Prints JSON."""

import contextlib
import io
import json
import sys
import types
from pathlib import Path

import emulate
import pretend
import torch

import rollout
from model import Transformer
from plumbing.seeds import seeded_generator

ROOT = Path(__file__).parents[1]
CONFIG = {
    "model_type": "qwen2",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
EOS = 0
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [14]]


def random_model(device):
    torch.manual_seed(0)
    model = Transformer(CONFIG)
    with torch.no_grad():
        model.embed_tokens.weight[EOS] *= 2.5  # ends now and then: some long, many short
    return model.to(device)


def rollouts(module, device, graph, dtype=None, slots=8, calls=1, **options):
    """So many calls of one sampler, with free() between them -> the episodes as lists, the sampler,
    and what it said on stderr."""
    sampler = module.Sampler(random_model(device), slots, 120, [EOS], dtype, graph=graph)
    arguments = dict(samples_per_prompt=4, max_new_tokens=70, temperature=1.0) | options
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        episodes = []
        for call in range(calls):
            random = seeded_generator(call, 0, "graph", device)
            episodes += sampler.generate(PROMPTS, generator=random, **arguments)
            sampler.free()
    lists = [(e.response.tolist(), e.logp.tolist(), e.entropy.tolist()) for e in episodes]
    return lists, sampler, said.getvalue()


def tokens_of(episodes):
    return [tokens for tokens, _, _ in episodes]


def everything():
    """The mutants last: they leave other modules behind."""
    found = {"rollouts": graph_against_eager(), "waits": waits(), "mutants": mutants()}
    print(json.dumps(found))


def graph_against_eager():
    """Name -> what came out."""
    rollout.GROW_BY_ON_GPU = 32  # so that the cache grows
    cases = {
        "refills": {"slots": 4, "calls": 2},
        "all at once": {"slots": 12},
        "top-p": {"top_p": 0.8, "temperature": 0.7},
        "bf16 copy": {"dtype": torch.bfloat16},
    }
    results = {}
    for name, options in cases.items():
        replays = emulate.counts["replays"]
        graphed, sampler, said = rollouts(rollout, "cuda", True, **options)
        eager, plain, _ = rollouts(rollout, "cuda", False, **options)
        on_cpu, _, _ = rollouts(rollout, "cpu", True, **options)
        results[name] = {
            "equal": graphed == eager,
            "equals the CPU": tokens_of(eager) == tokens_of(on_cpu),
            "captured": sampler.graphs.captured,
            "captured without": plain.graphs.captured,
            "replays": emulate.counts["replays"] - replays,
            "said": said,
            "lengths": sorted(len(tokens) for tokens in tokens_of(eager)),
        }
    return results


def counted_rounds(module, most):
    """A list that grows with each round of the module's samplers. RuntimeError after `most`: one
    whose graph changes nothing would never end."""
    rounds = []
    harvest = module.Slots.harvest

    def counted(slots):
        rounds.append(1)
        if len(rounds) > most:
            raise RuntimeError(f"more than {most} rounds")
        return harvest(slots)

    module.Slots.harvest = counted
    return rounds


def waits():
    """Host waits of a rollout by place in the code, and how many rounds it had."""
    rounds = counted_rounds(rollout, most=1000)
    with pretend.Record(ROOT) as record:
        rollouts(rollout, "cuda", False, slots=4)
    by_place = {}
    for (place, _, kind), number in record.waits.items():
        by_place[f"{place} {kind}"] = number
    return {"rounds": len(rounds), "waits": by_place}


def patched(name, old, new):
    """rollout, run anew from its text and that of plumbing.decode_graph, with `old` replaced in the
    one that `name` names."""
    for module_name in ("plumbing.decode_graph", "rollout"):
        path = ROOT / (module_name.replace(".", "/") + ".py")
        text = path.read_text()
        if module_name == name:
            assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in {path}"
            text = text.replace(old, new)
        module = types.ModuleType(module_name)
        sys.modules[module_name] = module
        exec(compile(text, str(path), "exec"), module.__dict__)
    module.GROW_BY_ON_GPU = 32
    return module


MUTANTS = {
    "rebound token": (
        "rollout",
        "self.newest.copy_(torch.where(self.alive, drawn, self.newest))",
        "self.newest = torch.where(self.alive, drawn, self.newest)",
    ),
    "rebound position": (
        "rollout",
        "self.position += self.alive",
        "self.position = self.position + self.alive",
    ),
    "rebound record": (
        "rollout",
        "self.logps.scatter_(1, column, logp[:, None])",
        "self.logps = self.logps.scatter(1, column, logp[:, None])",
    ),
    "a wait": (
        "rollout",
        "self.count += self.alive\n",
        "self.count += self.alive\n        int(drawn.max())\n",
    ),
    "a mask of flags, which waits": (
        "rollout",
        "self.count += self.alive\n",
        "self.count[self.alive] += 1\n",
    ),
    "a number of Python's": (
        "rollout",
        "self.logps.scatter_(1, column, logp[:, None])",
        "self.steps = getattr(self, 'steps', 0) + 1\n"
        "        self.logps.scatter_(1, column, logp[:, None] + self.steps)",
    ),
    "an unknown generator": (
        "plumbing.decode_graph",
        "graph.register_generator_state(self.generator)",
        "pass",
    ),
    "the same random numbers twice": (
        "plumbing.decode_graph",
        "        self.generator.set_state(random)\n        self.step()",
        "        self.step()",
    ),
    "a shape without the cache": (
        "plumbing.decode_graph",
        "[*self.slots.state, self.slots.cache]",
        "self.slots.state",
    ),
    "a shape without the rows": (
        "plumbing.decode_graph",
        "[(tensor.data_ptr(), tensor.shape) for tensor in tensors]",
        "[self.slots.cache.shape[4]]",
    ),
    "a shape without sizes": (
        "plumbing.decode_graph",
        "(tensor.data_ptr(), tensor.shape)",
        "tensor.data_ptr()",
    ),
}


def mutants():
    """Name -> whether the sampler noticed, whether its episodes are right all the same, and what it
    said."""
    few = {"max_new_tokens": 45}
    same = patched("rollout", "import math", "import math")
    right, _, _ = rollouts(same, "cuda", False, **few)
    results = {}
    for name, patch in MUTANTS.items():
        module = patched(*patch)
        counted_rounds(module, most=50)
        try:
            episodes, sampler, said = rollouts(module, "cuda", True, **few)
        except (RuntimeError, IndexError) as error:
            results[name] = {"noticed": False, "right": False, "said": str(error)}
            continue
        noticed = sampler.graphs.failed is not None
        results[name] = {"noticed": noticed, "right": episodes == right, "said": said}
    return results
