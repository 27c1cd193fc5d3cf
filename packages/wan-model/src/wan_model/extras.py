"""Errors about optional dependencies that an extra of a distribution installs."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def requires_extra(extra: str, distribution: str = "wan-model") -> Iterator[None]:
    """In this context, a failed import raises an error that names the extra to install.

    Args:
        extra: its name.
        distribution: that has it.

    Raises:
        ValueError: a package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ValueError(f"the package {error.name} is absent; run pip install '{distribution}[{extra}]'") from error
