"""What a stage is told: the device, its scratch folder, the time that is left, and the rows that exist already."""

import contextlib
import dataclasses
import gc
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from gpu.rows import DeviceLostError, Found, NotRun, Row, measured

# The seconds of a row whose figures have been measured.
AT_ONCE = -math.inf


@dataclasses.dataclass(frozen=True)
class Context:
    """A run of a stage.

    Attributes:
        device: ``cuda`` or ``cpu``; of the first stage also ``auto``.
        folder: for files of the stage.
        ends_at: by ``time.monotonic``; no row should begin that would end later.
        quick: on a CPU, only what shows that the stage runs.
        done: names of rows that an earlier process of this stage has finished.
        begin: called with the name of what begins, so that a crash can be attributed to it.
    """

    device: str
    folder: Path
    ends_at: float
    quick: bool = False
    done: frozenset[str] = frozenset()
    begin: Callable[[str], None] = lambda name: None

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device == "cuda"

    @property
    def seconds_left(self) -> float:
        """Until the stage should have ended."""
        return self.ends_at - time.monotonic()

    def need_gpu(self) -> None:
        """Refuse a row on a CPU.

        Raises:
            NotRun: there is no GPU.
        """
        if not self.on_gpu:
            raise NotRun("no GPU")

    def leave_out_if_quick(self) -> None:
        """Refuse a row that ``--quick`` leaves out.

        Raises:
            NotRun: it is left out.
        """
        if self.quick:
            raise NotRun("left out by --quick")

    def row(
        self, name: str, measure: Callable[[], Found], *, seconds: float = 1.0, memory_may_lack: bool = False
    ) -> Iterator[Row]:
        """The row of a check, unless it exists already.

        Args:
            name: unique in the stage.
            measure: see ``gpu.rows.measured``.
            seconds: that it takes about; without that much time left it is not run.
            memory_may_lack: see ``gpu.rows.measured``.

        Raises:
            DeviceLostError: after the row, if the device cannot be used any more.
        """
        if name in self.done:
            return
        if self.seconds_left < seconds:
            yield Row(name, "not run", "the time of the stage was used up")
            return
        self.begin(name)
        row = measured(name, measure, memory_may_lack=memory_may_lack)
        yield row
        if self.on_gpu and (row.outcome == "failed" or "memory" in row.why):
            self.free_memory()

    def free_memory(self) -> None:
        """Return unused memory to the device, for example after an error.

        Raises:
            DeviceLostError: the device cannot be used any more.
        """
        gc.collect()
        if not self.on_gpu:
            return
        import torch

        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except Exception as error:
            raise DeviceLostError(str(error)) from error

    @contextlib.contextmanager
    def group(self, name: str) -> Iterator[bool]:
        """Announce a group of rows that are measured together; False if it has crashed before."""
        if name not in self.done:
            self.begin(name)
        yield name not in self.done
