"""Timing: CUDA events on a GPU, rounds in which everything that is compared runs once, peak memory."""

import dataclasses
import statistics
import time
import traceback
from collections.abc import Callable, Mapping
from typing import NamedTuple

from gpu.context import Context
from gpu.rows import DeviceLostError, Failed, NotRun, Value, absent_package, last_lines, one_line

# Beyond what a call took before, so that a stage does not overrun.
_RESERVE_SECONDS = 2.0


def seconds_of(call: Callable[[], object], device: str, repeats: int = 1) -> float:
    """Seconds of one call, the mean of some in a row, from the start to the end of its work on the device."""
    if device != "cuda":
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats
    import torch

    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    for _ in range(repeats):
        call()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / 1e3 / repeats


class Kernel(NamedTuple):
    """A kernel of a profile: its name, its time in all calls, and how many these were."""

    name: str
    microseconds: float
    calls: int


def profiled_kernels(call: Callable[[], object], device: str) -> list[Kernel]:
    """The kernels of a call, the longest first, by torch's profiler; on a CPU the operators.

    Raises:
        NotRun: the profiler recorded nothing.
    """
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as record:
        call()
        if on_gpu:
            import torch

            torch.cuda.synchronize()
    field = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    found = [
        Kernel(event.key, float(getattr(event, field, 0.0)), event.count)
        for event in record.key_averages()
        # An operator's own time on the device is that of its kernels, which have events of their own.
        if not on_gpu or "CUDA" in str(getattr(event, "device_type", "CUDA"))
    ]
    found = sorted((kernel for kernel in found if kernel.microseconds > 0), key=lambda kernel: -kernel.microseconds)
    if not found:
        raise NotRun("the profiler recorded no kernel")
    return found


@dataclasses.dataclass
class Timed:
    """What is known of a candidate.

    Attributes:
        seconds: of each round.
        peak: most bytes that were allocated on the GPU while it ran.
        problem: why there is no figure, or None.
    """

    seconds: list[float] = dataclasses.field(default_factory=list)
    peak: int = 0
    problem: NotRun | Failed | None = None

    @property
    def median(self) -> float:
        """Seconds.

        Raises:
            NotRun, Failed: there is no figure.
        """
        if self.problem is not None:
            raise self.problem
        if not self.seconds:
            raise NotRun("the time of the stage was used up")
        return statistics.median(self.seconds)

    def figures(self) -> dict[str, Value]:
        """Seconds, each round and peak memory."""
        found: dict[str, Value] = {
            "seconds": float(f"{self.median:.4g}"),
            "each": " ".join(f"{one:.4g}" for one in self.seconds),
        }
        return {**found, "peak GB": round(self.peak / 1e9, 2)} if self.peak else found


def _problem(error: Exception) -> NotRun | Failed:
    if isinstance(error, NotRun | Failed):
        return error
    if package := absent_package(error):
        return NotRun(f"the package {package} is not installed")
    if type(error).__name__ == "OutOfMemoryError":
        return NotRun("it needs more memory than the device has")
    return Failed(f"{type(error).__name__}: {one_line(error)}", traceback=last_lines(error))


def time_alternately(calls: Mapping[str, Callable[[], object]], context: Context, rounds: int = 2) -> dict[str, Timed]:
    """Time several calls against each other; one that fails does not end the others.

    Args:
        calls: by name.
        context: of the stage; what would overrun it is left out.
        rounds: after a first call of each, which compiles and allocates. In a round each call runs once.

    Returns:
        For each name what is known.

    Raises:
        DeviceLostError: the device cannot be used any more.
    """
    found = {name: Timed() for name in calls}
    firsts: dict[str, float] = {}
    for name, call in calls.items():
        if context.seconds_left > 2 * _RESERVE_SECONDS:
            firsts[name] = _first(call, found[name], context)
            # The first call was longer, so that one figure of each is known before a second of any.
            if found[name].problem is None and context.seconds_left > _RESERVE_SECONDS:
                _timed(call, found[name], context)
    for number in range(1, rounds):
        # What ran before may leave caches and clocks in another state, so the order changes.
        for name in list(calls) if number % 2 == 0 else list(calls)[::-1]:
            it = found[name]
            if it.problem is None and name in firsts:
                lasts = it.seconds[-1] if it.seconds else firsts[name]
                if context.seconds_left > lasts + _RESERVE_SECONDS:
                    _timed(calls[name], it, context)
    return found


def _timed(call: Callable[[], object], it: Timed, context: Context) -> None:
    try:
        it.seconds.append(seconds_of(call, context.device))
    except Exception as error:
        _note(it, error, context)


def _first(call: Callable[[], object], it: Timed, context: Context) -> float:
    start = time.monotonic()
    try:
        if context.on_gpu:
            import torch

            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            call()
            torch.cuda.synchronize()
            it.peak = torch.cuda.max_memory_allocated()
        else:
            call()
    except Exception as error:
        _note(it, error, context)
    return time.monotonic() - start


def _note(it: Timed, error: Exception, context: Context) -> None:
    if isinstance(error, DeviceLostError):
        raise error
    it.problem = _problem(error)
    # Its frames hold tensors.
    traceback.clear_frames(error.__traceback__)
    context.free_memory()
