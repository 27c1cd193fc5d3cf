"""``WanDiT`` on Megatron, laid out over ranks."""
