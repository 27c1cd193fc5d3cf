"""Column-parallel products whose backward pass communicates while it computes the gradients of the weights.

Import only after ``wan_train.engine.start``.

Linears that read the same rows need one exchange in the backward pass, for the sum of what they send back. That sum
does not depend on the gradients of the weights, so the exchange is started first and they are computed meanwhile.
Megatron's ``ColumnParallelLinear`` overlaps in the same way, but with an exchange for each linear. CUDA begins the two
in the order of the calls only with ``CUDA_DEVICE_MAX_CONNECTIONS=1``.

Legend: H rows that the rank holds, S rows of all ranks, I input width, O output width on the rank.
"""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup
from torch.nn import functional as F


class _ColumnProducts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_HI: Tensor, group: ProcessGroup, scattered: bool, count: int, *weights_and_biases: Tensor
    ) -> tuple[Tensor, ...]:
        weights, biases = weights_and_biases[:count], weights_and_biases[count:]
        x_SI = gather_from_sequence_parallel_region(x_HI) if scattered else x_HI
        ctx.save_for_backward(x_SI, *weights)
        ctx.group, ctx.held = group, x_HI.shape if scattered else None
        return tuple(F.linear(x_SI, weight, bias) for weight, bias in zip(weights, biases, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients_SO: Tensor) -> tuple[Tensor | None, ...]:
        x_SI, *weights = ctx.saved_tensors
        into_x, work = None, None
        if ctx.needs_input_grad[0]:
            into_x = whole_SI = gradients_SO[0] @ weights[0]
            for gradient, weight in zip(gradients_SO[1:], weights[1:], strict=True):
                whole_SI.addmm_(gradient, weight)
            if ctx.held is None:
                work = torch.distributed.all_reduce(whole_SI, group=ctx.group, async_op=True)
            else:
                into_x = whole_SI.new_empty(ctx.held)
                work = torch.distributed.reduce_scatter_tensor(into_x, whole_SI, group=ctx.group, async_op=True)
        into_weights = [gradient.t() @ x_SI for gradient in gradients_SO]
        into_biases = [gradient.sum(0) for gradient in gradients_SO]
        if work is not None:
            work.wait()
        return into_x, None, None, None, *into_weights, *into_biases


def column_products(
    x_HI: Tensor, weights_OI: Sequence[Tensor], biases_O: Sequence[Tensor], group: ProcessGroup, *, scattered: bool
) -> tuple[Tensor, ...]:
    """The products of column-parallel linears that all read the same rows: [S, O] each.

    Args:
        x_HI: the rows that this rank holds.
        weights_OI: this rank's rows of the weights, all of them trained.
        biases_O: this rank's part of the biases.
        group: the tensor-parallel group.
        scattered: sequence parallelism: the ranks hold different rows, which are gathered; otherwise H is S.
    """
    products: tuple[Tensor, ...] = _ColumnProducts.apply(
        x_HI, group, scattered, len(weights_OI), *weights_OI, *biases_O
    )
    return products
