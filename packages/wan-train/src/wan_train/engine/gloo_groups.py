"""Megatron's twenty gloo groups, without what they would cost a computation on the same few cores.

Together they took a third of the speed of one process with two threads on two cores (BENCHMARKS.md).
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed.distributed_c10d as c10d
from torch import Tensor


class _SharingDevice(type):
    """Stands for torch's class of gloo groups; those that it makes share one device."""

    groups: Any = c10d.ProcessGroupGloo

    def __call__(cls, store: Any, rank: int, size: int, timeout: Any) -> Any:
        """A group."""
        options = cls.groups._Options()
        options._devices, options._timeout = [_device()], timeout
        return cls.groups(store, rank, size, options)

    def __instancecheck__(cls, instance: object) -> bool:
        """Of torch's class."""
        return isinstance(instance, cls.groups)

    def __getattr__(cls, name: str) -> Any:
        """Of torch's class."""
        return getattr(cls.groups, name)


class _GlooGroups(metaclass=_SharingDevice):
    pass


@functools.cache
def _device() -> Any:
    return _SharingDevice.groups.create_default_device()


def share_device() -> None:
    """Let all groups wait for the network in one thread; otherwise each has one that wakes a hundred times a second."""
    module: Any = c10d
    module.ProcessGroupGloo = _GlooGroups


def _unless_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(collective)
    def run(output: Tensor, source: Tensor, *args: Any, group: Any = None, **options: Any) -> Any:
        if torch.distributed.get_world_size(group) > 1:
            return collective(output, source, *args, group=group, **options)
        assert output.data_ptr() == source.data_ptr(), "the share of the only rank is the whole buffer"
        return None

    return run


def leave_alone_groups_of_one() -> None:
    """Reduce and gather nothing among one rank; ``mend_bridge`` calls it once Megatron is imported.

    gloo would copy the buffer onto itself in a thread of its own, with a team of OpenMP threads of its own; as soon as
    there are more of these than cores, they all sleep between two loops instead of spinning.
    """
    import megatron.core.distributed.param_and_grad_buffer as buffers

    buffers.dist_all_gather_func = _unless_alone(buffers.dist_all_gather_func)
    buffers.dist_reduce_scatter_func = _unless_alone(buffers.dist_reduce_scatter_func)
