"""Random numbers that depend on what they are for, and on nothing that happened before."""

import hashlib

import torch


def seeded_generator(
    seed: int, step: int, stream: str, device: str | torch.device = "cpu"
) -> torch.Generator:
    """A generator that (seed, step, stream) alone determine: an evaluation cannot disturb training,
    and a resumed run draws what the first would have drawn."""
    digest = hashlib.sha256(f"{seed} {step} {stream}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))
