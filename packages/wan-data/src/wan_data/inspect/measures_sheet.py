"""A contact sheet of the clips with the lowest and the highest values of each measure."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from wan_data.index.manifest import open_sources, read_manifest
from wan_data.index.records import SourceRecord
from wan_data.inspect.measured import measured
from wan_data.inspect.plots import new_figure, save_figure
from wan_data.sources.contents import content_of, status_of
from wan_data.sources.source import SourceFile, place_of
from wan_data.storage.failures import is_of_the_object
from wan_data.storage.local_copies import LocalCopies
from wan_data.storage.location import Location
from wan_data.video.buckets import Size
from wan_data.video.decoder_process import Decoder, Job
from wan_data.video.display.options import DisplayOptions
from wan_data.video.limits import Limits
from wan_data.video.source_file import Rejected
from wan_data.video.windows import Window

# Pixels of the longer side of a picture.
_SIDE = 256
_LONGEST_NAME = 40


def measures_sheet(dataset: Location, folder: Location, path: Path) -> list[str]:
    """Write a PNG with a row for each measure: the middle frames of the clips of its lowest and of its highest values.

    Args:
        dataset: whose sources were measured.
        folder: of its clips, also in a store. In the place of one that cannot be read is the reason.
        path: of the PNG.

    Returns:
        The names of the clips that could not be read, with the reasons.

    Raises:
        ValueError: the sources were not measured.
        OSError: a store fails, or takes no credentials.
    """
    manifest = read_manifest(dataset)
    found = measured({dataset: manifest})
    if not found:
        raise ValueError(
            f"the clips of {dataset} were not measured, so there are none of both ends; prepare it with --measures"
        )
    names = {name for one in found.values() for _, name in (*one["lowest"], *one["highest"])}
    with open_sources(dataset, manifest) as index:
        records = index.find(sorted(names))
    pictures = _pictures(records, folder, manifest.settings)
    columns = max(len(one["lowest"]) + len(one["highest"]) for one in found.values())
    figure, axes = new_figure(columns, len(found), (2.4 * columns, 2.4 * len(found)))
    for row, (measure, one) in zip(axes, found.items(), strict=True):
        for axis in row:
            axis.axis("off")
        for end, axis_of in (("lowest", row), ("highest", row[::-1])):
            for axis, (value, name) in zip(axis_of, one[end], strict=False):
                _show(axis, pictures[name], f"{measure.replace('_', ' ')} {value:.3g} ({end})\n{name[-_LONGEST_NAME:]}")
    save_figure(figure, path)
    return [f"{name}: {picture}" for name, picture in pictures.items() if isinstance(picture, str)]


def _show(axis: Any, picture: np.ndarray | str, title: str) -> None:
    if isinstance(picture, str):
        axis.text(0.5, 0.5, picture[:120], wrap=True, ha="center", va="center", fontsize=7, parse_math=False)
    else:
        axis.imshow(picture)
    axis.set_title(title, fontsize=7, parse_math=False)


def _pictures(
    records: Mapping[str, SourceRecord], folder: Location, settings: Mapping[str, Any]
) -> dict[str, np.ndarray | str]:
    """The middle frame [H, W, 3] of each source, or why there is none."""
    with LocalCopies() as copies, Decoder() as decoder:
        return {
            name: _picture(place_of(folder, name), record, settings, copies, decoder)
            for name, record in records.items()
        }


def _picture(
    path: Location, record: SourceRecord, settings: Mapping[str, Any], copies: LocalCopies, decoder: Decoder
) -> np.ndarray | str:
    middle, scale = record.frames // 2, min(1.0, _SIDE / max(record.height, record.width))
    try:
        source = SourceFile(record.path, path)
        with content_of(path, status_of(source), copies) as file:
            job = Job(
                file,
                Fraction(settings["fps"]),
                _limits(settings),
                (Window(middle, middle + 1),),
                Size(max(1, round(record.height * scale)), max(1, round(record.width * scale))),
                display=DisplayOptions(settings["background"], settings["hdr"]),
            )
            ((_, result),) = decoder.decode([job])
    except Rejected as error:
        return str(error)
    except OSError as error:
        if not is_of_the_object(error):
            raise
        return f"it cannot be read: {error.strerror or error}"
    return str(result) if isinstance(result, Rejected) else np.asarray(result[0])


def _limits(settings: Mapping[str, Any]) -> Limits:
    names: Sequence[str] = ("frames", "pixels", "bytes", "still")
    return Limits(*(settings[f"max_source_{name}"] for name in names))
