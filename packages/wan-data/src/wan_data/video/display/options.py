"""What is chosen about the display of sources: the colour behind transparent pixels, and what becomes of HDR."""

import dataclasses

WHITE = "#ffffff"
REFUSE, TONE_MAP = "refuse", "tone-map"
HDR_CHOICES = (REFUSE, TONE_MAP)


@dataclasses.dataclass(frozen=True)
class DisplayOptions:
    """How sources are displayed.

    Attributes:
        background: colour behind transparent pixels, as ``#rrggbb``.
        hdr: ``refuse`` a video in HDR (PQ, HLG), or ``tone-map`` it (see ``wan_data.video.display.tone_mapping``).

    Raises:
        ValueError: one of them is neither.
    """

    background: str = WHITE
    hdr: str = REFUSE

    def __post_init__(self) -> None:
        _ = self.rgb
        if self.hdr not in HDR_CHOICES:
            raise ValueError(f"hdr is {self.hdr!r}; expected one of {', '.join(HDR_CHOICES)}")

    @property
    def rgb(self) -> tuple[int, int, int]:
        """Red, green and blue of the background."""
        digits = self.background.removeprefix("#")
        try:
            red, green, blue = bytes.fromhex(digits)
        except ValueError:
            raise ValueError(
                f"background is {self.background!r}; expected a colour as #rrggbb, such as #ffffff for white"
            ) from None
        return red, green, blue
