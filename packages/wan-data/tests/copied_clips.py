"""Clips and copies of them, and other clips, for the rates at which near-duplicates are found."""

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
from made_scenes import Scene, write_frames

from wan_data.curation.duplicates import Candidate
from wan_data.curation.measuring_pass import MeasuringPass

HEIGHT, WIDTH, FRAMES = 192, 336, 48
# Pixels a frame of a picture 336 wide, which is crossed in 28 frames at the fastest.
SPEEDS = (0, 1, 4, 12)


def candidate(name: str, frames: list[np.ndarray]) -> Candidate:
    measuring = MeasuringPass(Fraction(16))
    for number, frame in enumerate(frames):
        measuring.add(frame, number)
    return Candidate(name, measuring.result().hashes, float(frames[0].shape[0] * frames[0].shape[1]))


def encoded(path: Path, frames: list[np.ndarray], crf: int) -> list[np.ndarray]:
    """What a decoder shows of the frames after H.264 of a quality."""
    with av.open(str(write_frames(path, frames, crf=crf))) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def clip(path: Path, seed: int) -> list[np.ndarray]:
    speed = SPEEDS[seed % len(SPEEDS)]
    return encoded(path, Scene(seed, HEIGHT, WIDTH).frames(FRAMES, speed=speed), 20)


def copies(path: Path, frames: list[np.ndarray]) -> Iterator[tuple[str, list[np.ndarray]]]:
    """Copies of a clip, each encoded again, by the name of what was done."""
    yield "mirrored", encoded(path, [np.ascontiguousarray(frame[:, ::-1]) for frame in frames], 23)
    yield "recompressed", encoded(path, frames, 35)
    small = [cv2.resize(frame, (WIDTH // 2, HEIGHT // 2), interpolation=cv2.INTER_AREA) for frame in frames]
    yield "rescaled", encoded(path, small, 23)
    yield "trimmed", encoded(path, frames[2:-2], 23)
    yield "brightened", encoded(path, [(frame * 0.85 + 30).clip(0, 255).astype(np.uint8) for frame in frames], 23)
    letterbox = [cv2.copyMakeBorder(frame, 24, 24, 0, 0, cv2.BORDER_CONSTANT) for frame in frames]
    yield "letterboxed", encoded(path, letterbox, 23)


def other_clip(number: int) -> Candidate:
    """A clip of its own scene, quickly: eight frames of its means."""
    scene = Scene(1_000_000 + number, 96, 96)
    return candidate(f"other {number:07}", scene.frames(8, speed=float(SPEEDS[number % len(SPEEDS)])))
