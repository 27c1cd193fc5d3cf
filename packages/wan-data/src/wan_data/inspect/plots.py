"""Plots: a contact sheet of decoded latents, and the plots of ``wan-data inspect``."""

import collections
import hashlib
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wan_data.inspect.statistics import simulate_packing
from wan_data.shards.energon_metadata import check_metadata
from wan_data.shards.reader import StoredSample, samples_of
from wan_data.storage.location import Location
from wan_model.codec.latent_codec import LatentCodec
from wan_model.system.files import atomic_write

_FRAMES = 4  # of a sample, first to last


def new_figure(columns: int, rows: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """A figure of a size in inches, and its axes [rows, columns]."""
    # Not pyplot, which keeps every figure in memory and selects a window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure as a PNG."""
    with atomic_write(path) as file:
        figure.savefig(file, dpi=110, format="png")


def choose_samples(folder: Location, split: str, count: int, seed: int) -> list[StoredSample]:
    """Choose samples of a split by a seed, without holding a whole split in memory.

    Raises:
        ValueError: the folder is no dataset, or has no such split.
    """
    parts = check_metadata(folder)
    if not parts.get(split):
        raise ValueError(f"{folder} has no split {split!r}; it has {', '.join(name for name in parts if parts[name])}")
    chosen: list[tuple[str, StoredSample]] = []
    for shard in parts[split]:
        for sample in samples_of(folder / shard):
            chosen.append((hashlib.sha256(f"{seed}\n{sample.key}".encode()).hexdigest(), sample))
        chosen = sorted(chosen, key=lambda pair: pair[0])[:count]
    return [sample for _, sample in chosen]


_LONGEST_NAME = 300


def contact_sheet(samples: Sequence[StoredSample], codec: LatentCodec, path: Path) -> None:
    """Write a PNG with some frames of each sample, decoded from its latent, above its caption.

    Args:
        samples: the samples to show.
        codec: a codec with its autoencoder.
        path: of the PNG.
    """
    figure, axes = new_figure(_FRAMES, len(samples), (3.2 * _FRAMES, 2.6 * len(samples)))
    for row, sample in zip(axes, samples, strict=True):
        video = codec.decode_video(sample.latent[None].float())[0].cpu()
        frames = video.shape[1]
        for column, axis in enumerate(row):
            axis.axis("off")
            number = round(column * (frames - 1) / (_FRAMES - 1))
            if column and number == round((column - 1) * (frames - 1) / (_FRAMES - 1)):
                continue
            axis.imshow(np.asarray((video[:, number].permute(1, 2, 0) + 1) / 2).clip(0, 1))
            axis.set_title(f"frame {number + 1} of {frames}", fontsize=7)
        size = "x".join(str(side) for side in video.shape[1:])
        caption = textwrap.shorten(str(sample.info.get("caption", "")), 300)
        source = str(sample.info.get("video_path", ""))[-_LONGEST_NAME:]
        name = f"{sample.key}, {source}, {size}"
        text = "\n".join([*textwrap.wrap(name, 150), *textwrap.wrap(caption, 150)])
        row[0].text(0, -0.04, text, transform=row[0].transAxes, fontsize=8, va="top", parse_math=False)
    save_figure(figure, path)


def plot_statistics(found: dict[str, Any], path: Path, *, pad_multiple: int = 1, packing_buffer: int = 64) -> None:
    """Write a PNG with histograms of samples, texts and measures, and the fill of packs of several capacities.

    Args:
        found: the result of ``wan_data.inspect.statistics.inspect``.
        path: of the PNG.
        pad_multiple, packing_buffer: as for ``inspect``.
    """
    splits, measures = found["splits"], found["measures"]
    rows = len(splits) + -(-len(measures) // 3)
    figure, axes = new_figure(3, rows, (15, 4 * rows))
    _plot_measures(measures, axes[len(splits) :].flat)
    for row, (name, values) in zip(axes[: len(splits)], splits.items(), strict=True):
        by_tokens: collections.Counter[int] = collections.Counter()
        for shape in values["shapes"]:
            by_tokens[shape["tokens"]] += shape["samples"]
        tokens = sorted(by_tokens)
        row[0].bar([str(count) for count in tokens], [by_tokens[count] for count in tokens])
        row[0].set(title=f"{name}: {values['samples']} samples", xlabel="tokens of a sample", ylabel="samples")
        row[0].tick_params(axis="x", rotation=90)
        lengths, counts = zip(*values["text_lengths"], strict=True)
        row[1].hist(lengths, weights=counts, bins=min(40, max(lengths)))
        row[1].set(title="texts", xlabel="text tokens of a sample", ylabel="samples")
        drawn = values["drawn_tokens"]
        least = max(tokens) + -max(tokens) % pad_multiple
        capacities = [least * factor for factor in (1, 1.5, 2, 3, 4, 6, 8)]
        fills = [
            simulate_packing(drawn, int(one), pad_multiple=pad_multiple, packing_buffer=packing_buffer).fill
            for one in capacities
        ]
        row[2].plot(capacities, [100 * fill for fill in fills], marker="o")
        row[2].set(
            title="packing", xlabel="capacity of a pack, tokens", ylabel="% of the capacity filled", ylim=(0, 102)
        )
        row[2].grid(alpha=0.3)
    save_figure(figure, path)


def _plot_measures(found: Mapping[str, Mapping[str, Any]], axes: Iterable[Any]) -> None:
    axes = list(axes)
    for axis in axes[len(found) :]:
        axis.axis("off")
    for axis, (name, one) in zip(axes, found.items(), strict=False):
        bins, least = one["histogram"], one["least"]
        width = (one["most"] - least) / len(bins) or 1.0
        axis.bar([least + width * number for number in range(len(bins))], bins, width, align="edge")
        axis.set(title=f"{name.replace('_', ' ')} of {one['clips']} clips", ylabel="clips")
        for place in ("low", "median", "high"):
            axis.axvline(one[place], color="black", linestyle=":", linewidth=1)
