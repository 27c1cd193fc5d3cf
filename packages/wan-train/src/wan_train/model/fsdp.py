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
    """Has no instances."""


def configure(config: Any, *, on_cpu: bool) -> None:
    """Set everything that ``dist.use_megatron_fsdp`` implies; each transformer block is one FSDP unit."""
    config.ddp.use_megatron_fsdp = True
    config.ddp.data_parallel_sharding_strategy = STRATEGY
    config.checkpoint.ckpt_format = "fsdp_dtensor"
    if on_cpu:
        # gloo has no reduction that scales while it sums.
        config.ddp.gradient_reduce_div_fusion = False
    if not isinstance(adapter.TELinear, type):
        # It tests every module for being one of Transformer Engine's, which is not installed.
        adapter.TELinear = _NoModule
    # The default unit is Megatron's own TransformerLayer.
    provider.FullyShardedDataParallel = functools.partial(adapter.FullyShardedDataParallel, fsdp_unit_modules=[Block])
