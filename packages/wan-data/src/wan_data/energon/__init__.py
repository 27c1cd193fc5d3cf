"""Everything that wan-data takes from Megatron-Energon, with one behaviour on all versions that it works with."""
