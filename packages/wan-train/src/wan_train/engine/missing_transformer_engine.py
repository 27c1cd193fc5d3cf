"""Importing Megatron-Bridge where Transformer Engine is not installed.

Bridge 0.3.1 imports ``transformer_engine`` unconditionally in files that a Wan model never uses (peft, some language
models). Megatron-Core asks politely and has a ``HAVE_TE`` flag; it must be imported first, so that the flag stays
honest, and so must NVIDIA's modelopt. For the one import of Bridge a finder then supplies modules whose every name is
a class that cannot be built.
"""

import importlib.abc
import importlib.machinery
import sys
import types
import warnings
from collections.abc import Sequence

_NAME = "transformer_engine"


class _Absent(type):
    def __getattr__(cls, name: str) -> "_Absent":
        if name.startswith("__"):
            raise AttributeError(name)
        return AbsentClass


class AbsentClass(metaclass=_Absent):
    """Stands where a class of Transformer Engine would; building one is an error."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        raise RuntimeError("this needs transformer-engine, which is not installed: pip install 'wan-train[te]'")


class _AbsentModule(types.ModuleType):
    def __getattr__(self, name: str) -> _Absent:
        if name.startswith("__"):
            raise AttributeError(name)
        return AbsentClass


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.split(".")[0] != _NAME:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _AbsentModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__path__ = []


def import_bridge_without_it() -> None:
    """Import ``megatron.bridge``; afterwards ``import transformer_engine`` fails as it did before."""
    with warnings.catch_warnings():
        # Each of them says, over many lines, that Transformer Engine and Apex are not there; so does our README.
        warnings.simplefilter("ignore", UserWarning)
        import modelopt.torch.opt.plugins  # noqa: F401

        _import_bridge_with_absent_classes()


def _import_bridge_with_absent_classes() -> None:
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        import megatron.bridge.training.pretrain  # noqa: F401
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.split(".")[0] == _NAME]:
            del sys.modules[name]
