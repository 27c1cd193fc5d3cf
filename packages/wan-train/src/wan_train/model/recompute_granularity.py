"""What ``model.recompute_granularity`` means. Imports no Megatron."""

from wan_model.dit.recompute import Recompute

# By Megatron's names, and one of ours. "full" means what it means there. "selective" does not: Megatron recomputes the
# core of attention and saves the rest; here the output of self-attention, the most expensive part to recompute, is
# saved and the rest recomputed. "elementwise" saves the outputs of all matrix products as well.
RECOMPUTE: dict[str | None, Recompute] = {
    None: "none",
    "elementwise": "elementwise",
    "selective": "all_but_attention",
    "full": "block",
}
