"""What a dataset holds, where programs have always imported it from; it lives in ``wan_data.reading``."""

from wan_data.reading.datasets import read_latent_spec, splits

__all__ = ["read_latent_spec", "splits"]
