"""Videos that are sampled while a run trains: where they are, and what is known about each. Needs no torch.

In the run's checkpoint folder::

    samples/samples.jsonl                 a line for each video, appended once the video is complete
    samples/step-0000100/fox.mp4          H.264, sampled after step 100; a single frame is fox.png

A line has ``step``, ``name`` (that of the file, without its suffix), ``caption``, ``seed`` and ``file``, of which the
suffix counts alone; other keys are ignored, and a line without ``file`` is about an ``.mp4``.
Where a resumed run samples a step again, it appends the lines again, and the last one holds.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from wan_model.system.safe_reading import complete_lines, open_file, parse_json

Suffix = Literal[".mp4", ".png"]

SAMPLES = "samples"
_RECORDS = "samples.jsonl"
_LONGEST_LINE = 1 << 16
_MOST_LINES = 100_000
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


def read_samples(folder: Path) -> list[SampleVideo]:
    """What the records name, ascending by step, then in the order in which names first appear.

    Lines that are no record, and a last line without its end, are left out. The files need not exist.

    Args:
        folder: the run's checkpoint folder.

    Raises:
        ValueError: the records exist and cannot be read.
    """
    path = records_path(folder)
    found: dict[tuple[int, str], SampleVideo] = {}
    names: dict[str, int] = {}
    try:
        file = open_file(path)
    except FileNotFoundError:
        return []
    with file:
        for line in itertools.islice(complete_lines(file, _LONGEST_LINE), _MOST_LINES):
            if line is not None and (video := _parse(line, path)):
                names.setdefault(video.name, len(names))
                found[video.step, video.name] = video
    return sorted(found.values(), key=lambda video: (video.step, names[video.name]))


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
