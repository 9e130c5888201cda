"""model.py against transformers: the logits of random checkpoints and of the embedded model."""

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from conftest import ARCHITECTURES, ROOT, distance, load_model, logits
from model import Transformer, load

ANSWER = "7 7 1 8 -> 23 ? 1 + 8 = 9 + 7 = 16 + 7 = 23 vs 23 so"


@torch.no_grad()
@pytest.mark.parametrize("changes", ARCHITECTURES)
def test_logits_equal_transformers(qwen2, changes):
    folder, reference = qwen2(**changes)
    model = load_model(folder)
    tokens = torch.randint(0, 112, (3, 70))
    want = reference(tokens).logits
    got = logits(model, tokens)
    assert want.std() > 0.5
    assert distance(want, got) <= 1e-4


@torch.no_grad()
def test_the_embedded_model_equals_transformers():
    model, tokenizer = load("base")
    reference = AutoModelForCausalLM.from_pretrained(ROOT / "base")
    reference_tokenizer = PreTrainedTokenizerFast.from_pretrained(ROOT / "base")
    ids = reference_tokenizer.encode(ANSWER)
    assert ids == tokenizer.encode(ANSWER)

    answer = torch.tensor([ids])
    noise = torch.randint(0, 112, (5, len(ids)))
    tokens = torch.cat((answer, noise))
    want = reference(tokens).logits
    got = logits(model, tokens)
    assert distance(want, got) <= 1e-4
    assert model.eos_ids == (tokenizer.eos_token_id,)


@torch.no_grad()
def test_positions_matter_only_relatively():
    model, _ = load("base")
    tokens = torch.randint(2, 102, (1, 30))
    position = torch.arange(30)[None]
    plain = model(tokens, position)
    shifted = model(tokens, position + 7)
    stretched = model(tokens, position * 2)
    assert distance(shifted, plain) < 1e-3  # RoPE is relative ...
    assert distance(stretched, plain) > 0.1  # ... and is there


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_makes_every_weight_once_in_the_asked_type(qwen2, monkeypatch, dtype):
    """No weight is made before it is read: the only storage is the model's."""
    folder, reference = qwen2(tie_word_embeddings=False)
    devices_before = []
    to_empty = Transformer.to_empty

    def watched(self, **options):
        devices = {parameter.device.type for parameter in self.parameters()}
        devices_before.append(devices)
        return to_empty(self, **options)

    monkeypatch.setattr(Transformer, "to_empty", watched)
    model, _ = load(str(folder), dtype=dtype)
    assert devices_before == [{"meta"}]
    for name, parameter in reference.named_parameters():
        mine = model.get_parameter(name.removeprefix("model."))
        assert mine.dtype == dtype
        assert mine.requires_grad
        assert torch.equal(mine, parameter.to(dtype))
