"""What the tests of models share: small random checkpoints, made by transformers and not by us."""

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from lab.pretrain import countdown_tokenizer
from model import load

# One thread for every process that a test starts.
os.environ["OMP_NUM_THREADS"] = "1"

ROOT = Path(__file__).resolve().parents[1]

LLAMA_31 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# Changes to the checkpoint that the fixture makes: the families besides Qwen2 ...
FAMILIES = [
    {"family": Qwen3Config, "head_dim": 16},
    {"family": Qwen3Config, "tie_word_embeddings": False},
    {"family": LlamaConfig},
    {"family": LlamaConfig, "rope_parameters": LLAMA_31, "head_dim": 12},
]
# ... and with them every kind of head, grouping, width and RoPE.
ARCHITECTURES = [
    {},
    {"tie_word_embeddings": False},
    {"num_key_value_heads": 4},
    {"num_key_value_heads": 1, "num_hidden_layers": 3},
    {
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
        "hidden_size": 48,
        "num_attention_heads": 6,
    },
    {"rope_theta": 500.0, "rms_norm_eps": 1e-5},
    *FAMILIES,
]

SMALL = {
    "vocab_size": 112,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "max_position_embeddings": 512,
}


@pytest.fixture
def qwen2(tmp_path):
    """Makes a random checkpoint with transformers, of Qwen2 if nothing is said: qwen2(...) ->
    (folder, the transformers model)."""

    def make(seed=0, eos=0, name="checkpoint", tokenizer=True, family=Qwen2Config, **changes):
        settings = SMALL | {"eos_token_id": eos} | changes
        if "rope_parameters" in settings:
            del settings["rope_theta"]
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(family(**settings)).eval()
        # Biases and norms too, which start as constants.
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
        model.generation_config.eos_token_id = eos

        folder = tmp_path / name
        model.save_pretrained(folder)
        if tokenizer:
            countdown_tokenizer().save_pretrained(folder)
        return folder, model

    return make


@pytest.fixture
def model(qwen2):
    """A random one of ours."""
    folder, _ = qwen2()
    return load_model(folder)


def load_model(folder):
    model, _ = load(str(folder))
    return model


def logits(model, tokens):
    """Of one of our models: tokens [B, T] -> [B, T, V]."""
    position = torch.arange(tokens.shape[1])
    hidden = model(tokens, position.expand_as(tokens))
    return F.linear(hidden, model.head)


def picked(logp, tokens):
    """The log-probability of each token: [..., V], [...] -> [...]."""
    return logp.gather(-1, tokens[..., None])[..., 0]


def entropy_of(logp):
    """Log-probabilities of all words -> nats, [..., V] -> [...]."""
    return -(logp.exp() * logp).sum(-1)


def distance(a, b):
    """The largest difference of two numbers in the same place."""
    return (a - b).abs().max()


def same_weights(model, other):
    mine = model.state_dict().values()
    theirs = other.state_dict().values()
    return all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def dice(seed):
    return torch.Generator().manual_seed(seed)
