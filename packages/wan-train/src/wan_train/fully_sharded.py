"""Fully sharded data parallelism: Megatron-FSDP around ``wan_model.WanDiT``.

Import only after ``wan_train.engine.start``.
"""

import functools
from typing import Any

import megatron.bridge.models.model_provider as provider
from megatron.core.distributed.fsdp.mcore_fsdp_adapter import FullyShardedDataParallel

from wan_model.dit import Block

STRATEGY = "optim_grads_params"


def settle(config: Any, *, on_cpu: bool) -> None:
    """Set what follows from ``dist.use_megatron_fsdp``, and have the blocks gathered one by one."""
    config.ddp.use_megatron_fsdp = True
    config.ddp.data_parallel_sharding_strategy = STRATEGY
    config.checkpoint.ckpt_format = "fsdp_dtensor"
    if on_cpu:
        # gloo can sum, but not scale while it sums.
        config.ddp.gradient_reduce_div_fusion = False
    # Megatron would look for its own TransformerLayer.
    provider.FullyShardedDataParallel = functools.partial(FullyShardedDataParallel, fsdp_unit_modules=[Block])
