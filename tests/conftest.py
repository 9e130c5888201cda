import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from lab.pretrain import countdown_tokenizer


LLAMA_31 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64}
FAMILIES = [dict(family=Qwen3Config, head_dim=16), dict(family=Qwen3Config, tie_word_embeddings=False),
            dict(family=LlamaConfig), dict(family=LlamaConfig, rope_parameters=LLAMA_31, head_dim=12)]


@pytest.fixture
def qwen2(tmp_path):
    """Makes a random checkpoint with transformers, of Qwen2 if nothing is said: qwen2(...) -> (folder, the transformers
    model)."""
    def make(seed=0, eos=0, name="checkpoint", tokenizer=True, family=Qwen2Config, **changes):
        torch.manual_seed(seed)
        settings = dict(vocab_size=112, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                        num_key_value_heads=2, rope_theta=10000.0, tie_word_embeddings=True,
                        max_position_embeddings=512, eos_token_id=eos) | changes
        if "rope_parameters" in settings:
            del settings["rope_theta"]
        model = AutoModelForCausalLM.from_config(family(**settings)).eval()
        with torch.no_grad():
            for parameter in model.parameters():            # biases and norms too, which start as constants
                parameter.add_(torch.randn_like(parameter) * 0.2)
        model.generation_config.eos_token_id = eos
        folder = tmp_path / name
        model.save_pretrained(folder)
        if tokenizer:
            countdown_tokenizer().save_pretrained(folder)
        return folder, model
    return make
