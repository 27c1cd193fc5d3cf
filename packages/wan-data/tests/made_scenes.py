"""Scenes like those of films: textures of the spectrum of photographs with shapes in front, seen by a moving camera."""

import dataclasses
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def texture(rng: np.random.Generator, height: int, width: int, slope: float = 1.6) -> np.ndarray:
    """A picture [height, width] whose amplitudes fall as 1/f^slope, nearly as in photographs; mean 0, variance 1.

    It repeats at its edges, so that a camera may pan over it for ever.
    """
    frequency = np.hypot(np.fft.fftfreq(height, 1 / height)[:, None], np.fft.rfftfreq(width, 1 / width))
    frequency[0, 0] = 1
    spectrum = np.fft.rfft2(rng.standard_normal((height, width))) / frequency**slope
    spectrum[0, 0] = 0
    picture = np.fft.irfft2(spectrum, (height, width))
    return picture / picture.std()


@dataclasses.dataclass
class Scene:
    """A scene from a seed: colours, a texture, light from above or below, and shapes that move in front."""

    seed: int
    height: int = 96
    width: int = 160

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        colours = rng.uniform(-1, 1, (2, 3))
        light = rng.uniform(-40, 40) * np.linspace(-1, 1, self.height)[:, None, None]
        base = rng.uniform(90, 150) + 40 * rng.uniform(-1, 1, 3)
        parts = [texture(rng, self.height, self.width)[..., None] * (22 + 14 * colour) for colour in colours]
        self._background = base + light + sum(parts)
        self._direction = rng.choice([-1, 1])
        count = int(rng.integers(1, 4))
        self._shapes = [
            (rng.uniform(0.2, 0.8, 2), rng.uniform(0.06, 0.2), rng.uniform(20, 235, 3), rng.uniform(-1, 1, 2))
            for _ in range(count)
        ]

    def frames(self, count: int, *, speed: float = 2.0, start: int = 0) -> list[np.ndarray]:
        """Frames [H, W, 3], uint8; the camera pans by ``speed`` pixels a frame, and the shapes move at half of it."""
        rows, columns = np.mgrid[: self.height, : self.width]
        out = []
        for number in range(start, start + count):
            image = np.roll(self._background, round(self._direction * speed * number), axis=1).copy()
            for place, radius, colour, way in self._shapes:
                row = place[0] * self.height + way[0] * speed * number / 2
                column = place[1] * self.width + way[1] * speed * number / 2
                inside = (rows - row % self.height) ** 2 + (columns - column % self.width) ** 2
                image[inside < (radius * self.height) ** 2] = colour
            out.append(image.clip(0, 255).astype(np.uint8))
        return out


def joined_scenes(lengths: Sequence[int], *, speed: float) -> list[np.ndarray]:
    """The frames of scenes 0, 1, ... of these lengths, one after the other."""
    return [frame for seed, length in enumerate(lengths) for frame in Scene(seed).frames(length, speed=speed)]


def write_frames(
    path: Path,
    frames: Sequence[np.ndarray],
    *,
    rate: int = 16,
    times: Sequence[int] | None = None,
    crf: int | None = None,
) -> Path:
    """A video of frames, shown at ``times`` in milliseconds; lossless, or H.264 of a quality."""
    path.parent.mkdir(parents=True, exist_ok=True)
    codec, stored = ("ffv1", "bgr0") if crf is None else ("libx264", "yuv420p")
    options = {} if crf is None else {"crf": str(crf), "preset": "veryfast"}
    with av.open(str(path), "w", options={"fflags": "bitexact"}) as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = stored
        if times is not None:
            stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        for number, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format=stored)
            if times is not None:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
