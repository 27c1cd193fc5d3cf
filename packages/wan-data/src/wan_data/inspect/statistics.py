"""``wan-data inspect``: statistics of a dataset and of its packs."""

import collections
import functools
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from wan_data.reading.blends import parts_of
from wan_data.reading.datasets import read_latent_spec
from wan_data.reading.packing import Efficiency, efficiency, full_packs, latent_tokens, usable_capacity
from wan_data.shards.energon_metadata import check_metadata
from wan_data.shards.manifest import MANIFEST_NAME, read_manifest
from wan_data.shards.reader import samples_of


def simulate_packing(
    tokens: Sequence[int], capacity: int, *, pad_multiple: int = 1, packing_buffer: int = 64
) -> Efficiency:
    """How full packs are with the loader's algorithm, and how much of them is padding.

    Args:
        tokens: of each sample, in the order in which they are drawn.
        capacity: tokens of a pack, padding included.
        pad_multiple: packs are padded to a multiple of this many tokens.
        packing_buffer: number of samples that are packed together.

    Raises:
        ValueError: a sample is larger than a pack.
    """
    packs: list[list[int]] = []
    usable, carried, place = usable_capacity(capacity, pad_multiple), list[int](), 0
    while place < len(tokens) or carried:
        fresh = tokens[place : place + packing_buffer - len(carried)]
        place += len(fresh)
        lengths = [*carried, *fresh]
        # At the end no sample is carried over.
        chosen, rest = full_packs(lengths, usable, len(carried) if place < len(tokens) else len(lengths))
        packs += [[lengths[i] for i in pack] for pack in chosen]
        carried = [lengths[i] for i in rest]
    return efficiency(packs, capacity, pad_multiple)


def _drawn(parts: Sequence[Sequence[int]], weights: Sequence[float], seed: int = 0) -> list[int]:
    """Tokens of as many draws as there are samples: datasets by weight, the samples of each in permutations."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(map(len, parts))
    chosen = torch.multinomial(torch.tensor(weights), count, replacement=True, generator=generator).tolist()

    def endless(values: Sequence[int]) -> Iterator[int]:
        while True:
            yield from (values[index] for index in torch.randperm(len(values), generator=generator).tolist())

    streams = [endless(values) for values in parts]
    return [next(streams[part]) for part in chosen]


def inspect(
    path: Path,
    *,
    capacity: int | None = None,
    pad_multiple: int = 1,
    packing_buffer: int = 64,
    patch_size: tuple[int, int, int] = (1, 2, 2),
) -> dict[str, Any]:
    """Read every sample of a dataset, or of a blend of several, and collect statistics.

    Args:
        path: the dataset's folder, or the YAML file of a blend.
        capacity: tokens of a pack; the largest sample's padded tokens if None.
        pad_multiple: packs are padded to a multiple of this many tokens.
        packing_buffer: number of samples that are packed together.
        patch_size: latent positions (frames, rows, columns) of a token.

    Returns:
        Plain values: ``splits`` -> name -> samples, shapes, text tokens, caption characters, packing of as many
        draws as there are samples, and the tokens of these draws.

    Raises:
        ValueError: the path is no dataset, or a sample is invalid.
    """
    splits = parts_of(path)
    folders = dict.fromkeys(part.folder for parts in splits.values() for part in parts)
    manifests = [read_manifest(folder) for folder in folders if (folder / MANIFEST_NAME).exists()]
    found: dict[str, Any] = {
        "path": str(path),
        "latent_fingerprint": read_latent_spec(path).fingerprint if len(manifests) == len(folders) else None,
        "rejected": [source.path for one in manifests for source in one.sources if source.verdict == "rejected"],
        "splits": {},
    }
    for split, parts in splits.items():
        shards = [(part, shard) for part in parts for shard in check_metadata(part.folder)[part.split]]
        samples = [
            (part, tuple(sample.latent.shape), sample.text.shape[0], len(str(sample.info.get("caption", ""))))
            for part, shard in shards
            for sample in samples_of(part.folder / shard)
        ]
        if not samples:
            continue
        tokens = {shape: latent_tokens(shape, patch_size) for _, shape, _, _ in samples}
        shapes = collections.Counter((part.name, shape) for part, shape, _, _ in samples)
        pack_capacity = capacity or max(tokens.values()) + -max(tokens.values()) % pad_multiple
        drawn = _drawn(
            [[tokens[shape] for of, shape, _, _ in samples if of == part] for part in parts],
            [part.weight for part in parts],
        )
        packs = simulate_packing(drawn, pack_capacity, pad_multiple=pad_multiple, packing_buffer=packing_buffer)
        text, caption = [length for _, _, length, _ in samples], [length for *_, length in samples]
        found["splits"][split] = {
            "samples": len(samples),
            "shards": len(shards),
            "weights": {part.name: part.weight for part in parts if part.name},
            "tokens": sum(tokens[shape] for _, shape, _, _ in samples),
            "shapes": [
                {"dataset": name, "latent": list(shape), "tokens": tokens[shape], "samples": count}
                for (name, shape), count in sorted(shapes.items())
            ],
            "drawn_tokens": drawn,
            "text_lengths": sorted(text),
            "text_tokens": _spread(text),
            "caption_characters": _spread(caption),
            "packing": {
                "capacity": pack_capacity,
                "packs": packs.packs,
                "valid_of_capacity": packs.fill,
                "valid_of_total": packs.useful,
            },
        }
    return found


def _spread(values: Sequence[int]) -> dict[str, float]:
    return {"least": min(values), "median": statistics.median(values), "most": max(values)}


def print_tables(found: dict[str, Any], console: Console | None = None) -> None:
    """Print the result of ``inspect`` as tables."""
    console = console or Console()
    say = functools.partial(console.print, soft_wrap=True)
    for split, values in found["splits"].items():
        table = Table(title=f"{split}: {values['samples']} samples in {values['shards']} shards", title_justify="left")
        blended = bool(values["weights"])
        for column in (*(("dataset", "weight") if blended else ()), "latent", "tokens", "samples"):
            table.add_column(column, justify="right")
        for shape in values["shapes"]:
            name = shape["dataset"]
            columns = (name, f"{values['weights'][name]:g}") if blended else ()
            table.add_row(*columns, "x".join(map(str, shape["latent"])), str(shape["tokens"]), str(shape["samples"]))
        console.print(table)
        for name in ("text_tokens", "caption_characters"):
            spread = values[name]
            name = name.replace("_", " ")
            say(f"{name}: {spread['least']} to {spread['most']}, median {spread['median']:g}")
        packing = values["packing"]
        say(
            f"packs of {packing['capacity']} tokens: {packing['packs']}, "
            f"{packing['valid_of_capacity']:.1%} of their capacity filled, "
            f"{packing['valid_of_total']:.1%} of computed tokens valid (packing efficiency)"
        )
    if found["rejected"]:
        say(f"files rejected when it was prepared: {len(found['rejected'])}")
