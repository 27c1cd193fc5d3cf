"""Files and folders that all test processes of a session share, each made once. Linux and macOS."""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

# Makes ``name`` with the function, which gets its path, unless another process of the session has done so already.
Once = Callable[[str, Callable[[Path], object]], Path]


@runtime_checkable
class TempPathFactory(Protocol):
    """Pytest's."""

    def getbasetemp(self) -> Path:
        """The folder of this process; under pytest-xdist those of all workers lie below a common one."""


def session_folder(factory: TempPathFactory, name: str) -> Path:
    """A folder common to all test processes of this session.

    Args:
        factory: pytest's ``tmp_path_factory``.
        name: of the folder, so that packages that are tested in one session do not share their files' names.
    """
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    folder.mkdir(exist_ok=True)
    return folder


def once_in(folder: Path) -> Once:
    """For a fixture ``once`` of session scope: ``once(name, build)`` is the path of what ``build`` made.

    While one process builds, others that want the same wait. Tests only read what was made, or copy it.
    """

    def make(name: str, build: Callable[[Path], object]) -> Path:
        path, done = folder / name, folder / f"{name}.done"
        with (folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                build(path)
                done.touch()
        return path

    return make


def order_by_shared_fixtures(items: list[Any], folder: Path, *fixtures: str) -> None:
    """Order the tests below a folder so that test processes rarely wait for what another one makes.

    Of the tests that use one of the fixtures, directly or through another fixture, the first one goes before all tests
    of the folder, and the others go behind them. Call it in ``pytest_collection_modifyitems``.

    Args:
        items: all collected tests; changed in place.
        folder: the tests to order; the others keep their positions.
        fixtures: the names of fixtures that make something once for all test processes.
    """
    places = [place for place, item in enumerate(items) if folder in item.path.parents]
    own = [items[place] for place in places]
    first: list[Any] = []
    for name in fixtures:
        user = next((item for item in own if name in item.fixturenames), None)
        if user is not None and user not in first:
            first.append(user)
    last = [item for item in own if item not in first and not {*fixtures}.isdisjoint(item.fixturenames)]
    middle = [item for item in own if item not in first and item not in last]
    for place, item in zip(places, [*first, *middle, *last], strict=True):
        items[place] = item
