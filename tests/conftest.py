import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from lab.pretrain import countdown_tokenizer


@pytest.fixture
def qwen2(tmp_path):
    """Makes a random Qwen2 checkpoint with transformers: qwen2(...) -> (folder, the transformers model)."""
    def make(seed=0, eos=0, name="checkpoint", tokenizer=True, **changes):
        torch.manual_seed(seed)
        settings = dict(vocab_size=112, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                        num_key_value_heads=2, rope_theta=10000.0, tie_word_embeddings=True,
                        max_position_embeddings=512, eos_token_id=eos) | changes
        model = Qwen2ForCausalLM(Qwen2Config(**settings)).eval()
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
