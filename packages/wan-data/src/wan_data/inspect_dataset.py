"""``wan-data inspect``: what a dataset holds, and how well it packs."""

import collections
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from wan_data.energon_metadata import check_metadata
from wan_data.manifest import MANIFEST_NAME, read_manifest
from wan_data.packing import Efficiency, efficiency, full_packs, usable_capacity
from wan_data.shard_reader import samples_of


def simulate_packing(
    tokens: Sequence[int], capacity: int, *, pad_multiple: int = 1, packing_buffer: int = 64, seed: int = 1234
) -> Efficiency:
    """How full the packs of one epoch are, with the loader's own algorithm on a shuffled order.

    Args:
        tokens: of each sample.
        capacity: tokens of a pack, padding included.
        pad_multiple: what packs are padded to.
        packing_buffer: samples looked at together.
        seed: of the order.

    Raises:
        ValueError: a sample is larger than a pack.
    """
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed)).tolist()
    packs: list[list[int]] = []
    usable, carried, place = usable_capacity(capacity, pad_multiple), list[int](), 0
    while place < len(order) or carried:
        fresh = order[place : place + packing_buffer - len(carried)]
        place += len(fresh)
        lengths = [*carried, *(tokens[index] for index in fresh)]
        # At the end nothing is kept back.
        chosen, rest = full_packs(lengths, usable, len(carried) if place < len(order) else len(lengths))
        packs += [[lengths[i] for i in pack] for pack in chosen]
        carried = [lengths[i] for i in rest]
    return efficiency(packs, capacity, pad_multiple)


def inspect(
    path: Path,
    *,
    capacity: int | None = None,
    pad_multiple: int = 1,
    packing_buffer: int = 64,
    patch_size: tuple[int, int, int] = (1, 2, 2),
) -> dict[str, Any]:
    """Read every sample of a dataset, safely, and count.

    Args:
        path: the dataset's folder.
        capacity: tokens of a pack; the largest sample's padded tokens if None.
        pad_multiple: what packs are padded to.
        packing_buffer: samples looked at together.
        patch_size: latent positions (frames, rows, columns) of a token.

    Returns:
        Plain values: ``splits`` -> name -> samples, shapes, text tokens, caption characters, packing.

    Raises:
        ValueError: it is no dataset, or a sample is refused.
    """
    parts = check_metadata(Path(path))
    manifest = read_manifest(path) if (path / MANIFEST_NAME).exists() else None
    found: dict[str, Any] = {
        "path": str(path),
        "latent_fingerprint": manifest.latent_spec.fingerprint if manifest else None,
        "rejected": [source.path for source in manifest.sources if source.verdict == "rejected"] if manifest else [],
        "splits": {},
    }
    for split, shards in parts.items():
        samples = [
            (tuple(sample.latent.shape), sample.text.shape[0], len(str(sample.info.get("caption", ""))))
            for shard in shards
            for sample in samples_of(path / shard)
        ]
        if not samples:
            continue
        tokens = [
            (shape[1] // patch_size[0]) * (shape[2] // patch_size[1]) * (shape[3] // patch_size[2])
            for shape, _, _ in samples
        ]
        shapes = collections.Counter(zip([shape for shape, _, _ in samples], tokens, strict=True))
        room = capacity or max(tokens) + -max(tokens) % pad_multiple
        packs = simulate_packing(tokens, room, pad_multiple=pad_multiple, packing_buffer=packing_buffer)
        found["splits"][split] = {
            "samples": len(samples),
            "shards": len(shards),
            "tokens": sum(tokens),
            "shapes": [
                {"latent": list(shape), "tokens": count_tokens, "samples": count}
                for (shape, count_tokens), count in sorted(shapes.items())
            ],
            "text_lengths": sorted(length for _, length, _ in samples),
            "text_tokens": _spread([length for _, length, _ in samples]),
            "caption_characters": _spread([length for _, _, length in samples]),
            "packing": {
                "capacity": room,
                "packs": packs.packs,
                "valid_of_capacity": packs.fill,
                "valid_of_total": packs.useful,
            },
        }
    return found


def _spread(values: Sequence[int]) -> dict[str, float]:
    return {"least": min(values), "median": statistics.median(values), "most": max(values)}


def print_tables(found: dict[str, Any], console: Console | None = None) -> None:
    """The result of ``inspect``, for people."""
    console = console or Console()
    for split, values in found["splits"].items():
        table = Table(title=f"{split}: {values['samples']} samples in {values['shards']} shards", title_justify="left")
        for column in ("latent", "tokens", "samples"):
            table.add_column(column, justify="right")
        for shape in values["shapes"]:
            table.add_row("x".join(map(str, shape["latent"])), str(shape["tokens"]), str(shape["samples"]))
        console.print(table)
        for name in ("text_tokens", "caption_characters"):
            spread = values[name]
            name = name.replace("_", " ")
            console.print(f"{name}: {spread['least']} to {spread['most']}, median {spread['median']:g}")
        packing = values["packing"]
        console.print(
            f"packs of {packing['capacity']} tokens: {packing['packs']}, "
            f"{packing['valid_of_capacity']:.1%} of their capacity filled, "
            f"{packing['valid_of_total']:.1%} of computed tokens valid"
        )
    if found["rejected"]:
        console.print(f"{len(found['rejected'])} files were rejected when it was prepared")
