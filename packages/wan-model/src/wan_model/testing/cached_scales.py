"""Scales of rounding that are cached in a folder, for runs of the same tests on the kernels of other processors.

A scale is computed in float64, from many runs, and is nearly the same on all processors; it is most of the time of a
test. With WAN_SCALES=FOLDER in the environment it is computed once. The folder is for one state of the code.
"""

import collections
import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from wan_model.system.files import atomic_path

VARIABLE = "WAN_SCALES"
# Of the norm of a result: far above what other kernels change in inputs that are drawn in float32.
_TOLERANCE = 1e-4
_calls: collections.Counter[str] = collections.Counter()


def cached(
    name: str | None, exact: Mapping[str, Tensor], compute: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """What ``compute`` returns, or returned for equal results when the folder got it.

    Args:
        name: of the scale; by default the running test and how many it has asked for before.
        exact: the results that it is the scale of.
        compute: returns tensors with the names and shapes of these.
    """
    folder, test = os.environ.get(VARIABLE), os.environ.get("PYTEST_CURRENT_TEST")
    if name is None and test is not None:
        name = f"{test}, {_calls[test]}"
        _calls[test] += 1
    if not folder or name is None:
        return compute()
    path = Path(folder) / f"{hashlib.sha256(name.encode()).hexdigest()}.pt"
    if path.exists():
        found = torch.load(path, weights_only=True)
        # The first test that uses a fixture computes its scales, which need not be the same test in every run.
        if _equal(found["exact"], exact):
            scale: dict[str, Tensor] = found["scale"]
            return scale
    scale = compute()
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path, unique=True) as partial:
        torch.save({"exact": dict(exact), "scale": scale}, partial)
    return scale


def _equal(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> bool:
    return found.keys() == exact.keys() and all(
        found[name].shape == value.shape and bool((found[name] - value).norm() <= _TOLERANCE * value.norm())
        for name, value in exact.items()
    )
