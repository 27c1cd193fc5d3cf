"""From videos with captions to shards of latents, and from shards to packed training batches.

Importing this package imports no torch; the names below load what they need when they are first used.
"""

from typing import TYPE_CHECKING

from wan_model.system.lazy import lazy_names

if TYPE_CHECKING:
    from wan_data.reading.datasets import read_latent_spec, splits
    from wan_data.reading.loader import LoaderConfig, PackLoader

__all__ = ["LoaderConfig", "PackLoader", "read_latent_spec", "splits"]
__version__ = "0.1.0"

__getattr__ = lazy_names(
    __name__,
    {
        **dict.fromkeys(("LoaderConfig", "PackLoader"), "reading.loader"),
        **dict.fromkeys(("read_latent_spec", "splits"), "reading.datasets"),
    },
)
