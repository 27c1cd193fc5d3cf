"""Datasets of given latents, without videos, a codec or a manifest."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from wan_data.shards.energon_metadata import write_metadata
from wan_data.shards.writer import Sample, ShardWriter


def write_latent_shards(folder: Path, shards: Iterable[tuple[str, Iterable[Tensor]]], *, text_tokens: int = 3) -> None:
    """Write a dataset.

    Args:
        folder: made if absent.
        shards: the split and the latents [C, F, H, W] of each shard. The keys are ``key``, the number of the shard and
            three digits for the number of the sample: ``key1007``.
        text_tokens: tokens of every text.
    """
    folder.mkdir(exist_ok=True)
    records = []
    for number, (split, latents) in enumerate(shards):
        with ShardWriter(folder, number, split) as shard:
            for index, latent in enumerate(latents):
                text = torch.zeros(text_tokens, 8)
                shard.write(Sample(f"key{number}{index:03d}", latent, text, {"caption": "x"}))
        assert shard.record is not None
        records.append(shard.record)
    write_metadata(folder, records)
