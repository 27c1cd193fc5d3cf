"""Limits of a source file, and the version of how sources are read."""

import dataclasses

# Raised when the frames of an unchanged file come out with other pixels or times than before. The manifest records it
# with the settings, so that new samples are not added to a dataset whose samples were read otherwise.
READING_VERSION = 3


@dataclasses.dataclass(frozen=True)
class Limits:
    """A source that exceeds one of these limits is rejected, never truncated.

    Attributes:
        frames: number of decoded frames of a source (two hours at 60 per second).
        pixels: of a frame.
        bytes: of a file.
        still: seconds that a frame may be displayed; more indicates damaged presentation times.
    """

    frames: int = 432_000
    pixels: int = 8192 * 4608
    bytes: int = 64 * 2**30
    still: int = 60

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value < 1:
                raise ValueError(f"max_source_{name} is {value}; it must be at least 1")
