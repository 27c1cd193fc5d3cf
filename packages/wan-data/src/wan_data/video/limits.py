"""Limits of a source file."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Limits:
    """A source that exceeds one of these limits is rejected, never truncated.

    Attributes:
        frames: number of decoded frames of a source (two hours at 60 per second).
        pixels: of a frame.
        bytes: of a file.
    """

    frames: int = 432_000
    pixels: int = 8192 * 4608
    bytes: int = 64 * 2**30

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value < 1:
                raise ValueError(f"max_source_{name} is {value}; it must be at least 1")
