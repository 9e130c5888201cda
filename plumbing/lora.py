"""LoRA (Hu et al., arXiv 2106.09685): beside each linear layer of attention and MLP two thin
matrices, which alone are trained.

What training changes in a layer's weights W [out, in] is of low rank: W + s B A, with A [rank, in],
B [out, rank] and s = alpha / rank. W has no gradient and no moments, only A and B have. A starts
with random numbers and B with zeros, so that nothing is changed at first: PEFT's default, and its
names. No dropout, and the head, the embedding, norms and biases stay as they are.

W has the type of --weights. A and B are always float32, so they need no master, and autocast computes
with both alike. Weight decay pulls A and B to 0, and so the sum to the weights of the base.

The sampler decodes with a copy of the model, in which s B A is added to the weights anew for every
rollout: as fast as a model without LoRA, at the price of that copy.
"""

import copy
import json
import math
from pathlib import Path
from typing import Iterator

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plumbing.seeds import seeded_generator

MATRICES = ("lora_A", "lora_B")


class LoraLinear(nn.Module):
    """In the place of a linear layer, whose weights it takes over."""

    def __init__(
        self, linear: nn.Linear, rank: int, alpha: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.rank = rank
        self.alpha = alpha
        a = torch.empty(rank, linear.in_features)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        b = torch.zeros(linear.out_features, rank)
        device = linear.weight.device
        self.lora_A = nn.Parameter(a.to(device))
        self.lora_B = nn.Parameter(b.to(device))

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        change = F.linear(F.linear(x, self.lora_A), self.lora_B)
        return F.linear(x, self.weight, self.bias) + self.scale * change

    def merged(self) -> Tensor:
        """W + s B A, added in float32, in the type of W, [out, in]."""
        change = self.scale * (self.lora_B @ self.lora_A)
        return (self.weight.float() + change).to(self.weight.dtype)


def add_adapters(model: nn.Module, rank: int, alpha: int, seed: int) -> None:
    """A and B for all linear layers of a model.Transformer but its head; the rest is frozen."""
    model.requires_grad_(False)
    # Numbers of a generator on the CPU: the same A on every device, and in every process.
    generator = seeded_generator(seed, 0, "lora")
    for name, layer in list(model.named_modules()):
        if name.startswith("layers.") and isinstance(layer, nn.Linear):
            model.set_submodule(name, LoraLinear(layer, rank, alpha, generator))


def adapted_layers(model: nn.Module) -> dict[str, LoraLinear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLinear)}


@torch.no_grad()
def merged_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and weights of the same model without LoRA, made one at a time. A model without LoRA:
    its own."""
    adapted = adapted_layers(model)
    for name, weight in model.state_dict().items():
        layer, _, kind = name.rpartition(".")
        if kind in MATRICES:
            continue
        if layer in adapted and kind == "weight":
            weight = adapted[layer].merged()
        yield name, weight


@torch.no_grad()
def merged_copy(model: nn.Module) -> nn.Module:
    """A copy without LoRA that computes the same."""
    copied = copy.deepcopy(model)
    for name, layer in adapted_layers(copied).items():
        width_out, width_in = layer.weight.shape
        plain = nn.Linear(width_in, width_out, device="meta")
        plain.weight = nn.Parameter(layer.merged())
        plain.bias = layer.bias
        copied.set_submodule(name, plain)
    return copied


def save_adapter(model: nn.Module, folder: Path, base: str) -> None:
    """A new folder with what PEFT's PeftModel.from_pretrained loads. base: the folder or hub id of
    the model that it belongs to."""
    layers = adapted_layers(model)
    matrices = {}
    for name, layer in layers.items():
        for matrix in MATRICES:
            full_name = f"base_model.model.model.{name}.{matrix}.weight"
            matrices[full_name] = getattr(layer, matrix).detach().cpu().contiguous()
    any_layer = next(iter(layers.values()))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": any_layer.rank,
        "lora_alpha": any_layer.alpha,
        "target_modules": sorted({name.rpartition(".")[2] for name in layers}),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    folder.mkdir()
    safetensors.torch.save_file(
        matrices, folder / "adapter_model.safetensors", metadata={"format": "pt"}
    )
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
