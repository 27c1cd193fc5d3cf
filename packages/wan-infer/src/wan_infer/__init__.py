"""Wan 2.1 text-to-video: the sampler.

Importing this package imports no torch; the names below load what they need when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wan_infer.output.contact_sheet import draw_contact_sheet, save_contact_sheet
    from wan_infer.output.video_file import read_video, save_video
    from wan_infer.request.settings import NEGATIVE_PROMPT
    from wan_infer.sampling.sampler import WanSampler

__all__ = ["NEGATIVE_PROMPT", "WanSampler", "draw_contact_sheet", "read_video", "save_contact_sheet", "save_video"]
__version__ = "0.1.0"

_HOMES = {
    "NEGATIVE_PROMPT": "requests",
    "WanSampler": "sampler",
    "draw_contact_sheet": "contact_sheet",
    "read_video": "video_file",
    "save_contact_sheet": "contact_sheet",
    "save_video": "video_file",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
