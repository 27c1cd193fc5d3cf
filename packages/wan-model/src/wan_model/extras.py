"""Packages that only an extra of this distribution installs."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def requires_extra(extra: str) -> Iterator[None]:
    """Name the extra to install when an import in this context fails.

    Raises:
        ValueError: a package is absent.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ValueError(f"the package {error.name} is absent; run pip install 'wan-model[{extra}]'") from error
