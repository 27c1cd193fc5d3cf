"""Generators seeded by what they are for, never by what ran before."""

import hashlib

import torch


def generator_for(purpose: str, *numbers: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that depends on the purpose and the numbers alone."""
    digest = hashlib.sha256(repr((purpose, *numbers)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
