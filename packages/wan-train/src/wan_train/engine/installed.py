"""Which Megatron-Bridge and Megatron-Core are installed, and whether they can work together. Imports nothing heavy.

Versions are read from the files that Python would import, because the metadata of an installed distribution says
nothing about a source checkout that comes before it on the path.
"""

import ast
import importlib.metadata
import importlib.util
from pathlib import Path

from packaging.version import Version

INSTALL_HINT = (
    "use one of NVIDIA's NeMo containers, or `pip install 'wan-train[engine]'` and then "
    "`pip install --no-deps megatron-bridge==0.3.1`"
)
# Callbacks, which the loop needs, came with Bridge 0.3.
OLDEST = {"megatron.bridge": (0, 3), "megatron.core": (0, 16)}
# What each release of Bridge was made with, for the error when another pair cannot be imported.
PAIRS = "Megatron-Bridge 0.3 with Megatron-Core 0.16, 0.4 with 0.17, 0.5 with 0.18, 0.6 with 0.19"
_NAMES = {"megatron.bridge": "Megatron-Bridge", "megatron.core": "Megatron-Core"}
_NVRX_FUNCTION = "get_write_results_queue"
_PARTS = ("MAJOR", "MINOR", "PATCH", "PRE_RELEASE")


class EngineError(ValueError):
    """Megatron-Bridge and Megatron-Core, as they are installed, cannot be used."""


class EngineMissingError(EngineError):
    """A distribution that the training loop needs is not installed."""


def is_installed(module: str) -> bool:
    """Whether a module can be imported, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _folder(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    assert spec is not None, "checked before"
    assert spec.submodule_search_locations, "a package"
    return Path(next(iter(spec.submodule_search_locations)))


def _constants(file: Path) -> dict[str, object]:
    """The constants that a module assigns, without running it."""
    found: dict[str, object] = {}
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            found |= {target.id: node.value.value for target in node.targets if isinstance(target, ast.Name)}
    return found


def version_of(module: str) -> str:
    """The version of ``megatron.bridge`` or ``megatron.core``, of the files that would be imported.

    Raises:
        EngineError: they do not say.
    """
    file = _folder(module) / "package_info.py"
    parts = _constants(file) if file.is_file() else {}
    if not all(isinstance(parts.get(name), int) for name in _PARTS[:3]):
        raise EngineError(f"{file} does not give the version of {_NAMES[module]}; expected MAJOR, MINOR and PATCH")
    return ".".join(str(parts[name]) for name in _PARTS[:3]) + str(parts.get("PRE_RELEASE") or "")


def installed_versions() -> str:
    """Both versions, for messages."""
    return " with ".join(f"{name} {version_of(module)}" for module, name in _NAMES.items())


def require_installed() -> None:
    """Raise an error that names what is found and what is needed if the engine is missing or cannot be imported.

    Raises:
        EngineMissingError: megatron-core, megatron-bridge or psutil is not installed.
        EngineError: their versions, or those of what they need, do not go together.
    """
    missing = [name for name in ("megatron.core", "megatron.bridge") if not is_installed(name)]
    if missing:
        names = " and ".join(name.replace(".", "-") for name in missing)
        raise EngineMissingError(f"training needs {names}, which is not installed: {INSTALL_HINT}")
    for module, oldest in OLDEST.items():
        if Version(version := version_of(module)).release < oldest:
            needed = ".".join(map(str, oldest))
            raise EngineError(f"{_NAMES[module]} is {version}; training needs {needed} or newer: {INSTALL_HINT}")
    if not is_installed("psutil"):
        # Core imports it where it can, and its writers end without a word to their rank where it cannot.
        raise EngineMissingError("Megatron-Core saves no checkpoint without psutil: pip install psutil")
    _require_megatron_training()
    _require_resiliency()


def _require_megatron_training() -> None:
    """Bridge from 0.4 on takes its configuration from Megatron-LM's own loop, which Core contains from 0.17 on."""
    bridge, core = _folder("megatron.bridge"), _folder("megatron.core")
    if "megatron.training" not in (bridge / "training" / "config.py").read_text(encoding="utf-8"):
        return
    needs = f"{_NAMES['megatron.bridge']} {version_of('megatron.bridge')} needs megatron.training"
    which = f"a checkout of Megatron-LM contains it beside megatron.core ({PAIRS}): put the checkout on PYTHONPATH"
    core_version = f"Megatron-Core {version_of('megatron.core')}"
    if not is_installed("megatron.training"):
        raise EngineError(f"{needs}, which {core_version} does not bring; {which}")
    training = _folder("megatron.training")
    if training.parent != core.parent:
        raise EngineError(
            f"{needs} of the same Megatron-LM as {core_version}, but the first is in {training} and the second in "
            f"{core}; {which}, before other installations"
        )


def resiliency_for(core: Path) -> str | None:
    """The version of nvidia-resiliency-ext that a ``megatron/core`` folder needs; None if any will do.

    Core from 0.17.1 on asserts it. Core 0.17.0 imports a function that came with the same version.
    """
    asserts = core / "dist_checkpointing" / "strategies" / "nvrx.py"
    if asserts.is_file():
        least = _constants(asserts).get("NVRX_MIN_VERSION")
        return least if isinstance(least, str) else None
    return "0.6.0" if _imports_function(core) else None


def _imports_function(core: Path) -> bool:
    file = core / "dist_checkpointing" / "strategies" / "torch.py"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    return "nvidia_resiliency_ext" in text and _NVRX_FUNCTION in text


def _require_resiliency() -> None:
    core = _folder("megatron.core")
    if (least := resiliency_for(core)) is None:
        return
    try:
        found = importlib.metadata.version("nvidia-resiliency-ext")
    except importlib.metadata.PackageNotFoundError:
        found = None
    if found is not None and Version(found) >= Version(least):
        return
    if not (core / "dist_checkpointing" / "strategies" / "nvrx.py").is_file() and _has_function():
        return  # a build of its sources, whose version says little
    raise EngineError(
        f"Megatron-Core {version_of('megatron.core')} needs nvidia-resiliency-ext {least} or newer, "
        f"{f'and {found} is installed' if found else 'which is not installed'}: "
        f"pip install 'nvidia-resiliency-ext>={least}'"
    )


def _has_function() -> bool:
    if not is_installed("nvidia_resiliency_ext"):
        return False
    file = _folder("nvidia_resiliency_ext") / "checkpointing" / "async_ckpt" / "filesystem_async.py"
    return file.is_file() and f"def {_NVRX_FUNCTION}(" in file.read_text(encoding="utf-8")
