"""Attention over packs: against plain softmax, which kernel is taken, and memory that grows with the tokens only."""

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from wan_model import PackLayout, TorchOps, WanConfig, WanDiT
from wan_model.dit import attention
from wan_model.dit.attention import packed_attention, resolve_kind
from wan_model.testing import assert_rounds_to

Q, K = (0, 7, 8, 8, 20), (0, 3, 9, 12, 16)


def tensors(rng: torch.Generator, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(rows, 3, 10, generator=rng, dtype=dtype) for rows in (23, 16, 16))
    return q, k, v


@pytest.mark.rounding
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_segment_attends_to_its_own_keys(rng: torch.Generator, dtype: torch.dtype) -> None:
    q, k, v = tensors(rng, dtype)
    out = packed_attention(q, k, v, Q, K)

    def plain() -> dict[str, Tensor]:
        found = {}
        for i in range(4):
            mine, keys = slice(Q[i], Q[i + 1]), slice(K[i], K[i + 1])
            scores = torch.einsum("qhe,khe->hqk", q[mine].double(), k[keys].double()) / 10**0.5
            found[f"segment {i}"] = torch.einsum("hqk,khe->qhe", scores.softmax(-1), v[keys].double())
        return found

    assert_rounds_to({f"segment {i}": out[Q[i] : Q[i + 1]] for i in range(4)}, plain)
    assert not out[20:].any(), "padding comes out as zeros"


def test_nothing_but_padding_still_takes_part_in_the_backward_pass(rng: torch.Generator) -> None:
    leaves = [x.requires_grad_() for x in tensors(rng)]
    out = packed_attention(*leaves, (0, 0), (0, 16))
    assert not out.any()
    assert all(not gradient.any() for gradient in torch.autograd.grad(out.sum(), leaves))


def test_no_queries_at_all_are_no_rows_with_gradients(rng: torch.Generator) -> None:
    q, k, v = (x.requires_grad_() for x in tensors(rng))
    out = packed_attention(q[:0], k, v, (0, 0), (0, 16))
    assert out.shape == (0, 3, 10)
    assert all(not gradient.any() for gradient in torch.autograd.grad(out.sum(), [k, v]))


def test_queries_before_the_first_segment_are_refused(rng: torch.Generator) -> None:
    with pytest.raises(ValueError, match="the first segment of queries starts at row 3; expected 0"):
        packed_attention(*tensors(rng), (3, 10), (0, 16))


class OnCuda:
    """As much of a CUDA tensor as the choice looks at."""

    is_cuda, dtype, device = True, torch.bfloat16, torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("offsets", "chosen"),
    [
        ((0, 32760), "sdpa"), ((0, 1024), "sdpa"), ((0, 30000, 30256), "sdpa"), ((0, 256, 512, 768), "sdpa"),
        ((0, 256, 512, 780), "varlen"),
    ],
    ids=["a video", "an image", "a video and an image", "equal images", "images"],
)  # fmt: skip
def test_auto_takes_one_launch_for_many_short_segments(offsets: tuple[int, ...], chosen: str) -> None:
    choose: Any = resolve_kind
    choose = getattr(choose, "__wrapped__", choose)
    assert choose("auto", OnCuda(), offsets, offsets) == chosen
    assert choose("cudnn", OnCuda(), offsets, offsets) == "cudnn"
    cpu = torch.zeros(1, 1, 1, dtype=torch.bfloat16)
    assert resolve_kind("auto", cpu, offsets, offsets) == "sdpa"


def test_equal_segments_are_one_batch(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    q_offsets, k_offsets = (0, 5, 10, 15, 16, 16, 21), (0, 6, 12, 18, 24, 30, 36)
    q = torch.randn(23, 2, 8, generator=rng)
    k, v = (torch.randn(36, 2, 8, generator=rng) for _ in range(2))
    sizes = []

    def record(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sizes.append((q.shape[0], q.shape[2], k.shape[2]))
        return scaled_dot_product_attention(q, k, v)

    scaled_dot_product_attention = attention.F.scaled_dot_product_attention
    with monkeypatch.context() as patch:
        patch.setattr(attention.F, "scaled_dot_product_attention", record)
        out = packed_attention(q, k, v, q_offsets, k_offsets)
    assert sizes == [(3, 5, 6), (1, 1, 6), (1, 5, 6)]
    pairs = zip(itertools.pairwise(q_offsets), itertools.pairwise(k_offsets), strict=True)
    for (start, stop), (first, last) in pairs:
        if start == stop:
            continue
        alone = packed_attention(q[start:stop], k[first:last], v[first:last], (0, stop - start), (0, last - first))
        assert torch.equal(out[start:stop], alone), "a sample does not depend on the others of its batch"


@pytest.mark.parametrize("kind", ["cudnn", "flash", "varlen"])
def test_kernels_that_cannot_run_here_say_so(kind: Any, rng: torch.Generator) -> None:
    with pytest.raises(ValueError, match=rf"attention {kind} needs CUDA and bfloat16.*float64 on cpu: choose sdpa"):
        packed_attention(*tensors(rng), Q, K, kind)


def test_unknown_attention_is_refused() -> None:
    make: Any = getattr(TorchOps.__init__, "__wrapped__", TorchOps.__init__)
    with pytest.raises(ValueError, match="attention is 'fast'; expected one of auto, sdpa, cudnn, flash, varlen"):
        make(TorchOps(), "fast")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What is asked of torch's choice of kernels."""
    calls = []

    @contextlib.contextmanager
    def record(*args: Any, **kwargs: Any) -> Iterator[None]:
        calls.append((*args, *kwargs.values()))
        yield

    monkeypatch.setattr(attention, "sdpa_kernel", record)
    monkeypatch.setattr(attention, "resolve_kind", lambda kind, *_: kind)
    return calls


# Two segments of 128, and one of a length at which cuDNN's backward pass can return NaN.
LENGTHS = (0, 128, 256, 448)


@pytest.mark.parametrize(
    ("kind", "kernels"),
    [
        ("cudnn", [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]),
        ("flash", [SDPBackend.FLASH_ATTENTION, SDPBackend.FLASH_ATTENTION]),
    ],
)
def test_one_kernel_alone_is_asked_of_torch(
    kind: Any, kernels: list[SDPBackend], rng: torch.Generator, asked: list[tuple[Any, ...]]
) -> None:
    q, k, v = (torch.randn(448, 1, 8, generator=rng) for _ in range(3))
    packed_attention(q, k, v, LENGTHS, LENGTHS, kind)
    assert asked == [(kernel,) for kernel in kernels]


@pytest.mark.parametrize(
    ("capability", "prefers"), [((8, 0), False), ((9, 0), True), ((10, 0), False), ((12, 0), False)]
)
def test_cudnn_is_preferred_where_it_was_measured_but_not_where_it_can_give_nan(
    capability: tuple[int, int], prefers: bool, asked: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device("cuda", capability[0])  # one for each, because the answer is kept
    monkeypatch.setattr(torch.cuda, "get_device_capability", {device: capability}.get)
    for lengths in ((32760, 32760), (1560, 512), (704, 704), (1, 512), (2048, 192)):
        with attention._kernels("sdpa", device, attention.Batch(1, *lengths)):
            pass
    others = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    first = ([SDPBackend.CUDNN_ATTENTION, *others], True)
    assert asked == [*([first] * 2 if prefers else []), *[(others,)] * 3]


def test_variable_lengths_are_told_to_the_kernel_not_read_back(
    rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.nn.attention import varlen

    q, k, v = tensors(rng)
    calls = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> Tensor:
        calls.append((cu_q.tolist(), cu_k.tolist(), cu_q.dtype, max_q, max_k))
        return packed_attention(q, k, v, Q, K, "sdpa")

    resolve = attention.resolve_kind
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    monkeypatch.setattr(
        attention, "resolve_kind", lambda kind, *args: kind if kind == "varlen" else resolve(kind, *args)
    )
    got = packed_attention(q, k, v, Q, K, "varlen")
    assert calls == [(list(Q), list(K), torch.int32, 12, 6)]
    assert torch.equal(got, packed_attention(q, k, v, Q, K))


def peak_bytes(model: WanDiT, layout: PackLayout) -> int:
    """The most memory that a forward and backward pass holds at once, as torch's allocator counts it."""
    tokens = torch.ones(layout.total, model.config.token_in)
    text = torch.ones(layout.num_samples, 8, model.config.text_dim)
    model.zero_grad()
    # torch 2.11 warns if the events may be those of one cycle only.
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        model(tokens, torch.full((layout.num_samples,), 5.0), text, layout).sum().backward()
    held = peak = 0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def test_memory_is_linear_in_the_tokens() -> None:
    model = WanDiT(
        WanConfig(num_heads=1, head_dim=16, num_layers=1, ffn_dim=32, text_dim=8, text_length=8, freq_dim=16)
    )
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 0.01)
    few, many = (peak_bytes(model, PackLayout(((1, side, 64),))) for side in (32, 128))
    assert few > 32 * 64 * 16 * 4, "the profiler saw the allocations"
    assert many < 4.4 * few
    # One mask, or one head's scores, of 8,192 x 8,192.
    assert many < 8192 * 8192
