"""Which attention kernel model.py asks of CUDA, on a pretended device, which chooses as CUDA does."""

import json

from pretended import ROOT, pretended_python

CASES = f"""
import contextlib, json, sys
sys.path.append({str(ROOT / "tests")!r})
import torch
from decode_graph_cases import random_model

tokens = torch.arange(1, 13).view(2, 6)
position = torch.arange(6).expand(2, -1)


def run(device, autocast=False):
    model = random_model(device)
    context = torch.autocast(device, torch.bfloat16) if autocast else contextlib.nullcontext()
    with context:
        hidden = model(tokens.to(device), position.to(device))
    hidden.float().sin().sum().backward()
    projection = model.layers[0].self_attn.k_proj.weight
    return hidden.detach().cpu(), projection.grad.cpu()


def kernels(**options):
    with pretend.Record({str(ROOT)!r}) as record:
        result = run("cuda", **options)
    chosen = [name for name in record.by_op if "attention ->" in name]
    return chosen, result


chosen, (hidden, gradient) = kernels()
chosen_in_autocast, _ = kernels(autocast=True)
same_hidden, same_gradient = run("cpu")
print(json.dumps(dict(
    float32=chosen,
    autocast=chosen_in_autocast,
    hidden=float((hidden - same_hidden).abs().max()),
    gradient=float((gradient - same_gradient).abs().max() / same_gradient.abs().max()),
)))
"""


def test_grouped_heads_never_meet_the_kernel_that_keeps_all_scores():
    """In float32 keys and values are repeated for their query heads: a fast kernel, and the hidden
    states and gradients of a CPU, where they are not repeated. In bfloat16 the fast kernel knows
    grouped heads."""
    found = json.loads(pretended_python(CASES))
    assert found["float32"] == ["scaled_dot_product_attention -> efficient"]
    assert found["autocast"] == ["scaled_dot_product_attention -> flash"]
    assert found["hidden"] < 1e-5
    assert found["gradient"] < 1e-5
