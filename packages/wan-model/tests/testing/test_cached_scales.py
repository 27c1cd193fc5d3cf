"""Scales that are cached: read for equal results, computed for others, and never cached without being asked."""

from pathlib import Path

import pytest
import torch

from wan_model.testing import cached_scales, rounding_scale
from wan_model.testing.cached_scales import cached

EXACT = {"out": torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)}


class Computing:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> dict[str, torch.Tensor]:
        self.calls += 1
        return {"out": torch.full((3,), float(self.calls))}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(cached_scales.VARIABLE, str(tmp_path / "scales"))
    return tmp_path / "scales"


def test_a_scale_is_computed_once_for_results_that_differ_by_rounding(folder: Path) -> None:
    compute = Computing()
    first = cached("one", EXACT, compute)
    second = cached("one", {"out": EXACT["out"] * (1 + 1e-6)}, compute)
    assert compute.calls == 1
    assert torch.equal(first["out"], second["out"])
    cached("another", EXACT, compute)
    assert compute.calls == 2
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize(
    "exact",
    [
        {"out": EXACT["out"] * 1.001},
        {"out": EXACT["out"][:2]},
        {"other": EXACT["out"]},
        {"out": EXACT["out"] * torch.nan},
    ],
    ids=["values", "shape", "name", "nan"],
)
def test_the_scale_of_other_results_is_not_taken(folder: Path, exact: dict[str, torch.Tensor]) -> None:
    compute = Computing()
    cached("one", EXACT, compute)
    cached("one", exact, compute)
    assert compute.calls == 2


def test_the_calls_of_a_test_have_names_of_their_own(folder: Path) -> None:
    x = torch.rand(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    small, large = rounding_scale(lambda: {"out": x * 1.1}), rounding_scale(lambda: {"out": x * 1100})
    assert len(list(folder.iterdir())) == 2
    assert large["out"].norm() > 500 * small["out"].norm()


def test_nothing_is_cached_without_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(cached_scales.VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    compute = Computing()
    assert [cached("one", EXACT, compute)["out"][0].item() for _ in range(2)] == [1, 2]
    assert list(tmp_path.iterdir()) == []
