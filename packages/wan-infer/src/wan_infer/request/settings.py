"""Requests for videos, checked before anything is loaded. Imports no torch.

Sizes are written W*H, as the official release does: ``832*480`` is landscape.
"""

import dataclasses
import math
import re
from collections.abc import Sequence

from wan_model.sampling.settings import Settings, check_seed, check_text
from wan_model.video_shape import SIDE_MULTIPLE, check_frames, nearest_side

# What the released models were trained for, W*H; 416*240 is NVIDIA's addition.
TASK_SIZES = {
    "t2v-1.3B": ("480*832", "832*480", "416*240"),
    "t2v-14B": ("720*1280", "1280*720", "480*832", "832*480"),
}


@dataclasses.dataclass(frozen=True)
class VideoRequest:
    """One video.

    Attributes:
        prompt: text of the video.
        width, height: pixels, multiples of 16.
        frames: 4n+1; one frame is a picture.
        seed: of its noise; the same seed and settings give the same video, independent of other requests.
        settings: sampling settings.
        lora_scales: of each LoRA file, where they are not merged into the weights; else None.

    Raises:
        ValueError: a size or a frame count that the model does not support, naming the nearest.
    """

    prompt: str
    width: int = 832
    height: int = 480
    frames: int = 81
    seed: int = 0
    settings: Settings = dataclasses.field(default_factory=Settings)
    lora_scales: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        check_frames("the number of frames", self.frames)
        check_size(self.width, self.height)
        check_seed("the seed", self.seed)
        check_text("prompt", self.prompt)


def check_size(width: int, height: int) -> None:
    """Refuse sides that 16 does not divide, naming the nearest size."""
    near = nearest_side(width), nearest_side(height)
    if near != (width, height):
        raise ValueError(
            f"the size {width}*{height} (width*height) is not made of multiples of {SIDE_MULTIPLE}; "
            f"the nearest is {near[0]}*{near[1]}"
        )


def parse_size(text: str) -> tuple[int, int]:
    """(width, height) of ``832*480``; ``832x480`` is understood too.

    Raises:
        ValueError: it is written otherwise.
    """
    match = re.fullmatch(r"\s*(\d{1,5})\s*[*x×]\s*(\d{1,5})\s*", text)  # noqa: RUF001
    if not match:
        raise ValueError(f"the size {text!r} is not understood; expected width*height, such as 832*480")
    return int(match[1]), int(match[2])


def check_task(task: str, requests: Sequence[VideoRequest]) -> None:
    """Refuse sizes that a released model was not trained for.

    Raises:
        ValueError: naming its sizes, and the nearest of them.
    """
    sizes = TASK_SIZES[task]
    for request in requests:
        asked = (request.width, request.height)
        if f"{request.width}*{request.height}" not in sizes:
            nearest = min(sizes, key=lambda size: _distance(asked, parse_size(size)))
            raise ValueError(
                f"the size {request.width}*{request.height} is not one of {task}'s: {', '.join(sizes)}; "
                f"the nearest is {nearest}; leave --task out to sample other sizes"
            )


def _distance(one: tuple[int, int], other: tuple[int, int]) -> float:
    return sum(abs(math.log(side / wanted)) for side, wanted in zip(one, other, strict=True))


def pair_requests(
    prompts: Sequence[str], sizes: Sequence[str], frames: Sequence[int], seeds: Sequence[int], settings: Settings
) -> list[VideoRequest]:
    """One request a video: lists of equal length are paired, and a single value applies to all.

    Raises:
        ValueError: lists of different lengths, or a request that the model does not support.
    """
    given = {"prompts": prompts, "sizes": sizes, "frame counts": frames, "seeds": seeds}
    count = max(len(values) for values in given.values())
    for values in given.values():
        if len(values) not in (1, count):
            amounts = ", ".join(f"{len(values)} {name}" for name, values in given.items())
            raise ValueError(f"got {amounts}; give each either once or {count} times")
    return [
        VideoRequest(
            prompts[i % len(prompts)],
            *parse_size(sizes[i % len(sizes)]),
            frames[i % len(frames)],
            seeds[i % len(seeds)],
            settings,
        )
        for i in range(count)
    ]
