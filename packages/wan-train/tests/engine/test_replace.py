"""Replacing functions of a package that may have changed: every holder gets the replacement, or it is an error."""

import functools
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import wan_train
from wan_train.engine.upstream.replace import EngineChangedError, by, drop, find, mentions, nothing, replace

PURPOSE = "this test"


@pytest.fixture
def module() -> Iterator[Callable[[str, str], types.ModuleType]]:
    """Makes modules ``megatron.made_up_NAME`` out of source."""
    made = []

    def make(name: str, source: str) -> types.ModuleType:
        full = f"megatron.made_up_{name}"
        module = types.ModuleType(full)
        sys.modules[full] = module
        made.append(full)
        exec(source, vars(module))
        return module

    yield make
    for full in made:
        del sys.modules[full]


WRITES = "def write(x): return ('written', x)\n"
LOOP = "from megatron.made_up_files import write\ndef loop(x):\n    def inner(): return write(x)\n    return inner()\n"


def test_every_module_that_imported_it_gets_the_replacement(module: Any) -> None:
    files, loop = module("files", WRITES), module("loop", LOOP)
    original = files.write
    replace(
        "megatron.made_up_files:write",
        lambda write: lambda x: ("safely", write(x)),
        PURPOSE,
        called_by=("megatron.made_up_loop:loop",),
    )
    assert loop.loop(3) == files.write(3) == ("safely", ("written", 3))
    assert loop.write is files.write is not original


def test_a_missing_function_is_an_error(module: Any) -> None:
    module("files", "")
    with pytest.raises(EngineChangedError, match="made_up_files has no write, which wan-train relies on for this test"):
        replace("megatron.made_up_files:write", by(nothing), PURPOSE)
    with pytest.raises(EngineChangedError, match="made_up_absent has no write"):
        replace("megatron.made_up_absent:write", by(nothing), PURPOSE)


def test_a_function_that_is_not_needed_may_be_missing(module: Any) -> None:
    files = module("files", WRITES)
    for name in ("write", "absent"):
        drop(f"megatron.made_up_files:{name}")
    assert files.write(3) is None


def test_a_caller_that_calls_another_function_is_an_error(module: Any) -> None:
    module("files", WRITES)
    module("loop", "def loop(x): return store(x)\n")
    with pytest.raises(EngineChangedError, match=r"made_up_loop:loop does not call megatron\.made_up_files:write"):
        replace("megatron.made_up_files:write", by(nothing), PURPOSE, called_by=("megatron.made_up_loop:loop",))


def test_a_caller_that_imported_it_from_elsewhere_is_an_error(module: Any) -> None:
    """It contains the name, and would call another function of that name."""
    module("files", WRITES)
    module("loop", f"{WRITES}\ndef loop(x): return write(x)\n")
    with pytest.raises(EngineChangedError, match="does not call"):
        replace("megatron.made_up_files:write", by(nothing), PURPOSE, called_by=("megatron.made_up_loop:loop",))


def test_the_newest_caller_that_exists_counts(module: Any) -> None:
    module("files", WRITES)
    module("loop", LOOP)
    module("manager", "class Manager:\n    def save(self): return store()\n")
    newest, older = "megatron.made_up_manager:Manager.save", "megatron.made_up_loop:loop"
    with pytest.raises(EngineChangedError, match=r"Manager\.save does not call"):
        replace("megatron.made_up_files:write", by(nothing), PURPOSE, called_by=(newest, older))
    with pytest.raises(EngineChangedError, match="none of the functions that call write"):
        replace("megatron.made_up_files:write", by(nothing), PURPOSE, called_by=("megatron.made_up_manager:gone",))


def test_places_and_names_are_found_behind_decorators(module: Any) -> None:
    module("files", WRITES)
    module("loop", LOOP)
    assert find("megatron.made_up_loop:loop") is not None
    assert find("megatron.made_up_loop:loop.inner") is None
    assert find("megatron.made_up_absent:loop") is None
    loop = find("megatron.made_up_loop:loop")

    @functools.wraps(loop)
    def decorated(*arguments: object) -> object:
        return loop(*arguments)

    assert mentions(decorated, "write")
    assert not mentions(decorated, "store")


def test_nothing_outside_the_engine_imports_bridge() -> None:
    """What depends on its version stands in one folder."""
    root = Path(wan_train.__file__).parent
    importing = {
        str(file.relative_to(root))
        for file in root.rglob("*.py")
        for line in file.read_text().splitlines()
        if line.lstrip().startswith(("from megatron.bridge", "import megatron.bridge"))
    }
    inside = {name for name in importing if name.startswith("engine/upstream/")}
    assert inside
    assert importing - inside == {"engine/absent_modules.py"}
