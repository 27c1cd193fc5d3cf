"""The ways in which wan-data reads a dataset, and a limit on the memory that they may take."""

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

from wan_data.inspect.plots import choose_samples
from wan_data.inspect.statistics import inspect
from wan_data.inspect.verify import verify
from wan_data.reading.loader import LoaderConfig, PackLoader


def load(folder: Path) -> None:
    packs = iter(PackLoader(LoaderConfig(str(folder), capacity=64, text_length=16), rank=0, world_size=1))
    for _ in range(4):
        next(packs)


def verified(folder: Path) -> None:
    if problems := verify(folder)[1]:
        raise ValueError("; ".join(problems))


WAYS = {
    "load": load,
    "verify": verified,
    "inspect": inspect,
    "preview": lambda path: choose_samples(path, "train", 3, 0),
}


@contextlib.contextmanager
def little_memory(size: int = 1 << 29) -> Iterator[None]:
    """No more than so many bytes of address space beyond what is in use."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
