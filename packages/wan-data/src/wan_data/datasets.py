"""Public names for opening a dataset; see ``wan_data.reading``."""

from wan_data.reading.datasets import read_latent_spec, splits
from wan_data.reading.empty_caption import read_empty_caption

__all__ = ["read_empty_caption", "read_latent_spec", "splits"]
