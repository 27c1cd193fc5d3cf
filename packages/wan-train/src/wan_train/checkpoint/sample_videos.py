"""Videos that are sampled while a run trains: where they are, and what is known about each. Needs no torch.

In the run's checkpoint folder, ``samples/samples.jsonl`` has a line for each video, appended once the video is
complete; ``samples/step-0000100/fox.mp4`` is H.264, sampled after step 100, and a single frame is ``fox.png``.

A line has ``step``, ``name`` (that of the file, without its suffix), ``caption``, ``seed`` and ``file``, of which the
suffix counts alone; other keys are ignored, and a line without ``file`` is about an ``.mp4``.
Where a resumed run samples a step again, it appends the lines again, and the last one holds. None of it may be a link:
what is shown may be handed on, so nothing comes from elsewhere.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from wan_model.system.safe_reading import complete_lines, open_below, parse_json
from wan_model.system.units import format_bytes

Suffix = Literal[".mp4", ".png"]

SAMPLES = "samples"
_RECORDS = "samples.jsonl"
_LONGEST_LINE = 1 << 16
# Of the end of the records, some hundred thousand lines.
_MOST_BYTES = 32 << 20
_LONGEST_NAME = 200


@dataclass(frozen=True)
class SampleVideo:
    """A video that was sampled from a run's weights.

    Attributes:
        step: number of completed steps.
        name: the same at every step for the same caption and seed.
        caption: what it was sampled for.
        seed: of its noise; None if it is not recorded.
        suffix: of its file; see ``suffix_of``.
    """

    step: int
    name: str
    caption: str
    seed: int | None
    suffix: Suffix = ".mp4"

    def path(self, folder: Path) -> Path:
        """Of the file, in the run's checkpoint folder."""
        return samples_folder(folder, self.step) / f"{self.name}{self.suffix}"


def suffix_of(frames: int) -> Suffix:
    """Of the file of a video: one frame is a picture."""
    return ".png" if frames == 1 else ".mp4"


def samples_folder(folder: Path, step: int) -> Path:
    """The folder of the videos of a step, in the run's checkpoint folder."""
    return folder / SAMPLES / f"step-{step:07d}"


def records_path(folder: Path) -> Path:
    """The file of records, in the run's checkpoint folder."""
    return folder / SAMPLES / _RECORDS


def is_sample_name(name: Any) -> bool:
    """Whether it can name a video: the beginning of a file name, not a path."""
    return (
        isinstance(name, str)
        and 0 < len(name) <= _LONGEST_NAME
        and not name.startswith(".")
        and Path(name).name == name
        and name.isprintable()
    )


def read_samples(folder: Path) -> tuple[list[SampleVideo], list[str]]:
    """What the records name, ascending by step, then in the order in which names first appear.

    Lines that are no record, and a last line without its end, are left out. The files need not exist.

    Args:
        folder: the run's checkpoint folder.

    Returns:
        The videos; and sentences about lines that are left out.

    Raises:
        ValueError: the records exist and cannot be read, or are reached by a link.
    """
    path = records_path(folder)
    found: dict[tuple[int, str], SampleVideo] = {}
    names: dict[str, int] = {}
    bad: list[int] = []
    notes, number = [], 0
    try:
        file = open_below(folder, path)
    except FileNotFoundError:
        return [], []
    with file:
        size = os.fstat(file.fileno()).st_size
        if size > _MOST_BYTES:
            file.seek(size - _MOST_BYTES)
            file.readline(_LONGEST_LINE)  # the rest of a line
            notes.append(f"Of {path} only the last {format_bytes(_MOST_BYTES)} are read, and lines counted.")
        end = file.tell()
        for number, line in enumerate(complete_lines(file, _LONGEST_LINE), 1):
            end = file.tell()
            if line is not None and (video := _parse(line, path)):
                names.setdefault(video.name, len(names))
                found[video.step, video.name] = video
            else:
                bad.append(number)
        file.seek(end)
        if file.read(1):
            bad.append(number + 1)  # it has no end
    if bad:
        notes.append(left_out(path, "records", bad[0], len(bad)))
    return sorted(found.values(), key=lambda video: (video.step, names[video.name])), notes


def left_out(path: Path, kind: str, first: int, count: int) -> str:
    """A sentence about lines of a file that are not what they should be.

    Args:
        path: of the file.
        kind: what they should be, such as ``records``.
        first: number of the first of them, from 1.
        count: how many there are.
    """
    more = f" and {count - 1} more" if count > 1 else ""
    return f"Lines of {path} that are no {kind} are left out: line {first}{more}."


def _parse(line: bytes, path: Path) -> SampleVideo | None:
    try:
        record = parse_json(line.decode("utf-8"), str(path), _LONGEST_LINE)
    except ValueError:
        return None
    if not isinstance(record, dict) or not is_sample_name(record.get("name")):
        return None
    step, seed = record.get("step"), record.get("seed")
    if type(step) is not int or not 0 <= step < 1 << 53:
        return None
    suffix: Suffix = ".png" if str(record.get("file")).endswith(".png") else ".mp4"
    caption = str(record.get("caption", ""))
    return SampleVideo(step, record["name"], caption, seed if type(seed) is int else None, suffix)
