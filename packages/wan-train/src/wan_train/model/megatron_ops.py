"""``wan_model.Ops`` on Megatron-Core: tensor, sequence and context parallelism for ``wan_model.WanDiT``.

Import only after ``wan_train.engine.start``.

Context parallelism splits a pack's tokens first (``wan_model.dit.context_parallel``). With sequence parallelism a rank
holds its part of these outside the tensor-parallel regions; ``project_tokens`` all-gathers them once for all linears
that read them, and its backward pass reduce-scatters once, while the gradients of trained weights are computed
(``wan_train.model.column_products``).
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn
from torch.nn import functional as F

from wan_model import ContextParallel, PackLayout, TokenRows
from wan_model.dit.attention import AttentionKind
from wan_model.dit.elementwise import rotate
from wan_model.dit.lora import AdaptableLinear, LoraMatrix
from wan_model.dit.ops import RMSNorm, TorchOps
from wan_model.dit.recompute import products_are_saved
from wan_model.kernels import available
from wan_train.model.column_products import column_products


def _no_init(weight: Tensor) -> None:
    """``wan_model.init_weights`` initialises the weights by key, independent of the layout."""


def _summed_over_ranks(matrix: Tensor) -> Tensor:
    """The matrix, whose gradient is summed over the tensor-parallel ranks."""
    same: Tensor = copy_to_tensor_model_parallel_region(matrix)
    return same


def _mark_split(parameter: nn.Parameter, axis: int) -> None:
    # Megatron sets these attributes only when it initialises the weights itself.
    split: Any = parameter
    split.tensor_model_parallel, split.partition_dim, split.partition_stride = True, axis, 1


class _ColumnLinear(AdaptableLinear, ColumnParallelLinear):
    """Output split over ranks; the input is already gathered.

    Of an adapter B is split as the weight is, and A is whole on every rank.
    """

    config: Any
    weight: nn.Parameter
    bias: nn.Parameter

    @property
    def is_plainly_trained(self) -> bool:
        """Whether its gradients are products with its weight and its input, and nothing else."""
        return self.is_plain and self.weight.requires_grad and not self.config.gradient_accumulation_fusion

    def whole_gradient(self, matrix: Tensor, *, is_up: bool) -> Tensor:
        """A gets from each rank what flows through its part of B."""
        return matrix if is_up else _summed_over_ranks(matrix)

    def forward(self, x: Tensor, *, parameters_only: bool = False) -> Any:
        """[S, in] -> [S, out / ranks], or only the weight and the bias, after what Megatron hooks on a call.

        One of these hooks waits until the weights of a step have been gathered (``ddp.overlap_param_gather``).
        """
        if parameters_only:
            return self.weight, self.bias
        # There is no communication here, and torch fuses the bias. A frozen weight has no gradient to accumulate.
        if not (self.is_plain and self.config.gradient_accumulation_fusion):
            return self.with_adapter(self.product(x, self.bias), x)
        out: Tensor = super().forward(x)[0]
        return out


class _RowLinear(AdaptableLinear, RowParallelLinear):
    """Input split over ranks; output reduced, or reduce-scattered over the sequence with sequence parallelism.

    Of an adapter A is split as the weight is, and B is whole on every rank: what it adds is summed with the product.
    """

    config: Any
    weight: nn.Parameter
    bias: nn.Parameter

    def whole_gradient(self, matrix: Tensor, *, is_up: bool) -> Tensor:
        """B gets from each rank what its part of A has made."""
        return _summed_over_ranks(matrix) if is_up else matrix

    def over_columns(self, largest_O1: Tensor) -> Tensor:
        """Those of all ranks, so that a weight in fp8 is the same however it is split."""
        group = parallel_state.get_tensor_model_parallel_group()
        torch.distributed.all_reduce(largest_O1, op=torch.distributed.ReduceOp.MAX, group=group)
        return largest_O1

    def forward(self, x: Tensor) -> Tensor:
        """[S, in / ranks] -> this rank's rows [S, out]."""
        alone = self.input_size_per_partition == self.input_size
        if alone and not (self.is_plain and self.config.gradient_accumulation_fusion):
            return self.with_adapter(self.product(x, self.bias), x)
        if not self.is_plain:
            # Not the product that may be saved: the all-reduce overwrites its argument.
            partial = self.with_adapter(self.product(x, None), x)
            if self.config.sequence_parallel:
                whole: Tensor = reduce_scatter_to_sequence_parallel_region(partial)
            else:
                whole = reduce_from_tensor_model_parallel_region(partial)
            return whole + self.bias
        if products_are_saved() and not self.config.sequence_parallel:
            # Megatron's all-reduce overwrites the product, which would be reduced again when the block is recomputed.
            reduced: Tensor = reduce_from_tensor_model_parallel_region(F.linear(x, self.weight).clone())
            return reduced + self.bias
        out: Tensor = super().forward(x)[0]
        return out


class _SplitRMSNorm(RMSNorm):
    """RMS norm across heads that are split over ranks: the squares are all-reduced in fp32."""

    def __init__(self, width: int, eps: float, ranks: int, group: torch.distributed.ProcessGroup) -> None:
        super().__init__(width // ranks, eps)
        self.full_width, self._group = width, group
        _mark_split(self.weight, 0)

    def _add_over_ranks(self, values: Tensor) -> None:
        torch.distributed.all_reduce(values, group=self._group)

    def forward(self, x_SD: Tensor, table_S1P: Tensor | None = None) -> Tensor:
        """Normalise this rank's part of the width, then apply RoPE if a table is given."""
        if available.for_tensor(x_SD):
            from wan_model.kernels.split_rms_norm import split_rms_norm_rotate

            table = None if table_S1P is None else torch.view_as_real(table_S1P)
            return split_rms_norm_rotate(x_SD, self.weight, self.eps, table, self.full_width, self._add_over_ranks)
        wide = x_SD.float()
        squares = wide.square().sum(dim=-1, keepdim=True)
        # Every rank's output depends on the sum, so its gradient is all-reduced as well.
        total = copy_to_tensor_model_parallel_region(reduce_from_tensor_model_parallel_region(squares))
        normed = (wide * torch.rsqrt(total / self.full_width + self.eps) * self.weight.float()).to(x_SD.dtype)
        return normed if table_S1P is None else rotate(normed, table_S1P)


class MegatronOps(TorchOps):
    """Megatron-Core's linears on the current tensor-parallel group.

    Args:
        config: Megatron's ``TransformerConfig`` of the run.
        attention: see ``wan_model.dit.attention``.

    Raises:
        ValueError: heads that the tensor-parallel size does not divide.
    """

    def __init__(self, config: Any, attention: AttentionKind = "auto") -> None:
        shared = parallel_state.get_context_parallel_world_size() > 1
        super().__init__(attention, ContextParallel(parallel_state.get_context_parallel_group()) if shared else None)
        self.group = parallel_state.get_tensor_model_parallel_group()
        self.ranks: int = parallel_state.get_tensor_model_parallel_world_size()
        self.rank: int = parallel_state.get_tensor_model_parallel_rank()
        self.sequence_parallel: bool = config.sequence_parallel and self.ranks > 1
        self._row_config = copy.copy(config)
        self._row_config.sequence_parallel = self.sequence_parallel
        # ``project_tokens`` gathers, so a column-parallel linear must not gather again.
        self._column_config = copy.copy(config)
        self._column_config.sequence_parallel = False

    def column_linear(self, width_in: int, width_out: int) -> nn.Module:
        """Megatron's ``ColumnParallelLinear``."""
        linear = _ColumnLinear(
            width_in, width_out, config=self._column_config, init_method=_no_init, bias=True, gather_output=False,
            disable_grad_reduce=True,
        )  # fmt: skip
        _mark_split(linear.weight, 0)
        _mark_split(linear.bias, 0)
        return linear

    def row_linear(self, width_in: int, width_out: int) -> nn.Module:
        """Megatron's ``RowParallelLinear``."""
        linear = _RowLinear(
            width_in, width_out, config=self._row_config, init_method=_no_init, bias=True, input_is_parallel=True,
            skip_bias_add=False,
        )  # fmt: skip
        _mark_split(linear.weight, 1)
        return linear

    def add_adapter(self, linear: nn.Module, rank: int) -> None:
        """B of a column-parallel linear and A of a row-parallel one are split as its weight is."""
        assert isinstance(linear, _ColumnLinear | _RowLinear)
        rows, columns = linear.weight.shape  # of this rank
        with torch.device(linear.weight.device):
            linear.lora_A, linear.lora_B = LoraMatrix(rank, columns), LoraMatrix(rows, rank)
        if isinstance(linear, _ColumnLinear):
            _mark_split(linear.lora_B.weight, 0)
        else:
            _mark_split(linear.lora_A.weight, 1)

    def input_columns(self, linear: nn.Module) -> tuple[int, int, int]:
        """A row-parallel linear's input is split."""
        assert isinstance(linear, _ColumnLinear | _RowLinear)
        columns = linear.weight.shape[1]
        if isinstance(linear, _RowLinear):
            return self.rank * columns, (self.rank + 1) * columns, self.ranks * columns
        return 0, columns, columns

    def norm_across_heads(self, width: int, eps: float) -> nn.Module:
        """RMS norm whose mean spans all ranks."""
        return _SplitRMSNorm(width, eps, self.ranks, self.group) if self.ranks > 1 else RMSNorm(width, eps)

    def local_heads(self, heads: int) -> int:
        """This rank's share."""
        if heads % self.ranks:
            raise ValueError(f"{heads} attention heads cannot be split over tensor-parallel size {self.ranks}")
        return heads // self.ranks

    def shard_tokens(self, x_SD: Tensor) -> Tensor:
        """This rank's share of the context and, with sequence parallelism, of the sequence."""
        rows = super().shard_tokens(x_SD)
        return scatter_to_sequence_parallel_region(rows) if self.sequence_parallel else rows

    def gather_tokens(self, x_SD: Tensor) -> Tensor:
        """All rows; every rank computes the same loss from them, so the backward takes its own rows of the gradient."""
        if self.sequence_parallel:
            x_SD = gather_from_sequence_parallel_region(x_SD, tensor_parallel_output_grad=False)
        return super().gather_tokens(x_SD)

    def project_tokens(self, x_SD: Tensor, *linears: nn.Module) -> tuple[Tensor, ...]:
        """Linears on all rows of the rank's share of the context; the backward pass sums over tensor-parallel ranks."""
        return self._project(x_SD, linears, scattered=self.sequence_parallel)

    def project_text(self, x_TD: Tensor, *linears: nn.Module) -> tuple[Tensor, ...]:
        """Linears on the rows as they are; the backward pass sums the gradients of all ranks."""
        return self._project(x_TD, linears, scattered=False)

    def _project(self, x_SD: Tensor, linears: Sequence[nn.Module], *, scattered: bool) -> tuple[Tensor, ...]:
        trained = [linear for linear in linears if isinstance(linear, _ColumnLinear) and linear.is_plainly_trained]
        if self.ranks > 1 and torch.is_grad_enabled() and len(trained) == len(linears):
            weights, biases = zip(*(linear(x_SD, parameters_only=True) for linear in trained), strict=True)
            return column_products(x_SD, weights, biases, self.group, scattered=scattered)
        if scattered:
            entered = gather_from_sequence_parallel_region(x_SD)
        else:
            entered = copy_to_tensor_model_parallel_region(x_SD)
        return tuple(linear(entered) for linear in linears)

    def held_rows(self, layout: PackLayout) -> TokenRows:
        """This rank's share of the context and, with sequence parallelism, of the sequence."""
        rows = self.entered_rows(layout)
        return rows.part(self.rank, self.ranks) if self.sequence_parallel else rows

    def on_token_rows(self, module: nn.Module) -> None:
        """Mark parameters whose gradients Megatron must sum over the ranks that share the sequence."""
        for parameter in module.parameters():
            parameter.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]

    def partition(self, parameter: nn.Parameter) -> tuple[int, int, int] | None:
        """The axis along which Megatron has split it, and the tensor-parallel rank and size."""
        if self.ranks > 1 and getattr(parameter, "tensor_model_parallel", False):
            return parameter.partition_dim, self.rank, self.ranks  # type: ignore[attr-defined]
        return None
