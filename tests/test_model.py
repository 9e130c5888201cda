"""model.py against transformers: logits, round trips, score; and what it refuses."""

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen3Config

from conftest import FAMILIES, LLAMA_31
from model import Transformer, load, response_mask, save, score


def logits(model, tokens):
    return F.linear(model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens)), model.head)


@pytest.mark.parametrize("changes", [
    {}, {"tie_word_embeddings": False}, {"num_key_value_heads": 4}, {"num_key_value_heads": 1, "num_hidden_layers": 3},
    {"rope_theta": 1e6, "tie_word_embeddings": False, "hidden_size": 48, "num_attention_heads": 6},
    {"rope_theta": 500.0, "rms_norm_eps": 1e-5}, *FAMILIES])
def test_logits_equal_transformers_and_save_round_trips(qwen2, tmp_path, changes):
    folder, reference = qwen2(**changes)
    model, tokenizer = load(str(folder))
    tokens = torch.randint(0, 112, (3, 70))
    with torch.no_grad():
        want, got = reference(tokens).logits, logits(model, tokens)
        assert want.std() > 0.5 and (want - got).abs().max() <= 1e-4
        save(model, tokenizer, tmp_path / "saved")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        assert (again(tokens).logits - got).abs().max() <= 1e-4
        assert again.generation_config.eos_token_id == 0
    mine, _ = load(str(tmp_path / "saved"))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), mine.state_dict().values(), strict=True))
    assert again.config.to_dict() | {"_name_or_path": ""} == reference.config.to_dict() | {"_name_or_path": ""}


def test_base_equals_transformers():
    model, tokenizer = load("base")
    reference = AutoModelForCausalLM.from_pretrained("base")
    ids = PreTrainedTokenizerFast.from_pretrained("base").encode("7 7 1 8 -> 23 ? 1 + 8 = 9 + 7 = 16 + 7 = 23 vs 23 so")
    assert ids == tokenizer.encode("7 7 1 8 -> 23 ? 1 + 8 = 9 + 7 = 16 + 7 = 23 vs 23 so")
    tokens = torch.cat((torch.tensor([ids]), torch.randint(0, 112, (5, len(ids)))))
    with torch.no_grad():
        assert (reference(tokens).logits - logits(model, tokens)).abs().max() <= 1e-4
    assert model.eos_ids == (tokenizer.eos_token_id,)


@pytest.mark.parametrize("old, changes", [
    ({"rope_theta": 777.0, "torch_dtype": "float32"}, {"rope_theta": 777.0}), ({"rope_theta": 1e4}, {"family": Qwen3Config}),
    ({"rope_theta": 5e5, "rope_scaling": {k: v for k, v in LLAMA_31.items() if k != "rope_theta"}},
     {"family": LlamaConfig, "rope_parameters": LLAMA_31})])
def test_the_config_of_earlier_transformers_versions(qwen2, old, changes):
    """transformers 4 wrote rope_theta and rope_scaling at the top of config.json; Qwen3's head_dim may be absent."""
    folder, reference = qwen2(**changes)
    config = json.loads((folder / "config.json").read_text())
    for key in ("rope_parameters", "head_dim"):
        config.pop(key, None)
    (folder / "config.json").write_text(json.dumps(config | old))
    tokens = torch.randint(0, 112, (2, 140))
    with torch.no_grad():
        assert (reference(tokens).logits - logits(load(str(folder))[0], tokens)).abs().max() <= 1e-4


def test_sharded_checkpoints_load_alike(qwen2, tmp_path):
    folder, reference = qwen2(tie_word_embeddings=False)
    reference.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    load(str(folder))[1].save_pretrained(tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    one, many = load(str(folder))[0], load(str(tmp_path / "sharded"))[0]
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), many.state_dict().values(), strict=True))


def test_tensors_that_some_checkpoints_hold_besides_are_left_out(qwen2):
    """Tied checkpoints may store the head too, old ones the frequencies of RoPE."""
    folder, reference = qwen2()
    weights = load_file(folder / "model.safetensors")
    besides = {"lm_head.weight": weights["model.embed_tokens.weight"].clone(),
               "model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    assert not set(besides) & set(weights)
    save_file(weights | besides, folder / "model.safetensors")
    model = load(str(folder))[0]
    want = {name.removeprefix("model."): parameter for name, parameter in reference.named_parameters()}
    assert all(torch.equal(parameter, want[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_makes_every_weight_once_in_the_asked_type(qwen2, monkeypatch, dtype):
    """No weight is made before it is read: the only storage is the model's."""
    folder, reference = qwen2(tie_word_embeddings=False)
    made, to_empty = [], Transformer.to_empty

    def watched(self, **options):
        made.append({parameter.device.type for parameter in self.parameters()})
        return to_empty(self, **options)
    monkeypatch.setattr(Transformer, "to_empty", watched)
    model, _ = load(str(folder), dtype=dtype)
    assert made == [{"meta"}]
    for name, parameter in reference.named_parameters():
        mine = model.get_parameter(name.removeprefix("model."))
        assert mine.dtype == dtype and mine.requires_grad and torch.equal(mine, parameter.to(dtype))


def test_generation_config_decides_the_end_tokens(qwen2):
    """Instruction-tuned checkpoints name more end tokens there than in config.json."""
    folder, _ = qwen2(eos=7)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7]}))
    assert load(str(folder))[0].eos_ids == (5, 7)


def test_a_bf16_checkpoint_is_saved_in_the_type_it_was_trained_in(qwen2, tmp_path):
    folder, reference = qwen2()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16", "dtype": "bfloat16"}))
    model, tokenizer = load(str(folder))
    for _ in range(2):                                      # the second time over the first
        save(model, tokenizer, tmp_path / "saved")
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("saved")] == ["saved"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "saved").dtype == torch.float32
    assert "torch_dtype" not in json.loads((tmp_path / "saved" / "config.json").read_text())


def test_logits_are_not_kept_for_the_backward_pass(qwen2):
    """What score saves for the backward pass does not grow with the vocabulary times the sequence."""
    model, _ = load(str(qwen2(vocab_size=5000)[0]))
    tokens, prompt_len, total_len = ragged_batch()
    largest = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (largest.append(t.numel()), t)[1], lambda t: t):
        logp, _ = score(model, tokens, prompt_len, total_len, 1.0, chunk=8)
    assert max(largest) <= 5000 * 32                        # the head's weight; 8 rows of logits would be 40,000
    assert sum(n for n in largest if n % 5000 == 0 and n != 5000 * 32) == 0
    assert logp.requires_grad


def test_several_end_tokens_survive_a_round_trip(qwen2, tmp_path):
    model, tokenizer = load(str(qwen2(eos=[5, 0])[0]))
    assert model.eos_ids == (5, 0)
    save(model, tokenizer, tmp_path / "saved")
    assert load(str(tmp_path / "saved"))[0].eos_ids == (5, 0)


def ragged_batch(seed=0, rows=5, length=60):
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 112, (rows, length), generator=g)
    prompt_len = torch.tensor([1, 7, 20, 3, 59])
    total_len = torch.tensor([60, 8, 41, 3 + 1, 60])
    for i in range(rows):
        tokens[i, total_len[i]:] = 0                        # padding that is also the end token
        tokens[i, total_len[i] - 1] = 0
    return tokens, prompt_len, total_len


@pytest.mark.parametrize("temperature, chunk", [(1.0, 2048), (0.7, 16), (1.3, 1)])
def test_score_equals_a_dense_float64_computation(qwen2, temperature, chunk):
    folder, reference = qwen2(tie_word_embeddings=False)
    model, _ = load(str(folder))
    tokens, prompt_len, total_len = ragged_batch()
    logp, entropy = score(model, tokens, prompt_len, total_len, temperature, chunk)
    assert logp.dtype == entropy.dtype == torch.float32 and not entropy.requires_grad
    seen = torch.zeros_like(logp, dtype=torch.bool)
    for i in range(len(tokens)):
        z = reference.double()(tokens[i:i + 1, :total_len[i]]).logits[0] / temperature
        want = z.log_softmax(-1)
        for t in range(prompt_len[i], total_len[i]):
            seen[i, t - 1] = True
            assert abs(logp[i, t - 1] - want[t - 1, tokens[i, t]]) <= 1e-4
            assert abs(entropy[i, t - 1] + (want[t - 1].exp() * want[t - 1]).sum()) <= 1e-4
    assert torch.equal(seen, response_mask(prompt_len, total_len, tokens.shape[1]))
    assert (logp[~seen] == 0).all() and (entropy[~seen] == 0).all()


def test_gradients_of_score_equal_the_dense_ones_and_do_not_depend_on_the_chunk(qwen2):
    folder, reference = qwen2()
    tokens, prompt_len, total_len = ragged_batch()
    mask = response_mask(prompt_len, total_len, tokens.shape[1])
    weight = torch.randn(mask.shape, generator=torch.Generator().manual_seed(1)) * mask
    dense = reference(tokens).logits[:, :-1].log_softmax(-1)
    h = -(dense.exp() * dense).sum(-1)
    (dense.gather(2, tokens[:, 1:, None])[..., 0] * weight + 0.3 * h * weight).sum().backward()
    want = {name.removeprefix("model."): p.grad for name, p in reference.named_parameters()}
    for chunk in (7, 10_000):
        model, _ = load(str(folder))
        logp, entropy = score(model, tokens, prompt_len, total_len, 1.0, chunk, entropy_grad=True)
        (logp * weight + 0.3 * entropy * weight).sum().backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad - want[name]).abs().max() <= 1e-4 * max(1, want[name].abs().max()), name


def test_end_token_gets_gradient_and_padding_none(qwen2):
    model, _ = load(str(qwen2()[0]))
    tokens, prompt_len, total_len = ragged_batch()
    embedded = []
    handle = model.layers[0].register_forward_pre_hook(lambda _, x: (x[0].retain_grad(), embedded.append(x[0]))[0])
    logp, _ = score(model, tokens, prompt_len, total_len, 1.0)
    handle.remove()
    (logp ** 2).sum().backward()
    grads = embedded[0].grad.abs().sum(-1)                  # [B, T]: whether an input position matters to the loss
    for i in range(len(tokens)):
        end = total_len[i] - 1                              # the sampled end token, predicted from end - 1
        assert logp[i, end - 1] < 0 and grads[i, end - 1] > 0
        assert (grads[i, end:] == 0).all()                  # nothing behind it, padding with the same id included


def test_what_is_refused(qwen2, tmp_path):
    folder, _ = qwen2()
    good = json.loads((folder / "config.json").read_text())
    with pytest.raises(FileNotFoundError, match="there is no model folder ./nowhere"):
        load("./nowhere")
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        (tmp_path / "empty").mkdir()
        load(str(tmp_path / "empty"))
    for change, sentence in (({"model_type": "gpt2"}, "'gpt2' is not supported; supported: qwen2, qwen3, llama"),
                             ({"use_sliding_window": True}, "sliding-window"), ({"hidden_act": "gelu"}, "activation"),
                             ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "RoPE scaling"),
                             ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window"),
                             ({"head_dim": 12}, r"k_proj.bias in .* is \(16,\), config.json wants \(24,\)"),
                             ({"model_type": "llama", "attention_bias": True}, "uses biases"),
                             ({"intermediate_size": 64}, r"is \(.*\), config.json wants"),
                             ({"num_hidden_layers": 3}, "lacks 12 tensors"),
                             ({"num_hidden_layers": 1}, "config.json does not call for")):
        (folder / "config.json").write_text(json.dumps(good | change))
        with pytest.raises(ValueError, match=sentence):
            load(str(folder))
    (folder / "config.json").write_text(json.dumps({k: v for k, v in good.items() if k != "hidden_size"}))
    with pytest.raises(ValueError, match="lacks hidden_size"):
        load(str(folder))
    (folder / "config.json").write_text('{"alpha": 0.4}')
    with pytest.raises(ValueError, match="names no model type"):
        load(str(folder))
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="does not hold a JSON object"):
        load(str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="does not hold a JSON object"):
        load(str(folder))
    (folder / "config.json").write_text(json.dumps(good))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load(str(folder))
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="lacks 26 tensors, embed.* among them; only safetensors are read"):
        load(str(folder))
    (folder / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    with pytest.raises(FileNotFoundError, match="has no tokenizer.json"):
        load(str(folder))


def test_a_hub_that_cannot_be_reached(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="hub did not give a model"):
        load("nobody/no-such-model")


def test_a_failed_save_leaves_the_earlier_one(qwen2, tmp_path, monkeypatch):
    model, tokenizer = load(str(qwen2()[0]))
    save(model, tokenizer, tmp_path / "saved")
    before = (tmp_path / "saved" / "model.safetensors").read_bytes()
    monkeypatch.setattr(tokenizer, "save_pretrained", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with torch.no_grad():
        model.norm.weight += 1
    with pytest.raises(OSError):
        save(model, tokenizer, tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").read_bytes() == before
    load(str(tmp_path / "saved"))


def test_positions_matter_only_relatively():
    model, _ = load("base")
    tokens = torch.randint(2, 102, (1, 30))
    with torch.no_grad():
        plain, shifted, stretched = (model(tokens, position[None]) for position in (
            torch.arange(30), torch.arange(30) + 7, torch.arange(30) * 2))
    assert (shifted - plain).abs().max() < 1e-3             # RoPE is relative ...
    assert (stretched - plain).abs().max() > 0.1            # ... and is there


PEAK = """
import sys, torch
from checkpoint import peak_memory
from model import Transformer, score
length, chunk = map(int, sys.argv[1:])
torch.manual_seed(0)
model = Transformer(dict(model_type="qwen2", vocab_size=152_000, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=1, rms_norm_eps=1e-6, tie_word_embeddings=True))
tokens, one = torch.randint(0, 152_000, (1, length)), torch.tensor([1])
before = peak_memory(torch.device("cpu"))
logp, entropy = score(model, tokens, one, one * length, 1.0, chunk)
logp.sum().backward()
print(peak_memory(torch.device("cpu")) - before)
"""


def test_the_peak_memory_of_score_grows_with_the_chunk_not_with_the_sequence():
    """A vocabulary of 152,000: all logits of 1024 tokens would be 0.6 GB in float32, for one copy; 64 rows are 0.04 GB.
    Each in a process of its own, because a peak does not come down again."""
    peak = {}
    for length, chunk in ((256, 64), (1024, 64), (1024, 512)):
        done = subprocess.run([sys.executable, "-c", PEAK, str(length), str(chunk)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peak[length, chunk] = float(done.stdout)
    print("GB above what was there, by (tokens, chunk):", {key: round(value, 2) for key, value in peak.items()})
    one_copy = (1024 - 256) * 152_000 * 4e-9                # of the logits that are more
    assert peak[1024, 64] < peak[256, 64] + one_copy / 2
    assert peak[1024, 512] > peak[1024, 64] + 3 * (512 - 64) * 152_000 * 4e-9


def test_recomputing_layers_changes_no_gradient(qwen2):
    folder, _ = qwen2(tie_word_embeddings=False)
    gradients = []
    for recompute in (False, True):
        model = load(str(folder))[0]
        model.recompute = recompute
        calls = []
        model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        logp, _ = score(model, *ragged_batch(), 1.0)
        logp.sum().backward()
        gradients.append([p.grad for p in model.parameters()])
        assert len(calls) == 1 + recompute
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_chunks_add_up_the_heads_gradient_in_fp32_under_autocast(qwen2):
    """Many chunks of one token: were their gradients added in bfloat16, most of them would be lost in the sum."""
    model, _ = load(str(qwen2()[0]))
    tokens = torch.randint(0, 112, (1, 2000), generator=torch.Generator().manual_seed(0))
    tokens[0, 1:] = 5
    found = []
    for chunk in (2000, 1):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            score(model, tokens, torch.tensor([1]), torch.tensor([2000]), 1.0, chunk)[0].sum().backward()
        found.append(model.embed_tokens.weight.grad.clone())
    assert (found[1] - found[0]).norm() <= 0.01 * found[0].norm()
