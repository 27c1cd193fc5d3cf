"""Which versions of Triton and NumPy interpret kernels."""

import importlib.metadata

import pytest

from wan_model.testing.interpreter import interpreter_problem


@pytest.mark.parametrize(
    ("triton", "numpy", "fails"), [("3.6.0", "2.4.6", True), ("3.6.0", "2.3.5", False), ("3.7.1", "2.5.5", False)]
)
def test_an_interpreter_that_runs_nothing_is_known(
    triton: str, numpy: str, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As kernels ran with torch 2.11 to 2.14 and these versions of NumPy."""
    monkeypatch.setattr(importlib.metadata, "version", {"triton": triton, "numpy": numpy}.__getitem__)
    assert interpreter_problem() == (
        f"Triton before 3.7 interprets nothing with NumPy {numpy}; it needs 2.3" if fails else None
    )
