"""The operations that are fused kernels on CUDA: how the model calls them, and their formulae.

Shapes: S rows, D width, B samples. The modulation [B, 6, D] is sliced as in a block, so that its strides are the same.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor

from wan_model.dit import elementwise
from wan_model.dit.rope import rotary_table
from wan_model.kernels import available
from wan_model.pack import TokenRows

EPS = 1e-6
Function = Callable[..., Tensor]


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation on the rows of a pack.

    Attributes:
        name: in the report.
        inputs: letters: ``x`` for rows [S, D] in the tested precision, ``w`` for a weight [D] in fp32, ``h`` for one in
            the tested precision, ``m`` for a modulation [B, 6, D] in fp32.
        call: (rows, head width) to the function of the inputs that the model calls.
        formula: (rows, head width) to the same function in plain operations.
    """

    name: str
    inputs: str
    call: Callable[[TokenRows, int], Function]
    formula: Callable[[TokenRows, int], Function]


def sample_of(rows: TokenRows, device: torch.device) -> Tensor:
    """The sample of each row."""
    index = torch.empty(rows.stop - rows.start, dtype=torch.long)
    for sample, start, stop in rows.segments:
        index[start:stop] = sample
    return index.to(device)


def _normed(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt()


def _modulated(rows: TokenRows, head: int) -> Function:
    def formula(x: Tensor, m: Tensor) -> Tensor:
        index = sample_of(rows, x.device)
        return _normed(x) * (1 + m[index, 1]) + m[index, 0]

    return formula


def _gated(rows: TokenRows, head: int) -> Function:
    return lambda x, y, m: x + y * m[sample_of(rows, x.device), 2]


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def rotated(x: Tensor, rows: TokenRows, head: int) -> Tensor:
    """Each pair of values turned by its angle, in fp64."""
    table = rotary_table(rows, head, x.device).to(torch.complex128)
    pairs = torch.view_as_complex(x.reshape(x.shape[0], -1, head // 2, 2))
    return torch.view_as_real(pairs * table).flatten(1)


def _table(rows: TokenRows, head: int, like: Tensor) -> Tensor:
    return rotary_table(rows, head, like.device)


OPERATIONS = (
    Operation(
        "layer norm with modulation", "xm",
        lambda rows, head: lambda x, m: elementwise.norm_modulate(x, m.unbind(1)[0], m.unbind(1)[1], rows, EPS),
        _modulated,
    ),
    Operation(
        "layer norm with weight and bias", "xww",
        lambda rows, head: lambda x, w, b: elementwise.layer_norm(x, w, b, EPS),
        lambda rows, head: lambda x, w, b: _normed(x) * w + b,
    ),
    Operation(
        "gate and addition", "xxm",
        lambda rows, head: lambda x, y, m: elementwise.gate_add_(x, y, m.unbind(1)[2], rows), _gated,
    ),
    Operation(
        "RMS norm", "xh",
        lambda rows, head: lambda x, w: elementwise.rms_norm_(x, w, EPS), lambda rows, head: _rms,
    ),
    Operation(
        "RMS norm with rotation", "xh",
        lambda rows, head: lambda x, w: elementwise.rms_norm_(x, w, EPS, _table(rows, head, x)),
        lambda rows, head: lambda x, w: rotated(_rms(x, w), rows, head),
    ),
)  # fmt: skip


def draw(operation: Operation, rows: TokenRows, width: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """The inputs, and last the gradient of the result."""
    rng = torch.Generator().manual_seed(5)
    count = rows.stop - rows.start
    shapes = {"x": (count, width), "w": (width,), "h": (width,), "m": (rows.layout.num_samples, 6, width)}
    drawn = [torch.randn(shapes[letter], generator=rng) for letter in (*operation.inputs, "x")]
    dtypes = [dtype if letter in "xh" else torch.float32 for letter in (*operation.inputs, "x")]
    return [x.to(device, kind) for x, kind in zip(drawn, dtypes, strict=True)]


@contextlib.contextmanager
def kernels_used(used: bool) -> Iterator[None]:
    """Whether the fused kernels compute in this context; on a CPU they run in Triton's interpreter."""

    # Not a mock that records its calls: it would keep every tensor that it was asked about.
    def answer(tensor: Tensor) -> bool:
        return used

    with mock.patch.object(available, "for_tensor", answer):
        yield
