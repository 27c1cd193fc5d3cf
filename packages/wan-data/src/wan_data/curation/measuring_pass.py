"""All measures of a clip in one pass over its frames, beside the decoding that checks it.

Shapes: H rows, W columns, 3 colours.
"""

import dataclasses
import math
from fractions import Fraction

import numpy as np
from jaxtyping import UInt8

from wan_data.curation.fingerprints import KEPT, Fingerprinter
from wan_data.curation.libraries import opencv
from wan_data.curation.measures import SCENE_KINDS, Measures
from wan_data.curation.movement import Movement, reduced
from wan_data.curation.scenes import CutDetector
from wan_data.curation.stills import Stills

# Sharpness and borders are those of so many frames a second: one costs as much as the rest of several.
_STILLS_PER_SECOND = 1

Rgb = UInt8[np.ndarray, "H W 3"]


@dataclasses.dataclass(frozen=True)
class MeasuringOptions:
    """What is measured, and how.

    Attributes:
        scenes: ``off``, ``content`` or ``adaptive``; see ``wan_data.curation.scenes.CutDetector``.
    """

    scenes: str = "off"

    def __post_init__(self) -> None:
        if self.scenes not in SCENE_KINDS:
            raise ValueError(f"scenes are {self.scenes!r}; expected one of {', '.join(SCENE_KINDS)}")


class MeasuringPass:
    """Measures a clip while its frames go by, each seen once; its memory does not grow with the clip.

    Every frame is measured for cuts, motion, stillness and hashes; one of each second, the first among them, for
    sharpness and black borders. A frame that is only repeated costs nothing, if it is the same object.

    Args:
        fps: the rate of the frames.
        options: what is measured.

    Raises:
        ValueError: a library of the extra ``curation`` is missing.
    """

    def __init__(self, fps: Fraction, options: MeasuringOptions | None = None) -> None:
        scenes = (options or MeasuringOptions()).scenes
        self._cuts = None if scenes == "off" else CutDetector(scenes, fps)
        self._movement, self._stills, self._fingerprinter = Movement(fps), Stills(), Fingerprinter()
        self._step = max(1, math.ceil(fps / _STILLS_PER_SECOND))
        self._frame: np.ndarray | None = None
        self._picture: np.ndarray | None = None
        self._number = -1
        # When the frame of now was first shown.
        self._since = 0
        self._next_still = 0

    def add(self, frame: Rgb, number: int) -> None:
        """Add the next frame.

        Args:
            frame: as it is displayed, not changed afterwards. A frame that is only repeated is the same object again.
            number: at the target rate, from 0, without gaps.
        """
        assert number == self._number + 1, f"frame {number} came after {self._number}"
        self._number = number
        if self._cuts is not None:
            self._cuts.add(frame, number)
        if frame is self._frame:
            return
        self._count_picture(number)
        cv2 = opencv()
        height, width = frame.shape[:2]
        luma = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
        picture = reduced(luma)
        self._movement.add(picture, number, height, width)
        self._decide(self._cuts.settled if self._cuts is not None else number + 1)
        if number >= self._next_still:
            self._stills.add(luma)
            self._next_still = number - number % self._step + self._step
        self._frame, self._since = frame, number
        self._picture = cv2.resize(picture, (KEPT, KEPT), interpolation=cv2.INTER_AREA)

    def result(self) -> Measures:
        """The measures, after the last frame."""
        assert self._frame is not None, "a clip has at least one frame"
        self._count_picture(self._number + 1)
        self._movement.repeated(self._number)
        cuts = self._cuts.cuts() if self._cuts is not None else None
        self._decide(self._number + 1)
        height, width = self._frame.shape[:2]
        box = self._stills.box
        return Measures(
            motion=self._movement.motion,
            stillness=self._movement.stillness,
            sharpness=self._stills.sharpness,
            black_borders=self._stills.black_borders,
            cuts=cuts,
            hashes=self._fingerprinter.hashes(
                box.top / height, box.bottom / height, box.left / width, box.right / width
            ),
        )

    def _count_picture(self, until: int) -> None:
        if self._picture is not None:
            self._fingerprinter.add(self._picture, until - self._since)
        self._picture = None

    def _decide(self, settled: int) -> None:
        undecided = self._movement.undecided()
        while undecided and undecided[0][0] < settled:
            number = undecided[0][0]
            self._movement.decide(cut=self._cuts is not None and self._cuts.is_cut(number))
