"""Fully sharded data parallelism: Megatron-FSDP around ``wan_model.WanDiT``.

Import only after ``wan_train.engine.start``.
"""

import functools
from typing import Any

import megatron.bridge.models.model_provider as provider
import megatron.core.distributed.fsdp.mcore_fsdp_adapter as adapter

from wan_model.dit.model import Block

STRATEGY = "optim_grads_params"


class _NoModule:
    """What no module is an instance of."""


def settle(config: Any, *, on_cpu: bool) -> None:
    """Set what follows from ``dist.use_megatron_fsdp``, and have the blocks gathered one by one."""
    config.ddp.use_megatron_fsdp = True
    config.ddp.data_parallel_sharding_strategy = STRATEGY
    config.checkpoint.ckpt_format = "fsdp_dtensor"
    if on_cpu:
        # gloo can sum, but not scale while it sums.
        config.ddp.gradient_reduce_div_fusion = False
    if not isinstance(adapter.TELinear, type):
        # It asks of every module whether it is one of Transformer Engine's, which are not there.
        adapter.TELinear = _NoModule
    # Megatron would look for its own TransformerLayer.
    provider.FullyShardedDataParallel = functools.partial(adapter.FullyShardedDataParallel, fsdp_unit_modules=[Block])
