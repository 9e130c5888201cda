"""score, the paper's H_t, against a dense computation on transformers' logits: values in float64,
gradients by autograd. And its memory, measured in processes of their own."""

import subprocess
import sys

import pytest
import torch

from conftest import ROOT, dice, distance, entropy_of, load_model, picked
from model import score
from plumbing.batch import response_mask


def ragged_batch():
    """tokens [B, T], prompt_len [B], total_len [B]. Padding is 0, and so is the end token."""
    tokens = torch.randint(0, 112, (5, 60), generator=dice(0))
    prompt_len = torch.tensor([1, 7, 20, 3, 59])
    total_len = torch.tensor([60, 8, 41, 4, 60])
    for row, total in zip(tokens, total_len):
        end = total - 1
        row[end:] = 0
    return tokens, prompt_len, total_len


@pytest.mark.parametrize(
    "temperature, chunk",
    [
        (1.0, 2048),
        (0.7, 16),
        (1.3, 1),
    ],
)
def test_score_equals_a_dense_float64_computation(qwen2, temperature, chunk):
    folder, reference = qwen2(tie_word_embeddings=False)
    model = load_model(folder)
    tokens, prompt_len, total_len = ragged_batch()
    logp, entropy = score(
        model,
        tokens,
        prompt_len,
        total_len,
        temperature,
        chunk=chunk,
    )
    assert logp.dtype == torch.float32
    assert entropy.dtype == torch.float32
    assert not entropy.requires_grad

    reference = reference.double()
    seen = torch.zeros_like(logp, dtype=torch.bool)
    for i, (row, prompt, total) in enumerate(zip(tokens, prompt_len, total_len)):
        # Without its padding; column t speaks of token t+1.
        z = reference(row[None, :total]).logits[0] / temperature
        want = z[:-1].log_softmax(-1)  # [total - 1, V]
        want_logp = picked(want, row[1:total])
        want_entropy = entropy_of(want)
        response = slice(prompt - 1, total - 1)
        seen[i, response] = True
        assert distance(logp[i, response], want_logp[response]) <= 1e-4
        assert distance(entropy[i, response], want_entropy[response]) <= 1e-4

    mask = response_mask(prompt_len, total_len, tokens.shape[1])
    assert torch.equal(seen, mask)
    assert (logp[~seen] == 0).all()
    assert (entropy[~seen] == 0).all()


@pytest.mark.parametrize("chunk", [7, 10_000])
def test_gradients_equal_the_dense_ones_whatever_the_chunk(qwen2, chunk):
    folder, reference = qwen2()
    tokens, prompt_len, total_len = ragged_batch()
    mask = response_mask(prompt_len, total_len, tokens.shape[1])
    weight = mask * torch.randn(mask.shape, generator=dice(1))

    def loss(logp, entropy):
        weighted = logp * weight + 0.3 * entropy * weight
        return weighted.sum()

    dense = reference(tokens).logits[:, :-1].log_softmax(-1)  # [B, T-1, V]
    dense_logp = picked(dense, tokens[:, 1:])
    loss(dense_logp, entropy_of(dense)).backward()

    model = load_model(folder)
    logp, entropy = score(
        model,
        tokens,
        prompt_len,
        total_len,
        temperature=1.0,
        chunk=chunk,
        entropy_grad=True,
    )
    loss(logp, entropy).backward()
    for name, parameter in model.named_parameters():
        want = reference.get_parameter(f"model.{name}").grad
        allowed = 1e-4 * max(1, want.abs().max())
        assert distance(parameter.grad, want) <= allowed, name


def test_the_end_token_gets_gradient_and_padding_none(model):
    tokens, prompt_len, total_len = ragged_batch()
    embedded = []

    def keep_gradient(_, inputs):
        inputs[0].retain_grad()
        embedded.append(inputs[0])

    handle = model.layers[0].register_forward_pre_hook(keep_gradient)
    logp, _ = score(model, tokens, prompt_len, total_len, temperature=1.0)
    handle.remove()
    (logp**2).sum().backward()
    # Whether an input position matters to the loss.
    influence = embedded[0].grad.abs().sum(-1)  # [B, T]
    for row in range(len(tokens)):
        end = total_len[row] - 1  # the sampled end token, predicted from end - 1
        assert logp[row, end - 1] < 0
        assert influence[row, end - 1] > 0
        # Nothing behind it, padding of the same id included.
        assert (influence[row, end:] == 0).all()


def gradients_with(recompute, folder):
    """Of each parameter, and how often the first layer ran."""
    model = load_model(folder)
    model.recompute = recompute
    runs = []

    def count(*_):
        runs.append(1)

    model.layers[0].mlp.register_forward_pre_hook(count)
    logp, _ = score(model, *ragged_batch(), temperature=1.0)
    logp.sum().backward()
    return [parameter.grad for parameter in model.parameters()], len(runs)


def test_recomputing_layers_changes_no_gradient(qwen2):
    folder, _ = qwen2(tie_word_embeddings=False)
    kept, runs_when_kept = gradients_with(False, folder)
    recomputed, runs_when_recomputed = gradients_with(True, folder)
    assert runs_when_kept == 1
    assert runs_when_recomputed == 2
    for one, other in zip(kept, recomputed, strict=True):
        assert torch.equal(one, other)


def test_chunks_add_up_the_heads_gradient_in_fp32_under_autocast(model):
    """Many chunks of one token: were their gradients added in bfloat16, most of them would be lost
    in the sum."""
    tokens = torch.randint(0, 112, (1, 2000), generator=dice(0))
    tokens[0, 1:] = 5
    prompt_len = torch.tensor([1])
    total_len = torch.tensor([2000])

    def gradient(chunk):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logp, _ = score(
                model,
                tokens,
                prompt_len,
                total_len,
                temperature=1.0,
                chunk=chunk,
            )
            logp.sum().backward()
        return model.embed_tokens.weight.grad.clone()

    at_once = gradient(chunk=2000)
    one_by_one = gradient(chunk=1)
    difference = one_by_one - at_once
    assert difference.norm() <= 0.01 * at_once.norm()


def test_logits_are_not_kept_for_the_backward_pass(qwen2):
    """What score saves for it does not grow with the vocabulary times the sequence."""
    vocabulary = 5000
    folder, _ = qwen2(vocab_size=vocabulary)
    model = load_model(folder)
    head = model.head.numel()
    assert head == vocabulary * 32
    sizes = []

    def pack(tensor):
        sizes.append(tensor.numel())
        return tensor

    def unpack(tensor):
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        logp, _ = score(model, *ragged_batch(), temperature=1.0, chunk=8)
    assert max(sizes) <= head  # 8 rows of logits would be 40,000
    rows_of_logits = [size for size in sizes if size % vocabulary == 0 and size != head]
    assert sum(rows_of_logits) == 0
    assert logp.requires_grad


PEAK = """
import sys
import torch
from model import Transformer, score
from plumbing.memory import peak_memory

length, chunk = map(int, sys.argv[1:])
cpu = torch.device("cpu")
torch.manual_seed(0)
model = Transformer(dict(
    model_type="qwen2", vocab_size=152_000, hidden_size=16, intermediate_size=32,
    num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, rms_norm_eps=1e-6,
    tie_word_embeddings=True,
))
tokens = torch.randint(0, 152_000, (1, length))
one = torch.tensor([1])
before = peak_memory(cpu)
logp, entropy = score(model, tokens, one, one * length, 1.0, chunk)
logp.sum().backward()
print(peak_memory(cpu) - before)
"""


def peak_of_score(length, chunk):
    """GB above what was there. In a process of its own, because a peak does not come down again."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(length), str(chunk)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


def test_the_peak_memory_of_score_grows_with_the_chunk_not_with_the_sequence():
    """A vocabulary of 152,000: all logits of 1024 tokens would be 0.6 GB in float32, for one copy;
    64 rows are 0.04 GB."""
    short = peak_of_score(length=256, chunk=64)
    long = peak_of_score(length=1024, chunk=64)
    long_large_chunk = peak_of_score(length=1024, chunk=512)
    print(f"GB above what was there: {short:.2f}, {long:.2f}, {long_large_chunk:.2f}")
    one_copy_of_more_logits = (1024 - 256) * 152_000 * 4e-9
    one_copy_of_larger_chunk = (512 - 64) * 152_000 * 4e-9
    assert long < short + one_copy_of_more_logits / 2
    assert long_large_chunk > long + 3 * one_copy_of_larger_chunk
