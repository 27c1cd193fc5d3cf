"""Fully sharded data parallelism: Megatron-FSDP around ``wan_model.WanDiT``.

Import only after ``wan_train.engine.start``.
"""

from typing import Any

from wan_model.dit.model import Block
from wan_train.engine.upstream.patches import use_fsdp_units

STRATEGY = "optim_grads_params"


def configure(config: Any, *, on_cpu: bool) -> None:
    """Set everything that ``dist.use_megatron_fsdp`` implies; each transformer block is one FSDP unit."""
    config.ddp.use_megatron_fsdp = True
    config.ddp.data_parallel_sharding_strategy = STRATEGY
    config.checkpoint.ckpt_format = "fsdp_dtensor"
    if on_cpu:
        # gloo has no reduction that scales while it sums.
        config.ddp.gradient_reduce_div_fusion = False
    use_fsdp_units(Block)
