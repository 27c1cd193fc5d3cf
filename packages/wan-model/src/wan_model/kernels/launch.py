"""Launching a Triton kernel on CUDA or, for tests, in Triton's interpreter on a CPU.

The interpreter needs the environment variable ``TRITON_INTERPRET=1`` before Triton is imported.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of a row that a thread holds in registers, of each operand.
_ELEMENTS_PER_THREAD = 16
_THREADS_PER_WARP = 32
_MOST_WARPS = 16


class Kernel:
    """A kernel.

    Args:
        function: written in Triton's language; pointers and numbers first, then constants as ``tl.constexpr``.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        # Without the checks of shapes that a test may have wrapped it in: Triton reads its source.
        self.function = inspect.unwrap(function)

    @functools.cached_property
    def compiled(self) -> Any:
        """Compiled for the device at its first launch with a type of arguments, or interpreted."""
        return triton.jit(self.function)

    def launch(self, grid: tuple[int, ...], *arguments: Any, warps: int, **constants: Any) -> None:
        """Run one program for each point of the grid.

        Args:
            grid: number of programs along each axis.
            arguments: tensors of one device, and numbers.
            warps: warps of a program.
            constants: of the kernel.
        """
        device = next(argument for argument in arguments if isinstance(argument, Tensor)).device
        here = device.type != "cuda" or device.index == torch.cuda.current_device()
        with contextlib.nullcontext() if here else torch.cuda.device(device):
            self.compiled[grid](*arguments, **constants, num_warps=warps)


def block_of(width: int) -> int:
    """The number of lanes for a row: Triton's blocks are powers of two."""
    block: int = triton.next_power_of_2(width)
    return block


def warps_of(width: int) -> int:
    """The number of warps of a program that holds whole rows of a width in registers."""
    return max(1, min(_MOST_WARPS, block_of(width) // (_ELEMENTS_PER_THREAD * _THREADS_PER_WARP)))


def _fill(out, value) -> None:  # type: ignore[no-untyped-def]
    tl.store(out, value)


def try_out(device: torch.device) -> None:
    """Compile and run a kernel; an error of any kind means that this machine cannot."""
    Kernel(_fill).launch((1,), torch.zeros(1, device=device), 1.0, warps=1)
