"""The tests of the packages that are marked ``gpu``, in a session of their own."""

import importlib.util
import re
import sys
from pathlib import Path

from gpu.commands import Started, start
from gpu.context import Context
from gpu.rows import Failed, Found, NotRun

ROOT = Path(__file__).resolve().parents[2]
# What the conftests of the packages import.
_NEEDED = ("pytest", "jaxtyping", "beartype")


def files() -> list[Path]:
    """The files that have such tests."""
    return [
        path
        for path in sorted(ROOT.glob("packages/*/tests/**/test_*.py"))
        if "@pytest.mark.gpu" in path.read_text(encoding="utf-8")
    ]


class MarkedTests:
    """The session, which may be started before it is waited for.

    Args:
        context: of the stage.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._started: Started | None = None

    def start(self) -> None:
        """Start it, once.

        Raises:
            NotRun: there is no GPU, or a package of the tests is absent.
        """
        if self._started is not None:
            return
        self._context.need_gpu()
        if absent := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
            raise NotRun(f"the package {absent[0]} is not installed")
        # Another version of torch may have other warnings, which are no errors here.
        options = ["-m", "gpu", "-q", "-W", "default", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short"]
        command = [sys.executable, "-m", "pytest", *options, "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml")]
        temporary = ["--basetemp", str(self._context.folder / "pytest-tmp")]
        self._started = start([*command, *temporary, *map(str, files())], self._context.folder / "pytest.log")

    def found(self) -> Found:
        """The row of the session.

        Raises:
            Failed: a test fails.
            NotRun: see ``start``; or all were skipped.
        """
        self.start()
        assert self._started is not None
        took = self._started.wait(self._context.seconds_left)
        text = self._started.log.read_text(encoding="utf-8", errors="replace")
        counts = {
            outcome: int(count) for count, outcome in re.findall(r"(\d+) (passed|skipped)", text.splitlines()[-1])
        }
        if not counts:
            raise Failed(f"pytest's last line has no counts: {self._started.last_lines()}")
        if not counts.get("passed"):
            raise NotRun(f"all were skipped: {self._started.last_lines()}")
        return Found("the tests marked gpu pass", {**counts, "seconds": round(took, 1)})
