"""The loader, where programs have always imported it from; it lives in ``wan_data.reading``."""

from wan_data.reading.loader import LoaderConfig, PackLoader

__all__ = ["LoaderConfig", "PackLoader"]
