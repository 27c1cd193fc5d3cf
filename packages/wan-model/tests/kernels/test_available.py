"""Where Triton's kernels cannot be used, one warning names the reason, and torch's operations give the same."""

import sys
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from wan_model import PackLayout, TokenRows
from wan_model.dit import elementwise as ew
from wan_model.dit.rope import rotary_table
from wan_model.kernels import available

ROWS = TokenRows.whole(PackLayout(((1, 2, 3), (1, 1, 2)), padding=1))
WIDTH = 16
CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    available.usable.cache_clear()
    yield
    available.usable.cache_clear()


def operations() -> list[Tensor]:
    """Every operation that has a kernel."""
    rng = torch.Generator().manual_seed(1)
    x, y = (torch.randn(ROWS.stop, WIDTH, generator=rng) for _ in range(2))
    of_sample, other = (torch.randn(2, WIDTH, generator=rng) for _ in range(2))
    table = rotary_table(ROWS, WIDTH, torch.device("cpu"))
    return [
        ew.norm_modulate(x, of_sample, other, ROWS, 1e-6),
        ew.layer_norm(x, of_sample[0], other[0], 1e-6),
        ew.gate_add_(x, y.clone(), of_sample, ROWS),
        ew.rms_norm_(x.clone(), of_sample[0], 1e-6, table),
    ]


@pytest.mark.parametrize("reason", ["no compiler", "no Triton"])
def test_a_fallback_warns_once_with_its_reason(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason == "no compiler":
        pytest.importorskip("triton", reason="Triton is not installed")

        def refuse(device: torch.device) -> None:
            raise RuntimeError("while compiling\n  Failed to find C compiler")

        monkeypatch.setattr("wan_model.kernels.launch.try_out", refuse)
        said = r"cannot be used on cuda:0 \(RuntimeError: Failed to find C compiler\); .* and a C compiler on the PATH"
    else:
        monkeypatch.setitem(sys.modules, "wan_model.kernels.launch", None)
        said = r"cannot be used on cuda:0 \(ModuleNotFoundError: import of wan_model\.kernels\.launch halted"
    wanted = operations()
    # As for tensors on a GPU.
    monkeypatch.setattr(available, "for_tensor", lambda x: available.usable(CUDA))
    with pytest.warns(RuntimeWarning, match=said) as record:
        got = operations()
    assert len(record) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = operations()
    for one in (got, again):
        assert all(torch.equal(a, b) for a, b in zip(one, wanted, strict=True))


def test_kernels_are_for_tensors_on_cuda_in_their_types(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnCuda:
        is_cuda, device = True, CUDA

        def __init__(self, dtype: torch.dtype) -> None:
            self.dtype = dtype

    monkeypatch.setattr(available, "usable", lambda device: device == CUDA)
    choose = getattr(available.for_tensor, "__wrapped__", available.for_tensor)
    assert choose(OnCuda(torch.bfloat16))
    assert not choose(OnCuda(torch.float64))
    assert not choose(torch.zeros(1))
