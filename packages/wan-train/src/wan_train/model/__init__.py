"""WanDiT on Megatron-Core: layouts, FSDP, EMA."""
