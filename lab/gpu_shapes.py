"""The models that lab.gpu measures: the embedded one, and random weights in the shapes of real ones,
made on the card. How fast a model is does not depend on what its weights are."""

from dataclasses import dataclass

import torch

from model import Transformer, load
from plumbing.pretrained import named_as_in_transformers, open_pretrained


@dataclass(frozen=True)
class Shape:
    name: str
    config: dict | None  # None: the embedded model
    dtype: torch.dtype  # of the weights
    slots: tuple[int, ...]  # decode: sequences at a time
    prompt: int  # decode: tokens of a prompt
    new_tokens: int  # decode: tokens of a response
    # decode: two lengths of responses, whose difference in time is that of steps alone, without
    # prefill and capture. Both fit the first cache of a GPU, 128 positions.
    steady: tuple[int, int]
    answers: int  # update: of one optimizer step
    lengths: tuple[int, int]  # update: tokens of a prompt and of a response
    recompute: bool = False
    # Seconds that a part may take on the card, for the budget.
    decode_seconds: float = 30
    update_seconds: float = 20


QWEN = dict(model_type="qwen2", hidden_act="silu", rms_norm_eps=1e-6, rope_theta=1e6)
SMOLLM_135M = dict(
    model_type="llama",
    hidden_act="silu",
    rms_norm_eps=1e-5,
    rope_theta=1e5,
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
    max_position_embeddings=8192,
)
QWEN_1_5B = QWEN | dict(
    vocab_size=151936,
    hidden_size=1536,
    intermediate_size=8960,
    num_hidden_layers=28,
    num_attention_heads=12,
    num_key_value_heads=2,
    tie_word_embeddings=True,
    max_position_embeddings=32768,
)
QWEN_7B = QWEN | dict(
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    tie_word_embeddings=False,
    max_position_embeddings=32768,
)
TINY = QWEN | dict(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=False,
    max_position_embeddings=512,
)

USUAL = dict(
    dtype=torch.bfloat16,
    slots=(64, 512),
    prompt=32,
    new_tokens=128,
    steady=(40, 88),
    answers=32,
    lengths=(128, 384),
)
SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            "tiny", TINY, torch.bfloat16, slots=(4,), prompt=5, new_tokens=9,
            steady=(8, 16), answers=4, lengths=(6, 10), decode_seconds=0, update_seconds=0,
        ),
        Shape(
            "embedded", None, torch.float32, slots=(64, 512), prompt=32, new_tokens=128,
            steady=(40, 88), answers=64, lengths=(32, 96), decode_seconds=15, update_seconds=10,
        ),
        Shape("135M", SMOLLM_135M, **USUAL),
        Shape("1.5B", QWEN_1_5B, **USUAL, decode_seconds=40),
        Shape(
            "7B", QWEN_7B, **(USUAL | dict(new_tokens=64)), recompute=True, decode_seconds=45,
            update_seconds=40,
        ),
    )
}  # fmt: skip


def config_of(shape: Shape) -> dict:
    return shape.config or open_pretrained("base").config


def make_model(shape: Shape, device: torch.device) -> Transformer:
    if shape.config is None:
        return load("base", device, shape.dtype)[0]
    return random_model(shape.config, device, shape.dtype)


def random_model(
    config: dict, device: torch.device, dtype: torch.dtype, std: float = 0.02
) -> Transformer:
    """Drawn on the device: no weight passes through the host's memory. With a small `std` the logits
    are those of a nearly uniform distribution, as before a pre-training."""
    with torch.device("meta"):
        model = Transformer(config)
    model = model.to(dtype).to_empty(device=device)
    random = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, std, generator=random)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    model.eos_ids = (0,)
    return model


def peer_of(model: Transformer):
    """transformers' model over the same weights, in the same memory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**model.config)
    with torch.device(model.head.device):
        peer = AutoModelForCausalLM.from_config(config, dtype=model.head.dtype)
    weights = {"lm_head.weight": model.head.detach()} | named_as_in_transformers(model)
    peer.load_state_dict(weights, assign=True)
    peer.tie_weights()
    return peer
