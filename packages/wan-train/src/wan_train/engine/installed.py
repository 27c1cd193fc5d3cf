"""Whether the training engine is installed. Imports nothing heavy."""

import importlib.util

INSTALL_HINT = (
    "use one of NVIDIA's NeMo containers, or `pip install 'wan-train[engine]'` and then "
    "`pip install --no-deps megatron-bridge==0.3.1`"
)


class EngineMissingError(ValueError):
    """A distribution that the training loop needs is not installed."""


def is_installed(module: str) -> bool:
    """Whether a module can be imported, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def require_installed() -> None:
    """Raise an error that names what to install if the engine is missing.

    Raises:
        EngineMissingError: megatron-core or megatron-bridge is not installed.
    """
    missing = [name for name in ("megatron.core", "megatron.bridge") if not is_installed(name)]
    if missing:
        names = " and ".join(name.replace(".", "-") for name in missing)
        raise EngineMissingError(f"training needs {names}, which is not installed: {INSTALL_HINT}")
