"""Errors about optional dependencies that an extra of this distribution installs."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def requires_extra(extra: str) -> Iterator[None]:
    """In this context, a failed import raises an error that names the extra to install.

    Raises:
        ValueError: a package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ValueError(f"the package {error.name} is absent; run pip install 'wan-model[{extra}]'") from error
