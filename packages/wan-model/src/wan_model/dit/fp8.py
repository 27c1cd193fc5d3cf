"""Frozen weights in fp8: a linear whose weight is kept as ``float8_e4m3fn`` with a scale for each output.

Row o of W is kept as round(W_o / s_o) with s_o = max |W_o| / 448, and W is computed from it, in the precision of the
input, for every product of the forward and of the backward pass.

Legend: S rows, I input width, O output width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

FP8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(FP8).max
# A row of zeros has a scale too.
_SMALLEST = 1e-30


def largest_of_rows(weight_OI: Tensor) -> Tensor:
    """max |W_o| of each row, fp32 [O, 1]."""
    return weight_OI.float().abs().amax(dim=1, keepdim=True)


def quantize(weight_OI: Tensor, largest_O1: Tensor) -> tuple[Tensor, Tensor]:
    """A weight in fp8, and the scale of each row, fp32 [O, 1].

    Args:
        weight_OI: of all columns, or of some.
        largest_O1: ``largest_of_rows`` of all columns.
    """
    scale_O1 = largest_O1.clamp_min(_SMALLEST) / _LARGEST
    return (weight_OI.float() / scale_O1).to(FP8), scale_O1


def dequantize(weight_OI: Tensor, scale_O1: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in a precision."""
    return (weight_OI.float() * scale_O1).to(dtype)


class _Fp8Linear(torch.autograd.Function):
    """W x + b for a frozen W, of which only the fp8 form is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x_SI: Tensor, weight_OI: Tensor, scale_O1: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight_OI, scale_O1)
        bias = None if bias_O is None else bias_O.to(x_SI.dtype)
        return F.linear(x_SI, dequantize(weight_OI, scale_O1, x_SI.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad_SO: Tensor) -> tuple[Tensor, None, None, None]:
        weight_OI, scale_O1 = ctx.saved_tensors
        return grad_SO @ dequantize(weight_OI, scale_O1, grad_SO.dtype), None, None, None


def fp8_linear(x_SI: Tensor, weight_OI: Tensor, scale_O1: Tensor, bias_O: Tensor | None) -> Tensor:
    """W x + b with W from ``quantize``; of x alone there is a gradient."""
    out: Tensor = _Fp8Linear.apply(x_SI, weight_OI, scale_O1, bias_O)
    return out
