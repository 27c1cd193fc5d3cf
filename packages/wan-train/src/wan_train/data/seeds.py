"""Seeds and generators from a purpose and numbers, independent of any global state."""

import hashlib

import torch


def seed_for(purpose: str, *numbers: int) -> int:
    """A seed of 63 bits: a hash of the purpose and the numbers."""
    digest = hashlib.sha256(repr((purpose, *numbers)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator_for(purpose: str, *numbers: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator with that seed."""
    return torch.Generator(device).manual_seed(seed_for(purpose, *numbers))
