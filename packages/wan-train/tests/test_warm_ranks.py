"""The tests' own ranks, which are forked from a process that has imported the engine."""

import os

import pytest
import torch
import warm_ranks


def test_no_rank_is_forked_from_a_process_that_uses_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("it was forked"))
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        with pytest.raises(RuntimeError, match=r"^CUDA is initialised in this process"):
            warm_ranks._fork({}, 0, 0, None)  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match=r"which must not use CUDA: run these tests without -m gpu"):
        warm_ranks._import_engine()
