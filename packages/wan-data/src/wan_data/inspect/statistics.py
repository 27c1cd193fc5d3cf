"""``wan-data inspect``: statistics of a dataset and of its packs."""

import bisect
import collections
import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from wan_data.curation.distributions import measures_table
from wan_data.index.lengths import Counts, LengthCounts
from wan_data.index.manifest import MANIFEST_NAME, Manifest, read_manifest
from wan_data.inspect.measured import measured
from wan_data.reading.blends import Part, parts_of
from wan_data.reading.datasets import read_latent_spec
from wan_data.reading.packing import Efficiency, efficiency, full_packs, latent_tokens, usable_capacity
from wan_data.shards.reader import samples_of
from wan_data.storage.files import is_there
from wan_data.storage.location import Location

# Samples whose packing is simulated.
MOST_DRAWN = 100_000


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


@dataclasses.dataclass(frozen=True)
class _Samples:
    """What is known of the samples of a part.

    Attributes:
        shards: number of its shards.
        shapes: numbers of samples by the shapes of their latents, [C, F, H, W].
        lengths: of their texts.
    """

    shards: int
    shapes: Mapping[tuple[int, ...], int]
    lengths: LengthCounts


def _samples_of(part: Part, manifest: Manifest | None) -> _Samples:
    """From the manifest if it has them, else from the shards."""
    shards = [name for name, _ in part.shards]
    shapes: collections.Counter[tuple[int, ...]] = collections.Counter()
    # Of the manifest only if the splits were not changed by hand.
    if (
        manifest is not None
        and manifest.lengths is not None
        and {*shards} == {shard.name for shard in manifest.shards if shard.split == part.split}
    ):
        for shape in manifest.shapes:
            shapes[tuple(shape.latent)] += shape.samples if shape.split == part.split else 0
        counts = {one.split: one.counts for one in manifest.lengths}
        return _Samples(len(shards), +shapes, counts.get(part.split, LengthCounts()))
    texts: collections.Counter[int] = collections.Counter()
    captions: collections.Counter[int] = collections.Counter()
    for shard in shards:
        for sample in samples_of(part.folder / shard):
            shapes[tuple(sample.latent.shape)] += 1
            texts[sample.text.shape[0]] += 1
            captions[len(str(sample.info.get("caption", "")))] += 1
    return _Samples(len(shards), shapes, LengthCounts(tuple(sorted(texts.items())), tuple(sorted(captions.items()))))


def _drawn(parts: Sequence[Mapping[int, int]], weights: Sequence[float], seed: int = 0) -> list[int]:
    """Tokens of as many draws as there are samples, or ``MOST_DRAWN``: datasets by weight, each in permutations.

    Args:
        parts: numbers of samples of each dataset by their tokens.
        weights: of the datasets.
        seed: of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    count = min(MOST_DRAWN, sum(sum(one.values()) for one in parts))
    chosen = torch.multinomial(torch.tensor(weights), count, replacement=True, generator=generator).tolist()

    def endless(samples: Mapping[int, int]) -> Iterator[int]:
        tokens = torch.tensor(sorted(samples), dtype=torch.int32)
        numbers = torch.tensor([samples[one] for one in sorted(samples)])
        while sum(samples.values()) > MOST_DRAWN:  # a permutation of more than is drawn
            places = torch.multinomial(numbers.double(), MOST_DRAWN, replacement=True, generator=generator)
            yield from tokens[places].tolist()
        values = tokens.repeat_interleave(numbers)
        while True:
            yield from values[torch.randperm(len(values), generator=generator)].tolist()

    streams = [endless(one) for one in parts]
    return [next(streams[part]) for part in chosen]


def inspect(
    path: Location,
    *,
    capacity: int | None = None,
    pad_multiple: int = 1,
    packing_buffer: int = 64,
    patch_size: tuple[int, int, int] = (1, 2, 2),
) -> dict[str, Any]:
    """Collect statistics of a dataset, or of a blend of several.

    They are those that the manifest counts; the samples of a dataset without such a manifest are read.

    Args:
        path: the dataset's folder, or the YAML file of a blend, on a disk or in a store.
        capacity: tokens of a pack; the largest sample's padded tokens if None.
        pad_multiple: packs are padded to a multiple of this many tokens.
        packing_buffer: number of samples that are packed together.
        patch_size: latent positions (frames, rows, columns) of a token.

    Returns:
        Plain values: ``splits`` -> name -> samples, shapes, text tokens, caption characters, packing of as many
        draws as there are samples, at most ``MOST_DRAWN``, and the tokens of these draws; ``measures`` -> name ->
        its distribution over the sources.

    Raises:
        ValueError: the path is no dataset, or a sample is invalid.
    """
    splits = parts_of(path)
    folders = dict.fromkeys(part.folder for parts in splits.values() for part in parts)
    manifests = {folder: read_manifest(folder) for folder in folders if is_there(folder / MANIFEST_NAME)}
    found: dict[str, Any] = {
        "path": str(path),
        "latent_fingerprint": read_latent_spec(str(path)).fingerprint if len(manifests) == len(folders) else None,
        "rejected": sum(one.index.counts.rejected for one in manifests.values()),
        "unselected": sum(one.index.counts.unselected for one in manifests.values()),
        "duplicates": sum(one.index.counts.duplicates for one in manifests.values()),
        "measures": measured(manifests),
        "splits": {},
    }
    for split, parts in splits.items():
        samples = [_samples_of(part, manifests.get(part.folder)) for part in parts]
        count = sum(sum(one.shapes.values()) for one in samples)
        if not count:
            continue
        tokens = {shape: latent_tokens(shape, patch_size) for one in samples for shape in one.shapes}
        shapes = collections.Counter[tuple[str, tuple[int, ...]]]()
        for part, one in zip(parts, samples, strict=True):
            for shape, number in one.shapes.items():
                shapes[part.name, shape] += number
        largest = max(tokens.values())
        pack_capacity = capacity or largest + -largest % pad_multiple
        by_tokens: list[collections.Counter[int]] = []
        for one in samples:
            by_tokens.append(collections.Counter())
            for shape, number in one.shapes.items():
                by_tokens[-1][tokens[shape]] += number
        drawn = _drawn(by_tokens, [part.weight for part in parts])
        packs = simulate_packing(drawn, pack_capacity, pad_multiple=pad_multiple, packing_buffer=packing_buffer)
        texts, captions = _total(one.lengths.texts for one in samples), _total(one.lengths.captions for one in samples)
        found["splits"][split] = {
            "samples": count,
            "shards": sum(one.shards for one in samples),
            "weights": {part.name: part.weight for part in parts if part.name},
            "tokens": sum(tokens[shape] * number for (_, shape), number in shapes.items()),
            "shapes": [
                {"dataset": name, "latent": list(shape), "tokens": tokens[shape], "samples": number}
                for (name, shape), number in sorted(shapes.items())
            ],
            "drawn_tokens": drawn,
            "text_lengths": texts,
            "text_tokens": _spread(texts),
            "caption_characters": _spread(captions),
            "packing": {
                "capacity": pack_capacity,
                "packs": packs.packs,
                "valid_of_capacity": packs.fill,
                "valid_of_total": packs.useful,
            },
        }
    return found


def _total(counts: Iterable[Counts]) -> Counts:
    total: collections.Counter[int] = collections.Counter()
    for pairs in counts:
        for length, number in pairs:
            total[length] += number
    return tuple(sorted(total.items()))


def _spread(counts: Counts) -> dict[str, float]:
    """Of lengths, each with the number of samples that have it, ascending."""
    ends = list(itertools.accumulate(number for _, number in counts))
    low, high = (counts[bisect.bisect_right(ends, place)][0] for place in ((ends[-1] - 1) // 2, ends[-1] // 2))
    return {"least": counts[0][0], "median": (low + high) / 2, "most": counts[-1][0]}


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
    if found["measures"]:
        console.print(measures_table(found["measures"]))
    if found["rejected"]:
        say(f"files rejected when it was prepared: {found['rejected']}")
    if found["unselected"]:
        say(f"files left out by --where: {found['unselected']}")
    if found["duplicates"]:
        say(f"near-duplicates left out by --duplicates drop: {found['duplicates']}")
