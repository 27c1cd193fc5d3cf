"""Every attention that there is, with gradients, against fp64: alone, packed, and to texts."""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu.context import Context
from gpu.exact_attention import RESULTS, Exact, compare_with_exact, exact_attention
from gpu.rows import Failed, Found, NotRun, Row, Value
from wan_model.dit.attention import cudnn_may_give_nan, packed_attention

Attend = Callable[[Tensor, Tensor, Tensor, tuple[int, ...], tuple[int, ...]], Tensor]

# By the size of a value in bytes, in units of ``gpu.exact_attention``'s deviation: for a whole result and for the worst
# row of a head. Errors of 16 bits have 0.5 to 1.5 of it. Scores of -120 in fp32 are sums whose order matters more.
_LIMITS = {2: (2.0, 8.0), 4: (8.0, 32.0)}
# Scores of about this, so that the logarithm of a row's sum is below that of the smallest fp32: at lengths of 64 modulo
# 128, cuDNN's backward pass has returned NaN for these on Hopper (pytorch issue 196678).
_NEGATIVE_SCORE = -120.0
# The scores of more queries are too many for the backend that keeps them all.
_MOST_WITH_ALL_SCORES = 8192


@dataclasses.dataclass(frozen=True)
class Case:
    """Inputs of attention.

    Attributes:
        name: in the report.
        lengths: of the samples.
        texts: of their texts, or empty for self-attention.
        dtype: of the inputs.
        padding: rows after the last sample.
        negative: all scores are strongly negative.
    """

    name: str
    lengths: tuple[int, ...]
    texts: tuple[int, ...] = ()
    dtype: torch.dtype = torch.bfloat16
    padding: int = 0
    negative: bool = False

    @property
    def offsets(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of queries and keys."""
        q = tuple(itertools.accumulate(self.lengths, initial=0))
        return q, tuple(itertools.accumulate(self.texts, initial=0)) if self.texts else q

    def inputs(self, heads: int, width: int, device: str) -> list[Tensor]:
        """Queries, keys, values and the gradient of the result."""
        rng = torch.Generator().manual_seed(3)
        queries, keys = (offsets[-1] for offsets in self.offsets)
        if not self.texts:
            keys += self.padding
        q, grad = (torch.randn(queries + self.padding, heads, width, generator=rng) for _ in range(2))
        k, v = (torch.randn(keys, heads, width, generator=rng) for _ in range(2))
        if self.negative:
            direction = F.normalize(torch.randn(width, generator=rng), dim=0)
            direction *= (-_NEGATIVE_SCORE * width**0.5) ** 0.5
            q, k = 0.3 * q + direction, 0.3 * k - direction
        return [x.to(device, self.dtype) for x in (q, k, v, grad)]


def _one_backend(backend: SDPBackend) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor, q_offsets: tuple[int, ...], k_offsets: tuple[int, ...]) -> Tensor:
        if backend is SDPBackend.MATH and max(q_offsets[-1], k_offsets[-1]) > _MOST_WITH_ALL_SCORES:
            raise NotRun("it keeps all scores, which would take tens of gigabytes")
        parts: list[Tensor] = []
        padding = q.shape[0] - q_offsets[-1]
        pairs = zip(itertools.pairwise(q_offsets), itertools.pairwise(k_offsets), strict=True)
        with sdpa_kernel(backend):
            for (a, b), (c, d) in pairs:
                one = (x[None].transpose(1, 2) for x in (q[a:b], k[c:d], v[c:d]))
                parts.append(F.scaled_dot_product_attention(*one).transpose(1, 2).squeeze(0))  # type: ignore[arg-type]
        return torch.cat([*parts, q.new_zeros(padding, *q.shape[1:])])

    return attend


def _kind(name: str) -> Attend:
    return lambda q, k, v, q_offsets, k_offsets: packed_attention(q, k, v, q_offsets, k_offsets, name)  # type: ignore[arg-type]


def _transformer_engine(
    q: Tensor, k: Tensor, v: Tensor, q_offsets: tuple[int, ...], k_offsets: tuple[int, ...]
) -> Tensor:
    """As wan-train calls it, without Megatron."""
    from transformer_engine.pytorch import DotProductAttention

    heads, width = q.shape[1:]
    kind = "self" if q_offsets == k_offsets else "cross"
    module = DotProductAttention(
        heads, width, attention_dropout=0.0, qkv_format="thd", attn_mask_type="padding", attention_type=kind
    )
    starts = [torch.tensor(offsets, dtype=torch.int32, device=q.device) for offsets in (q_offsets, k_offsets)]
    longest = [max(b - a for a, b in itertools.pairwise(offsets)) for offsets in (q_offsets, k_offsets)]
    out: Tensor = module(
        q[: q_offsets[-1]].contiguous(), k[: k_offsets[-1]].contiguous(), v[: k_offsets[-1]].contiguous(),
        cu_seqlens_q=starts[0], cu_seqlens_kv=starts[1], max_seqlen_q=longest[0], max_seqlen_kv=longest[1],
    )  # fmt: skip
    return torch.cat([out.view(-1, heads, width), q.new_zeros(q.shape[0] - q_offsets[-1], heads, width)])


IMPLEMENTATIONS: dict[str, Attend] = {
    **{name: _kind(name) for name in ("auto", "sdpa", "cudnn", "flash", "varlen")},
    "torch's efficient": _one_backend(SDPBackend.EFFICIENT_ATTENTION),
    "torch's math": _one_backend(SDPBackend.MATH),
    "transformer engine": _transformer_engine,
}
_ON_CPU = ("auto", "sdpa", "torch's math")


def cases(on_gpu: bool) -> list[Case]:
    """The shortest first, because a kernel that is wrong is so at these too."""
    fp32, fp16 = torch.float32, torch.float16
    if not on_gpu:
        return [
            *(Case(f"length {n}", (n,)) for n in (1, 63, 64)),
            Case("a pack", (40, 1, 7), padding=3),
            Case("to texts", (40, 1, 7), (6, 6, 6), padding=3),
            Case("length 64, negative scores", (64,), negative=True),
            Case("a pack in fp32", (40, 1, 7), dtype=fp32),
        ]
    texts = (512,) * 4
    return [
        *(Case(f"length {n}", (n,)) for n in (1, 63, 64, 192, 320, 704, 1560, 4096)),
        *(Case(f"length {n}, negative scores", (n,), negative=True) for n in (1, 64, 192, 704)),
        Case("a pack", (704, 1, 63, 192), padding=7),
        Case("a pack of equal images", (1560,) * 9),
        Case("to texts", (704, 1, 63, 192), texts, padding=7),
        Case("to texts, negative scores", (704, 1, 63, 192), texts, negative=True),
        Case("to short texts", (704, 1, 63, 192), (64, 1, 77, 192)),
        *(Case(f"length {n} in fp16", (n,), dtype=fp16) for n in (704, 1560)),
        Case("a pack in fp16", (704, 1, 63, 192), dtype=fp16),
        *(Case(f"length {n} in fp32", (n,), dtype=fp32) for n in (63, 704)),
        Case("a pack in fp32", (704, 1, 63, 192), dtype=fp32),
        Case("to texts in fp32", (704, 1, 63, 192), texts, dtype=fp32),
        Case("length 32,760", (32_760,)),
    ]


def run(attend: Attend, inputs: list[Tensor], case: Case) -> dict[str, Tensor]:
    """The result and its gradients."""
    q, k, v = (x.clone().requires_grad_() for x in inputs[:3])
    out = attend(q, k, v, *case.offsets)
    return dict(zip(RESULTS, [out.detach(), *torch.autograd.grad(out, (q, k, v), inputs[3])], strict=True))


@contextlib.contextmanager
def _without_kernel() -> Iterator[None]:
    """A kernel that torch was built without, or that does not take these inputs, is no failure of ours."""
    try:
        yield
    except RuntimeError as error:
        if "No available kernel" not in str(error):
            raise
        raise NotRun("torch has no such kernel for these inputs") from error


def _allowed_to_lack(name: str) -> bool:
    # What the model uses by default must always work.
    return name not in ("auto", "sdpa")


def compare(name: str, attend: Attend, case: Case, inputs: list[Tensor], exact: Exact) -> Found:
    """A row: forward and backward of an implementation beside fp64.

    Raises:
        Failed: it is further off than rounding.
        NotRun: there is no such kernel.
    """
    with _without_kernel() if _allowed_to_lack(name) else contextlib.nullcontext():
        results = run(attend, inputs, case)
    numbers = compare_with_exact(results, exact, *_LIMITS[case.dtype.itemsize])
    return Found("equal to fp64 within rounding", numbers)


def _determinism(name: str, attend: Attend, case: Case, inputs: list[Tensor]) -> Found:
    with _without_kernel():
        first, second = run(attend, inputs, case), run(attend, inputs, case)
    same = {key: torch.equal(first[key], second[key]) for key in RESULTS}
    # cuDNN's and flash attention's backward passes add partial sums in no fixed order, unless told otherwise.
    what = "equal to the bit" if all(same.values()) else "not equal to the bit, so neither is a resumed run"
    return Found(f"two runs are {what}", {f"{key} equal": value for key, value in same.items()})


# Queries and keys around the edges of cuDNN's tiles, and lengths that occur.
_QUERIES, _KEYS = (1, 2, 63, 64, 192), (2, 63, 64, 65, 128, 192, 512)
_LONG = ((1560, 1560), (1560, 512), (4160, 4160), (32_760, 512), (704, 1560))


def _not_finite(queries: int, keys: int, device: str) -> bool | None:
    """Whether a gradient of cuDNN's attention is not finite where all scores are strongly negative.

    None where it has no kernel.
    """
    q, k, v, grad = Case("", (queries,), (keys,), negative=True).inputs(2, 128, device)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    try:
        out = _one_backend(SDPBackend.CUDNN_ATTENTION)(q, k, v, (0, queries), (0, keys))
    except RuntimeError as error:
        if "No available kernel" not in str(error):
            raise
        return None
    return not all(bool(x.isfinite().all()) for x in torch.autograd.grad(out, leaves, grad))


def cudnn_lengths(context: Context) -> Found:
    """At which lengths cuDNN's backward pass gives NaN, beside those at which the model does not take it.

    Raises:
        Failed: NaN at lengths at which the model takes it.
    """
    context.need_gpu()
    found = {
        lengths: _not_finite(*lengths, context.device)
        for lengths in (*itertools.product(_QUERIES, _KEYS), *_LONG)
        if context.seconds_left > 2
    }
    nan = [lengths for lengths, bad in found.items() if bad]
    absent = [lengths for lengths, bad in found.items() if bad is None]
    taken = [lengths for lengths in nan if not cudnn_may_give_nan(*lengths)]
    numbers: dict[str, Value] = {
        "pairs": len(found),
        "queries x keys with NaN": " ".join(f"{q}x{k}" for q, k in nan),
        "without kernel": " ".join(f"{q}x{k}" for q, k in absent),
        "avoided without need": sum(bad is False and cudnn_may_give_nan(*it) for it, bad in found.items()),
    }
    if taken:
        raise Failed(f"NaN where the model takes cuDNN: {taken}", numbers)
    return Found("the model takes cuDNN at none of the lengths at which it gives NaN", numbers)


@dataclasses.dataclass
class _Prepared:
    """A case with its inputs and its reference, which are computed in the first row that needs them."""

    case: Case
    device: str

    @functools.cached_property
    def inputs(self) -> list[Tensor]:
        heads, width = (12, 128) if self.device == "cuda" else (2, 32)
        return self.case.inputs(heads, width, self.device)

    @functools.cached_property
    def exact(self) -> Exact:
        return exact_attention(self.inputs, *self.case.offsets)


def _check_needs(context: Context, name: str, case: Case) -> None:
    if name not in _ON_CPU:
        context.need_gpu()
    if name in ("cudnn", "flash", "varlen", "transformer engine") and case.dtype == torch.float32:
        raise NotRun("it takes 16 bits only")


def rows(context: Context) -> Iterator[Row]:
    """Each case with each implementation, then which of them give the same bits twice."""
    yield from context.row("cuDNN by length, negative scores", functools.partial(cudnn_lengths, context), seconds=3)
    for case in cases(context.on_gpu):
        prepared = _Prepared(case, context.device)
        for name, attend in IMPLEMENTATIONS.items():

            def check(name: str = name, attend: Attend = attend, it: _Prepared = prepared) -> Found:
                _check_needs(context, name, it.case)
                return compare(name, attend, it.case, it.inputs, it.exact)

            # The reference of the longest takes some seconds.
            needed = 8.0 if sum(case.lengths) > 10_000 else 1.0
            row = f"{name}, {case.name}"
            yield from context.row(row, check, seconds=needed, memory_may_lack=_allowed_to_lack(name))
    twice = [Case("length 4,096", (4096,)), Case("a pack", (704, 1, 63, 192))] if context.on_gpu else cases(False)[3:4]
    for case in twice:
        prepared = _Prepared(case, context.device)
        for name, attend in IMPLEMENTATIONS.items():

            def check_twice(name: str = name, attend: Attend = attend, it: _Prepared = prepared) -> Found:
                _check_needs(context, name, it.case)
                return _determinism(name, attend, it.case, it.inputs)

            yield from context.row(f"twice: {name}, {case.name}", check_twice)
