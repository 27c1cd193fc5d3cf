"""Elementwise operations and norms: modulation, gates, rotary rotation, activation.

These are bound by memory bandwidth, so each makes one pass over memory if possible. On the CPU, operations of several
steps work on chunks that fit in the cache. On CUDA they are Triton kernels (``wan_model.kernels``) or, where those
cannot be compiled, torch's operations one by one. All give the same results up to rounding: everything is computed in
fp32 and rounded once to the precision of the input.

A function whose name ends in an underscore may overwrite one of its inputs, which the caller must not use afterwards.

Legend: S tokens on this rank, D width, B samples, H heads, E head width.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from wan_model.dit.recompute import products_are_saved
from wan_model.kernels import available
from wan_model.kernels.row_chunks import chunks_by_sample, chunks_of_all
from wan_model.pack import TokenRows

# Elements of a chunk per thread: a few such buffers fit in a core's caches. Smaller tensors are not cut into chunks.
_CHUNK_SIZE = 131_072
_GELU_LINEAR = 2 * math.sqrt(2 / math.pi)
_GELU_CUBIC = 0.044715 * _GELU_LINEAR


def at_least_fp32(x: Tensor) -> Tensor:
    """Convert to fp32; fp64 is kept, so that a model in fp64 computes in fp64 throughout."""
    return x if x.dtype == torch.float64 else x.float()


def _by_segment(
    rows: TokenRows, function: Callable[..., Tensor], tokens: Sequence[Tensor], samples: Sequence[Tensor]
) -> Tensor:
    """Apply a function to each segment's rows of ``tokens`` and its sample's row of ``samples``."""
    by_sample = [values_BD.unbind(0) for values_BD in samples]
    if len(rows.segments) == 1:
        sample = rows.segments[0][0]
        return function(*tokens, *(values[sample] for values in by_sample))
    # split() instead of slices, because the gradient of a slice is a tensor of the full size.
    lengths = [stop - start for _, start, stop in rows.segments]
    parts = zip(*(x_SD.split(lengths) for x_SD in tokens), strict=True)
    return torch.cat(
        [
            function(*segment, *(values[sample] for values in by_sample))
            for segment, (sample, _, _) in zip(parts, rows.segments, strict=True)
        ]
    )


# -- norms with a factor and an offset, gates -------------------------------------------------------------------------


def norm_modulate(x_SD: Tensor, shift_BD: Tensor, scale_BD: Tensor, rows: TokenRows, eps: float) -> Tensor:
    """LN(x) * (1 + scale) + shift, with the scale and shift (fp32) of each token's sample."""
    if available.for_tensor(x_SD):
        from wan_model.kernels.layer_norm import layer_norm_factor_offset

        chunks = chunks_by_sample(rows, x_SD.device)
        return layer_norm_factor_offset(x_SD, scale_BD, shift_BD, chunks, eps, plus_one=1.0)
    # A layer norm with weight 1 + scale and bias shift is the same function in one pass, on a CPU.
    width, dtype = x_SD.shape[-1:], x_SD.dtype

    def of_segment(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        if x.is_cpu:
            return F.layer_norm(x, width, 1 + scale, shift, eps)
        return F.layer_norm(at_least_fp32(x), width, 1 + scale, shift, eps).to(dtype)

    return _by_segment(rows, of_segment, (x_SD,), (shift_BD, scale_BD))


def layer_norm(x_SD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
    """LN(x) * weight + bias."""
    weight_D, bias_D = at_least_fp32(weight_D), at_least_fp32(bias_D)
    if available.for_tensor(x_SD):
        from wan_model.kernels.layer_norm import layer_norm_factor_offset

        chunks = chunks_of_all(x_SD.shape[0], x_SD.device)
        return layer_norm_factor_offset(x_SD, weight_D[None], bias_D[None], chunks, eps, plus_one=0.0)
    return F.layer_norm(at_least_fp32(x_SD), x_SD.shape[-1:], weight_D, bias_D, eps).to(x_SD.dtype)


def gate_add_(x_SD: Tensor, update_SD: Tensor, gate_BD: Tensor, rows: TokenRows) -> Tensor:
    """x + gate * update, with the gate (fp32) of each token's sample. Without gradients it overwrites ``update``."""
    if available.for_tensor(x_SD) and available.for_tensor(update_SD):
        from wan_model.kernels import gate

        chunks = chunks_by_sample(rows, x_SD.device)
        overwrites = not torch.is_grad_enabled() and update_SD.dtype == x_SD.dtype
        if overwrites and x_SD.is_contiguous() and update_SD.is_contiguous():
            return gate.gate_add_(x_SD, update_SD, gate_BD, chunks)
        return gate.gate_add(x_SD, update_SD, gate_BD, chunks)
    if update_SD.is_cpu and update_SD.dtype == x_SD.dtype == torch.float32 and not torch.is_grad_enabled():
        for sample, start, stop in rows.segments:
            update = update_SD[start:stop]
            torch.addcmul(x_SD[start:stop], update, gate_BD[sample], out=update)
        return update_SD

    def of_segment(x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
        return torch.addcmul(at_least_fp32(x), at_least_fp32(update), gate).to(x.dtype)

    return _by_segment(rows, of_segment, (x_SD, update_SD), (gate_BD,))


def add_(x_SD: Tensor, update_SD: Tensor) -> Tensor:
    """x + update. Without gradients the result overwrites ``update``."""
    if torch.is_grad_enabled() or update_SD.dtype != x_SD.dtype:
        return x_SD + update_SD
    return update_SD.add_(x_SD)


# -- norm and rotation of queries and keys -----------------------------------------------------------------


def _as_pairs(x_SD: Tensor, pairs: int) -> Tensor:
    # A plain view instead of einops, because this is called for every chunk.
    return torch.view_as_complex(x_SD.view(x_SD.shape[0], -1, pairs, 2))


def rotate(x_SD: Tensor, table_S1P: Tensor) -> Tensor:
    """Rotate each pair of values (2i, 2i+1) of every head by its token's angle, in fp32.

    Args:
        x_SD: tokens, the heads concatenated.
        table_S1P: from ``wan_model.dit.rope.rotary_table``; P is half of a head's width.
    """
    rotated = _as_pairs(at_least_fp32(x_SD), table_S1P.shape[-1]) * table_S1P
    return torch.view_as_real(rotated).flatten(1).to(x_SD.dtype)


def rms_norm_(x_SD: Tensor, weight_D: Tensor, eps: float, table_S1P: Tensor | None = None) -> Tensor:
    """RMS norm over the whole width, then ``rotate`` if a table is given. Without gradients it overwrites its input."""
    if available.for_tensor(x_SD):
        from wan_model.kernels.rms_norm import rms_norm_rotate, rms_norm_rotate_

        table_S1P2 = None if table_S1P is None else torch.view_as_real(table_S1P)
        if not torch.is_grad_enabled() and x_SD.is_contiguous():
            return rms_norm_rotate_(x_SD, weight_D, eps, table_S1P2)
        return rms_norm_rotate(x_SD, weight_D, eps, table_S1P2)
    normed: Tensor
    if x_SD.is_cpu and x_SD.dtype == weight_D.dtype == torch.float32:
        if torch.is_grad_enabled():
            normed = _RMSNormRotate.apply(x_SD, weight_D, eps, table_S1P)
        else:
            normed, _ = _rms_norm_chunks(x_SD, weight_D, eps, table_S1P, out_SD=x_SD)
        return normed
    normed = F.rms_norm(at_least_fp32(x_SD), x_SD.shape[-1:], at_least_fp32(weight_D), eps).to(x_SD.dtype)
    return normed if table_S1P is None else rotate(normed, table_S1P)


def _chunks(first: Tensor, *others: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Chunks of the same rows of several tensors, small enough for the cache; None stays None."""
    rows, width = first.shape
    step = max(1, _CHUNK_SIZE * torch.get_num_threads() // width)
    if rows <= step:
        return iter([(first, *others)])
    count = -(-rows // step)
    return zip(*([None] * count if x is None else x.split(step) for x in (first, *others)), strict=True)


def _rms_norm_chunks(
    x_SD: Tensor, weight_D: Tensor, eps: float, table_S1P: Tensor | None, out_SD: Tensor
) -> tuple[Tensor, Tensor]:
    """Write the result into ``out_SD``; return it and the scale of each row."""
    rows, width = x_SD.shape
    scale_S1 = x_SD.new_empty(rows, 1)
    eps_1 = x_SD.new_full((1,), eps)
    for x, out, scale, rotations in _chunks(x_SD, out_SD, scale_S1, table_S1P):
        torch.linalg.vector_norm(x, dim=-1, keepdim=True, out=scale)
        torch.addcmul(eps_1, scale, scale, value=1 / width, out=scale).rsqrt_()
        if rotations is None:
            torch.mul(x, scale, out=out).mul_(weight_D)
        else:
            # A row's scale is multiplied into its rotations, which are fewer than its values.
            _as_pairs(torch.mul(x, weight_D, out=out), rotations.shape[-1]).mul_(rotations * scale.unsqueeze(-1))
    return out_SD, scale_S1


class _RMSNormRotate(torch.autograd.Function):
    """RMS norm and rotation in one pass over memory, forward and backward; fp32 on the CPU."""

    @staticmethod
    def forward(ctx: Any, x_SD: Tensor, weight_D: Tensor, eps: float, table_S1P: Tensor | None) -> Tensor:
        out_SD, scale_S1 = _rms_norm_chunks(x_SD, weight_D, eps, table_S1P, torch.empty_like(x_SD))
        ctx.save_for_backward(x_SD, weight_D, scale_S1, table_S1P)
        return out_SD

    @staticmethod
    def backward(ctx: Any, grad_SD: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x_SD, weight_D, scale_S1, table_S1P = ctx.saved_tensors
        width = x_SD.shape[1]
        grad_x_SD = torch.empty_like(x_SD)
        grad_weight_D = torch.zeros_like(weight_D) if ctx.needs_input_grad[1] else None
        back_S1P = None if table_S1P is None else table_S1P.conj().resolve_conj()
        for x, grad, scale, out, back in _chunks(x_SD, grad_SD.contiguous(), scale_S1, grad_x_SD, back_S1P):
            if back is not None:
                grad = torch.view_as_real(_as_pairs(grad, back.shape[-1]) * back).flatten(1)
            normed = x * scale
            # With n the normed row: dx = scale (g w - n mean(g w n)), dw = sum of g n over rows.
            torch.mul(grad, normed, out=out)
            if grad_weight_D is not None:
                grad_weight_D += out.sum(dim=0)
            dots = torch.mv(out, weight_D).unsqueeze(-1)
            torch.mul(grad, weight_D, out=out).addcmul_(normed, dots, value=-1 / width).mul_(scale)
        return grad_x_SD, grad_weight_D, None, None


# -- activation -------------------------------------------------------------------------------------------------------


def tanh_gelu_(x: Tensor) -> Tensor:
    """GELU, tanh approximation; it may overwrite its input.

    0.5 x (1 + tanh z) is x sigmoid(2 z), which needs one exponential and does not cancel for negative x.
    """
    if x.is_cpu and x.dtype == torch.float32 and x.numel() > _CHUNK_SIZE and x.is_contiguous():
        # A copy has the same bits as the computation over the input, which F.gelu has not.
        activated: Tensor = _TanhGelu.apply(x.clone() if products_are_saved() else x)
        return activated
    return F.gelu(x, approximate="tanh")


class _TanhGelu(torch.autograd.Function):
    """Saves the derivative instead of the input; it is computed while the input is in the cache."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        derivative = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        flat = x.view(-1)
        linear = x.new_full((1,), _GELU_LINEAR)
        flat_derivative = None if derivative is None else derivative.view(-1)
        size = _CHUNK_SIZE * torch.get_num_threads()
        buffer = x.new_empty(min(size, flat.numel()))
        for start in range(0, flat.numel(), size):
            chunk = flat[start : start + size]
            gate = buffer[: chunk.numel()]
            # s = sigmoid(u) with u = x (linear + cubic x²)
            torch.addcmul(linear, chunk, chunk, value=_GELU_CUBIC, out=gate).mul_(chunk).sigmoid_()
            if flat_derivative is None:
                chunk.mul_(gate)
                continue
            # y = x s and dy/dx = s + x u' s (1 - s) = s + (y - y s) u'
            slope = flat_derivative[start : start + size]
            torch.addcmul(linear, chunk, chunk, value=3 * _GELU_CUBIC, out=slope)
            chunk.mul_(gate)
            slope.mul_(torch.addcmul(chunk, chunk, gate, value=-1)).add_(gate)
        if derivative is not None:
            ctx.save_for_backward(derivative)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (derivative,) = ctx.saved_tensors
        # In place, because allocating a tensor of this size costs more than the product. A second backward pass is an
        # error of autograd, because the saved tensor has changed.
        return derivative.mul_(grad)
