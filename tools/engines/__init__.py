"""wan-train's tests with sources of Megatron-Bridge and Megatron-Core of any version."""
