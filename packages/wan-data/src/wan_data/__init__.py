"""Encodes videos with captions to shards of latents, and reads shards as packed training batches.

Importing this package imports no torch; the module of each public name is imported on first use.
"""

from typing import TYPE_CHECKING

from wan_model.system.lazy import lazy_names

if TYPE_CHECKING:
    from wan_data.reading.datasets import read_latent_spec, splits
    from wan_data.reading.empty_caption import read_empty_caption
    from wan_data.reading.loader import LoaderConfig, PackLoader

__all__ = ["LoaderConfig", "PackLoader", "read_empty_caption", "read_latent_spec", "splits"]
__version__ = "0.1.0"

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            **dict.fromkeys(("LoaderConfig", "PackLoader"), "reading.loader"),
            **dict.fromkeys(("read_latent_spec", "splits"), "reading.datasets"),
            "read_empty_caption": "reading.empty_caption",
        },
    )
