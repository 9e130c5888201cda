"""plumbing/lora.py against the model without it, a slow formula for its gradient, PEFT and
transformers."""

import copy
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import Linear
from transformers import AutoModelForCausalLM

import train
from conftest import ARCHITECTURES, ROOT, dice, distance, load_model, logits, same_weights
from model import Transformer, count_parameters, load, score
from plumbing import memory
from plumbing.batch import pad_responses
from plumbing.lora import (
    adapted_layers,
    add_adapters,
    merged_copy,
    merged_weights,
)
from plumbing.memory import count_adapters
from plumbing.optimizer import MasterAdamW, make_optimizer
from plumbing.pretrained import save
from plumbing.seeds import seeded_generator
from plumbing.settings import Settings
from rollout import Sampler
from test_distributed import ONE, TWO, run
from test_memory import QWEN_7B
from test_update import MIXED
from training_runs import read_jsonl, replace_reward, reward_by_length, small_run

RANK = 3
ALPHA = 5
PROJECTIONS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def fresh(folder: Path) -> Transformer:
    """With LoRA, and untrained."""
    model = load_model(folder)
    add_adapters(model, RANK, ALPHA, seed=0)
    return model


def moved(folder: Path) -> Transformer:
    """With LoRA, whose B is no longer zero."""
    model = fresh(folder)
    g = dice(1)
    for layer in adapted_layers(model).values():
        layer.lora_B.data.normal_(std=0.3, generator=g)
    return model


def some_tokens(rows: int = 3, length: int = 40) -> torch.Tensor:
    return torch.randint(0, 112, (rows, length), generator=dice(2))


def take_steps(model: Transformer, steps: int, **changes) -> torch.optim.Optimizer:
    """Optimizer steps on twelve answers of this model."""
    s = Settings(lr=1e-2, lora_rank=RANK, **changes)
    prompts = [[5, 6], [7, 8, 9, 10], [11]]
    sampler = Sampler(model, 12, 60, (0,))
    episodes = sampler.generate(prompts, 4, 24, 1.0, seeded_generator(0, 0, "test"))
    old_logp, mask = pad_responses([episode.logp for episode in episodes])
    optimizer = make_optimizer(model, s.lr, s)
    for _ in range(steps):
        train.update(model, optimizer, episodes, old_logp, MIXED[:, None] * mask, s)
    return optimizer


# At its start.


@torch.no_grad()
@pytest.mark.parametrize("changes", ARCHITECTURES)
def test_untrained_it_changes_nothing(qwen2, tmp_path, changes):
    """Log-probabilities, entropies, and the model that is saved: bit for bit those of the base."""
    folder, _ = qwen2(**changes)
    base, tokenizer = load(str(folder))
    model = fresh(folder)
    lengths = (torch.tensor([5, 9, 1]), torch.tensor([40, 12, 30]))
    want = score(base, some_tokens(), *lengths, 0.9)
    got = score(model, some_tokens(), *lengths, 0.9)
    assert want[0].abs().max() > 1
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])

    save(model, tokenizer, tmp_path / "saved", base=str(folder))
    assert same_weights(load_model(tmp_path / "saved"), base)


@pytest.mark.parametrize("changes", ARCHITECTURES)
def test_every_linear_layer_has_a_and_b_and_alone_is_trained(qwen2, changes):
    """As many numbers as the plan counts from config.json."""
    folder, _ = qwen2(**changes)
    model = fresh(folder)
    layers = range(len(model.layers))
    assert list(adapted_layers(model)) == [f"layers.{i}.{p}" for i in layers for p in PROJECTIONS]
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(name.endswith(("lora_A", "lora_B")) for name in trainable)
    assert len(trainable) == 2 * len(adapted_layers(model))
    count = sum(parameter.numel() for parameter in trainable.values())
    assert count == count_adapters(model.config, RANK)


def test_the_first_numbers_are_pefts(model):
    """peft.tuners.lora.LoraLayer.reset_lora_parameters: B zero, and A Kaiming's with a = sqrt(5),
    which is uniform up to 1 / sqrt(in). The same for the same seed, others for every layer."""
    again = copy.deepcopy(model)
    other = copy.deepcopy(model)
    add_adapters(model, 64, ALPHA, seed=4)
    add_adapters(again, 64, ALPHA, seed=4)
    add_adapters(other, 64, ALPHA, seed=5)
    seen = set()
    for name, layer in adapted_layers(model).items():
        a = layer.lora_A.detach()
        bound = 1 / math.sqrt(layer.weight.shape[1])
        assert a.shape == (64, layer.weight.shape[1])
        assert 0.98 * bound < a.abs().max() <= bound
        assert abs(a.mean()) < 0.05 * bound
        assert a.std() == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert layer.lora_B.shape == (layer.weight.shape[0], 64)
        assert not layer.lora_B.any()
        assert torch.equal(a, again.get_submodule(name).lora_A)
        assert not torch.equal(a, other.get_submodule(name).lora_A)
        seen.add(float(a[0, 0]))
    assert len(seen) == 14


# In training.


def weights_gradients(model: Transformer, s_times_ba: dict) -> dict[str, torch.Tensor]:
    """Of a loss in a model without LoRA that has these numbers added to its weights."""
    for name, change in s_times_ba.items():
        model.get_submodule(name).weight.data += change
    loss_of(model).backward()
    return {name: model.get_submodule(name).weight.grad for name in s_times_ba}


def loss_of(model: Transformer) -> torch.Tensor:
    tokens = some_tokens()
    logp, entropy = score(model, tokens, torch.tensor([5, 9, 1]), torch.tensor([40, 12, 30]), 1.0)
    return (logp * torch.linspace(-1, 2, logp.shape[1])).sum()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("changes", [{}, *ARCHITECTURES[-2:]])
def test_the_gradient_is_the_slow_formulas(qwen2, changes, recompute):
    """The chain rule on W + s B A: dB = s dW A', dA = s B' dW, with dW from a model without LoRA
    that has the sum as its weights. In float64 but for logits and RoPE."""
    folder, _ = qwen2(**changes)
    model = moved(folder).double()
    model.recompute = recompute
    loss_of(model).backward()
    layers = adapted_layers(model)
    scale = ALPHA / RANK
    change = {}
    for name, layer in layers.items():
        change[name] = scale * layer.lora_B.detach() @ layer.lora_A.detach()
    slow = weights_gradients(load_model(folder).double(), change)
    for name, layer in layers.items():
        db = scale * slow[name] @ layer.lora_A.T
        da = scale * layer.lora_B.T @ slow[name]
        assert db.norm() > 0.1 and da.norm() > 0.1
        assert distance(layer.lora_B.grad, db) <= 1e-5 * db.norm()
        assert distance(layer.lora_A.grad, da) <= 1e-5 * da.norm()
        assert layer.weight.grad is None


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, *ARCHITECTURES[-2:]])
def test_merged_is_unmerged_after_steps(qwen2, changes):
    """Logits of the model as it is trained, and of the copy that samples; both have moved."""
    folder, _ = qwen2(**changes)
    model = fresh(folder)
    with torch.enable_grad():
        take_steps(model, 5)
    tokens = some_tokens()
    got = logits(model, tokens)
    merged = merged_copy(model)
    assert not adapted_layers(merged)
    assert distance(got, logits(load_model(folder), tokens)) > 0.1
    assert distance(got, logits(merged, tokens)) <= 1e-4
    by_name = dict(merged_weights(model))
    assert list(by_name) == list(load_model(folder).state_dict())
    assert all(torch.equal(by_name[name], weight) for name, weight in merged.state_dict().items())


def test_the_sampler_has_merged_weights_of_its_own(qwen2):
    """Its log-probabilities, after a `sync`, are those that `score` finds without merging; before,
    they are the base's."""
    folder, _ = qwen2()
    model = fresh(folder)
    sampler = Sampler(model, 8, 60, (0,))
    assert sampler.decoder is not model
    assert {type(layer) for layer in sampler.decoder.layers[0].mlp.children()} == {Linear}
    take_steps(model, 5)
    gaps = []
    for _ in range(2):
        [episode] = sampler.generate([[5, 6, 7]], 1, 40, 1.0, seeded_generator(0, 0, "test"))
        tokens = torch.cat((episode.prompt, episode.response))[None]
        logp, _ = score(model, tokens, torch.tensor([3]), torch.tensor([len(tokens[0])]), 1.0)
        gaps.append(distance(logp[0, 2:], episode.logp))
        sampler.sync()
    assert gaps[0] > 1e-2
    assert gaps[1] <= 1e-5


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_the_base_stays_and_has_no_moments(qwen2, weights):
    folder, _ = qwen2()
    dtype = getattr(torch, weights)
    model, _ = load(str(folder), dtype=dtype)
    base = copy.deepcopy(model)
    add_adapters(model, RANK, ALPHA, seed=0)
    first = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.recompute = True
    optimizer = take_steps(model, 3, dtype=weights, weights=weights)

    for name, parameter in model.named_parameters():
        if name.endswith(("lora_A", "lora_B")):
            assert parameter.dtype == torch.float32
            assert not torch.equal(parameter, first[name])
            assert optimizer.state[parameter]["exp_avg"].dtype == torch.float32
        else:
            assert parameter.dtype == dtype
            assert parameter.grad is None and parameter not in optimizer.state
            assert torch.equal(parameter, base.get_parameter(name))
    assert not isinstance(optimizer, MasterAdamW)


def test_two_processes_make_the_step_of_one(tmp_path):
    """And neither touches the base, whose weights have no gradient to add up."""
    for command in (ONE, TWO):
        done = run(command, "tests/two_processes_step.py", str(tmp_path), "1", str(RANK))
        assert done.returncode == 0, done.stderr
    one = load_file(tmp_path / "1-0.safetensors")
    first = load_file(tmp_path / "2-0.safetensors")
    second = load_file(tmp_path / "2-1.safetensors")
    base = load_model("base")
    add_adapters(base, RANK, 4, seed=0)
    for name, before in base.named_parameters():
        assert torch.equal(first[name], second[name])
        if not before.requires_grad:
            assert torch.equal(first[name], before) and torch.equal(one[name], before)
        else:
            want = one[name] - before
            assert want.abs().max() > 0
            assert (first[name] - one[name]).norm() <= 1e-5 * want.norm() + 1e-9, name


# What is saved.


def with_saved(qwen2, tmp_path, **changes) -> tuple[Path, Path, Transformer]:
    """-> the base's folder, the folder that was saved, our model."""
    folder, _ = qwen2(**changes)
    model = moved(folder)
    _, tokenizer = load(str(folder))
    save(model, tokenizer, tmp_path / "saved", base=str(folder))
    return folder, tmp_path / "saved", model


@torch.no_grad()
@pytest.mark.parametrize("changes", ARCHITECTURES)
def test_transformers_loads_the_merged_model(qwen2, tmp_path, changes):
    folder, saved, model = with_saved(qwen2, tmp_path, **changes)
    theirs = AutoModelForCausalLM.from_pretrained(saved)
    assert type(theirs).__name__.endswith("ForCausalLM")  # and not PEFT's
    got = logits(model, some_tokens())
    assert distance(theirs(some_tokens()).logits, got) <= 1e-3
    base = AutoModelForCausalLM.from_pretrained(folder)
    assert distance(base(some_tokens()).logits, got) > 1


@torch.no_grad()
@pytest.mark.parametrize("changes", ARCHITECTURES)
def test_peft_loads_the_adapter(qwen2, tmp_path, changes):
    """Beside the base, and merged into it by PEFT: our logits, and our merged weights."""
    peft = pytest.importorskip("peft", reason="pip install peft")
    folder, saved, model = with_saved(qwen2, tmp_path, **changes)
    base = AutoModelForCausalLM.from_pretrained(folder)
    theirs = peft.PeftModel.from_pretrained(base, saved / "adapter")
    got = logits(model, some_tokens())
    assert distance(theirs(some_tokens()).logits, got) <= 1e-3
    merged = theirs.merge_and_unload().state_dict()
    for name, weight in load_file(saved / "model.safetensors").items():
        assert distance(merged[name], weight) <= 1e-6


@torch.no_grad()
def test_the_adapter_of_a_model_is_what_peft_saves(qwen2, tmp_path):
    """The same names and shapes as of a LoRA that PEFT made, and the settings that it reads."""
    peft = pytest.importorskip("peft", reason="pip install peft")
    folder, saved, _ = with_saved(qwen2, tmp_path)
    names = [name.rpartition(".")[2] for name in PROJECTIONS]
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=names, task_type="CAUSAL_LM")
    base = AutoModelForCausalLM.from_pretrained(folder)
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "theirs")
    ours = load_file(saved / "adapter/adapter_model.safetensors")
    theirs = load_file(tmp_path / "theirs/adapter_model.safetensors")
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}
    read = peft.LoraConfig.from_pretrained(saved / "adapter")
    for setting in ("r", "lora_alpha", "target_modules", "bias", "lora_dropout", "task_type"):
        assert getattr(read, setting) == getattr(config, setting)
    assert read.base_model_name_or_path == str(folder)


@pytest.mark.parametrize(
    "base, name",
    [("base", str(ROOT / "base")), ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B")],
)
def test_the_adapter_names_its_base(tmp_path, monkeypatch, base, name):
    """A hub id, or a path that is good in every working directory."""
    model, tokenizer = load("base")
    add_adapters(model, RANK, ALPHA, seed=0)
    monkeypatch.chdir(tmp_path)
    save(model, tokenizer, "saved", base=base)
    config = json.loads(Path("saved/adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == name


def test_what_bfloat16_weights_lose_the_adapter_keeps(qwen2, tmp_path):
    """The merged model is of the weights' type, A and B are float32."""
    folder, _ = qwen2()
    model, tokenizer = load(str(folder), dtype=torch.bfloat16)
    add_adapters(model, RANK, ALPHA, seed=0)
    save(model, tokenizer, tmp_path / "saved", base=str(folder))
    for name, weight in load_file(tmp_path / "saved/model.safetensors").items():
        assert weight.dtype == torch.bfloat16, name
    adapter = load_file(tmp_path / "saved/adapter/adapter_model.safetensors")
    assert {matrix.dtype for matrix in adapter.values()} == {torch.float32}


# Runs.

RUNS = {
    "grpo": dict(algo="grpo"),
    "ppo, bfloat16, recompute": dict(
        algo="ppo", critic_warmup=1, dtype="bfloat16", weights="bfloat16", recompute=True
    ),
}


@pytest.fixture(scope="module", params=RUNS)
def whole(request, tmp_path_factory) -> tuple[Path, dict]:
    """A run of four steps in one go -> its folder, its settings."""
    out = tmp_path_factory.mktemp("runs")
    changes = RUNS[request.param] | dict(lora_rank=4, lr=5e-3, steps=4, max_new_tokens=24)
    with pytest.MonkeyPatch.context() as patch:
        replace_reward(patch, reward_by_length)
        return small_run(out, "whole", **changes)[0], changes


def unmeasured(log: list[dict]) -> list[dict]:
    return [{k: v for k, v in line.items() if not k.endswith(("_s", "_gb"))} for line in log]


def test_a_resumed_run_is_the_whole_run(whole, monkeypatch):
    """Two steps and two, bit for bit: A, B, their moments, a critic's head, the log, and the models
    that are saved."""
    replace_reward(monkeypatch, reward_by_length)
    folder, changes = whole
    half, _ = small_run(folder.parent, "half", **changes | dict(steps=2))
    train.train(Settings(resume=str(half), steps=4))
    assert unmeasured(read_jsonl(half / "log.jsonl")) == unmeasured(
        read_jsonl(folder / "log.jsonl")
    )
    for file in ("state", "model/model", "model/adapter/adapter_model"):
        want = load_file(folder / f"{file}.safetensors")
        got = load_file(half / f"{file}.safetensors")
        assert got.keys() == want.keys()
        assert all(torch.equal(got[name], want[name]) for name in want)


def test_a_state_holds_what_is_trained_and_nothing_else(whole):
    folder, changes = whole
    state = load_file(folder / "state.safetensors")
    base = load_model("base")
    models = 2 if changes["algo"] == "ppo" else 1
    head = base.config["hidden_size"] + 1 if models == 2 else 0  # of the critic
    count = models * count_adapters(base.config, 4) + head
    for key in ("weight", "exp_avg", "exp_avg_sq"):
        tensors = [tensor for name, tensor in state.items() if name.endswith("/" + key)]
        assert sum(tensor.numel() for tensor in tensors) == count
    parts = {name.partition("/")[0] for name in state}
    assert parts == ({"policy", "critic"} if models == 2 else {"policy"})
    assert state["policy/layers.0.mlp.up_proj.lora_B/weight"].abs().max() > 0
    if models == 2:
        assert state["critic/body.layers.0.mlp.up_proj.lora_B/weight"].abs().max() > 0
        assert state["critic/value.weight/weight"].abs().max() > 0


def test_a_run_leaves_only_its_own_files_and_can_be_replaced(whole, monkeypatch):
    replace_reward(monkeypatch, reward_by_length)
    folder, changes = whole
    run_folder = shutil.copytree(folder, folder.parent / "replaced")
    again, _ = small_run(folder.parent, "replaced", **changes | dict(steps=2, overwrite=True))
    assert len(read_jsonl(again / "log.jsonl")) == 2
    (run_folder / "model/adapter/notes.txt").write_text("precious")
    with pytest.raises(ValueError, match="would delete .*notes.txt, which is no file of a run"):
        small_run(folder.parent, "replaced", **changes | dict(overwrite=True))
    shutil.rmtree(run_folder)


def test_another_base_is_refused_on_resume(tmp_path):
    """The embedded model, written again, and then with the last bit of one number changed."""
    base = Path(shutil.copytree(ROOT / "base", tmp_path / "base"))
    half, _ = small_run(tmp_path, "half", lora_rank=1, steps=1, max_new_tokens=8, model=str(base))
    model, tokenizer = load(str(base))
    save(model, tokenizer, base)
    train.train(Settings(resume=str(half), steps=2))

    weight = model.layers[1].mlp.up_proj.weight.data
    weight[3, 4] = torch.nextafter(weight[3, 4], torch.tensor(9.0))
    save(model, tokenizer, base)
    sentence = "belongs to adapters of other weights than those that --model has now"
    with pytest.raises(ValueError, match=sentence):
        train.train(Settings(resume=str(half), steps=3))


# The plan.


def test_the_plan_of_7b_by_hand(monkeypatch, capsys):
    """Qwen2.5 7B, rank 16, on 80 GB. A layer: width 3584, keys 512, MLP 18944. In bfloat16 2 bytes a
    weight, twice (the sampler's copy); 16 for each number in A and B, where without LoRA it is 14
    for each weight."""
    layer = 2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18944)
    adapters = 28 * 16 * layer
    assert count_adapters(QWEN_7B, 16) == adapters == 40_370_176
    parameters = count_parameters(QWEN_7B)
    s = Settings(lora_rank=16, dtype="bfloat16", weights="bfloat16")
    cuda = torch.device("cuda")
    training = memory.TrainingMemory(QWEN_7B, parameters, s, 1024, 8, cuda)
    size = training.always()
    assert size["weights"] == 2 * parameters + 4 * adapters
    assert size["gradients"] == 4 * adapters
    assert size["optimizer"] == 8 * adapters
    assert size["decode weights"] == 2 * parameters
    saves = 14 * parameters - 4 * parameters - 16 * adapters
    monkeypatch.setattr(memory, "free_bytes", lambda device: 80e9)
    monkeypatch.setattr(memory, "name_of", lambda device: "a card")
    assert training.plan().endswith(
        f"; LoRA trains 0.0404 billion numbers in their place, which saves {saves / 1e9:.3g}"
    )


def test_the_disk_of_a_lora_run_by_hand(tmp_path, monkeypatch):
    """A state of 12 bytes a number of A and B, twice; the merged model; the adapter."""
    s = Settings(out=str(tmp_path), lora_rank=8, dtype="bfloat16", weights="bfloat16")
    needed = 2 * 12 * 10**6 + 2 * 10**9 + 4 * 10**6
    for missing in (0, 1000):
        free = needed - missing
        usage = shutil._ntuple_diskusage(free, 0, free)
        monkeypatch.setattr(memory.shutil, "disk_usage", lambda folder: usage)
        if missing:
            with pytest.raises(ValueError, match="a save takes 2.03 GB of disk"):
                memory.check_disk(s, 10**9, 10**6)
        else:
            memory.check_disk(s, 10**9, 10**6)
