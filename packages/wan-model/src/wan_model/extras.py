"""Packages that only an extra of this distribution brings."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def requires_extra(extra: str) -> Iterator[None]:
    """Imports in this context that fail say which extra to install.

    Raises:
        ValueError: a package is absent.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ValueError(f"the package {error.name} is absent; run pip install 'wan-model[{extra}]'") from error
