"""Transformer Engine's fused attention for packs, on Megatron's linears. Needs CUDA and Transformer Engine.

Import only after ``wan_train.engine.start`` has found Transformer Engine.
"""

import functools
import itertools
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from transformer_engine.pytorch import DotProductAttention

from wan_model.dit.attention import Offsets, offsets_on_device
from wan_train.model.megatron_ops import MegatronOps


@functools.lru_cache(maxsize=8)
def _attention(heads: int, width: int, kind: str) -> Any:
    # Without parameters and dropout one module serves every layer. The kind ("self", "cross") decides whether keys are
    # masked by the lengths of the queries or by their own.
    return DotProductAttention(
        heads, width, attention_dropout=0.0, qkv_format="thd", attn_mask_type="padding", attention_type=kind
    )


def _longest(offsets: Offsets) -> int:
    return max(stop - start for start, stop in itertools.pairwise(offsets))


class TransformerEngineOps(MegatronOps):
    """``MegatronOps`` with ``DotProductAttention`` over "thd" (packed) tensors."""

    def attend(self, q_SHE: Tensor, k_SHE: Tensor, v_SHE: Tensor, q_offsets: Offsets, k_offsets: Offsets) -> Tensor:
        """Packed attention of this rank's rows."""
        if q_offsets[-1] == 0:  # only padding, for which no kernel is called
            return super().attend(q_SHE, k_SHE, v_SHE, q_offsets, k_offsets)
        # The maximum lengths are passed from the host, so nothing is copied back from the device.
        heads, width = q_SHE.shape[1:]
        device = q_SHE.device
        attended = _attention(heads, width, "self" if q_offsets == k_offsets else "cross")(
            q_SHE[: q_offsets[-1]].contiguous(),
            k_SHE[: k_offsets[-1]].contiguous(),
            v_SHE[: k_offsets[-1]].contiguous(),
            cu_seqlens_q=offsets_on_device(q_offsets, device),
            cu_seqlens_kv=offsets_on_device(k_offsets, device),
            max_seqlen_q=_longest(q_offsets),
            max_seqlen_kv=_longest(k_offsets),
        )
        out = rearrange(attended, "s (h e) -> s h e", h=heads)
        if padding := q_SHE.shape[0] - q_offsets[-1]:
            out = torch.cat([out, out.new_zeros(padding, heads, width)])
        return out
