"""The NaN guard on every kind of norm; that it stops a whole run is in test_metrics.py."""

from typing import Any

import pytest


@pytest.mark.parametrize("name", ["clip_grad_norm", "get_grad_norm"])
def test_only_a_finite_norm_passes(probed: dict[str, Any], name: str) -> None:
    assert probed["nan guard"][name] == ["nan at step 7", "inf at step 7", "-inf at step 7", 3.5, None]
