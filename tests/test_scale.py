"""scale.py: the planner against sums by hand and tensors that were kept, the optimizer against torch's, two processes
against one."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from model import Transformer, load
from scale import MasterAdamW, plan
from train import PRESETS, Settings

# The published shapes of Qwen2.5-7B and 1.5B.
QWEN_7B = dict(model_type="qwen2", vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
               num_attention_heads=28, num_key_value_heads=4, rms_norm_eps=1e-6, tie_word_embeddings=False)
QWEN_1_5B = QWEN_7B | dict(vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_attention_heads=12,
                           num_key_value_heads=2, tie_word_embeddings=True)
CARD = 139 * 2 ** 30
CPU = torch.device("cpu")


def planned(config, free=1e15, length=9216, rows=64, **changes):
    """plan's table as numbers: {"weights": 15.2, ..., "a rollout needs": ..., "an update": ...}, on a machine of that size"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.sysconf", lambda name: {"SC_PHYS_PAGES": int(free) // 4096, "SC_PAGE_SIZE": 4096}[name])
        text = plan(config, Settings(**PRESETS["paper-grpo"] | changes), length, rows, CPU).partition(": ")[2]
    return {" ".join(part.split()[:-1]): float(part.split()[-1]) for part in text.replace(";", ",").split(", ")}


def test_the_plan_of_7b_by_hand():
    """7.616 billion weights, as its model card says; 57,344 bytes of cache per token in bfloat16, 28,672 for 1.5B."""
    mode = planned(QWEN_7B, weights="bfloat16")
    assert mode["weights"] == mode["gradients"] == pytest.approx(15.23, rel=2e-3)
    assert mode["optimizer"] == pytest.approx(76.16, rel=2e-3) and "decode weights" not in mode
    assert mode["KV cache"] == pytest.approx(57344 * 64 * 9216 / 1e9, rel=5e-3)
    assert mode["an update"] == pytest.approx(106.6 + mode["activations"], rel=5e-3)
    assert mode["a rollout needs"] == pytest.approx(106.6 + mode["KV cache"], rel=5e-3)
    usual = planned(QWEN_7B)
    assert usual["weights"] == pytest.approx(30.46, rel=2e-3) and usual["optimizer"] == pytest.approx(60.93, rel=2e-3)
    assert usual["decode weights"] == pytest.approx(15.23, rel=2e-3)
    assert planned(QWEN_1_5B)["KV cache"] == pytest.approx(28672 * 64 * 9216 / 1e9, rel=5e-3)
    both = planned(QWEN_7B, weights="bfloat16", algo="ppo")
    assert both["optimizer"] == pytest.approx(2 * 76.16, rel=5e-3)


def test_what_cannot_fit_is_refused_with_numbers_and_advice():
    assert planned(QWEN_7B, CARD, weights="bfloat16", dtype="bfloat16")
    with pytest.raises(ValueError, match=r"optimizer 152.*but there are 149; what may help: fewer --slots.*--algo grpo"):
        planned(QWEN_7B, CARD, weights="bfloat16", algo="ppo")
    with pytest.raises(ValueError, match=r"a rollout needs 1\d\d.*--weights bfloat16"):
        planned(QWEN_7B, CARD)
    with pytest.raises(ValueError, match="--recompute"):
        planned(QWEN_1_5B, CARD / 2, recompute=False, micro_tokens=32768)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("mode", [dict(), dict(dtype="bfloat16"), dict(dtype="bfloat16", weights="bfloat16")])
def test_planned_activations_are_those_that_a_forward_pass_keeps(mode, recompute):
    """The tensors that autograd holds at the end of a forward pass, each storage once, without the weights."""
    config = dict(model_type="qwen2", vocab_size=64, hidden_size=256, intermediate_size=900, num_hidden_layers=8,
                  num_attention_heads=8, num_key_value_heads=2, rms_norm_eps=1e-6)
    s = Settings(recompute=recompute, micro_tokens=4096, chunk=1, **mode)
    model = Transformer(config).to(getattr(torch, s.weights))
    model.recompute = recompute
    weights, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(t):
        if t.untyped_storage().data_ptr() not in weights:
            kept[t.untyped_storage().data_ptr()] = t
        return t
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast(
            "cpu", torch.bfloat16, enabled=mode == dict(dtype="bfloat16")):
        hidden = model(torch.zeros(8, 512, dtype=torch.int64), torch.arange(512).expand(8, 512))
    found = sum(t.untyped_storage().nbytes() for t in kept.values()) / 1e9
    table = plan(config, s, 512, 8, CPU).partition("activations ")[2]
    one_layer = 0 if not recompute else plan_of_a_layer(config, s)          # made again later, in the backward pass
    assert hidden.requires_grad and float(table.split(";")[0]) == pytest.approx(found + one_layer, rel=0.12)


def plan_of_a_layer(config, s):
    """What the planner adds for the one layer that is recomputed: activations of one layer without recomputing."""
    import dataclasses
    one = {}
    for layers in (1, 2):
        usual = dataclasses.replace(s, recompute=False)
        text = plan(config | {"num_hidden_layers": layers, "vocab_size": 1}, usual, 512, 8, CPU)
        one[layers] = float(text.partition("activations ")[2].split(";")[0])
    return one[2] - one[1]


def test_the_optimizer_is_adamw_on_a_float32_master():
    """torch's AdamW on float32 copies of the weights, fed the same gradients: the masters agree but for the rounding of
    the first moment, and steps too small for bfloat16 add up."""
    g = torch.Generator().manual_seed(0)
    start = [(torch.randn(40, 30, generator=g) * 0.02).bfloat16(), torch.randn(7, generator=g).bfloat16()]
    mine, theirs = ([torch.nn.Parameter(t.to(kind)) for t in start] for kind in (torch.bfloat16, torch.float32))
    ours, torchs = MasterAdamW(mine, 1e-6, 0.1), torch.optim.AdamW(theirs, 1e-6, weight_decay=0.1)
    for _ in range(200):
        for a, b in zip(mine, theirs):
            a.grad = (torch.randn(a.shape, generator=g) + 0.5).bfloat16()
            b.grad = a.grad.float()
        ours.step()
        torchs.step()
    for a, b, first in zip(mine, theirs, start):
        master, moved = ours.state[a]["master"], (b - first.float())
        assert (master - b).abs().max() <= 0.02 * moved.abs().max() and moved.abs().max() > 5e-5
        assert torch.equal(a, master.bfloat16()) and ours.state[a]["exp_avg"].dtype == torch.bfloat16
        assert (ours.state[a]["exp_avg_sq"] - torchs.state[b]["exp_avg_sq"]).abs().max() <= 1e-6


TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ONE_STEP = """
import sys, torch
from safetensors.torch import save_file
from model import Critic, load
from rollout import Episode, per_token
from scale import join
from train import Settings, adamw, critic_advantage, update
rank, world = join(torch.device("cpu"))
g = torch.Generator().manual_seed(0)
lengths = torch.randint(3, 40, (12,), generator=g).tolist()
episodes = [Episode(torch.randint(2, 112, (8,), generator=g), torch.randint(2, 112, (n,), generator=g),
                    -torch.rand(n, generator=g) - 4, torch.zeros(n), True, i) for i, n in enumerate(lengths)]
advantage = torch.randn(12, 1, generator=g).expand(12, 40).clone()
advantage[6:] *= float(sys.argv[2])
logp = torch.nn.utils.rnn.pad_sequence([e.logp for e in episodes], batch_first=True)
mine = slice(rank * 12 // world, (rank + 1) * 12 // world)
model = load("base")[0]
s = Settings(grad_clip=1e9)
critic, counted = Critic(model), per_token([e.logp for e in episodes[mine]])[1]
with torch.no_grad():
    critic.value.weight.copy_(torch.randn(critic.value.weight.shape, generator=g))
reward = torch.randn(12, generator=g)
whitened = critic_advantage(critic, episodes[mine], reward[mine], counted, s)[0][counted]
adamw(model, 0.0, s)
sums = update(model, torch.optim.SGD(model.parameters(), 1.0), episodes[mine], logp[mine], advantage[mine, :logp.shape[1]], s)
weights = {name: p.detach().clone() for name, p in model.named_parameters()}
sums = {key: float(value) for key, value in sums.items() if key != "score_s"}
save_file(weights | {"whitened": whitened, "sums": torch.tensor([sums[key] for key in sorted(sums)])}, f"{sys.argv[1]}/{world}-{rank}.safetensors")
"""


@pytest.mark.parametrize("second_half", [1, 0])
def test_two_processes_make_the_gradient_of_one(tmp_path, second_half):
    """Also where all sequences of the second one have zero advantage, so that it has nothing to score."""
    script = tmp_path / "step.py"
    script.write_text(ONE_STEP)
    for command in ([sys.executable], TWO):
        done = subprocess.run([*command, str(script), str(tmp_path), str(second_half)], capture_output=True, text=True,
                              env={**os.environ, "PYTHONPATH": ".", "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
    one, *two = (load_file(tmp_path / f"{name}.safetensors") for name in ("1-0", "2-0", "2-1"))
    assert torch.allclose(torch.cat([got["whitened"] for got in two]), one["whitened"], atol=1e-5)
    assert abs(float(one["whitened"].mean())) < 1e-5 and abs(float(two[0]["whitened"].mean())) > 1e-3
    base = dict(load("base")[0].named_parameters())
    for name, before in base.items():
        want = one[name] - before
        assert want.abs().max() > 0 or "k_proj.bias" in name
        assert all((got[name] - one[name]).norm() <= 1e-5 * want.norm() + 1e-9 for got in two), name
        assert torch.equal(two[0][name], two[1][name])
    assert torch.allclose(two[0]["sums"], one["sums"], rtol=1e-4, atol=1e-5) and torch.equal(two[0]["sums"], two[1]["sums"])


def launch(*flags):
    return subprocess.run([*TWO, "train.py", *flags], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_two_processes_train_save_once_and_resume(tmp_path):
    """PPO, whose advantages are whitened over both; then the resumed half of the run is the same, bit for bit."""
    flags = ("--algo ppo --critic-warmup 1 --steps 4 --prompts 4 --samples 4 --minibatch 2 --eval-problems 3 --eval-samples 1 "
             "--final-samples 2 --slots 8 --max-new-tokens 24 --eval-every 2 --out").split()
    done = launch(*flags, str(tmp_path), "--name", "a")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trained - base") == 1 and done.stdout.count("memory in GB") == 1
    lines = [json.loads(line) for line in (tmp_path / "a/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    validated = [json.loads(line)["step"] for line in (tmp_path / "a/validation.jsonl").read_text().splitlines()]
    assert validated == [0, 2, 4]
    want = load_file(tmp_path / "a/state.safetensors")
    launch(*flags, str(tmp_path), "--name", "b", "--steps", "2")
    config = json.loads((tmp_path / "b/config.json").read_text())
    (tmp_path / "b/config.json").write_text(json.dumps(config | {"steps": 4}))
    done = launch("--resume", str(tmp_path / "b"))
    assert done.returncode == 0, done.stderr
    got = load_file(tmp_path / "b/state.safetensors")
    assert set(got) == set(want) and all(torch.equal(got[name], want[name]) for name in want)
    again = [json.loads(line) for line in (tmp_path / "b/log.jsonl").read_text().splitlines()]
    assert [{k: v for k, v in line.items() if not k.endswith(("_s", "_gb"))} for line in again] == [
        {k: v for k, v in line.items() if not k.endswith(("_s", "_gb"))} for line in lines]


def test_what_two_processes_refuse(tmp_path):
    done = launch("--minibatch", "1", "--out", str(tmp_path / "runs"))
    assert done.returncode != 0 and "train.py: --minibatch must be a multiple of the number of processes; it is 1" in done.stderr
    assert not (tmp_path / "runs").exists()
