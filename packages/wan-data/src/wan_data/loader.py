"""Public names of the loader; see ``wan_data.reading``."""

from wan_data.reading.loader import LoaderConfig, PackLoader

__all__ = ["LoaderConfig", "PackLoader"]
