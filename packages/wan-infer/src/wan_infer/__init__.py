"""Wan 2.1 text-to-video: the sampler.

Importing this package imports no torch; the module of each name below is imported on first use.
"""

from typing import TYPE_CHECKING

from wan_model.sampling.settings import NEGATIVE_PROMPT
from wan_model.system.lazy import lazy_names

if TYPE_CHECKING:
    from wan_infer.output.contact_sheet import draw_contact_sheet, save_contact_sheet
    from wan_infer.output.video_file import read_video, save_video
    from wan_infer.sampling.sampler import WanSampler

__all__ = ["NEGATIVE_PROMPT", "WanSampler", "draw_contact_sheet", "read_video", "save_contact_sheet", "save_video"]
__version__ = "0.1.0"

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "WanSampler": "sampling.sampler",
            **dict.fromkeys(("draw_contact_sheet", "save_contact_sheet"), "output.contact_sheet"),
            **dict.fromkeys(("read_video", "save_video"), "output.video_file"),
        },
    )
