"""Makes Megatron's twenty gloo groups cheap on few cores.

Unchanged they slow a process with two threads on two cores down by a third (BENCHMARKS.md).
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed.distributed_c10d as c10d
from torch import Tensor

from wan_train.engine.upstream.replace import replace


class _SharingDevice(type):
    """Replaces torch's class of gloo groups; its groups share one device."""

    groups: Any = c10d.ProcessGroupGloo

    def __call__(cls, store: Any, rank: int, size: int, timeout: Any, **others: bool) -> Any:
        """Create a group; torch passes further switches from 2.14 on, and one that is set makes a group of its kind."""
        if any(others.values()):
            return cls.groups(store, rank, size, timeout=timeout, **others)
        options = cls.groups._Options()
        options._devices, options._timeout = [_device()], timeout
        return cls.groups(store, rank, size, options)

    def __instancecheck__(cls, instance: object) -> bool:
        """Instances of torch's class."""
        return isinstance(instance, cls.groups)

    def __getattr__(cls, name: str) -> Any:
        """Attributes of torch's class."""
        return getattr(cls.groups, name)


class _GlooGroups(metaclass=_SharingDevice):
    pass


@functools.cache
def _device() -> Any:
    return _SharingDevice.groups.create_default_device()


def share_device() -> None:
    """Let all groups share one network thread; by default each has one that wakes a hundred times per second."""
    module: Any = c10d
    module.ProcessGroupGloo = _GlooGroups


def _unless_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(collective)
    def run(output: Tensor, source: Tensor, *args: Any, group: Any = None, **options: Any) -> Any:
        if torch.distributed.get_world_size(group) > 1:
            return collective(output, source, *args, group=group, **options)
        assert output.data_ptr() == source.data_ptr(), "the shard of the only rank is the whole buffer"
        return None

    return run


def skip_groups_of_one() -> None:
    """Skip collectives of groups of one rank; ``patch_bridge`` calls it once Megatron is imported.

    gloo would copy the buffer onto itself in a thread with its own team of OpenMP threads; with more of these than
    cores, all of them sleep between two parallel loops instead of spinning.
    """
    for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
        place = f"megatron.core.distributed.param_and_grad_buffer:{name}"
        replace(place, _unless_alone, "running on few cores")
