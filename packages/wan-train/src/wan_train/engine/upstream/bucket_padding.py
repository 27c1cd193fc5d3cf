"""The distributed optimizer's state is saved under the parameter that it belongs to, also with several buckets.

Megatron-Core (0.16 to 0.19) gathers the state of a buffer without the padding between its buckets, and cuts it up at
positions that count the padding. Behind the first padding everything is saved under a neighbour's name: with
``ddp.overlap_grad_reduce``, which makes several buckets, a run resumed with the moments and the fp32 weights of others.
"""

import functools
from typing import Any

from wan_train.engine.upstream.replace import changed

_PURPOSE = "an exact resume with several buckets"
_SAVES = "sharded_param_state_fully_reshardable"


def _without_padding(buffer: Any) -> dict[Any, tuple[int, int, int]]:
    """Where each parameter begins and ends in the buffer without the padding between its buckets, and its bucket."""
    padding, end = [], 0
    for bucket in buffer.buckets:
        padding.append(bucket.offset - end)
        end += bucket.numel_unpadded
    return {
        parameter: (start - padding[bucket], stop - padding[bucket], bucket)
        for parameter, (start, stop, bucket) in buffer.param_index_map.items()
    }


def save_without_padding() -> None:
    """Replace what saves the state.

    Raises:
        EngineChangedError: there is no such function.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    save = vars(DistributedOptimizer).get(_SAVES)
    if save is None:
        raise changed(f"Megatron-Core's DistributedOptimizer has no {_SAVES}", _PURPOSE)

    @functools.wraps(save)
    def save_aligned(self: Any, *args: Any, **kwargs: Any) -> Any:
        padded = [buffer.param_index_map for buffer in self.buffers]
        try:
            for buffer in self.buffers:
                buffer.param_index_map = _without_padding(buffer)
            return save(self, *args, **kwargs)
        finally:
            for buffer, positions in zip(self.buffers, padded, strict=True):
                buffer.param_index_map = positions

    setattr(DistributedOptimizer, _SAVES, save_aligned)
