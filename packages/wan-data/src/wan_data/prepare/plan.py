"""``wan-data plan``: the samples, sizes and time of a preparation, before anything is encoded."""

import collections
import dataclasses
import functools
import itertools
import math
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from wan_data.curation.distributions import distributions, measures_table
from wan_data.curation.measures import MEASURE_NAMES
from wan_data.index.manifest import MANIFEST_NAME, read_manifest
from wan_data.index.records import DUPLICATE, LEFT_OUT, UNSELECTED
from wan_data.prepare.near_duplicates import without_duplicates
from wan_data.prepare.planned_source import ProbeResult, RejectedSource
from wan_data.prepare.probing.results import Again, ProbeResults, planned_of_json
from wan_data.prepare.settings import PrepareSettings, require_same_settings
from wan_data.prepare.shard_batches import with_splits
from wan_data.reading.packing import latent_tokens
from wan_model.system.units import format_bytes, format_seconds
from wan_model.video_shape import TEMPORAL_STRIDE

# Rough number of letters in a token of the text encoder, and the width of the released one.
_LETTERS_PER_TOKEN = 4
_TEXT_WIDTH = 4096
_CHANNELS, _SPATIAL_STRIDE = 16, 8  # of the latents of Wan 2.1


def refusal_of(dataset: Path, settings: PrepareSettings, name: str) -> str | None:
    """Why ``prepare`` would add nothing to the dataset in a folder; None if it would, or if there is none.

    Args:
        dataset: the folder.
        settings: of the preparation.
        name: of the dataset, for the message.
    """
    if not (dataset / MANIFEST_NAME).exists():
        return None
    try:
        require_same_settings(read_manifest(dataset).settings, settings, name)
    except ValueError as error:
        return str(error)
    return None


def make_plan(results: ProbeResults, settings: PrepareSettings, *, rate: float | None = None) -> dict[str, Any]:
    """Summarise what ``prepare`` would make of probed sources.

    Args:
        results: of probing the sources.
        settings: of the preparation.
        rate: pixels (of all frames) that the autoencoder encodes per second; None if it was not measured.

    Returns:
        Plain values: ``buckets`` (one row per split and shape), ``rejected`` (reasons with their sources),
        ``unselected`` and ``duplicates`` (what ``--where`` and ``--duplicates drop`` leave out), ``named_duplicates``,
        ``measures`` (their distributions), totals, bytes and, given a rate, seconds.
    """
    with (
        tempfile.TemporaryDirectory(prefix="wan-data-") as folder,
        without_duplicates(results, settings, Path(folder)) as decided,
    ):
        return _plan_of(decided, settings, rate)


def _plan_of(results: ProbeResults, settings: PrepareSettings, rate: float | None) -> dict[str, Any]:
    buckets: collections.Counter[tuple[str, int, int, int]] = collections.Counter()
    text_bytes = unused = pixels = accepted = frames_of_all = 0
    named: list[str] = []
    for entry, split in with_splits(Again(lambda: results.entries(accepted=True)), settings, None):
        source = planned_of_json(entry.value, entry.file)
        accepted += 1
        if source.duplicate_of is not None:
            named.append(f"{source.name}: of {source.duplicate_of}")
        frames_of_all += source.info.frames
        unused += source.info.frames - sum(window.length for window in source.windows)
        tokens = min(settings.text_length, len(source.caption) // _LETTERS_PER_TOKEN + 2)
        text_bytes += 4 * _TEXT_WIDTH * tokens * len(source.windows)
        for window in source.windows:
            buckets[split, window.length, source.size.height, source.size.width] += 1
    rows: list[dict[str, Any]] = []
    for (split, frames, height, width), samples in sorted(buckets.items()):
        latent = (_CHANNELS, (frames - 1) // TEMPORAL_STRIDE + 1, height // _SPATIAL_STRIDE, width // _SPATIAL_STRIDE)
        pixels += samples * frames * height * width
        rows.append(
            {
                "split": split,
                "frames": frames,
                "height": height,
                "width": width,
                "samples": samples,
                "tokens": latent_tokens(latent),
                "latent_bytes": samples * 4 * math.prod(latent),
            }
        )
    kinds: dict[str, list[RejectedSource]] = collections.defaultdict(list)
    curated: dict[str, list[str]] = {UNSELECTED: [], DUPLICATE: []}
    for rejected in results.rejected():
        if rejected.verdict in LEFT_OUT:
            curated[rejected.verdict].append(f"{rejected.name}: {rejected.reason}")
        else:
            kinds[_kind(rejected.reason)].append(rejected)
    by_split: collections.Counter[str] = collections.Counter()
    for (split, *_), count in buckets.items():
        by_split[split] += count
    return {
        "sources": accepted + sum(len(one) for one in kinds.values()) + sum(len(one) for one in curated.values()),
        "accepted": accepted,
        "samples": sum(row["samples"] for row in rows),
        "shards": sum(-(-count // settings.samples_per_shard) for count in by_split.values()),
        "tokens": sum(row["samples"] * row["tokens"] for row in rows),
        "buckets": rows,
        "frames": frames_of_all,
        "frames_unused": unused,
        "rejected": [
            {
                "reason": equal.pop() if len(equal := {one.reason for one in sources}) == 1 else kind,
                "sources": [f"{one.name}: {one.reason}" for one in sources],
            }
            for kind, sources in sorted(kinds.items())
        ],
        "unselected": curated[UNSELECTED],
        "duplicates": curated[DUPLICATE],
        "named_duplicates": named,
        "measures": _measures(results) if settings.measuring else {},
        "latent_bytes": sum(row["latent_bytes"] for row in rows),
        "text_bytes_about": text_bytes,
        "pixels": pixels,
        "seconds_about": None if rate is None else pixels / rate,
    }


def _measures(results: ProbeResults) -> dict[str, dict[str, Any]]:
    """The distributions of the measures of all sources that could be decoded."""
    sources: Iterator[ProbeResult] = itertools.chain(results.accepted(), results.rejected())
    found = distributions(
        (source.name, [getattr(source.measures, name) for name in MEASURE_NAMES])
        for source in sources
        if source.measures is not None
    )
    return {name: dataclasses.asdict(one) for name, one in found.items()}


def _kind(reason: str) -> str:
    """The reason without numbers and file names, by which equal reasons are grouped."""
    # Not the digits of a name, such as UTF-8.
    return re.sub(r"(?<![\w-])\d+([.x]\d+)*", "N", re.sub(r"\S+\.(jsonl?|txt|csv|parquet)\b", "FILE", reason))


def measured_rate(model: str, settings: PrepareSettings, device: str) -> float:
    """Measure how many pixels (of all frames) the autoencoder encodes per second, in the second of two small windows.

    Raises:
        ValueError: the model cannot be loaded.
    """
    import torch

    from wan_data.prepare.encoding.encoder import choose_device, encode_batch, load_codec

    codec = load_codec(model, settings, choose_device(device), vae=True, text=False)
    frames = min(5, settings.window_lengths.longest)
    size = min(size for sizes in settings.resolutions() for size in sizes)
    window = torch.zeros(frames, size.height, size.width, 3, dtype=torch.uint8)
    seconds = 0.0
    for _ in range(2):
        start = time.perf_counter()
        encode_batch(codec, [window])
        seconds = time.perf_counter() - start
    return frames * size.height * size.width / seconds


def print_plan(plan: dict[str, Any], console: Console | None = None) -> None:
    """Print the result of ``make_plan`` as a table."""
    console = console or Console()
    say = functools.partial(console.print, markup=False, highlight=False, soft_wrap=True)
    table = Table(
        title=f"{plan['samples']} samples of {plan['accepted']} of {plan['sources']} files", title_justify="left"
    )
    for column in ("split", "frames x height x width", "samples", "tokens a sample", "latents"):
        table.add_column(column, justify="left" if column == "split" else "right")
    for row in plan["buckets"]:
        shape = f"{row['frames']}x{row['height']}x{row['width']}"
        table.add_row(row["split"], shape, str(row["samples"]), f"{row['tokens']:,}", format_bytes(row["latent_bytes"]))
    console.print(table)
    if plan["frames"]:
        share = plan["frames_unused"] / plan["frames"]
        say(f"{plan['frames_unused']:,} of {plan['frames']:,} frames ({share:.1%}) are in no window")
    say(
        f"{plan['shards']} shards, {plan['tokens']:,} tokens, {format_bytes(plan['latent_bytes'])} of latents and "
        f"about {format_bytes(plan['text_bytes_about'])} of text embeddings"
    )
    if plan["measures"]:
        console.print(measures_table(plan["measures"]))
    if plan["seconds_about"] is not None:
        say(f"encoding the videos takes about {format_seconds(plan['seconds_about'])} on one such device")
    for kind in plan["rejected"]:
        say(f"\n{len(kind['sources'])} rejected: {kind['reason']}")
        for source in kind["sources"][:5]:
            say(f"  {source.removesuffix(': ' + kind['reason'])}")
        if len(kind["sources"]) > 5:
            say(f"  and {len(kind['sources']) - 5} more (--json lists all)")
    for key, title in (
        ("unselected", "left out by --where"),
        ("duplicates", "left out by --duplicates drop"),
        ("named_duplicates", "near-duplicates, in the split of the file that they are like"),
    ):
        if lines := plan[key]:
            say(f"\n{len(lines)} {title}:")
            for line in lines[:5]:
                say(f"  {line}")
            if len(lines) > 5:
                say(f"  and {len(lines) - 5} more (--json lists all)")
