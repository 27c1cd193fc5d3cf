"""Low-rank adapters (LoRA): W x + factor * B A dropout(x) in place of W x, for chosen linears of a frozen transformer.

A [r, in] and B [out, r] are kept in fp32 and are the only parameters with gradients; products are computed in the
precision of the input, as those of W are. The factor is alpha / r, or alpha / sqrt(r) with rank stabilisation. A starts
Kaiming-uniform, B at zero (``wan_model.weights.transformer.initial_tensor``). Parameters are called ``lora_A.weight``
and ``lora_B.weight`` under the linear's key, as in diffusers' files.

Dropout masks are a function of a seed, the linear's name, the row's place in the pack and the column, so they are the
same in every parallel layout and at a recomputation.

Source: Hu et al., "LoRA" (2021), equation 3; Kalajdzievski, "A Rank Stabilization Scaling Factor" (2023); peft's
``LoraLayer``.

Legend: S rows, I input width, O output width, R rank.
"""

import contextlib
import contextvars
import dataclasses
import fnmatch
import hashlib
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wan_model.config import WanConfig
from wan_model.dit.fp8 import fp8_linear
from wan_model.dit.recompute import adapter_region

DOWN, UP = "lora_A", "lora_B"
# The linears of a block, by diffusers' names.
LINEARS = (
    *(f"{attention}.{name}" for attention in ("attn1", "attn2") for name in ("to_q", "to_k", "to_v", "to_out.0")),
    "ffn.net.0.proj",
    "ffn.net.2",
)
_LARGEST_RANK = 1 << 14
# Beyond, a factor in fp32 could be zero or infinite.
_SMALLEST_ALPHA, _LARGEST_ALPHA = 1e-30, 1e30


@dataclasses.dataclass(frozen=True)
class LoraSettings:
    """What is adapted, and how.

    Attributes:
        rank: r of every adapter.
        alpha: of the factor; None for r, so that the factor is 1.
        use_rslora: rank stabilisation: the factor is alpha / sqrt(r).
        dropout: probability that a value of an adapter's input is dropped in training.
        targets: globs for the linears, which match a whole name such as ``blocks.0.attn1.to_q`` or what follows one of
            its dots: ``to_q``, ``attn1.*``, ``blocks.1?.ffn.*``.

    Raises:
        ValueError: a value that no adapter can have.
    """

    rank: int
    alpha: float | None = None
    use_rslora: bool = False
    dropout: float = 0.0
    targets: tuple[str, ...] = ("*",)

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= _LARGEST_RANK:
            raise ValueError(f"the rank of the LoRA is {self.rank}; expected a whole number from 1 to {_LARGEST_RANK}")
        if self.alpha is not None and not _SMALLEST_ALPHA <= self.alpha <= _LARGEST_ALPHA:
            raise ValueError(
                f"the alpha of the LoRA is {self.alpha}; expected a number above 0, from {_SMALLEST_ALPHA:g} to "
                f"{_LARGEST_ALPHA:g}, or none for the rank"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"the dropout of the LoRA is {self.dropout}; expected 0 or more and below 1")
        if not self.targets:
            raise ValueError(
                "the LoRA has no targets; expected at least one name, for example attn1.to_q, or * for all"
            )

    @property
    def factor(self) -> float:
        """Of B A."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def linears(self, config: WanConfig) -> list[str]:
        """Names of the adapted linears of a whole model, in its order.

        Raises:
            ValueError: a target that matches no linear.
        """
        every = [f"blocks.{layer}.{name}" for layer in range(config.num_layers) for name in LINEARS]
        chosen: set[str] = set()
        for target in self.targets:
            matched = {name for name in every if _matches(name, target)}
            if not matched:
                raise ValueError(
                    f"the LoRA's target {target!r} is no linear of the model's {config.num_layers} blocks; expected "
                    f"names such as {', '.join(LINEARS)}, or globs such as attn1.* and blocks.0.*"
                )
            chosen |= matched
        return [name for name in every if name in chosen]


def _matches(name: str, pattern: str) -> bool:
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[start:]), pattern) for start in range(len(parts)))


def is_adapter_key(key: str) -> bool:
    """Whether a parameter's key is that of an adapter."""
    return key.endswith((f".{DOWN}.weight", f".{UP}.weight"))


def adapted_names(keys: Iterable[str]) -> list[str]:
    """The linears whose adapters are among keys, in their order."""
    return [key.removesuffix(f".{DOWN}.weight") for key in keys if key.endswith(f".{DOWN}.weight")]


def adapter_shapes(config: WanConfig, settings: LoraSettings) -> dict[str, tuple[int, int]]:
    """Key and shape of every adapter's tensor of the whole model."""
    width, ffn = config.hidden_size, config.ffn_dim
    shapes = {}
    for name in settings.linears(config):
        wide_out, wide_in = name.endswith("ffn.net.0.proj"), name.endswith("ffn.net.2")
        shapes[f"{name}.{DOWN}.weight"] = (settings.rank, ffn if wide_in else width)
        shapes[f"{name}.{UP}.weight"] = (ffn if wide_out else width, settings.rank)
    return shapes


class LoraMatrix(nn.Module):
    """A or B, fp32; uninitialised."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns, dtype=torch.float32))

    def forward(self) -> Tensor:
        """The weight, after what a runtime hooks on a call: Megatron waits there until the weights are gathered."""
        return self.weight


@dataclasses.dataclass
class Adapter:
    """How a linear uses its A and B.

    Attributes:
        name: of the linear.
        factor: of B A; one for each row of A where several adapters are joined, [R].
        dropout: see ``LoraSettings``.
        columns: (first, end, all) of the columns of its input that this rank has.
    """

    name: str
    factor: float | Tensor
    dropout: float
    columns: tuple[int, int, int]


class AdaptableLinear(nn.Module):
    """Part of every linear of a runtime (``Ops``): it may have an adapter, ``lora_A`` and ``lora_B``.

    Its frozen weight may be in fp8, with a scale for each row (``wan_model.dit.fp8``).
    """

    lora: Adapter | None = None
    weight: Tensor
    weight_scale: Tensor | None = None
    lora_A: LoraMatrix
    lora_B: LoraMatrix

    def whole_gradient(self, matrix: Tensor, *, is_up: bool) -> Tensor:
        """A or B as it enters the product; a runtime that splits the linear sums its gradient over the ranks here."""
        del is_up
        return matrix

    @property
    def is_plain(self) -> bool:
        """Whether it is nothing but a weight and a bias in the model's precision."""
        return self.lora is None and self.weight_scale is None

    def over_columns(self, largest_O1: Tensor) -> Tensor:
        """The largest values of the rows, where this rank has some of the columns only."""
        return largest_O1

    def product(self, x_SI: Tensor, bias_O: Tensor | None) -> Tensor:
        """W x + b."""
        if self.weight_scale is None:
            return F.linear(x_SI, self.weight, bias_O)
        return fp8_linear(x_SI, self.weight, self.weight_scale, bias_O)

    def with_adapter(self, product_SO: Tensor, x_SI: Tensor) -> Tensor:
        """Add factor * B A x to W x, or to this rank's part of it. Without gradients W x is overwritten."""
        if self.lora is None:
            return product_SO
        factor = self.lora.factor
        with adapter_region():
            down_RI = self.whole_gradient(self.lora_A(), is_up=False).to(x_SI.dtype)
            up_OR = self.whole_gradient(self.lora_B(), is_up=True).to(x_SI.dtype)
            low_SR = F.linear(_drop(x_SI, self.lora), down_RI)
            if isinstance(factor, Tensor):
                # A product in 16 bits has factors in fp32.
                low_SR, factor = (low_SR * factor).to(low_SR.dtype), 1.0
            if torch.is_grad_enabled():
                return torch.addmm(product_SO, low_SR, up_OR.t(), alpha=factor)
            # W x is needed no more; a copy of it would take as long as the adapter's products of a narrow model.
            return product_SO.addmm_(low_SR, up_OR.t(), alpha=factor)


# -- dropout ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class DropoutRows:
    """The rows that linears are applied to in a region, for their dropout masks.

    Attributes:
        seed: of the pack's masks.
        start, stop: the rows of the input.
        total: rows of the whole pack.
    """

    seed: int
    start: int
    stop: int
    total: int


_rows: contextvars.ContextVar[DropoutRows | None] = contextvars.ContextVar("dropout_rows", default=None)


@contextlib.contextmanager
def dropout_over(rows: DropoutRows | None) -> Iterator[None]:
    """In this context adapters drop values of these rows; with None nothing is dropped."""
    token = _rows.set(rows)
    try:
        yield
    finally:
        _rows.reset(token)


def _drop(x_SI: Tensor, lora: Adapter) -> Tensor:
    rows = _rows.get()
    if rows is None or lora.dropout == 0:
        return x_SI
    assert x_SI.shape[0] == rows.stop - rows.start, "the rows are those of the region"
    keep = dropout_mask(lora, rows, x_SI.device)
    return x_SI * keep * (1 / (1 - lora.dropout))


def dropout_mask(lora: Adapter, rows: DropoutRows, device: torch.device) -> Tensor:
    """Which values of an adapter's input are kept: [S, I] of this rank's part, bool.

    The mask of the whole pack is drawn, in every layout, and the part is cut out of it.
    """
    digest = hashlib.sha256(f"{rows.seed}/{lora.name}".encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    first, end, width = lora.columns
    whole = torch.empty(rows.total, width, dtype=torch.bool, device=device)
    return whole.bernoulli_(1 - lora.dropout, generator=generator)[rows.start : rows.stop, first:end]


# -- merging ----------------------------------------------------------------------------------------------------------


def weight_change(down_RI: Tensor, up_OR: Tensor, factor: float | Tensor) -> Tensor:
    """factor * B A, fp32: what an adapter adds to its linear's weight."""
    return (up_OR.float() * factor) @ down_RI.float()


@torch.no_grad()
def merged_weight(weight: Tensor, change: Tensor) -> Tensor:
    """W + change, summed in fp32 and rounded once to the weight's precision."""
    return (weight.float() + change.to(weight.device)).to(weight.dtype)
