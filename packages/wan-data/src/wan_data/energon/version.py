"""The installed version of Megatron-Energon, and the versions that wan-data works with. Imports nothing of Energon."""

from importlib.metadata import PackageNotFoundError, version

from packaging.requirements import Requirement
from packaging.version import InvalidVersion

NEEDED = "megatron-energon>=6.0.1,<8"


def energon_version() -> str:
    """The installed version; Energon itself does not know it before 7.1.

    Raises:
        ValueError: none is installed, or one that wan-data does not work with.
    """
    try:
        found = version("megatron-energon")
    except PackageNotFoundError:
        raise ValueError(f"Megatron-Energon is not installed; wan-data needs {NEEDED}") from None
    try:
        fits = Requirement(NEEDED).specifier.contains(found, prereleases=True)
    except InvalidVersion:
        fits = False
    if not fits:
        raise ValueError(f"Megatron-Energon {found} is installed; wan-data needs {NEEDED}")
    return found


def unusable(reason: str) -> ValueError:
    """The error for an installed Energon with which wan-data cannot keep its promises.

    Args:
        reason: what is wrong and what is needed; left out if the version itself is refused.
    """
    try:
        found = energon_version()
    except ValueError as error:
        return error
    return ValueError(f"Megatron-Energon {found} cannot be used: {reason}")
