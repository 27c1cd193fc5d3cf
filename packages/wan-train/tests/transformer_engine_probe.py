"""Part of ``engine_probe``: Transformer Engine's attention, by a stand-in that computes what its documentation says."""

import sys
from typing import Any

import torch


class _DocumentedAttention(torch.nn.Module):
    """Transformer Engine's ``DotProductAttention`` as its documentation describes it for packed tensors, in torch.

    With ``attention_type="self"`` keys are masked by the lengths of the queries, as the real one's slow path does.
    """

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int,
        *,
        attention_dropout: float,
        qkv_format: str,
        attn_mask_type: str,
        attention_type: str,
    ) -> None:
        super().__init__()
        assert (attention_dropout, qkv_format, attn_mask_type) == (0.0, "thd", "padding")
        self.shape, self.kind = (num_attention_heads, kv_channels), attention_type

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_kv: torch.Tensor,
        max_seqlen_q: int,
        max_seqlen_kv: int,
    ) -> torch.Tensor:
        for x, starts, longest in (
            (query, cu_seqlens_q, max_seqlen_q),
            (key, cu_seqlens_kv, max_seqlen_kv),
            (value, cu_seqlens_kv, max_seqlen_kv),
        ):
            assert x.is_contiguous()
            assert x.shape[1:] == self.shape
            assert starts.dtype == torch.int32
            assert starts[-1] == x.shape[0] > 0
            assert longest == starts.diff().max()
        lengths_q = cu_seqlens_q.diff().tolist()
        lengths_k = cu_seqlens_kv.diff().tolist()
        out = []
        for q, k, v, own in zip(
            query.split(lengths_q), key.split(lengths_k), value.split(lengths_k), lengths_q, strict=True
        ):
            seen = own if self.kind == "self" else k.shape[0]
            scores = torch.einsum("qhe,khe->hqk", q, k[:seen]) / self.shape[1] ** 0.5
            out.append(torch.einsum("hqk,khe->qhe", scores.softmax(-1), v[:seen]))
        return torch.cat(out).flatten(1)


def transformer_engine_answers() -> dict[str, object]:
    """Behind the model's answers, which made the groups of ranks."""
    import dataclasses
    import types

    from wan_train import engine
    from wan_train.config.options import RunOptions
    from wan_train.loop.run import build_config
    from wan_train.model.megatron_ops import MegatronOps
    from wan_train.model.provider import _ops

    stand_in: Any = types.ModuleType("transformer_engine.pytorch")
    stand_in.DotProductAttention = _DocumentedAttention
    sys.modules["transformer_engine"] = types.ModuleType("transformer_engine")
    sys.modules["transformer_engine.pytorch"] = stand_in
    provider = build_config(RunOptions("tiny")).model
    provider.finalize()
    without = engine.start()
    engine._started = dataclasses.replace(without, transformer_engine=True)
    try:
        chosen = {"auto, fp32": type(_ops(provider)).__name__}
        provider.params_dtype = torch.bfloat16
        chosen["auto, bf16"] = type(_ops(provider)).__name__
        provider.attention = "sdpa"
        chosen["sdpa, bf16"] = type(_ops(provider)).__name__
        provider.attention, provider.params_dtype = "transformer_engine", torch.float32
        fused = _ops(provider)
    finally:
        engine._started = without
        del sys.modules["transformer_engine"], sys.modules["transformer_engine.pytorch"]

    def differences(rows: int, q_offsets: tuple[int, ...], k_offsets: tuple[int, ...]) -> float:
        generator, worst, results = torch.Generator().manual_seed(1), 0.0, []
        lengths = (rows, k_offsets[-1], k_offsets[-1])
        inputs = [torch.randn(length, 4, 24, generator=generator, dtype=torch.float64) for length in lengths]
        weight = torch.randn(rows, 4, 24, generator=generator, dtype=torch.float64)
        for ops in (fused, MegatronOps(provider, "sdpa")):
            leaves = [x.clone().requires_grad_() for x in inputs]
            out = ops.attend(*leaves, q_offsets, k_offsets)
            (out * weight).sum().backward()
            results.append([out.detach(), *(leaf.grad for leaf in leaves)])
        for got, wanted in zip(*results, strict=True):
            assert got is not None
            assert wanted is not None
            assert got.shape == wanted.shape
            worst = max(worst, float((got - wanted).norm() / max(1.0, float(wanted.norm()))))
        return worst

    return {
        "chosen": chosen,
        "off by": {
            "samples": differences(12, (0, 3, 8, 12), (0, 3, 8, 12)),
            "with padding": differences(16, (0, 3, 8, 12), (0, 3, 8, 12)),
            "texts": differences(12, (0, 3, 8, 12), (0, 7, 14, 21)),
            "a sample of which this rank has nothing": differences(9, (0, 3, 3, 9), (0, 7, 14, 21)),
            "nothing but padding": differences(4, (0, 0), (0, 7)),
        },
    }
