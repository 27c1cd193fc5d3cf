"""Fully sharded data parallelism: Megatron-FSDP around ``wan_model.WanDiT``.

Import only after ``wan_train.engine.start``.
"""

from typing import Any

from wan_model.dit.lora import is_adapter_key
from wan_model.dit.model import Block
from wan_model.system.torchrun import world_size
from wan_train.engine.upstream.patches import use_fsdp_units
from wan_train.model.layout import Layout

SHARDED = "optim_grads_params"
# With nothing to shard, Megatron-FSDP adds the gradients to themselves in place of their shards, so every micro-batch
# doubles them (Megatron-Core 0.16, ``_bucket_group_gradient_reduce``).
ALONE = "optim"


def configure(config: Any, *, on_cpu: bool) -> None:
    """Set everything that ``dist.use_megatron_fsdp`` implies; each transformer block is one FSDP unit."""
    config.ddp.use_megatron_fsdp = True
    layout = Layout.of(config, world_size())
    config.ddp.data_parallel_sharding_strategy = SHARDED if layout.data * layout.context > 1 else ALONE
    config.checkpoint.ckpt_format = "fsdp_dtensor"
    if on_cpu:
        # gloo has no reduction that scales while it sums.
        config.ddp.gradient_reduce_div_fusion = False
    use_fsdp_units(Block, saved=None if config.model.lora is None else is_adapter_key)
