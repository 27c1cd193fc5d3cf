"""Importing Megatron-Bridge without the distributions that a Wan model has no use for.

Bridge imports three of them unconditionally, in files that serve language models, adapters, quantisation and a restart
within the process: ``transformer_engine``, which only builds against CUDA and is left out where it is absent; NVIDIA's
``modelopt``, whose import alone takes longer than everything else together; and ``nvidia_resiliency_ext.inprocess``,
which has wheels for Linux and for Python up to 3.12 only. During the import of Bridge a finder supplies stub modules,
whose attributes are classes that cannot be instantiated; afterwards the stubs are removed. Megatron-Core has
``HAVE_...`` flags for them, which must be correct: it is imported first, and what Bridge imports of it later does not
see the stubs.

``transformers`` and ``datasets``, which tokenizers and instruction data need, are stubbed although they are installed,
also for Core: importing them takes a third of the engine's start. Later imports get the real modules.
"""

import builtins
import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import sys
import types
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from wan_train.engine.installed import is_installed

TRANSFORMER_ENGINE = "transformer_engine"
MODELOPT = "modelopt"
# Of the first not the whole package: Bridge asks whether it can write checkpoints, and has to find that it cannot. The
# others are of tokenizers.
_UNUSED = ("nvidia_resiliency_ext.inprocess", "regex", "six")
_OF_LANGUAGE_MODELS = ("transformers", "datasets")


class _Absent(type):
    def __getattr__(cls, name: str) -> "_Absent":
        if name.startswith("__"):
            raise AttributeError(name)
        return AbsentClass


class AbsentClass(metaclass=_Absent):
    """Stub of a class or function of an absent distribution; calling it is an error."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        raise RuntimeError(
            "this needs transformer-engine, nvidia-modelopt, nvidia-resiliency-ext or a package of language models "
            "(transformers, datasets, regex, six), which the engine runs without"
        )


class _AbsentModule(types.ModuleType):
    def __getattr__(self, name: str) -> _Absent:
        if name.startswith("__"):
            raise AttributeError(name)
        return AbsentClass


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, names: Iterable[str]) -> None:
        self.names = frozenset(names)
        self.packages = frozenset(name.partition(".")[0] for name in self.names)

    def _is_stubbed(self, module: str) -> bool:
        """Whether it is one of the named ones, or within one, or one's parent."""
        return any(f"{module}.".startswith(f"{name}.") or name.startswith(f"{module}.") for name in self.names)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not self._is_stubbed(fullname):
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _AbsentModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__path__ = []


# Packages whose ``__init__`` imports language and vision models or Megatron-LM's own loop, which takes longer than
# importing torch; and those of their names that Bridge's training loop needs, with the modules that define them.
_BARE: dict[str, dict[str, str]] = {
    "megatron.bridge": {},
    "megatron.bridge.models": {
        "GPTModelProvider": "megatron.bridge.models.gpt_provider",
        "T5ModelProvider": "megatron.bridge.models.t5_provider",
    },
    "megatron.bridge.models.conversion": {},
    "megatron.bridge.models.hf_pretrained": {},
    "megatron.training": dict.fromkeys(
        ("get_adlr_autoresume", "get_args", "get_timers"), "megatron.training.global_vars"
    ),
}


def _bare_package(name: str, places: dict[str, str]) -> None:
    """Import a package without running its ``__init__``; names in ``places`` are imported on demand."""
    if name in sys.modules:
        return
    spec = importlib.util.find_spec(name)
    assert spec is not None, "checked by the caller"
    package: Any = types.ModuleType(name)
    package.__spec__, package.__path__ = spec, spec.submodule_search_locations

    def find(attribute: str) -> Any:
        if attribute not in places:
            raise AttributeError(f"module {name!r} has no attribute {attribute!r} here; import it where it is defined")
        return getattr(importlib.import_module(places[attribute]), attribute)

    package.__getattr__ = find
    sys.modules[name] = package
    parent, _, child = name.rpartition(".")
    setattr(importlib.import_module(parent), child, package)


def skip_model_families() -> None:
    """Make Megatron-Bridge importable without its language and vision models and their dependencies."""
    for name, places in _BARE.items():
        if is_installed(name):
            _bare_package(name, places)


@contextlib.contextmanager
def _left_out(names: Iterable[str]) -> Iterator[None]:
    """In this context the named modules and their parents are stubs, unless they are imported already."""
    finder = _Finder(name for name in names if name not in sys.modules)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] in finder.packages]:
            del sys.modules[name]


@contextlib.contextmanager
def _seen_by_bridge_only(names: Iterable[str]) -> Iterator[None]:
    """In this context no module but those of Megatron-Bridge can import the packages of the named modules.

    Megatron-Core, of which Bridge imports more and more, shall find that they are absent.
    """
    import_module = builtins.__import__
    hidden = frozenset(name.partition(".")[0] for name in names if name not in sys.modules)

    def import_unless_hidden(
        name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0
    ) -> Any:
        importer = (globals or {}).get("__name__", "")
        if level == 0 and name.partition(".")[0] in hidden and not importer.startswith("megatron.bridge"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return import_module(name, globals, locals, fromlist, level)

    builtins.__import__ = import_unless_hidden
    try:
        yield
    finally:
        builtins.__import__ = import_module


def unused_and_absent() -> list[str]:
    """Modules that Bridge imports, that a run does not use, and that are not installed."""
    return [name for name in _UNUSED if not is_installed(name.partition(".")[0])]


def import_bridge_without(names: Iterable[str]) -> None:
    """Import Megatron-Bridge's training loop with stubs for the named distributions.

    Args:
        names: modules to stub; those that are imported already are kept.
    """
    with contextlib.ExitStack() as stack, warnings.catch_warnings(), _left_out(_OF_LANGUAGE_MODELS):
        # They say at length that Transformer Engine and Apex are missing, which is expected here.
        warnings.simplefilter("ignore", UserWarning)
        stack.callback(logging.disable, logging.root.manager.disable)
        logging.disable(logging.INFO)
        import megatron.core.extensions.transformer_engine

        with _seen_by_bridge_only(names), _left_out(names):
            import megatron.bridge.training.pretrain  # noqa: F401

            if is_installed("megatron.training.utils"):
                importlib.import_module("megatron.training.utils")  # Bridge imports it later, and it warns too
